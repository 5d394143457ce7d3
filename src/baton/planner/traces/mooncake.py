"""Mooncake's traces, JSON lines.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

timestamp: milliseconds from the start, rising, in steps of 3 s in the published ones. hash_ids:
one a block of 512 prompt tokens, equal where the prompts are equal up to the block's end; the last
one may stand for less than a block, and is left out then: a cache keeps full blocks. (Published
hit ratios count it: `with_tails` keeps it.)
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.planner.traces.checks import Place
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "mooncake"
BLOCK_TOKENS = 512


def read(source: Source, *, sort: bool = False, with_tails: bool = False) -> Trace:
    """Read the file.

    Raises:
        ConfigError: it names the line and what to change.
    """

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        for line, row in source.objects():
            place = Place(str(source), line)
            prompt = place.tokens(row.get("input_length"), "input_length", least=1)
            blocks = _blocks(place, row.get("hash_ids", []))
            if not with_tails:
                blocks = blocks[: prompt // BLOCK_TOKENS]
            yield (
                place,
                TraceRequest(
                    arrival_s=place.number(row.get("timestamp"), "timestamp") / 1000,
                    num_prompt_tokens=prompt,
                    num_output_tokens=place.tokens(row.get("output_length"), "output_length"),
                    blocks=blocks,
                    block_size=BLOCK_TOKENS if blocks else 0,
                ),
            )

    return finish(rows(), source=str(source), format=NAME, in_order=not sort)


def _blocks(place: Place, value: object) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(block) is int for block in value):
        return tuple(value)
    raise place.wrong("hash_ids is no list of whole numbers; correct it, or leave hash_ids out")
