"""Results of load tests: `vllm bench serve --save-result --save-detailed`, and `baton bench --json`.

vLLM's is one JSON object with parallel lists, a place a request: `input_lens`, `output_lens`,
`ttfts` (seconds), `itls` (a list each), `start_times` (seconds of one clock; older versions have
none, and then nothing is known of arrivals), `errors` (text, empty if all went well). SGLang's
script writes the same lists. Baton's has `format: baton-bench/1` and an object a request. What
failed is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from baton.errors import ConfigError
from baton.planner.traces.checks import Place
from baton.planner.traces.source import Source
from baton.planner.traces.trace import Trace, finish
from baton.twin.workload import TraceRequest

VLLM = "vllm-bench"
BATON = "baton-bench"


def read_vllm(source: Source, document: dict[str, object]) -> Trace:
    """Read vLLM's object.

    Raises:
        ConfigError: lists are missing, unlike in length, or hold what they should not.
    """
    prompts = _list(source, document, "input_lens")
    length = len(prompts)
    outputs = _list(source, document, "output_lens", length)
    optional = {
        name: _list(source, document, name, length) if document.get(name) else [None] * length
        for name in ("start_times", "ttfts", "itls", "errors")
    }
    has_arrivals = bool(document.get("start_times"))
    num_failed = 0

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        nonlocal num_failed
        for i in range(length):
            place = Place(str(source), i + 1, "entry")
            output = place.tokens(outputs[i], "output_lens")
            if optional["errors"][i] or not output:
                num_failed += 1
                continue
            ttft = place.duration(optional["ttfts"][i], "ttfts")
            decode = _sum(place, optional["itls"][i])
            yield (
                place,
                TraceRequest(
                    arrival_s=place.number(optional["start_times"][i], "start_times")
                    if has_arrivals
                    else 0.0,
                    num_prompt_tokens=place.tokens(prompts[i], "input_lens", least=1),
                    num_output_tokens=output,
                    ttft_s=ttft,
                    tpot_s=decode / (output - 1) if decode is not None and output > 1 else None,
                    e2e_s=ttft + decode if ttft is not None and decode is not None else None,
                ),
            )

    ok = list(rows())
    return finish(
        ok,
        source=str(source),
        format=VLLM,
        in_order=False,
        has_arrivals=has_arrivals,
        notes=_notes(num_failed, has_arrivals),
    )


def read_baton(source: Source, document: dict[str, object]) -> Trace:
    """Read the object that `baton bench --json` writes, if it holds one run.

    Raises:
        ConfigError: it holds several runs, or not what it should.
    """
    runs = document.get("runs")
    if not isinstance(runs, list) or len(runs) != 1:
        count = len(runs) if isinstance(runs, list) else 0
        raise ConfigError(
            f"{source} holds {count} runs: give the result of one run, without --sweep"
        )
    entries = runs[0].get("requests") if isinstance(runs[0], dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{source} has no list runs[0].requests: write it with baton bench --json")
    num_failed = 0
    num_cached = 0

    def rows() -> Iterator[tuple[Place, TraceRequest]]:
        nonlocal num_failed, num_cached
        for i, entry in enumerate(entries, 1):
            place = Place(str(source), i, "request")
            if not isinstance(entry, dict):
                raise place.wrong("is no object; write the file with baton bench --json")
            if entry.get("failure") or entry.get("prompt_tokens") is None:
                num_failed += 1
                continue
            num_cached += place.tokens(entry.get("cached_tokens") or 0, "cached_tokens")
            yield (
                place,
                TraceRequest(
                    arrival_s=place.number(entry.get("sent_s"), "sent_s"),
                    num_prompt_tokens=place.tokens(
                        entry.get("prompt_tokens"), "prompt_tokens", least=1
                    ),
                    num_output_tokens=place.tokens(entry.get("output_tokens"), "output_tokens"),
                    ttft_s=place.duration(entry.get("ttft_s"), "ttft_s"),
                    tpot_s=place.duration(entry.get("tpot_s"), "tpot_s"),
                    e2e_s=place.duration(entry.get("e2e_s"), "e2e_s"),
                ),
            )

    ok = list(rows())
    return finish(
        ok,
        source=str(source),
        format=BATON,
        in_order=False,
        num_cached_tokens=num_cached,
        notes=_notes(num_failed, True),
    )


def _notes(num_failed: int, has_arrivals: bool) -> Iterator[str]:
    if num_failed:
        yield f"{num_failed:,} requests failed or gave no token; they are left out"
    if not has_arrivals:
        yield "there are no start_times: nothing is known of the rate (a newer vLLM writes them)"


def _list(
    source: Source, document: dict[str, object], name: str, length: int | None = None
) -> list[object]:
    value = document.get(name)
    if not isinstance(value, list):
        raise ConfigError(
            f"{source} has no list {name}: write it with --save-result --save-detailed"
        )
    if length is not None and len(value) != length:
        raise ConfigError(
            f"{source}: {name} has {len(value)} entries and input_lens {length}; "
            "write the file again with --save-result --save-detailed"
        )
    return value


def _sum(place: Place, gaps: object) -> float | None:
    if gaps is None:
        return None
    if not isinstance(gaps, list):
        raise place.wrong("itls is no list of seconds; write it with --save-detailed")
    return math.fsum(place.duration(gap, "itls") or 0.0 for gap in gaps)
