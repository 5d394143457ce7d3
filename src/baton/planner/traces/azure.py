"""Azure's LLM inference traces of 2023 and 2024, CSV.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44               2023: UTC, seven decimals
    2024-05-10 00:00:00.009930+00:00,2162,5          2024: with its zone

Rows are in the order of their times. Nothing is known of shared prefixes or conversations.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.planner.traces.checks import Place
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "azure"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read(source: Source, *, sort: bool = False) -> Trace:
    """Read the file.

    Raises:
        ConfigError: it names the line and what to change.
    """

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        for line, row in source.records():
            place = Place(str(source), line)
            arrival_s = place.time(row["TIMESTAMP"], "TIMESTAMP")
            prompt = place.tokens(row["ContextTokens"], "ContextTokens", least=1)
            output = place.tokens(row["GeneratedTokens"], "GeneratedTokens")
            yield place, TraceRequest(arrival_s, prompt, output)

    return finish(rows(), source=str(source), format=NAME, in_order=not sort)
