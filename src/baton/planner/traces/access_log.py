"""Access logs of OpenAI-compatible servers and gateways, JSON lines; there is no one form of them.

Each line is a call; what it holds is looked for under the names in use: the time (`created`,
`timestamp`, `start_time`, …), `usage` with prompt_tokens and completion_tokens (at the top, or in
`response` or `response.body`), the status, latencies, the user, a conversation. Where the prompt's
text is logged (`messages`, `prompt`), it is hashed in blocks, so that shared prefixes and turns of
conversations show; no text is kept. Calls that failed or used no tokens are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from baton.planner.traces.checks import Place, epoch_scale
from baton.planner.traces.columns import look_up
from baton.planner.traces.prompt_blocks import BLOCK_CHARS, block_ids, prompt_text
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

NAME = "access-log"
Entry = Mapping[str, object]
_PLACES = ("", "response.body.", "response.", "body.", "result.", "metadata.", "request.body.")
_REQUEST_PLACES = ("", "request.body.", "request.", "body.")
TIME = ("start_time", "startTime", "arrival", "received_at", "request_time", "timestamp", "ts")
TIME += ("@timestamp", "time", "created_at", "created")
USAGE_IN = ("usage.prompt_tokens", "usage.input_tokens", "prompt_tokens", "input_tokens")
USAGE_OUT = ("usage.completion_tokens", "usage.output_tokens", "completion_tokens", "output_tokens")
CACHED = ("usage.prompt_tokens_details.cached_tokens", "cached_tokens")
SECONDS = {"_ms": 1e-3, "_us": 1e-6, "Ms": 1e-3}
TTFT = ("ttft", "ttft_s", "ttft_ms", "time_to_first_token", "time_to_first_token_ms")
E2E = ("duration_s", "duration_ms", "latency_s", "latency_ms", "e2e_s", "response_time_ms")
SESSION = ("session_id", "session", "conversation_id", "conversation", "thread_id", "metadata.session_id")
TENANT = ("user", "tenant", "organization", "api_key_alias", "safety_identifier")
STATUS = ("status_code", "status", "response.status_code", "http_status")


def looks_like_one(entry: Entry) -> bool:
    """Whether an entry tells how many tokens a call used, or at least that it failed."""
    return _first(entry, _PLACES, USAGE_IN)[1] is not None or _failed(entry)


def read(source: Source, entries: Iterable[tuple[int, object]], unit: str) -> Trace:
    """Read (number, entry) pairs; `unit` says what is numbered.

    Raises:
        ConfigError: it names the entry and what to change.
    """
    num_failed = num_cached = num_chars = num_prompt = 0
    is_cached_told = False
    found: list[tuple[Place, TraceRequest]] = []
    for number, entry in entries:
        place = Place(str(source), number, unit)
        if not isinstance(entry, dict):
            raise place.wrong("is no JSON object; correct or delete it")
        prompt_name, prompt = _first(entry, _PLACES, USAGE_IN)
        if _failed(entry) or not prompt:
            num_failed += 1
            continue
        text = prompt_text(entry, _REQUEST_PLACES)
        _, cached = _first(entry, _PLACES, CACHED)
        is_cached_told = is_cached_told or cached is not None
        num_cached += place.tokens(cached or 0, "cached_tokens")
        row = _request(place, entry, place.tokens(prompt, prompt_name, least=1), text)
        if text:
            num_chars += len(text)
            num_prompt += row.num_prompt_tokens
        found.append((place, row))
    block_size = max(1, round(BLOCK_CHARS * num_prompt / num_chars)) if num_chars else 0
    return finish(
        _with_block_size(found, block_size),
        source=str(source),
        format=NAME,
        in_order=False,
        num_cached_tokens=num_cached if is_cached_told else None,
        notes=_notes(num_failed, block_size),
    )


def _notes(num_failed: int, block_size: int) -> Iterator[str]:
    if num_failed:
        yield f"{num_failed:,} calls failed or used no tokens; they are left out"
    if block_size:
        yield (
            f"shared prefixes are told from the text, in blocks of {BLOCK_CHARS} characters, "
            f"about {block_size} tokens"
        )


def _with_block_size(
    found: list[tuple[Place, TraceRequest]], block_size: int
) -> Iterator[tuple[Place, TraceRequest]]:
    """The size of a block in tokens is the whole log's mean; a prompt has no more than fit."""
    for place, row in found:
        if row.blocks:
            blocks = row.blocks[: row.num_prompt_tokens // block_size]
            size = block_size if blocks else 0
            row = msgspec.structs.replace(row, blocks=blocks, block_size=size)
        yield place, row


def _request(place: Place, entry: Entry, prompt: int, text: str) -> TraceRequest:
    time_name, stamp = _first(entry, ("", "response.body.", "response.", "request."), TIME)
    if stamp is None:
        raise place.wrong(
            f"has no time; write it under one of {', '.join(TIME)}, or give --columns arrival=…"
        )
    arrival = place.time(stamp, time_name)
    output_name, output = _first(entry, _PLACES, USAGE_OUT)
    num_output = place.tokens(output or 0, output_name or "completion_tokens")
    ttft = _seconds(place, entry, TTFT)
    e2e = _seconds(place, entry, E2E)
    tpot = None
    if ttft is not None and e2e is not None and num_output > 1 and e2e >= ttft:
        tpot = (e2e - ttft) / (num_output - 1)
    return TraceRequest(
        arrival_s=arrival * epoch_scale(arrival),
        num_prompt_tokens=prompt,
        num_output_tokens=num_output,
        id=_label(entry, ("id", "request_id", "response.body.id", "response.id", "custom_id")),
        blocks=block_ids(text),
        session=_label(entry, SESSION),
        kind=_label(entry, ("kind", "route", "endpoint", "path")),
        tenant=_label(entry, TENANT),
        ttft_s=ttft,
        tpot_s=tpot,
        e2e_s=e2e,
    )


def _first(
    entry: Entry, places: tuple[str, ...], names: tuple[str, ...]
) -> tuple[str, object | None]:
    """The first of the names that holds something, and what it holds."""
    for name in names:
        for at in places:
            value = look_up(entry, at + name)
            if value is not None and value != "":
                return at + name, value
    return "", None


def _failed(entry: Entry) -> bool:
    _, status = _first(entry, ("",), STATUS)
    if isinstance(status, int) and not isinstance(status, bool):
        return status >= 400
    if isinstance(status, str):
        return status.startswith(("4", "5")) or status.lower() in ("error", "failed", "failure")
    return bool(entry.get("error"))


def _seconds(place: Place, entry: Entry, names: tuple[str, ...]) -> float | None:
    name, value = _first(entry, ("", "metrics.", "response."), names)
    seconds = place.duration(value, name)
    if seconds is None:
        return None
    return seconds * next((f for end, f in SECONDS.items() if name.endswith(end)), 1.0)


def _label(entry: Entry, names: tuple[str, ...]) -> str:
    _, value = _first(entry, ("", "request.", "request.body."), names)
    return str(value) if isinstance(value, str | int) else ""
