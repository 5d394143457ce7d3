"""Readers of traces: every form, and a sentence for all that is wrong with one."""

from __future__ import annotations

import gzip
import json
import time
from base64 import b64encode
from pathlib import Path

import msgspec
import pytest
from unit import trace_files as files

from baton.errors import ConfigError
from baton.observe.block_ids import MAX_BLOCKS, BlockIds
from baton.observe.events import RecentRequests, Waterfall
from baton.planner.traces import FORMATS, Trace, read_trace, spread
from baton.planner.traces.checks import MAX_TOKENS, parse_date
from baton.planner.traces.prompt_blocks import BLOCK_CHARS, block_ids
from baton.planner.traces.trace import tick
from baton.twin.workload import TraceRequest

DATA = Path(__file__).parents[2] / "data" / "traces"


def read(tmp_path: Path, text: str | bytes, mapping: str = "", *, sort: bool = False) -> Trace:
    file = tmp_path / "trace"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_trace(file, mapping=mapping, sort=sort)


def test_azure_2023(tmp_path: Path) -> None:
    trace = read(tmp_path, files.AZURE_2023)
    assert trace.format == "azure"
    assert [r.num_prompt_tokens for r in trace.requests] == [374, 396, 879]
    assert [r.num_output_tokens for r in trace.requests] == [44, 109, 1]
    assert trace.requests[1].arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert trace.requests[0].arrival_s == 0.0
    assert trace.start_unix_s == pytest.approx(1_700_158_546.68, abs=0.01)
    assert any("no output token" in note for note in trace.notes)


def test_azure_2024_has_a_zone(tmp_path: Path) -> None:
    trace = read(tmp_path, files.AZURE_2024)
    assert trace.requests[1].arrival_s == pytest.approx(0.007405, abs=1e-6)
    assert trace.start_unix_s == pytest.approx(1_715_299_200.01, abs=0.01)


def test_mooncake_keeps_full_blocks(tmp_path: Path) -> None:
    trace = read(tmp_path, files.MOONCAKE)
    assert trace.format == "mooncake"
    assert [r.arrival_s for r in trace.requests] == [0.0, 3.0, 3.0]
    assert [r.blocks for r in trace.requests] == [(0, 1), (0, 3), ()]
    assert [r.block_size for r in trace.requests] == [512, 512, 0]


def test_gzip_is_told_by_its_content(tmp_path: Path) -> None:
    assert read(tmp_path, gzip.compress(files.AZURE_2023.encode())) == read(
        tmp_path, files.AZURE_2023
    )


def test_columns(tmp_path: Path) -> None:
    trace = read(tmp_path, files.COLUMNS, files.COLUMNS_MAP)
    assert trace.requests == [
        TraceRequest(0.0, 10, 1, tenant="a"),
        TraceRequest(1.5, 20, 2, tenant="b"),
    ]


def test_columns_of_json_lines_are_paths(tmp_path: Path) -> None:
    rows = files.lines(
        {"at": "2026-01-01T00:00:00Z", "n": {"in": 5, "out": 6}, "ms": 200},
        {"at": "2026-01-01T00:00:02.5Z", "n": {"in": 7, "out": 8}, "ms": None},
    )
    trace = read(tmp_path, rows, "arrival=at,prompt=n.in,output=n.out,ttft=ms:ms")
    assert [r.arrival_s for r in trace.requests] == [0.0, 2.5]
    assert [r.num_output_tokens for r in trace.requests] == [6, 8]
    assert [r.ttft_s for r in trace.requests] == [pytest.approx(0.2), None]
    assert trace.start_unix_s == 1_767_225_600.0


@pytest.mark.parametrize("scale", [1, 10**3, 10**6, 10**9])
def test_counts_since_1970_tell_their_unit(tmp_path: Path, scale: int) -> None:
    text = f"t,i,o\n{1_700_000_000 * scale},1,1\n{1_700_000_002 * scale},1,1\n"
    trace = read(tmp_path, text, "arrival=t,prompt=i,output=o")
    assert trace.requests[1].arrival_s == pytest.approx(2.0, abs=1e-6)
    assert trace.start_unix_s == pytest.approx(1_700_000_000)


def test_lengths_without_times(tmp_path: Path) -> None:
    trace = read(tmp_path, files.LENGTHS)
    assert not trace.has_arrivals
    assert [r.num_output_tokens for r in trace.requests] == [918, 905]
    assert any("no arrival times" in note for note in trace.notes)


def test_vllm_bench(tmp_path: Path) -> None:
    trace = read(tmp_path, files.vllm())
    first, second = trace.requests
    assert trace.format == "vllm-bench"
    assert (first.arrival_s, first.num_prompt_tokens, first.tpot_s) == (0.0, 20, None)
    assert (second.arrival_s, second.num_prompt_tokens) == (5.0, 10)
    assert second.tpot_s == pytest.approx(0.2)
    assert second.e2e_s == pytest.approx(0.9)
    assert any("1 requests failed" in note for note in trace.notes)


def test_vllm_bench_of_older_versions_has_no_times(tmp_path: Path) -> None:
    trace = read(tmp_path, files.vllm(start_times=None, errors=None))
    assert not trace.has_arrivals
    assert any("start_times" in note for note in trace.notes)


def test_baton_bench(tmp_path: Path) -> None:
    trace = read(tmp_path, files.bench())
    assert trace.format == "baton-bench"
    assert trace.requests == [TraceRequest(0.0, 12, 3, ttft_s=0.5, tpot_s=0.1, e2e_s=0.7)]
    assert trace.num_cached_tokens == 4


def test_lifecycle_events_as_the_gateway_gives_them(tmp_path: Path) -> None:
    recent = RecentRequests()
    for i, e2e_s in enumerate((3.0, 1.0)):
        event = msgspec.convert(files.waterfall(request_id=f"r{i}", e2e_s=e2e_s), Waterfall)
        event.received_unix_s = 0.0
        recent.add(event)
    recent.add(msgspec.convert(files.waterfall(num_generated_tokens=0), Waterfall))
    trace = read(tmp_path, msgspec.json.encode(recent.newest_first()))
    assert trace.format == "baton-events"
    assert [r.id for r in trace.requests] == ["r0", "r1"]  # the longer one came first
    assert trace.requests[1].arrival_s == pytest.approx(2.0, abs=0.2)
    assert trace.start_unix_s == pytest.approx(time.time() - 3, abs=30)
    assert trace.num_cached_tokens == 32
    assert trace.requests[1].tpot_s == pytest.approx(0.2)


def test_lifecycle_events_tell_which_prompts_begin_alike(tmp_path: Path) -> None:
    ids, other = BlockIds(), BlockIds()
    keys = [b"system", b"question"]
    events = [
        files.waterfall(request_id=name, block_size=16, prompt_blocks=b64encode(told).decode())
        for name, told in (
            ("a", ids.of(keys)), ("b", ids.of([b"system", b"another"])), ("c", other.of(keys)),
        )
    ]  # fmt: skip
    a, b, c = read(tmp_path, files.lines(*events)).requests
    assert len(a.blocks) == 2 and a.block_size == 16
    assert a.blocks[0] == b.blocks[0] and a.blocks[1] != b.blocks[1]
    assert not set(a.blocks) & set(c.blocks)  # of another process
    with pytest.raises(ConfigError, match="line 1: prompt_blocks: block ids have 7 bytes each"):
        read(tmp_path, files.lines(files.waterfall(block_size=16, prompt_blocks="AAAA")))
    with pytest.raises(ConfigError, match="2 blocks of block_size 0 are no beginning of 40"):
        read(tmp_path, files.lines(events[0] | {"block_size": 0}))


def test_of_very_long_prompts_the_beginning_is_told(tmp_path: Path) -> None:
    told = BlockIds().of([b"%d" % i for i in range(MAX_BLOCKS + 5)])
    event = files.waterfall(
        num_prompt_tokens=16 * (MAX_BLOCKS + 5), block_size=16,
        prompt_blocks=b64encode(told).decode(),
    )  # fmt: skip
    trace = read(tmp_path, files.lines(event))
    assert len(trace.requests[0].blocks) == MAX_BLOCKS
    assert any("of 1 long prompts only the first 2,048 blocks are told" in n for n in trace.notes)


def test_lifecycle_events_by_line_and_without_times(tmp_path: Path) -> None:
    old = files.waterfall(request_id="r2")
    del old["received_unix_s"]
    trace = read(tmp_path, files.lines(files.waterfall(), old))
    assert len(trace.requests) == 2
    assert not trace.has_arrivals


def test_access_log(tmp_path: Path) -> None:
    trace = read(
        tmp_path,
        files.lines(
            files.call(created=1_700_000_010, session_id="s", user="u"),
            files.call(status=500, usage=None),
            files.call(status="504", error="late"),
            files.call(usage={"prompt_tokens": 0}),
            {
                "request": {"body": {"model": "m"}},
                "timestamp": "2023-11-14T22:13:20Z",
                "response": {
                    "status_code": 200,
                    "body": {
                        "id": "x",
                        "usage": {
                            "input_tokens": 7,
                            "output_tokens": 3,
                            "prompt_tokens_details": {"cached_tokens": 2},
                        },
                    },
                },
                "ttft_ms": 100,
                "duration_ms": 300,
            },
        ),
    )
    assert trace.format == "access-log"
    first, second = trace.requests
    assert (first.id, first.num_prompt_tokens, first.arrival_s) == ("x", 7, 0.0)
    assert first.tpot_s == pytest.approx(0.1)
    assert (second.session, second.tenant, second.arrival_s) == ("s", "u", 10.0)
    assert trace.num_cached_tokens == 2
    assert any("3 calls failed" in note for note in trace.notes)


def test_logged_text_shows_what_is_shared(tmp_path: Path) -> None:
    system = {"role": "system", "content": "s" * 3 * BLOCK_CHARS}
    turns = [system, {"role": "user", "content": "q" * BLOCK_CHARS}]
    other = [system, {"role": "user", "content": "other" * BLOCK_CHARS}]
    more = [*turns, {"role": "assistant", "content": "a" * 90}]
    rows = [files.call(created=1_700_000_000 + i, messages=m) for i, m in
            enumerate((turns, other, more))]  # fmt: skip
    one, two, three = read(tmp_path, files.lines(*rows)).requests
    assert one.block_size > 0
    assert one.blocks[:3] == two.blocks[:3]
    assert one.blocks[3] != two.blocks[3]
    assert three.blocks[: len(one.blocks)] == one.blocks
    assert len(one.blocks) * one.block_size <= one.num_prompt_tokens


def test_blocks_are_chained() -> None:
    left, right, end = "l" * BLOCK_CHARS, "r" * BLOCK_CHARS, "e" * BLOCK_CHARS
    assert block_ids(left + end)[1] != block_ids(right + end)[1]
    assert block_ids(left + "rest") == block_ids(left)
    assert block_ids("short") == ()


def test_digitised_curves(tmp_path: Path) -> None:
    for name, text in {
        "x_rate_7days_digitised.csv": "hour_from_start,req_per_min_low,req_per_min\n"
        "0,0,60\n1,0,600\n2,0,0\n3,0,60\n",
        "x_input_tokens_cdf_digitised.csv": "tokens,cdf_percent\n10,0\n110,100\n",
        "x_output_tokens_cdf_digitised.csv": "tokens,cdf_percent\n0,50\n0,60\n20,100\n",
    }.items():
        (tmp_path / name).write_text(text)
    file = tmp_path / "x_rate_7days_digitised.csv"
    trace = read_trace(file)
    hours = [sum(h <= r.arrival_s / 3600 < h + 1 for r in trace.requests) for h in range(3)]
    assert hours[0] == pytest.approx(3600, rel=0.1)
    assert hours[1] == pytest.approx(36000, rel=0.05)
    assert hours[2] == 0
    mean = sum(r.num_prompt_tokens for r in trace.requests) / len(trace.requests)
    assert mean == pytest.approx(60, abs=1)
    assert sum(r.num_output_tokens == 1 for r in trace.requests) > 0.55 * len(trace.requests)
    assert read_trace(file, seed=0) == trace
    assert read_trace(file, seed=1) != trace
    (tmp_path / "x_output_tokens_cdf_digitised.csv").unlink()
    with pytest.raises(ConfigError, match="needs x_output_tokens_cdf"):
        read_trace(file)


def test_sorting_is_asked_for(tmp_path: Path) -> None:
    rows = files.MOONCAKE.splitlines()
    text = "\n".join((rows[1], rows[0]))
    with pytest.raises(ConfigError, match=r"line 2: its time lies 3 s before .* --sort"):
        read(tmp_path, text)
    assert [r.arrival_s for r in read(tmp_path, text, sort=True).requests] == [0.0, 3.0]


BAD: list[tuple[str, str, str]] = [
    ("", "", "is empty"),
    (" \n\n", "", "is empty"),
    ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "", "holds no requests"),
    (files.AZURE_2024.replace("2399", "-3"), "", r"line 3: ContextTokens is '-3'; write"),
    (files.AZURE_2024.replace("2399", "many"), "", r"line 3: ContextTokens is 'many'"),
    (files.AZURE_2024.replace("2399", "0"), "", r"line 3: ContextTokens is '0'.* from 1 on"),
    (files.AZURE_2024.replace("2399", "1.5"), "", r"line 3: .*whole number"),
    (files.AZURE_2024.replace("2399", "nan"), "", r"line 3: ContextTokens is 'nan'"),
    (files.AZURE_2024.replace("2399", "9" * 5000), "", r"line 3: ContextTokens is"),
    (files.AZURE_2024.replace("2399", str(MAX_TOKENS + 1)), "", r"line 3: .*more than 10,000,000"),
    (files.AZURE_2024.replace("2024-05-10 00:00:00.017", "noon", 1), "", r"line 3: TIMESTAMP is"),
    (files.AZURE_2024 + "2024-05-11\n", "", r"line 4: 1 cells under 3 columns"),
    (files.AZURE_2024 + '"open\n', "", r"line 4: no CSV"),
    ("a,b\n1,2\n", "", r"its columns are a, b; say which is which with --columns"),
    ("a,b\n1,2\n", "prompt=a,output=c", r"no column 'c' for output; its columns are a, b"),
    ("a,b\n1,2\n", "prompt=a", "must say which columns are prompt= and output="),
    ("a,b\n1,2\n", "prompt=a,output=b,prompt=b", r"--columns 'prompt=b': write FIELD=COLUMN"),
    ("a,b\n1,2\n", "length=a", r"fields are prompt, output, arrival"),
    ("t,a,b\n1,2,3\n1e12,2,3\n", "arrival=t,prompt=a,output=b", r"spans .* days: check the unit"),
    ("t,a,b\n1,2,3\n,2,3\n", "arrival=t,prompt=a,output=b", r"line 3: arrival is ''"),
    ("t,a,b\n1,2,3\n2,2,3\n", "prompt=a,output=b,ttft=t:h", r"no column 't:h'"),
    ("a,b,c\n1,2,-1\n", "prompt=a,output=b,ttft=c", r"line 2: ttft is '-1'; a time cannot be neg"),
    (files.MOONCAKE + "{\n", "", r"line 5: no JSON"),
    (files.MOONCAKE + "[1]\n", "", r"line 5: a JSON object is needed"),
    (files.MOONCAKE + '{"timestamp": 9000}\n', "", r"line 5: input_length is None"),
    (files.MOONCAKE.replace("[4]", '["a"]'), "", r"line 4: hash_ids is no list"),
    (files.MOONCAKE.replace('"output_length": 7', '"output_length": true'), "", "line 2: output"),
    (files.vllm(output_lens=[1]), "", r"output_lens has 1 entries and input_lens 3"),
    (files.vllm(output_lens=None), "", r"no list output_lens: write it with --save-result"),
    (files.vllm(itls=[5, [], []]), "", r"entry 1: itls is no list"),
    (files.vllm(ttfts=[-1, 0, 0]), "", r"entry 1: ttfts is -1; a time cannot be negative"),
    (files.vllm(input_lens=["x", 1, 1]), "", r"entry 1: input_lens is 'x'"),
    (files.vllm(errors=["a", "b", "c"]), "", "holds no requests"),
    (files.bench(num_runs=2), "", "holds 2 runs: give the result of one run"),
    (files.bench(prompt_tokens=-1), "", r"request 1: prompt_tokens is -1"),
    (files.bench(failure="x"), "", "holds no requests"),
    ("[]", "", "holds no requests"),
    ("[1, 2]", "", "in no known form; it begins with an entry of int"),
    ('{"a": 1}\n', "", "in no known form; it begins with an entry of a. Known forms: "),
    ("{broken\n", "", "is no JSON"),
    ("[" * 100_000, "", "is no JSON"),
    (files.lines(files.waterfall(num_prompt_tokens="x")), "", r"line 1: .*num_prompt_tokens"),
    (files.lines(files.waterfall(num_prompt_tokens=0)), "", r"line 1: num_prompt_tokens is 0"),
    (files.lines(files.call(), {**files.call(), "created": None}), "", r"line 2: has no time"),
    (files.lines(files.call(usage={"prompt_tokens": 1e9})), "", r"line 1: usage.prompt_tokens is"),
    (files.lines(files.call(), files.call(ttft=-1)), "", r"line 2: ttft is -1"),
    ("a\0b\n", "", r"line 1: a zero byte"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "mapping", "message"), BAD)
def test_what_is_wrong_is_said_in_a_sentence(
    tmp_path: Path, text: str, mapping: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, text, mapping)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\xfa\n", "line 1: no UTF-8"),
        (gzip.compress(files.AZURE_2023.encode())[:-20], "cannot read .* whole"),
        (b"\x1f\x8b not gzip", "cannot read"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, content)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_trace(path)


def test_long_lines_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.planner.traces.source.MAX_LINE_BYTES", 100)
    with pytest.raises(ConfigError, match="line 1: a line above"):
        read(tmp_path, "x" * 100)
    monkeypatch.setattr("baton.planner.traces.source.MAX_BYTES", 150)
    with pytest.raises(ConfigError, match="line 5: .*cut the trace"):
        read(tmp_path, files.AZURE_2023 * 3)


def test_coarse_clocks() -> None:
    assert tick([0.0, 0.0, 3.0, 3.0, 3.0, 9.0, 9.0]) == 3.0
    assert tick([0.0, 0.0, 3.0, 3.0, 3.0, 7.0, 7.0]) == 0.0  # no grid
    assert tick([0.0, 1.0, 2.0, 3.0]) == 0.0  # every time is its own
    trace = Trace(
        source="x",
        format="y",
        requests=[TraceRequest(3.0 * (i // 4), 1, 1, id=str(i)) for i in range(40)],
        tick_s=3.0,
    )
    spaced = spread(trace)
    times = [r.arrival_s for r in spaced.requests]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert len(set(times)) == 40
    assert [r.id for r in spaced.requests] == [str(i) for i in range(40)]
    assert spread(trace) == spaced
    assert spread(spaced) is spaced
    assert "3 s" in spaced.notes[-1]


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # where a trace is read does not matter
    time.tzset()
    try:
        _check_dates()
    finally:
        monkeypatch.undo()
        time.tzset()


def _check_dates() -> None:
    assert parse_date("1970-01-01 00:00:01.5") == 1.5
    assert parse_date("1970-01-01T01:00:00,25+01:00") == 0.25
    assert parse_date("2023-11-16 18:15:46.6805900") == pytest.approx(1_700_158_546.68059)
    assert parse_date("yesterday") is None


def test_every_form_is_named() -> None:
    assert set(FORMATS) == {
        "baton-events", "azure", "mooncake", "vllm-bench", "baton-bench", "access-log",
        "columns", "digitised",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["mooncake", "azure2024_derived", "lengths"])
def test_every_data_set_says_where_it_is_from(folder: str) -> None:
    names = [path.name for path in (DATA / folder).iterdir()]
    assert "README.md" in names
    assert any(name.startswith("LICENSE") for name in names)
    text = (DATA / folder / "README.md").read_text()
    assert "Licence" in text
    for file in (DATA / folder).glob("*.gz"):
        if "_cdf_" not in file.name:
            assert json.dumps(read_trace(file).format)
