"""Devices, prices, model shapes and bundled profiles: what they say, and what they refuse."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest

from baton.core.cost import Parallel, StepShape
from baton.errors import ConfigError
from baton.planner.hardware import data_dir, devices, find_device, find_price, prices
from baton.planner.models import MODELS, find_model
from baton.planner.profiles import bundled_profiles, datasheet_profile, find_profile, read_profile

NEEDED = ("A100", "H100", "H200", "B200", "L40S", "A10G", "L4", "T4", "MI300X", "RTX 4090")
PUBLISHED_SIZES = {
    "Llama-2-7B": 6.7e9, "Llama-2-13B": 13e9, "Llama-2-70B": 69e9, "Llama-3.1-8B": 8.03e9,
    "Llama-3.1-70B": 70.6e9,
    "Mistral-7B": 7.24e9, "Yi-34B": 34.4e9, "Qwen3-32B": 32.8e9, "OPT-13B": 13e9, "OPT-66B": 66e9,
    "OPT-175B": 175e9, "BLOOM-176B": 176e9, "Qwen3-30B-A3B": 30.5e9, "Qwen3-235B-A22B": 235e9,
    "gpt-oss-120b": 117e9, "MiniMax-M2.5": 230e9, "DeepSeek-V3": 671e9, "Kimi-K2.5": 1.03e12,
    "GLM-5": 744e9, "Qwen3.5-397B-A17B": 397e9,
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_what_planners_ask_for_is_there_with_a_price_and_a_date(name: str) -> None:
    device = find_device(name)
    assert device.bf16_flops_per_s > 1e13 and device.memory_bytes_per_s > 1e11
    assert 1e10 < device.memory_bytes < 1e12
    price = find_price(device)
    assert price is not None and price.basis != "former"
    assert 0.1 < price.usd_per_device_hour < 20
    assert price.date and price.source


def test_published_figures() -> None:
    h100, a100 = find_device("h100_sxm"), find_device(" a100 ")
    assert (h100.name, a100.name) == ("H100 SXM", "A100-80GB SXM")
    assert h100.bf16_flops_per_s == 989e12 and h100.memory_bytes_per_s == 3.35e12
    price = find_price(h100)
    assert price is not None and price.usd_per_device_hour == pytest.approx(6.88)
    azure = find_price(h100, "Azure")
    assert azure is not None and azure.usd_per_device_hour == pytest.approx(12.29)
    assert find_price(h100, "Nobody") is None
    assert find_device("GB200").devices_per_node == 4


def test_former_prices_are_kept_but_not_used() -> None:
    a100 = find_device("A100-40GB")
    assert [p.basis for p in prices(a100)].count("former") == 1
    found = find_price(a100)
    assert found is not None and found.usd_per_device_hour == pytest.approx(2.745, abs=1e-3)


def test_peak_follows_the_width_of_weights() -> None:
    h100, b200, a100 = map(find_device, ("H100", "B200", "A100"))
    assert h100.peak(2) == 989e12 and h100.peak(1) == 1978e12
    assert h100.peak(0.56) == 1978e12, "no 4 bits there: the 8 bits' rate"
    assert b200.peak(0.56) == 9e15
    assert a100.peak(1) == 312e12
    power = h100.power()
    assert power is not None and power.idle_w < power.compute_w < power.max_w == 700


def test_every_row_has_a_source_and_every_price_a_device() -> None:
    names = {device.name for device in devices()}
    assert len(names) == len(devices())
    assert all(device.source and device.confidence for device in devices())
    for device in devices():
        for price in prices(device):
            assert price.date and price.source and price.basis
    with (data_dir("hardware") / "prices.csv").open() as lines:
        assert {row["device"] for row in csv.DictReader(lines)} <= names


@pytest.mark.parametrize("find", [find_device, find_model])
def test_unknown_names_are_refused_with_the_nearest(find: object) -> None:
    assert callable(find)
    with pytest.raises(ConfigError, match="not known") as refused:
        find("zzz")
    assert "Llama-3.1-8B" in str(refused.value) or "H100" in str(refused.value)
    with pytest.raises(ConfigError, match="did you mean"):
        find("H100X" if find is find_device else "Llama-3.1-8")


def test_missing_data_are_named() -> None:
    with pytest.raises(ConfigError, match="'nothing' is missing"):
        data_dir("nothing")


@pytest.mark.parametrize(("name", "size"), PUBLISHED_SIZES.items())
def test_models_have_the_sizes_in_their_names(name: str, size: float) -> None:
    assert find_model(name).num_weights == pytest.approx(size, rel=0.04)


def test_every_model_is_checked_and_paths_are_names() -> None:
    assert {shape.name for shape in MODELS.values()} == set(PUBLISHED_SIZES)
    assert find_model("deepseek-ai/DeepSeek-R1").name == "DeepSeek-V3"
    assert find_model("nvidia/Llama-3.1-8B-Instruct-FP8").name == "Llama-3.1-8B"


def test_bundled_profiles_are_what_they_say() -> None:
    found = bundled_profiles()
    names = {find_device(profile.device).name for profile in found.values()}
    wanted = ("A100", "H100", "H200", "B200", "L40S", "RTX 4090", "RTX PRO 6000")
    assert {find_device(name).name for name in wanted} <= names
    for profile in found.values():
        assert profile.measured and profile.held_out and profile.source and profile.date
        device = find_device(profile.device)
        rates = profile.coefficients
        assert 0.05 < rates.flops_per_s / device.peak(profile.model.weight_bytes) < 1.5
        assert 0.2 < rates.weight_bytes_per_s / device.memory_bytes_per_s < 1.5
        for error in profile.held_out:
            assert error.num_points >= 20 and len(error.ratios) > 10
            assert error.ratios == tuple(sorted(error.ratios))


def test_the_nearest_profile_is_found() -> None:
    llama = find_model("Llama-3.1-70B")
    in_8_bits = msgspec.structs.replace(llama, weight_bytes=1.0)
    found = find_profile(find_device("H200"), in_8_bits)
    assert (found.model.name, found.model.weight_bytes) == ("Llama-3.1-70B", 1.0)
    assert find_profile(find_device("H200"), in_8_bits, "vllm").engine == "vllm"
    assert find_profile(find_device("A100"), llama).engine == "vllm-kernels"
    in_16_bits = find_profile(find_device("H200"), llama)
    assert in_16_bits.model.weight_bytes == 2, "its kernels, before engines of other widths"


@pytest.mark.parametrize("name", ["L4", "A10G", "T4", "MI300X"])
def test_a_datasheet_estimate_says_so_and_errs_more(name: str) -> None:
    found = find_profile(find_device(name), find_model("Llama-3.1-8B"))
    assert not found.measured and found.engine == "datasheet"
    assert "estimate" in found.notes
    assert found.held_out and found.held_out[0].median > 0.05


def test_a_faster_device_is_predicted_faster() -> None:
    model = find_model("Llama-3.1-70B")
    step = StepShape(32, 32, 32, 32 * 1000, 32_000.0)
    times = [
        datasheet_profile(find_device(name), model).cost(None, Parallel(8)).step_s(step)
        for name in ("A100", "H100", "H200", "B200")
    ]
    assert times == sorted(times, reverse=True)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="no profile"):
        read_profile(tmp_path / "bad.json")
