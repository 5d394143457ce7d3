"""Baton's own lifecycle events: what the gateway's admin listener gives under `/requests`.

A JSON array of waterfalls, newest first, or one of them a line (see `baton.observe.events`). Each
choice of a request is a request here: to the engine it is one. Those that failed before their
first token are left out. Prompts that begin alike have equal block ids, if one gateway process
served both; where events have none, nothing is known of sharing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from baton.errors import ConfigError
from baton.observe.block_ids import MAX_BLOCKS, numbers
from baton.observe.events import Waterfall
from baton.planner.traces.checks import Place
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "baton-events"
FIELDS = ("request_id", "choice", "num_prompt_tokens", "num_generated_tokens")


def read(source: Source | str, entries: Iterable[tuple[int, object]], unit: str) -> Trace:
    """Read (number, waterfall) pairs; `unit` says what is numbered.

    Raises:
        ConfigError: it names the entry and what to change.
    """
    num_failed = 0
    num_cached = 0
    num_cut = 0
    has_arrivals = True

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        nonlocal num_failed, num_cached, num_cut, has_arrivals
        for number, entry in entries:
            place = Place(str(source), number, unit)
            try:
                event = msgspec.convert(entry, Waterfall)
            except msgspec.ValidationError as error:
                raise place.wrong(f"{error}; take what the gateway's /requests gives") from None
            if event.num_generated_tokens < 1:
                num_failed += 1
                continue
            num_cached += place.tokens(event.num_cached_tokens, "num_cached_tokens")
            has_arrivals = has_arrivals and event.received_unix_s > 0
            request = _request(place, event)
            full = request.num_prompt_tokens // (request.block_size or 1)
            num_cut += len(request.blocks) == MAX_BLOCKS < full
            yield place, request

    found = list(rows())
    notes = []
    if num_failed:
        notes.append(f"{num_failed:,} requests ended without a token; they are left out")
    if num_cut:
        notes.append(
            f"of {num_cut:,} long prompts only the first {MAX_BLOCKS:,} blocks are told: what they "
            "share behind these is not known"
        )
    if not has_arrivals:
        notes.append("not every event has received_unix_s: nothing is known of the rate")
        found = [(place, msgspec.structs.replace(row, arrival_s=0.0)) for place, row in found]
    return finish(
        found,
        source=str(source),
        format=NAME,
        in_order=False,
        has_arrivals=has_arrivals,
        num_cached_tokens=num_cached,
        notes=notes,
    )


def _request(place: Place, event: Waterfall) -> TraceRequest:
    output = place.tokens(event.num_generated_tokens, "num_generated_tokens", least=1)
    prompt = place.tokens(event.num_prompt_tokens, "num_prompt_tokens", least=1)
    blocks = _blocks(place, event, prompt)
    ttft, e2e = event.ttft_s, event.e2e_s
    return TraceRequest(
        arrival_s=place.number(event.received_unix_s, "received_unix_s"),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        id=event.request_id,
        blocks=blocks,
        block_size=event.block_size if blocks else 0,
        ttft_s=place.duration(ttft, "ttft_s"),
        tpot_s=(e2e - ttft) / (output - 1) if output > 1 and e2e >= ttft else None,
        e2e_s=place.duration(e2e, "e2e_s"),
    )


def _blocks(place: Place, event: Waterfall, num_prompt_tokens: int) -> tuple[int, ...]:
    try:
        blocks = numbers(event.prompt_blocks)
    except ConfigError as error:
        raise place.wrong(f"prompt_blocks: {error}; take what the gateway gives") from None
    if blocks and not 0 < len(blocks) * event.block_size <= num_prompt_tokens:
        raise place.wrong(
            f"{len(blocks)} blocks of block_size {event.block_size} are no beginning of "
            f"{num_prompt_tokens} prompt tokens; take what the gateway gives"
        )
    return blocks
