"""The cost model: what it counts, how it bends, and that it is cheap."""

from __future__ import annotations

import time

import msgspec
import pytest

from baton.core.codec_choice import CodecFigures, choose_codec
from baton.core.cost import (
    ChunkShape,
    Coefficients,
    HeldOut,
    Link,
    ModelShape,
    Parallel,
    Power,
    Profile,
    Rest,
    StepShape,
    after_rest_s,
    model_shape,
    shape,
    transfer_s,
)
from baton.core.keys import root_key
from baton.core.plan import Chunk, StepPlan
from baton.core.sequence import Sequence
from baton.errors import ConfigError
from baton.model_spec import ModelSpec, RopeSpec
from baton.types import Request, SamplingParams

MODEL = ModelShape("toy", 4, 64, 8, 2, 8, 128, 1000)
RATES = Coefficients(1e9, 1e8, 1e9, 1e8)
PROFILE = Profile("baton", "here", MODEL, RATES, (), "a test", "2026-01-01", True)
EXPERTS = msgspec.structs.replace(
    MODEL, num_experts=8, experts_per_token=2, expert_size=32, intermediate_size=0
)


def decode(batch: int, context: int) -> StepShape:
    return StepShape.of([ChunkShape(1, context, True)] * batch)


def prompt(num_tokens: int, context: int = 0) -> StepShape:
    return StepShape.of([ChunkShape(num_tokens, context, True)])


def cost(model: ModelShape = MODEL, parallel: Parallel | None = None, **changes: float | None):
    rates = msgspec.structs.replace(RATES, **changes)
    return msgspec.structs.replace(PROFILE, model=model, coefficients=rates).cost(None, parallel)


def test_shape_of_a_plan_is_that_of_its_chunks() -> None:
    root = root_key(b"", "", b"")
    seqs = [
        Sequence(Request(str(i), (1,) * 64, SamplingParams(8)), root, 16, 0.0) for i in range(3)
    ]
    plan = StepPlan(
        1,
        (Chunk(seqs[0], 40, 1, True), Chunk(seqs[1], 0, 30, False), Chunk(seqs[2], 16, 48, True)),
    )
    found = shape(plan)
    assert found == StepShape.of(
        [ChunkShape(1, 40, True), ChunkShape(30, 0, False), ChunkShape(48, 16, True)]
    )
    assert found == StepShape(79, 2, 3, 41 + 30 + 64, 40.5 + 450 + 48 * (16 + 24))


def test_empty_step_costs_the_fixed_time_alone() -> None:
    found = cost(step_s=0.5, layer_s=0.25).parts(StepShape(0, 0, 0, 0, 0.0))
    assert found.overhead_s == 0.5 + 4 * 0.25
    assert found.attention_s == found.kv_s == found.activation_s == 0


def test_weights_are_counted_as_published() -> None:
    llama = ModelShape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256)
    assert llama.num_weights == pytest.approx(8.03e9, rel=0.01)
    assert llama.kv_bytes_per_token == 128 * 1024
    assert EXPERTS.num_moe_layers == 4 and EXPERTS.is_moe
    assert EXPERTS.num_weights == 4 * (64 * 20 * 8 + 8 * 3 * 64 * 32) + 2 * 64_000


def test_shape_of_a_spec_is_the_same_model() -> None:
    spec = ModelSpec(
        architecture="LlamaForCausalLM", vocab_size=4096, hidden_size=256, intermediate_size=704,
        num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, max_position=1024,
        rms_norm_eps=1e-5, rope=RopeSpec(), qk_norm=False, qkv_bias=False, o_bias=False,
        mlp_bias=False, sliding_window=(None, 128, None, 128, None, None),
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    found = model_shape(spec, "demo")
    norms = 6 * 2 * 256 + 256
    assert found.num_weights == spec.num_parameters() - norms
    assert found.kv_bytes_per_token == spec.kv_bytes_per_token()
    assert (found.window, found.num_window_layers) == (128, 2)
    assert model_shape(spec, "demo", "float32").weight_bytes == 4


def test_few_rows_cost_bytes_and_many_cost_flops() -> None:
    linear = [cost().parts(prompt(n)).linear_s for n in (1, 2, 4096, 8192)]
    assert linear[1] == pytest.approx(linear[0], rel=0.01)
    head = 64_000 * (2 / 1e8)  # one row of logits, bound by memory
    assert linear[3] - head == pytest.approx(2 * (linear[2] - head), rel=0.01)
    assert linear[0] == pytest.approx((MODEL.dense_weights + 64_000) * 2 / 1e8, rel=0.01)
    assert linear[3] - head == pytest.approx(8192 * 2 * MODEL.dense_weights / 1e9, rel=0.01)


def test_smooth_maximum_is_above_both_and_below_their_sum() -> None:
    # At the ridge, 10 rows, both take the same time.
    step = StepShape(10, 0, 1, 10, 50.0)
    both = MODEL.dense_weights * 2 / 1e8
    for sharpness in (1.0, 2.0, 4.0):
        found = cost(sharpness=sharpness).parts(step).linear_s
        assert found == pytest.approx(both * 2 ** (1 / sharpness))


def test_attention_grows_with_pairs_and_kv_with_context() -> None:
    short, long = cost().parts(decode(4, 100)), cost().parts(decode(4, 200))
    assert long.kv_s / short.kv_s == pytest.approx(201 / 101)
    assert long.linear_s == short.linear_s
    assert cost().parts(decode(4, 100)).kv_s == pytest.approx(404 * MODEL.kv_bytes_per_token / 1e8)
    assert cost().parts(prompt(100)).attention_s == pytest.approx(4 * 4 * 64 * 5000 / 1e9)
    # Two chunks of a prompt see the pairs that the whole one sees.
    halves = prompt(50).attention_pairs + prompt(50, 50).attention_pairs
    assert halves == prompt(100).attention_pairs


def test_prompts_in_a_step_slow_the_reading_of_kv_where_they_do() -> None:
    decodes = [ChunkShape(1, 100, True)] * 3
    mixed = StepShape.of([*decodes, ChunkShape(20, 0, True)])
    slow = cost(mixed_kv_factor=2.0)
    assert slow.parts(mixed).kv_s == pytest.approx(2 * cost().parts(mixed).kv_s)
    for alone in (StepShape.of(decodes), prompt(20, 100)):
        assert slow.parts(alone) == cost().parts(alone)


def test_sliding_windows_bound_what_is_read() -> None:
    windowed = msgspec.structs.replace(MODEL, window=16, num_window_layers=2)
    near, far = cost(windowed).parts(decode(1, 8)), cost(windowed).parts(decode(1, 4096))
    full = cost().parts(decode(1, 4096))
    assert near.kv_s == pytest.approx(cost().parts(decode(1, 8)).kv_s)
    assert far.kv_s == pytest.approx(full.kv_s / 2, rel=0.01)


def test_tensor_parallel_shares_work_and_pays_for_talking() -> None:
    one = cost().parts(decode(8, 500))
    four = cost(MODEL, Parallel(tensor=4), allreduce_s=1e-5, allreduce_bytes_per_s=1e8)
    parts = four.parts(decode(8, 500))
    assert parts.linear_s == pytest.approx(one.linear_s / 4)
    assert parts.kv_s == pytest.approx(one.kv_s / 2), "two KV heads: two ranks hold a copy each"
    assert parts.communication_s == pytest.approx(8 * 1e-5 + 8 * 8 * 2 * 128 * 0.75 / 1e8)
    assert one.communication_s == 0


def test_pipeline_stages_take_their_turns() -> None:
    two = cost(MODEL, Parallel(pipeline=2), hop_s=1e-3, hop_bytes_per_s=1e6)
    step = decode(8, 500)
    assert two.step_s(step) == pytest.approx(cost().step_s(step) + 1e-3 + 8 * 128 / 1e6)
    assert two.stage_s(step) == two.step_s(step) / 2


def test_a_batch_touches_the_experts_that_it_needs() -> None:
    touched = [cost(EXPERTS).parts(decode(n, 0)).experts_s for n in (1, 2, 64)]
    weights = 4 * EXPERTS.expert_weights
    assert touched[0] == pytest.approx(2 * weights * 2 / 1e8, rel=0.01)
    expected = 8 * (1 - 0.75**2)
    assert touched[1] == pytest.approx(expected * weights * 2 / 1e8, rel=0.01)
    many = cost(EXPERTS).parts(prompt(4096)).experts_s
    assert many == pytest.approx(4096 * 2 * 2 * weights / 1e9, rel=0.01)
    slower = cost(EXPERTS, expert_factor=1.5).parts(decode(2, 0)).experts_s
    assert slower == pytest.approx(1.5 * touched[1])


def test_data_parallel_attention_leaves_experts_over_all_ranks() -> None:
    one, four = cost(EXPERTS), cost(EXPERTS, Parallel(data=4))
    step = decode(64, 500)
    assert four.parts(step).kv_s == pytest.approx(one.parts(step).kv_s / 4)
    assert four.parts(step).experts_s == pytest.approx(one.parts(step).experts_s / 4)


def test_power_lies_between_idle_and_the_limit() -> None:
    power = Power(100, 500, 200, 700)
    idle = cost(step_s=100.0).watts(decode(1, 10), power)
    assert idle == pytest.approx(100, rel=0.01)
    busy = cost().watts(prompt(8192), power)
    decoding = cost().watts(decode(1, 100), power)
    assert 500 < busy <= 700
    assert 250 < decoding < 420
    assert cost(step_s=0.0).watts(StepShape(0, 0, 0, 0, 0.0), power) <= 700


def test_a_prediction_takes_less_than_10_microseconds() -> None:
    model = cost(EXPERTS, Parallel(tensor=2, data=2), allreduce_s=1e-6)
    step = decode(64, 1000)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        for _ in range(200):
            model.step_s(step)
        best = min(best, (time.perf_counter() - begin) / 200)
    assert best < 10e-6


def test_transfer_counts_bytes_blocks_and_latency_once() -> None:
    link = Link(1e6, latency_s=0.5, per_block_s=0.01)
    assert transfer_s(2e6, link, 10) == pytest.approx(0.5 + 2.0 + 0.1)
    assert transfer_s(0, link, 0) == 0
    with pytest.raises(ValueError, match="rate"):
        transfer_s(1e6, Link(0.0))


def test_a_codec_moves_less_and_costs_at_both_ends() -> None:
    link = Link(1e6)
    codec = CodecFigures("int8", 500, encode_s=1e-4, decode_s=2e-4)
    # The wire is the slowest stage; the others show once.
    assert transfer_s(10_000, link, 10, codec) == pytest.approx(10 * 5e-4 + 3e-4)
    slow = CodecFigures("int8", 500, encode_s=1e-2, decode_s=2e-4)
    assert transfer_s(10_000, link, 10, slow) == pytest.approx(10 * 1e-2 + 5e-4 + 2e-4)


def test_time_a_block_does_not_change_which_codec_is_best() -> None:
    codec = CodecFigures("int8", 500, encode_s=1e-4, decode_s=2e-4, kl=0.001)
    for link in (Link(1e6), Link(1e6, 0.0, 0.5)):
        assert choose_codec(1000, [codec], link, 0.01).codec == "int8"
    assert choose_codec(1000, [codec], Link(1e6, 0.0, 0.5), 0.01).predicted_s > 0.5


def test_profile_survives_json() -> None:
    error = HeldOut("decode", 3, 0.1, 0.2, (0.9, 1.0, 1.2))
    profile = msgspec.structs.replace(PROFILE, held_out=(error,), power=Power(1, 2, 3, 4))
    assert Profile.from_json(profile.to_json()) == profile
    assert profile.error("decode") == error
    assert profile.error("prefill") == error, "the first one, where there is none of that kind"
    assert PROFILE.error("decode") is None


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b'{"format": 2}'])
def test_no_profile_is_refused_with_a_sentence(text: bytes) -> None:
    with pytest.raises(ConfigError, match="no profile of this version"):
        Profile.from_json(text)


def test_what_a_rest_costs_is_on_the_lines_between_what_was_measured() -> None:
    rests = (Rest(0.01, 0.001), Rest(0.05, 0.003))
    found = [after_rest_s(rests, rest_s) for rest_s in (0.0, 0.005, 0.01, 0.03, 0.05, 9.0)]
    assert found == pytest.approx([0.0, 0.0005, 0.001, 0.002, 0.003, 0.003])
    assert after_rest_s((), 1.0) == 0.0
