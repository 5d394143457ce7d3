"""What the analysis counts and computes, against cases worked out by hand or by brute force."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.core.cost import Coefficients, ModelShape, Parallel, StepCost
from baton.errors import BatonError, ConfigError
from baton.planner.analyze import analyze
from baton.planner.analyze.arrivals import Arrivals, arrivals
from baton.planner.analyze.claims import Facts, judge
from baton.planner.analyze.lengths import Lengths, lengths
from baton.planner.analyze.page import page
from baton.planner.analyze.phases import decode_batch, split
from baton.planner.analyze.serving import CHUNK_TOKENS, Modelled
from baton.planner.analyze.sharing import hit_blocks, sharing, turns
from baton.planner.analyze.tables import tables
from baton.planner.analyze.workers import device_prices, workers
from baton.planner.endpoint import Answer, fit_endpoint, non_negative
from baton.planner.hardware import find_device
from baton.planner.models import find_model
from baton.planner.traces import Trace, mooncake
from baton.planner.traces.source import Source
from baton.twin.workload import TraceRequest

MOONCAKE = Path(__file__).parents[2] / "data/traces/mooncake/conversation_trace.jsonl.gz"


def trace(
    requests: Sequence[TraceRequest], *, start: float | None = None, has_arrivals: bool = True
) -> Trace:
    return Trace(
        source="<made> & up",
        format="test",
        requests=list(requests),
        start_unix_s=start,
        has_arrivals=has_arrivals,
    )


def at(*times: float) -> Trace:
    return trace([TraceRequest(time, 10, 10) for time in times])


def when(made: Trace) -> Arrivals:
    found = arrivals(made)
    assert found is not None
    return found


# Lengths


def test_lengths() -> None:
    found = lengths([1, 2, 3, 4, 100])
    assert (found.count, found.total, found.mean, found.max) == (5, 110, 22.0, 100)
    assert found.quantile(50) == 3
    assert found.cv == pytest.approx(
        math.sqrt(sum((x - 22) ** 2 for x in (1, 2, 3, 4, 100)) / 5) / 22
    )
    assert sum(found.histogram.counts) == 5


@pytest.mark.parametrize("values", [[7], [1, 1], [1, 2], list(range(1, 3000)), [1, 10_000_000]])
def test_histograms_hold_every_request(values: list[int]) -> None:
    histogram = lengths(values).histogram
    assert sum(histogram.counts) == len(values)
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert list(histogram.edges) == sorted(set(histogram.edges))


# Arrivals


def test_a_metronome_and_poisson() -> None:
    steady = when(at(*(float(i) for i in range(600))))
    assert steady.cv == pytest.approx(0, abs=1e-9)
    assert steady.dispersion_1s == pytest.approx(0, abs=1e-9)
    rng = random.Random(1)
    times, now = [], 0.0
    for _ in range(20_000):
        now += rng.expovariate(5.0)
        times.append(now)
    poisson = when(at(*times))
    assert poisson.rate_per_s == pytest.approx(5, rel=0.03)
    assert poisson.cv == pytest.approx(1, rel=0.03)
    assert poisson.dispersion_1s == pytest.approx(1, rel=0.08)
    assert poisson.kind == "steady"
    assert poisson.per_day == pytest.approx(86400 * poisson.rate_per_s)


def test_bursts() -> None:
    found = when(at(*(600.0 * i + 0.01 * j for i in range(4) for j in range(50))))
    assert found.kind == "very bursty"
    assert found.peak_1s == 50
    assert found.peak_60s == pytest.approx(50 / 60)
    assert found.peak_over_mean_60s == pytest.approx((50 / 60) / (200 / found.duration_s))
    assert found.empty_minutes == pytest.approx(27 / 30)


def test_no_times_no_rate() -> None:
    assert arrivals(trace([TraceRequest(0.0, 1, 1)] * 3, has_arrivals=False)) is None
    assert arrivals(at(0.0)) is None
    assert arrivals(at(0.0, 0.0)) is None


def test_shape_of_the_day() -> None:
    # From 22:00 UTC for 30 hours; four requests an hour, forty in the hour from 03:00.
    start = 1_700_000_000 - 1_700_000_000 % 86400 + 22 * 3600
    times = []
    for hour in range(30):
        number = 40 if (22 + hour) % 24 == 3 else 4
        times += [3600.0 * hour + 3600 * i / number for i in range(number)]
    made = trace([TraceRequest(time, 1, 1) for time in [*times, 108_000.0]], start=float(start))
    found = when(made)
    assert found.hours_are_utc
    rates = found.by_hour
    assert rates[3] == pytest.approx(40 / 3600, rel=0.01)
    assert rates[2] == pytest.approx(4 / 3600, rel=0.01)
    assert rates[12] == pytest.approx(4 / 3600, rel=0.01)
    assert found.hour_peak_over_mean == pytest.approx(40 / (23 * 4 + 40) * 24, rel=0.01)
    assert when(at(0.0, 3600.0)).by_hour == ()
    part = when(trace([TraceRequest(t, 1, 1) for t in (0.0, 7 * 3600.0)], start=float(start)))
    assert [hour for hour, rate in enumerate(part.by_hour) if rate is not None] == [
        0, 1, 2, 3, 4, 22, 23,
    ]  # fmt: skip


# Sharing


def prompt(*blocks: int, tail: int = 0, session: str = "") -> TraceRequest:
    return TraceRequest(
        0.0, 10 * len(blocks) + tail, 1, blocks=blocks, block_size=10, session=session
    )


def naive_hits(requests: list[TraceRequest], num_blocks: int | None) -> list[int]:
    """The same by a list in order of use, the most recent last."""
    order: list[int] = []
    found = []
    for request in requests:
        hits = 0
        while hits < len(request.blocks) and request.blocks[hits] in order:
            hits += 1
        found.append(hits)
        for block in reversed(request.blocks):
            if block in order:
                order.remove(block)
            order.append(block)
        if num_blocks is not None:
            order = order[max(0, len(order) - num_blocks) :]
    return found


@pytest.mark.parametrize("num_blocks", [1, 3, 8, None])
def test_caches_against_brute_force(num_blocks: int | None) -> None:
    rng = random.Random(num_blocks)
    requests = []
    for _ in range(300):
        path = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
        # An id stands for a whole path, as a chained hash does.
        ids = tuple(hash(tuple(path[: i + 1])) for i in range(len(path)))
        requests.append(prompt(*ids))
    size = None if num_blocks is None else 10 * num_blocks
    assert list(hit_blocks(requests, size)) == naive_hits(requests, num_blocks)


def test_hit_ratios() -> None:
    requests = [prompt(1, 2, tail=5), prompt(1, 3), prompt(1, 2, 4)]
    found = sharing(requests, (20,), num_cached_tokens=15)
    endless = found.infinite
    assert endless is not None
    assert endless.block_ratio == pytest.approx(3 / 7)
    assert endless.token_ratio == pytest.approx(30 / 75)
    assert endless.request_ratio == pytest.approx(2 / 3)
    assert (found.num_blocks, found.num_distinct, found.top_block_share) == (7, 4, 1.0)
    assert found.measured_ratio == pytest.approx(0.2)
    assert found.caches[0].block_ratio == pytest.approx(2 / 7)  # 2 was dropped for 3


def test_mooncake_hit_ratios_are_the_published_ones() -> None:
    """The figures stand in the data's README; they count blocks that are not full, too."""
    made = mooncake.read(Source(MOONCAKE), with_tails=True)
    published = {1_000_000: 0.054, 3_100_000: 0.139, 10_200_000: 0.287, 30_700_000: 0.359,
                 102_000_000: 0.366}  # fmt: skip
    found = {hits.num_tokens: hits for hits in sharing(made.requests, tuple(published)).caches}
    for size, ratio in published.items():
        assert found[size].block_ratio == pytest.approx(ratio, abs=0.002)
    full = sharing(mooncake.read(Source(MOONCAKE)).requests, ()).infinite
    assert full is not None
    assert full.token_ratio == pytest.approx(0.374, abs=0.002)


def test_turns() -> None:
    named = [prompt(1, session="a"), prompt(1, session="a"), prompt(2, session="b"), prompt(3)]
    found = turns(named)
    assert (found.told_by, found.num_conversations) == ("session", 2)
    assert found.follow_up_share == pytest.approx(1 / 3)
    guessed = turns([prompt(0, 1, tail=3), prompt(0, 1, 2), prompt(0, 5), prompt(0, 1, 2, 7)])
    assert guessed.told_by == "blocks"
    assert guessed.follow_up_share == pytest.approx(2 / 4)
    assert turns([TraceRequest(0.0, 5, 5)]).follow_up_share is None


def test_a_system_prompt_is_no_conversation() -> None:
    requests = [prompt(0, tail=5), *(prompt(0, 100 + i) for i in range(50))]
    assert turns(requests).follow_up_share == 0.0
    again = [prompt(0, 1), prompt(0, 1)]  # the same prompt once more continues nothing
    assert turns(again).follow_up_share == 0.0


# Phases


class Linear:
    """A worker whose costs are plain: 1 ms a prompt token; a step of 5 ms and 1 ms a sequence."""

    label, basis = "H100 made up", "invented"
    usd_per_hour: float | None = 3.6
    flops_per_s: float | None = 1e12

    def __init__(self, kv_tokens: int | None = None, label: str = "") -> None:
        self.kv_tokens = kv_tokens
        self.label = label or self.label

    def prefill(self, num_tokens: int) -> tuple[float, float | None]:
        return 1e-3 * num_tokens, 0.5 * num_tokens

    def decode(self, batch: int, context: int) -> tuple[float, float | None]:
        return 5e-3 + 1e-3 * batch, 2.0 * batch


MODEL = ModelShape("toy", 2, 8, 2, 1, 4, 16, 32)


def test_split_by_hand() -> None:
    requests = [TraceRequest(0.0, 100, 11), TraceRequest(100.0, 300, 1)]
    found = split(requests, Linear(), MODEL, duration_s=100.0, batch=5)
    assert found.prefill.device_s == pytest.approx(0.4)
    assert found.decode.device_s == pytest.approx(10 * 10e-3 / 5)  # ten steps, a fifth of each
    assert found.prefill.usd == pytest.approx(0.4 / 3600 * 3.6)
    assert found.prefill.joules == pytest.approx(200)
    assert found.decode.joules == pytest.approx(10 * 2.0)
    assert found.busy_workers == pytest.approx(0.42 / 100)
    assert found.share("device_s") == pytest.approx(0.4 / 0.42)
    assert found.usd_per_million_tokens == pytest.approx(1e6 * 0.42 / 3600 * 3.6 / 412)
    assert found.joules_per_token == pytest.approx(220 / 412)
    assert (found.batch, found.batch_limit, found.peak_prefill) == (5, "given", None)


def test_flops_by_hand() -> None:
    # A layer: 8 x (2 x 2 + 2 x 1) x 4 of attention, 3 x 8 x 16 of the MLP; the head 32 x 8.
    weights = 2 * (8 * 6 * 4 + 3 * 8 * 16)
    found = split([TraceRequest(0.0, 100, 11)], Linear(), MODEL, batch=1)
    pairs = 4 * 2 * 4 * 2  # flops a query-key pair, over both layers
    prefill = 2 * weights * 100 + pairs * 100 * 100 / 2 + 2 * 32 * 8
    decode = 10 * (2 * weights + 2 * 32 * 8) + pairs * 10 * (100 + 10 / 2)
    assert found.prefill.flops == pytest.approx(prefill)
    assert found.decode.flops == pytest.approx(decode)
    assert found.prefill.compute_use == pytest.approx(prefill / (0.1 * 1e12))


def test_cached_prompts_cost_less_prefill() -> None:
    requests = [TraceRequest(0.0, 100, 2), TraceRequest(0.0, 300, 2)]
    found = split(requests, Linear(), MODEL, batch=1, cached=[50, 300], cached_by="x")
    assert found.prefill.device_s == pytest.approx(50e-3 + 1e-3)  # the last token is computed
    weights = 2 * 2 * (8 * 6 * 4 + 3 * 8 * 16)
    pairs = 4 * 2 * 4 * 2 * ((100**2 - 50**2) / 2 + (300**2 - 299**2) / 2)
    assert found.prefill.flops == pytest.approx(51 * weights + pairs + 2 * 2 * 32 * 8)
    assert found.cached == "x"


@pytest.mark.parametrize(
    ("kv_tokens", "tpot_s", "expected"),
    [
        (None, 0.05, (45, "latency")),
        (1000, 0.05, (10, "memory")),
        (None, 1.0, (256, "the engine")),
        (None, 0.001, (1, "latency")),
        (10, 1.0, (1, "memory")),
    ],
)
def test_the_batch_and_what_bounds_it(
    kv_tokens: int | None, tpot_s: float, expected: tuple[int, str]
) -> None:
    assert decode_batch(Linear(kv_tokens), 100, tpot_s) == expected


def test_how_much_of_the_batch_the_traffic_fills() -> None:
    # 300 tokens a second: 2 at a time yield 286, 3 would yield 375.
    requests = [TraceRequest(float(t), 10, 301) for t in range(10)]
    assert split(requests, Linear(), MODEL, duration_s=10.0).traffic_batch == 2
    assert split(requests, Linear(), MODEL, duration_s=0.01).traffic_batch == 45
    assert split(requests, Linear(), MODEL).traffic_batch is None


def test_the_busiest_minute_of_prefill() -> None:
    requests = [TraceRequest(float(t), 100 if t // 60 != 2 else 500, 1) for t in range(0, 301, 10)]
    found = split(requests, Linear(), MODEL, duration_s=300.0, batch=1)
    assert found.peak_prefill == pytest.approx(3000 / ((4 * 600 + 3000) / 5))


def test_long_prompts_are_computed_in_chunks() -> None:
    rates = Coefficients(1e15, 1e15, 1e15, 1e15, step_s=1.0)
    worker = Modelled("x", StepCost(MODEL, rates, Parallel()))
    assert worker.prefill(CHUNK_TOKENS)[0] == pytest.approx(1, abs=0.01)
    assert worker.prefill(CHUNK_TOKENS + 1)[0] == pytest.approx(2, abs=0.01)


def test_workers_take_as_many_devices_as_the_model_needs() -> None:
    small, large = find_model("Llama-3.1-8B"), find_model("Llama-3.1-70B")
    assert workers(small, ["H100"])[0].label == "H100 SXM"
    many = workers(large, ["h100", "L40S"])
    assert [worker.label for worker in many] == ["4x H100 SXM", "4x L40S"]
    price = device_prices()["H100 SXM"]
    assert many[0].usd_per_hour == pytest.approx(4 * price)
    memory = 0.9 * 4 * find_device("H100").memory_bytes - 2 * large.num_weights
    assert many[0].kv_tokens == int(memory / large.kv_bytes_per_token)
    with pytest.raises(ConfigError, match="leave it out of --hardware"):
        workers(find_model("DeepSeek-V3"), ["T4"])
    with pytest.raises(ConfigError, match="not known"):
        workers(small, ["H1000x"])


# Rules of thumb


def facts(**changes: Any) -> Facts:
    requests = [TraceRequest(10.0 * i, 1000 + i, 100) for i in range(100)]
    made = trace(requests)
    slow, cheap = Linear(label="H100 made up"), Linear(label="A100 made up")
    cheap.usd_per_hour = 1.8
    splits = [split(requests, each, MODEL, duration_s=990.0, batch=10) for each in (slow, cheap)]
    fields: dict[str, Any] = {
        "prompts": lengths([r.num_prompt_tokens for r in requests]),
        "outputs": lengths([100] * 100),
        "long_answers": 0.0,
        "arrivals": arrivals(made),
        "model": find_model("Llama-3.1-8B"),
        "servings": (slow, cheap),
        "splits": splits,
        "prices": {"L40S": 1.861},
    }
    return Facts(**(fields | changes))


def verdict(name: str, made: Facts) -> str:
    return next(claim.verdict for claim in judge(made) if claim.name == name)


def why(name: str, made: Facts) -> str:
    return next(claim.why for claim in judge(made) if claim.name == name)


def replaced(made: Facts, **changes: Any) -> Facts:
    """With fields of the main split changed."""
    first = msgspec.structs.replace(made.splits[0], **changes)
    return msgspec.structs.replace(made, splits=[first, *made.splits[1:]])


def length(value: int) -> Lengths:
    return lengths([value] * 100)


def test_rules_without_a_cost_model_are_not_told() -> None:
    claims = judge(facts(servings=(), splits=(), model=None, prices={}, arrivals=None))
    assert {claim.verdict for claim in claims} == {"not told"}
    assert not any(claim.applies for claim in claims)
    assert all(claim.why.startswith("needs ") for claim in claims)


def test_requests_a_day() -> None:
    made = facts()  # 8,727 requests a day
    assert verdict("requests a day", replaced(made, busy_workers=2.0)) == "holds"
    assert verdict("requests a day", replaced(made, busy_workers=0.1)) == "does not hold"


def test_output_over_input() -> None:
    made = facts()  # 0.1 times; prefill has most of the time
    decode = made.splits[0].decode
    prefill = made.splits[0].prefill
    rare = msgspec.structs.replace(decode, device_s=prefill.device_s / 100)
    even = msgspec.structs.replace(decode, device_s=prefill.device_s)
    assert verdict("output over input", replaced(made, decode=rare)) == "holds"
    assert verdict("output over input", replaced(made, decode=even)) == "does not hold"
    long = msgspec.structs.replace(made, outputs=length(10_000))
    assert verdict("output over input", replaced(long, decode=even)) == "holds"
    assert verdict("output over input", replaced(long, decode=rare)) == "does not hold"


def test_kv_size_follows_model_and_prompt() -> None:
    # Llama-2-7B: 512 KiB a token, so that 2K tokens are 1.07 GB and 4K tokens 2.15 GB.
    old = find_model("Llama-2-7B")
    assert verdict("KV of a prompt", facts(model=old, prompts=length(2048))) == "does not hold"
    assert "1.1 GB for the median" in why("KV of a prompt", facts(model=old, prompts=length(2048)))
    assert verdict("KV of a prompt", facts(model=old, prompts=length(4096))) == "holds"


def test_transfer_is_judged_by_its_share_of_prefill() -> None:
    model = find_model("Llama-2-7B")  # 43 us a token at 100 Gbit/s; prefill takes 1 ms
    assert verdict("transfer time", facts(model=model, prompts=length(4000))) == "does not hold"
    assert verdict("transfer time", facts(model=model, prompts=length(1000))) == "holds"


def test_linear_prefill() -> None:
    varied = lengths([100] * 50 + [5000] * 50)
    assert verdict("linear prefill", facts(prompts=varied)) == "holds"
    assert verdict("linear prefill", facts(prompts=length(100))) == "not told"
    rates = Coefficients(1e12, 1e12, 1e11, 1e12)
    curved = Modelled("x", StepCost(find_model("Llama-3.1-8B"), rates, Parallel()))
    assert verdict("linear prefill", facts(prompts=varied, servings=(curved,))) == "does not hold"


def test_idle_decode() -> None:
    made = facts()
    prefill = msgspec.structs.replace(made.splits[0].prefill, device_s=1.0)
    idle = msgspec.structs.replace(made.splits[0].decode, device_s=9.0, compute_use=0.1)
    busy = msgspec.structs.replace(idle, compute_use=0.5)
    assert verdict("idle decode", replaced(made, prefill=prefill, decode=idle)) == "holds"
    assert verdict("idle decode", replaced(made, prefill=prefill, decode=busy)) == "does not hold"


def test_devices_are_compared_by_money_and_energy() -> None:
    made = facts()  # the A100 costs half
    assert verdict("A100 for decode", made) == "holds"
    assert verdict("15-40 % cheaper", made) == "bounded"  # one device is best at both
    assert "saves at most 0%" in why("15-40 % cheaper", made)
    decode = msgspec.structs.replace(made.splits[0].decode, usd=0.0, joules=0.0)
    prefill = msgspec.structs.replace(made.splits[0].prefill, usd=5.0, joules=5.0)
    other = msgspec.structs.replace(
        made.splits[1],
        prefill=msgspec.structs.replace(prefill, usd=3.0, joules=1.0),
        decode=msgspec.structs.replace(decode, usd=1.0, joules=5.0),
    )
    apart = msgspec.structs.replace(replaced(made, decode=decode, prefill=prefill))
    apart = msgspec.structs.replace(apart, splits=[apart.splits[0], other])
    assert verdict("A100 for decode", apart) == "does not hold"
    assert verdict("15-40 % cheaper", apart) == "holds"  # 3 instead of 4
    assert verdict("half the power", apart) == "holds"  # 1 instead of 5
    assert verdict("2-4x cheaper", apart) == "bounded"
    assert verdict("60-75 % at 70 B", apart) == "not told"
    large = msgspec.structs.replace(apart, model=find_model("Llama-3.1-70B"))
    assert verdict("60-75 % at 70 B", large) == "bounded"


def test_prices_and_peaks() -> None:
    assert verdict("12 L40S", facts()) == "does not hold"
    assert verdict("12 L40S", facts(prices={"L40S": 7.5})) == "holds"
    assert verdict("prefill capacity", replaced(facts(), peak_prefill=2.5)) == "holds"
    assert verdict("prefill capacity", replaced(facts(), peak_prefill=1.2)) == "does not hold"


# A measured server


def answers(step_s: float = 4e-3, square: float = 1e-8) -> list[Answer]:
    made, now = [], 0.0
    for count in (16, 64, 256, 1024, 4096):
        first = now + 0.01 + 1e-4 * count + square * count**2
        gap = step_s + 5e-4 + 1e-7 * (count + 10)
        made.append(Answer(now, tuple(first + gap * i for i in range(20)), count, 20, True))
        now = first + 10
    for batch in (2, 4, 8):
        gap = step_s + batch * (5e-4 + 1e-7 * (256 + 10))
        events = tuple(now + 1 + gap * i for i in range(20))
        made += [Answer(now, events, 256, 20, False)] * batch
        now += 20
    return made


def test_a_server_is_told_apart_from_outside() -> None:
    fit = fit_endpoint("x", answers())
    assert fit.ttft.coefficients == pytest.approx(
        {"base": 0.01, "per_token": 1e-4, "per_token_squared": 1e-8}, rel=1e-3
    )
    assert fit.gap.coefficients == pytest.approx(
        {"step": 4e-3, "per_sequence": 5e-4, "per_kv_token": 1e-7}, rel=1e-3
    )
    assert fit.max_batch == 8
    assert fit.prefill(1000)[0] == pytest.approx(0.11, rel=1e-3)
    assert fit.ttft_s(1000) == pytest.approx(0.12, rel=1e-3)
    assert fit.decode(4, 100)[0] == pytest.approx(4e-3 + 2e-3 + 4e-5, rel=1e-3)
    assert fit.ttft.error < 1e-6
    assert len(fit.ttft_points) == 5


def test_chunks_of_tokens_are_counted_as_tokens() -> None:
    halved = [msgspec.structs.replace(a, num_output_tokens=39) for a in answers()]
    one, two = fit_endpoint("x", answers()), fit_endpoint("x", halved)
    assert two.gap.coefficients["step"] == pytest.approx(one.gap.coefficients["step"] / 2, rel=0.02)


def test_a_prefill_in_between_does_not_count_as_a_gap() -> None:
    made = answers()
    disturbed = []
    for answer in made:
        events = answer.event_s[:10] + tuple(t + 3.0 for t in answer.event_s[10:])
        disturbed.append(msgspec.structs.replace(answer, event_s=events))
    fit = fit_endpoint("x", disturbed)
    assert fit.gap.coefficients["step"] == pytest.approx(4e-3, rel=0.05)


def test_too_few_answers_are_said() -> None:
    with pytest.raises(BatonError, match="fewer than 4 prompt lengths"):
        fit_endpoint("x", answers()[:3])
    short = [msgspec.structs.replace(a, event_s=a.event_s[:2]) for a in answers()]
    with pytest.raises(BatonError, match="16 tokens or longer"):
        fit_endpoint("x", short)


def test_coefficients_are_never_negative() -> None:
    import numpy as np

    rng = np.random.default_rng(3)
    for _ in range(50):
        x = np.column_stack([np.ones(12), rng.uniform(1, 9, 12), rng.uniform(1, 9, 12)])
        y = rng.uniform(1, 5, 12)
        found = non_negative(x, y)
        assert (found >= 0).all()
        # No small step within the bounds makes it better.
        error = float((((x @ found) / y - 1) ** 2).sum())
        for i in range(3):
            for change in (-1e-4, 1e-4):
                moved = found.copy()
                moved[i] = max(0.0, moved[i] + change)
                assert float((((x @ moved) / y - 1) ** 2).sum()) >= error - 1e-12


# Everything together


def whole() -> Any:
    requests = [
        TraceRequest(
            float(i), 50 + i, 1 + i % 7, blocks=(0, i // 2), block_size=16, kind="<b>chat</b>",
            ttft_s=0.1 + i, tpot_s=0.01, e2e_s=1.0 + i,
        )
        for i in range(300)
    ]  # fmt: skip
    fit = fit_endpoint("<script>alert(1)</script>", answers())
    return analyze(
        trace(requests),
        [Linear(), fit],
        model=MODEL,
        endpoint=fit,
        caches=(100, 1000),
        prices=device_prices(),
    )


def test_analysis_and_its_json() -> None:
    found = whole()
    assert found.num_requests == 300
    assert found.latencies.metrics["ttft"][1] == pytest.approx(150, abs=1)
    assert found.kinds == {"<b>chat</b>": 300}
    assert [split.label for split in found.splits] == ["H100 made up"] * 2 + [
        "<script>alert(1)</script>"
    ]
    assert found.splits[1].cached == "an endless prefix cache"
    assert found.splits[1].prefill.device_s < found.splits[0].prefill.device_s
    document = msgspec.json.decode(msgspec.json.encode(found))
    assert document["format"] == "baton-analyze/1"
    assert len(document["claims"]) == 14
    names = [table.name for table in tables(found)]
    assert names == ["lengths", "traffic", "sharing", "latencies", "endpoint", "split", "claims"]
    for table in tables(found):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_page_needs_nothing_else_and_trusts_nobody() -> None:
    text = page(whole())
    assert "<script" not in text
    assert "<made>" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;made&gt; &amp; up" in text
    assert not re.search(r"(?:https?:)?//\w|url\(|@import|<link|<img| src=", text)
    assert "prefers-color-scheme:dark" in text
    assert text.count("<svg") == text.count("</svg>") >= 7
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text)


def test_the_page_of_the_smallest_trace() -> None:
    text = page(analyze(trace([TraceRequest(0.0, 1, 1)], has_arrivals=False)))
    assert "unknown" in text
    assert text.count("<svg") == 2


def test_spread_clocks_are_used_for_burstiness() -> None:
    requests = [TraceRequest(3.0 * (i // 12), 5, 5) for i in range(1200)]
    coarse = msgspec.structs.replace(trace(requests), tick_s=3.0)
    found = analyze(coarse)
    assert found.arrivals is not None
    assert found.arrivals.cv == pytest.approx(1, abs=0.15)
    assert any("assumption" in note for note in found.notes)
    raw = arrivals(coarse)
    assert raw is not None
    assert raw.cv > 3
