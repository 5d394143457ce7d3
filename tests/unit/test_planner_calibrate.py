"""Fits find what made the data, say how far off they are, and look at no answers."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from baton.core.cost import ChunkShape, Coefficients, ModelShape, Profile, StepShape
from baton.errors import ConfigError
from baton.planner.calibrate import (
    Observation,
    cross_validate,
    fit_steps,
    hash_fraction,
    held_out,
    minimise,
)
from baton.planner.kernels import fit_decode_attention, fit_gemm, fit_prompt_attention
from baton.planner.pooled import Point, fit_pooled
from baton.planner.profile import Measured, Policy, StepTime, check_profile, fit_profile, step_grid
from baton.planner.serving import NOT_CONFIGURATION, ServingFit, read_points
from baton.planner.steady import Load, decode_shape, steady, steady_split

MODEL = ModelShape("toy", 8, 512, 8, 4, 64, 1408, 8192)
TRUE = Coefficients(
    5e11, 2e10, 2e11, 1e10, sharpness=2.5, step_s=2e-4, layer_s=3e-5, sequence_s=5e-6, sample_s=9e-6
)


def observe(noise: float = 0.0, seed: int = 0) -> list[Observation]:
    rng = random.Random(seed)
    cost = Profile("", "", MODEL, TRUE, (), "", "", True).cost()
    steps = step_grid(4096, 64, 2048, 1 << 16, 16)
    return [
        Observation(
            StepShape.of(chunks),
            cost.step_s(StepShape.of(chunks)) * (1 + rng.uniform(-noise, noise)),
            kind,
            (kind, chunks),
        )
        for kind, chunks in steps
    ]


def test_minimise_finds_parameters_over_orders_of_magnitude() -> None:
    x = np.linspace(1, 100, 50)
    measured = 3e-6 + x / 2e9
    found = minimise(lambda v: v[0] + x / v[1], measured, [1e-5, 1e8])
    assert found == pytest.approx([3e-6, 2e9], rel=1e-3)


def test_a_few_wild_points_bend_the_fit_little() -> None:
    x = np.linspace(1, 100, 60)
    measured = 2.0 * x
    measured[::15] *= 5
    assert minimise(lambda v: v[0] * x, measured, [1.0])[0] == pytest.approx(2.0, rel=0.02)


def test_a_prior_holds_what_data_do_not_determine() -> None:
    x = np.linspace(1, 10, 20)
    # Only the product counts.
    found = minimise(lambda v: v[0] * v[1] * x, 6 * x, [2.0, 1.0], [0.01, None])
    assert found == pytest.approx([2.0, 3.0], rel=0.01)


@pytest.mark.parametrize("measured", [[], [0.0], [-1.0], [float("nan")]])
def test_times_that_are_none_are_refused(measured: list[float]) -> None:
    with pytest.raises(ConfigError, match="nothing can be fitted"):
        minimise(lambda v: np.full(len(measured), v[0]), np.array(measured), [1.0])


def test_steps_are_predicted_after_a_fit_from_far_away() -> None:
    observations = observe(noise=0.02)
    start = Coefficients(
        1e11, 1e11, 1e11, 1e11, step_s=1e-5, layer_s=1e-5, sequence_s=1e-6, sample_s=1e-6
    )
    free = (
        "flops_per_s", "weight_bytes_per_s", "attention_flops_per_s", "kv_bytes_per_s",
        "sharpness", "layer_s", "sequence_s", "sample_s",
    )  # fmt: skip
    found = fit_steps(observations, start, dict.fromkeys(free), MODEL)
    cost = Profile("", "", MODEL, found, (), "", "", True).cost()
    errors = [abs(cost.step_s(each.shape) / each.seconds - 1) for each in observations]
    assert np.median(errors) < 0.02 and max(errors) < 0.1
    assert found.flops_per_s == pytest.approx(TRUE.flops_per_s, rel=0.1)
    assert found.kv_bytes_per_s == pytest.approx(TRUE.kv_bytes_per_s, rel=0.2)
    assert found.step_s == 1e-5, "what is not free stays"


def test_held_out_groups_are_not_seen() -> None:
    observations = observe()
    seen_groups: list[set[object]] = []

    def fit(seen):  # type: ignore[no-untyped-def]
        groups = {each.group for each in seen}
        seen_groups.append(groups)

        def predict(each: Observation) -> float:
            assert each.group not in groups
            return each.seconds / 1.1

        return predict

    found = {each.kind: each for each in cross_validate(observations, fit)}
    assert len(seen_groups) == 5
    assert found["step"].num_points == len(observations)
    assert set(found) == {"step", "decode", "prefill", "mixed"}
    assert found["decode"].median == pytest.approx(0.1)


def test_quantiles_of_the_error() -> None:
    found = held_out("step", [0.8, 1.0, 1.0, 1.1, 1.5])
    assert (found.median, found.num_points) == (0.1, 5)
    assert found.ratios[0] == 0.8 and found.ratios[-1] == 1.5
    assert found.p90 == pytest.approx(0.38)


def test_splits_depend_on_names_alone() -> None:
    values = [hash_fraction(("a", i)) for i in range(2000)]
    assert values[0] == pytest.approx(0.074107507), "the same in every process"
    assert len(set(values)) == 2000
    assert 0.45 < np.mean(values) < 0.55 and min(values) >= 0 and max(values) < 1


def test_pooled_families_borrow_from_their_kind() -> None:
    def point(family: str, x: float, rate: float) -> Point:
        return Point(x * rate, (("family", family),), lambda v: float(v[0]) * x)

    points = [point("many", x, 4.0) for x in range(1, 30)]
    points += [point("other", x, 2.0) for x in range(1, 30)] + [point("few", 5.0, 8.0)]
    found = fit_pooled(points, [1.0], {"family": 0.3})
    assert found.parameters([("family", "many")])[0] == pytest.approx(4, rel=0.03)
    assert found.parameters([("family", "other")])[0] == pytest.approx(2, rel=0.03)
    few, unknown = (found.parameters([("family", name)])[0] for name in ("few", "unknown"))
    assert unknown == found.common[0] and 2 < unknown < 4
    assert unknown < few <= 8.1
    with pytest.raises(ConfigError, match="nothing can be fitted"):
        fit_pooled([], [1.0], {})


def test_grid_stays_within_the_limits() -> None:
    steps = step_grid(1000, 16, 512, 8000, 16)
    assert {kind for kind, _ in steps} == {"decode", "prefill", "mixed"}
    for _, chunks in steps:
        assert len(chunks) <= 16 and sum(c.num_tokens for c in chunks) <= 512
        assert max(c.context + c.num_tokens for c in chunks) <= 1000
        assert sum(-(-(c.context + c.num_tokens) // 16) * 16 for c in chunks) <= 8000
    with pytest.raises(ConfigError, match="raise engine"):
        step_grid(16, 1, 8, 32, 16)


def measured_by(cost_s, policy: tuple[Policy, ...] = ()) -> Measured:  # type: ignore[no-untyped-def]
    steps = tuple(
        StepTime(kind, chunks, cost_s(StepShape.of(chunks)))
        for kind, chunks in step_grid(2048, 32, 1024, 1 << 15, 16)
    )
    return Measured("baton", "here", MODEL, steps, policy, 1e-5, 2e-5, 16, 4096, "2026-01-01")


def test_a_profile_of_measured_steps_predicts_them() -> None:
    true = Profile("", "", MODEL, TRUE, (), "", "", True).cost()
    policy = tuple(Policy(n, 1e-4 + 2e-6 * n) for n in (1, 4, 16))
    found = fit_profile(measured_by(true.step_s, policy))
    step = found.error("step")
    assert step is not None and step.median < 0.03 and step.num_points > 50
    assert (found.export_s, found.import_s, found.block_size) == (1e-5, 2e-5, 16)
    alone = fit_profile(measured_by(true.step_s))
    assert found.coefficients.step_s - alone.coefficients.step_s == pytest.approx(1e-4, rel=0.01)
    more = found.coefficients.sequence_s - alone.coefficients.sequence_s
    assert more == pytest.approx(2e-6, rel=0.05)
    checked = check_profile(alone, measured_by(true.step_s).steps)
    assert np.median([abs(ours / step.seconds - 1) for step, ours in checked]) < 0.03


def test_too_few_steps_are_refused() -> None:
    step = StepTime("decode", (ChunkShape(1, 8, True),), 1e-3)
    few = msgspec.structs.replace(measured_by(lambda shape: 1e-3), steps=(step,) * 3)
    with pytest.raises(ConfigError, match="too few"):
        fit_profile(few)


def test_steady_load_pays_for_the_prompts_of_others() -> None:
    cost = Profile("", "", MODEL, TRUE, (), "", "", True).cost()
    load = Load(512, 100, 8)
    apart, together = steady(cost, load, interference=0.0), steady(cost, load)
    assert apart.tpot_s == pytest.approx(cost.step_s(decode_shape(load)))
    assert together.tpot_s > apart.tpot_s
    assert steady(cost, load, queue=1.0).ttft_s > steady(cost, load, queue=0.0).ttft_s
    split = steady_split(cost, cost, load, 1, 1)
    assert split.tpot_s <= together.tpot_s
    rate = split.tokens_per_s
    assert steady_split(cost, cost, Load(512, 100, 16), 1, 1).tokens_per_s >= rate * 0.99


def _table(directory: Path, name: str, head: str, rows: list[tuple[object, ...]]) -> None:
    lines = [head, *(",".join(map(str, row)) for row in rows)]
    with gzip.open(directory / name, "wt") as file:
        file.write("\n".join(lines) + "\n")


def test_kernel_tables_give_the_rates_that_made_them(tmp_path: Path) -> None:
    rows = []
    for m in (1, 8, 64, 256, 1024, 4096):
        for n in (1024, 2048, 4096, 8192):
            for k in (1024, 4096, 8192):
                compute, memory = 2 * m * n * k / 4e14, (2 * n * k + 2 * m * (n + k)) / 1.5e12
                rows.append(("bfloat16", m, n, k, 1e3 * (5e-6 + max(compute, memory))))
    _table(tmp_path, "gpu.gemm_perf.v1.csv.gz", "gemm_dtype,m,n,k,latency", rows)
    found = fit_gemm(tmp_path, "gpu", "bfloat16")
    assert found.values["flops_per_s"] == pytest.approx(4e14, rel=0.05)
    assert found.values["weight_bytes_per_s"] == pytest.approx(1.5e12, rel=0.05)
    assert found.values["launch_s"] == pytest.approx(5e-6, rel=0.05)
    assert found.error.median < 0.03
    with pytest.raises(ConfigError, match="are left"):
        fit_gemm(tmp_path, "gpu", "fp8")
    with pytest.raises(ConfigError, match="no table"):
        fit_decode_attention(tmp_path, "gpu")


def test_rows_faster_than_the_peak_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = []
    for batch in (1, 2, 4, 8):
        for heads in (8, 16, 32):
            for tokens in (256, 1024, 4096):
                flops = batch * tokens**2 / 2 * 4 * heads * 128
                honest = 1e-5 + flops / 2e14
                rows.append((batch, tokens, heads, 8, 128, "bfloat16", 0, 1e3 * honest))
                if tokens == 4096:
                    rows.append((batch, tokens, heads, 1, 128, "bfloat16", 0, 1e3 * flops / 9e15))
    head = "batch_size,isl,num_heads,num_key_value_heads,head_dim,kv_cache_dtype,step,latency"
    _table(tmp_path, "gpu.context_attention_perf.v1.csv.gz", head, rows)
    found = fit_prompt_attention(tmp_path, "gpu", 1e15)
    assert found.num_impossible == 12
    assert found.values["attention_flops_per_s"] == pytest.approx(2e14, rel=0.05)


HEAD = (
    "id,backend,backend_version,model_path,system,precision,mode,isl,osl,gemm_quant_mode,"
    "moe_quant_mode,batch_size,tp_size,pp_size,attention_dp_size,moe_tp_size,moe_ep_size,"
    "prefill_batch_size,prefill_num_workers,prefill_tp_size,prefill_pp_size,"
    "prefill_attention_dp_size,prefill_moe_tp_size,prefill_moe_ep_size,decode_batch_size,"
    "decode_num_workers,decode_tp_size,decode_pp_size,decode_attention_dp_size,"
    "decode_moe_tp_size,decode_moe_ep_size,silicon_ttft_ms,silicon_tpot_ms,"
    "silicon_concurrency,measured"
)


def _row(**values: object) -> tuple[object, ...]:
    usual: dict[str, object] = {
        "id": "x", "backend": "vllm", "model_path": "m/Llama-3.1-8B", "system": "h100_sxm",
        "mode": "agg", "isl": 1024, "osl": 128, "batch_size": 8.0, "tp_size": 1.0,
        "silicon_ttft_ms": 50.0, "silicon_tpot_ms": 9.0, "silicon_concurrency": 8.0,
        "measured": "2026-01-01",
    }  # fmt: skip
    usual.update(values)
    return tuple(usual.get(name, "") for name in HEAD.split(","))


def test_a_configuration_is_neither_load_nor_answer(tmp_path: Path) -> None:
    rows = [
        _row(),
        _row(id="y", isl=2048, osl=64, batch_size=16.0, silicon_concurrency=16.0,
             silicon_ttft_ms=99.0, silicon_tpot_ms=10.0, measured="2026-02-02"),
        _row(tp_size=2.0),
        _row(backend_version="0.19"),
    ]  # fmt: skip
    _table(tmp_path, "rows.csv.gz", HEAD, rows)
    one, two, three, four = read_points(tmp_path / "rows.csv.gz")
    assert one.configuration == two.configuration
    assert len({p.configuration for p in (one, three, four)}) == 3
    assert not {name for name, _ in one.configuration} & set(NOT_CONFIGURATION)
    assert (three.num_devices, one.load, one.tpot_s) == (2, Load(1024, 128, 8.0), 0.009)


def test_parallelism_is_read_with_its_quirks(tmp_path: Path) -> None:
    moe = {"model_path": "d/DeepSeek-R1", "gemm_quant_mode": "fp8"}
    rows = [
        _row(**moe, tp_size=64.0, attention_dp_size=1.0, moe_tp_size=8.0, moe_ep_size=8.0),
        _row(**moe, tp_size=1.0, attention_dp_size=64.0, moe_tp_size=8.0, moe_ep_size=8.0),
        _row(**moe, tp_size=4.0, attention_dp_size=4.0, moe_tp_size=1.0, moe_ep_size=16.0),
        _row(**moe, tp_size=8.0, attention_dp_size=1.0, moe_tp_size=1.0, moe_ep_size=8.0),
        _row(**moe, mode="disagg", batch_size="", prefill_num_workers=2.0, prefill_tp_size=4.0,
             decode_num_workers=3.0, decode_tp_size=8.0, silicon_concurrency=30.0),
        _row(**moe, mode="disagg", batch_size="", decode_tp_size=8.0, silicon_concurrency=30.0),
    ]  # fmt: skip
    _table(tmp_path, "rows.csv.gz", HEAD, rows)
    points = read_points(tmp_path / "rows.csv.gz")
    assert [p.num_devices for p in points] == [8, 8, 4, 8, 32], "without worker counts: left out"
    assert [p.parallel.data for p in points] == [1, 8, 4, 1, 1]
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(tmp_path / "none.csv.gz")
    _table(tmp_path, "bad.csv.gz", HEAD, [_row(isl="many")])
    with pytest.raises(ConfigError, match="not of this form"):
        read_points(tmp_path / "bad.csv.gz")


def test_serving_predictions_do_not_read_the_answers(tmp_path: Path) -> None:
    rows = [
        _row(isl=isl, batch_size=float(c), silicon_concurrency=float(c),
             silicon_tpot_ms=6 + 0.05 * c * isl / 512, silicon_ttft_ms=20 + 4 * c)
        for isl in (512, 1024, 2048)
        for c in (1, 4, 16, 64)
    ]  # fmt: skip
    _table(tmp_path, "rows.csv.gz", HEAD, rows)
    points = read_points(tmp_path / "rows.csv.gz")
    fit = ServingFit(points)
    for point in points:
        blind = msgspec.structs.replace(point, tpot_s=float("nan"), ttft_s=float("nan"))
        assert fit.predict(blind) == fit.predict(point)
    errors = [abs(fit.predict(p)[1] / p.tpot_s - 1) for p in points]
    assert np.median(errors) < 0.12
    assert fit.parameters(points[0])["weight_bytes"] > 0
