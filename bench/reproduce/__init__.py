"""Published measurements and results, predicted from published inputs: one script a source.

    python bench/reproduce/llmservingsim.py  [--data data/llmservingsim]   real vLLM runs
    python bench/reproduce/distserve.py      [--data data]                 goodput of split serving
    python bench/reproduce/splitwise.py      [--data data]                 cluster designs
    python bench/reproduce/serving_points.py [--data DIR]                  measured serving points
    python bench/reproduce/mooncake_hits.py  [--data DIR]                  prefix hits by cache size

Each prints what was published, what came out here and how far off that is, and writes JSON. What is
to be predicted is read only after it was predicted, and nothing is fitted to it. Other systems'
policies live here, behind core's protocols; nothing in `src` knows of them.
"""
