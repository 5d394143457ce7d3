"""Whatever a trace file holds, it gives requests in order or a sentence, never a traceback."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit import trace_files as files

from baton.errors import ConfigError
from baton.planner.traces import read_trace
from baton.planner.traces.checks import MAX_TOKENS

GOOD = [
    files.AZURE_2023,
    files.AZURE_2024,
    files.MOONCAKE,
    files.LENGTHS,
    files.vllm(),
    files.bench(),
    files.lines(files.waterfall(), files.waterfall(request_id="r2")),
    json.dumps([files.waterfall()]),
    files.lines(files.call(), files.call(messages=[{"role": "user", "content": "x" * 200}])),
    files.COLUMNS,
]
MAPPINGS = ["", files.COLUMNS_MAP, "prompt=in,output=out", "arrival=created,prompt=a.b,output=c"]
NAMES = sorted(
    {"timestamp", "input_length", "output_length", "hash_ids", "input_lens", "output_lens", "itls"}
    | {"ttfts", "start_times", "errors", "format", "runs", "requests", "usage", "prompt_tokens"}
    | {"completion_tokens", "created", "status", "error", "messages", "content", "prompt", "in"}
    | set(files.waterfall())
)
VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["baton-bench/1", "2024-05-10 00:00:00", "-1", "1e400", "nan", 10**30]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6)
    ),
    max_leaves=12,
)
FUZZ = settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))


def check(content: bytes, mapping: str = "") -> None:
    """Either a trace that keeps its promises, or a `ConfigError` of one line."""
    handle, name = tempfile.mkstemp()
    try:
        os.write(handle, content)
        os.close(handle)
        try:
            trace = read_trace(Path(name), mapping=mapping, sort=bool(len(content) % 2))
        except ConfigError as error:
            assert str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
            return
    finally:
        os.unlink(name)
    times = [request.arrival_s for request in trace.requests]
    assert times
    assert times[0] == 0.0
    assert times == sorted(times)
    for request in trace.requests:
        assert 1 <= request.num_prompt_tokens <= MAX_TOKENS
        assert 1 <= request.num_output_tokens <= MAX_TOKENS
        assert len(request.blocks) * request.block_size <= request.num_prompt_tokens
        for seconds in (request.ttft_s, request.tpot_s, request.e2e_s):
            assert seconds is None or seconds >= 0


def test_the_good_ones_are_good() -> None:
    for text in GOOD[:-1]:
        handle, name = tempfile.mkstemp()
        os.write(handle, text.encode())
        os.close(handle)
        assert read_trace(Path(name)).requests
        os.unlink(name)


@FUZZ
@given(st.binary(max_size=300), st.sampled_from(MAPPINGS))
def test_any_bytes(content: bytes, mapping: str) -> None:
    check(content, mapping)


@FUZZ
@given(st.data())
def test_good_files_with_a_few_changes(data: st.DataObject) -> None:
    text = bytearray(data.draw(st.sampled_from(GOOD)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b"-", b"null", b"{}", b"[]", b'"', b"\n", b",", b"9" * 30, b"1e999"])
        )
        text[at : at + data.draw(st.integers(0, 6))] = piece
    content = bytes(text)
    if data.draw(st.booleans()):
        content = gzip.compress(content)
        content = content[: data.draw(st.integers(len(content) - 12, len(content)))]
    check(content, data.draw(st.sampled_from(MAPPINGS)))


@FUZZ
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=12), max_size=4))
def test_any_objects(entries: list[dict[str, Any]]) -> None:
    for content in (files.lines(*entries), json.dumps(entries), json.dumps(entries, indent=1)):
        check(content.encode())
        check(content.encode(), "arrival=created,prompt=prompt_tokens,output=usage")


@FUZZ
@given(st.sampled_from(["vllm", "bench", "waterfall", "call"]), st.data())
def test_known_forms_with_any_value(kind: str, data: st.DataObject) -> None:
    make: Any = getattr(files, kind)
    sample = make()
    names = list(sample) if isinstance(sample, dict) else list(json.loads(files.vllm()))
    one = VALUES if isinstance(sample, dict) else VALUES | st.lists(VALUES, min_size=3, max_size=3)
    changes = {data.draw(st.sampled_from(names)): data.draw(one)}
    made = make(**changes)
    check((made if isinstance(made, str) else files.lines(files.call(), made)).encode())
