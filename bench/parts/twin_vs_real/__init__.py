"""The pieces of `bench/twin_vs_real.py`: cells, both sides, judgement, what is kept, report."""
