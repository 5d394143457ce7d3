"""Write `data/profiles` from published measurements.

    python bench/reproduce/make_profiles.py --kernels DIR --serving FILE --layers DIR [--out DIR]

kernels: aiconfigurator's tables of single kernels; serving: its measured serving points; layers:
LLMServingSim's tables of layers. Each profile keeps the error on what its fit did not see.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from baton.core.cost import Coefficients, HeldOut, Profile
from baton.planner.calibrate import (
    Observation,
    cross_validate,
    fit_steps,
    hash_fraction,
    held_out,
)  # fmt: skip
from baton.planner.hardware import find_device
from baton.planner.kernels import (
    Fitted,
    fit_allreduce,
    fit_decode_attention,
    fit_gemm,
    fit_prompt_attention,
)  # fmt: skip
from baton.planner.layer_tables import read_steps
from baton.planner.models import find_model
from baton.planner.profiles import Shares
from baton.planner.serving import START, ServingFit, ServingPoint, coefficients, read_points

ROOT = Path(__file__).parents[2]
GPUS = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s")
KERNEL_DATE = "2026"
"""The tables carry versions (vLLM 0.14 and 0.19), no dates."""
BORROWED_ATTENTION = {"h200_sxm": "h100_sxm"}
"""Of the H200's prompt attention table three rows in four are faster than its peak: same dies."""
SMALL_KERNELS, SMALL_KERNEL_S = 4, 3e-6
"""Norms, rotation, activation of a layer: aiconfigurator's 3 us each."""
SOURCE = "ai-dynamo/aiconfigurator@095f58a5 (Apache-2.0)"
LAYERS = {
    "RTX4090_Llama-3.1-8B_tp1": ("RTX 4090", "Llama-3.1-8B", "2026-08-17"),
    "RTXPRO6000_Llama-3.1-8B_tp1": ("RTX PRO 6000", "Llama-3.1-8B", "2026-04-24"),
    "RTXPRO6000_Qwen3-32B_tp1": ("RTX PRO 6000", "Qwen3-32B", "2026-04-24"),
}
MIN_POINTS = 20
FREE = (
    "flops_per_s", "weight_bytes_per_s", "attention_flops_per_s", "kv_bytes_per_s",
    "sharpness", "step_s", "layer_s", "sequence_s", "sample_s",
    "mixed_kv_factor",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = ROOT / "data"
    parser.add_argument("--kernels", type=Path, default=data / "aiconfigurator" / "kernels")
    parser.add_argument(
        "--serving", type=Path, default=data / "aiconfigurator" / "silicon_e2e.csv.gz"
    )
    parser.add_argument("--layers", type=Path, default=data / "llmservingsim" / "profile")
    parser.add_argument("--out", type=Path, default=data / "profiles")
    args = parser.parse_args()
    points = [p for p in read_points(args.serving) if not p.model.is_moe and not p.split]
    fit = ServingFit(points)
    profiles = serving_profiles(points, fit)
    kernels = {gpu: Kernels(args.kernels, gpu) for gpu in GPUS}
    common = {name: float(value) for name, value in zip(START, fit.common(), strict=True)}
    for gpu, each in kernels.items():
        profiles[f"{gpu.replace('_', '-')}.kernels"] = each.profile(common)
    for stem, (device, model, date) in LAYERS.items():
        name = f"{device.lower().replace(' ', '-')}.layers.{model.lower()}"
        profiles[name] = layer_profile(args.layers, stem, device, model, date, common)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, profile in profiles.items():
        (args.out / f"{name}.json").write_bytes(profile.to_json())
        errors = ", ".join(f"{e.kind} {e.median:.1%} (p90 {e.p90:.1%}, n {e.num_points})"
                           for e in profile.held_out)  # fmt: skip
        print(f"{name}: {errors}")
    shares = datasheet_shares(kernels, common, points)
    (args.out / "datasheet.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(shares), indent=1) + b"\n"
    )
    for error in shares.held_out:
        print(f"datasheet alone: {error.kind} {error.median:.1%} (p90 {error.p90:.1%})")
    return 0


class Kernels:
    """The fits of one GPU's tables."""

    def __init__(self, directory: Path, gpu: str) -> None:
        self.gpu, self.device = gpu, find_device(gpu)
        attention = BORROWED_ATTENTION.get(gpu, gpu)
        peak = find_device(attention).bf16_flops_per_s
        self.gemm = fit_gemm(directory, gpu, "bfloat16")
        self.decode = fit_decode_attention(directory, gpu)
        self.prompt = fit_prompt_attention(directory, attention, peak)
        self.reduce = fit_allreduce(directory, gpu)

    @property
    def layer_s(self) -> float:
        launches = 4 * self.gemm.values["launch_s"] + self.decode.values["launch_s"]
        return launches + SMALL_KERNELS * SMALL_KERNEL_S

    @property
    def fits(self) -> tuple[Fitted, ...]:
        return self.gemm, self.decode, self.prompt, self.reduce

    def profile(self, common: dict[str, float]) -> Profile:
        link = find_device(self.gpu).link_bytes_per_s
        rates = Coefficients(
            flops_per_s=self.gemm.values["flops_per_s"],
            weight_bytes_per_s=self.gemm.values["weight_bytes_per_s"],
            attention_flops_per_s=self.prompt.values["attention_flops_per_s"],
            kv_bytes_per_s=self.decode.values["kv_bytes_per_s"],
            activation_bytes_per_s=self.gemm.values["weight_bytes_per_s"],
            sharpness=self.gemm.values["sharpness"],
            step_s=common["step_s"],
            layer_s=self.layer_s,
            sequence_s=common["sequence_s"],
            allreduce_s=self.reduce.values["allreduce_s"],
            allreduce_bytes_per_s=self.reduce.values["allreduce_bytes_per_s"],
            hop_s=1e-5,
            hop_bytes_per_s=0.8 * link,
            expert_factor=common["expert_factor"],
        )
        notes = (
            "From single kernels in 16 bits. step_s and sequence_s are those of whole engines on "
            "other devices; layer_s is launches; hop_* are assumptions."
        )
        if self.gpu in BORROWED_ATTENTION:
            notes += f" Prompt attention is {BORROWED_ATTENTION[self.gpu]}'s: this device's table "
            notes += "claims more than its peak."
        return Profile(
            engine="vllm-kernels",
            device=self.device.name,
            model=find_model("Llama-3.1-8B"),
            coefficients=rates,
            held_out=tuple(fit.error for fit in self.fits),
            source=f"{SOURCE}: kernels of {self.gpu}",
            date=KERNEL_DATE,
            measured=True,
            power=self.device.power(),
            fits=("flops_per_s", "weight_bytes_per_s", "attention_flops_per_s", "kv_bytes_per_s",
                  "sharpness", "layer_s", "allreduce_s", "allreduce_bytes_per_s"),
            notes=notes,
        )  # fmt: skip


def serving_profiles(points: list[ServingPoint], fit: ServingFit) -> dict[str, Profile]:
    """One for each family with enough points; its error is on configurations left out."""
    ratios: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for half in (0, 1):
        seen = [p for p in points if (hash_fraction(p.configuration) < 0.5) == (half == 0)]
        part = ServingFit(seen)
        for p in points:
            if (hash_fraction(p.configuration) < 0.5) != (half == 0):
                ttft_s, tpot_s = part.predict(p)
                ratios[p.levels[-1]].append((p.tpot_s / tpot_s, p.ttft_s / ttft_s))
    families = defaultdict(list)
    for p in points:
        families[p.levels[-1]].append(p)
    profiles = {}
    for family, members in families.items():
        if len(members) < MIN_POINTS:
            continue
        first = members[0]
        device = find_device(first.device)
        tpot, ttft = np.array(ratios[family]).T
        values = np.array(list(fit.parameters(first).values()))
        parameters = fit.parameters(first)
        name = f"{first.device.replace('_', '-')}.{first.engine}.{first.model.name.lower()}"
        bits = f"{first.model.weight_bytes * 8:.0f}" if first.model.weight_bytes >= 1 else "4"
        profiles[f"{name}.{bits}bit"] = Profile(
            engine=first.engine,
            device=device.name,
            model=first.model,
            coefficients=coefficients(values, device, first.model),
            held_out=(held_out("decode", list(tpot)), held_out("ttft", list(ttft[ttft > 0]))),
            source=f"{SOURCE}: {len(members)} serving points",
            date=max(p.date for p in members) or "undated",
            measured=True,
            power=device.power(),
            fits=tuple(name for name in START if name != "expert_factor"),
            notes=(
                "From TTFT and TPOT of whole servers at constant concurrency; `decode` is the "
                "error of TPOT, `ttft` that of TTFT with its queue. Of the prompts of others, "
                f"{parameters['interference']:.2f} came between a request's tokens."
            ),
        )
    return profiles


def layer_profile(
    directory: Path, stem: str, device_name: str, model_name: str, date: str,
    common: dict[str, float],
) -> Profile:  # fmt: skip
    device, model = find_device(device_name), find_model(model_name)
    steps = read_steps(directory, stem, model)
    start = Coefficients(
        flops_per_s=0.7 * device.bf16_flops_per_s,
        weight_bytes_per_s=0.8 * device.memory_bytes_per_s,
        attention_flops_per_s=0.4 * device.bf16_flops_per_s,
        kv_bytes_per_s=0.8 * device.memory_bytes_per_s,
        mixed_kv_factor=1.5,
        step_s=1e-4, layer_s=2e-5, sequence_s=1e-6, sample_s=1e-6,
    )  # fmt: skip
    prior: dict[str, float | None] = dict.fromkeys(FREE)
    prior.update(
        attention_flops_per_s=0.2,
        sharpness=0.5,
        step_s=1.0,
        layer_s=1.0,
        sequence_s=1.0,
        sample_s=1.0,
    )

    def fit(seen: list[Observation]) -> Coefficients:
        return fit_steps(seen, start, prior, model)

    def predictor(seen: list[Observation]):  # type: ignore[no-untyped-def]
        cost = Profile("", "", model, fit(seen), (), "", "", True).cost()
        return lambda step: cost.step_s(step.shape)

    errors: list[HeldOut] = cross_validate(steps, predictor, num_folds=2)
    rates = fit(steps)
    rates = msgspec.structs.replace(rates, step_s=rates.step_s + common["step_s"])
    return Profile(
        engine="vllm-layers",
        device=device.name,
        model=model,
        coefficients=rates,
        held_out=tuple(errors),
        source="casys-kaist/LLMServingSim@5daddb21 (MIT): layer tables, vLLM 0.19.0",
        date=date,
        measured=True,
        power=device.power(),
        fits=FREE,
        notes="From single layers; the engine's time a step between them is that of whole engines.",
    )


def datasheet_shares(
    kernels: dict[str, Kernels], common: dict[str, float], points: list[ServingPoint]
) -> Shares:
    """Medians over the devices.

    The error is that of whole engines on a device of which nothing was measured: each device's
    serving points, predicted by a fit to the others. Other makers' devices may be further off.
    """

    def shares_of(each: Kernels) -> dict[str, float]:
        device = each.device
        return {
            "flops": each.gemm.values["flops_per_s"] / device.bf16_flops_per_s,
            "weight_bytes": each.gemm.values["weight_bytes_per_s"] / device.memory_bytes_per_s,
            "attention_flops": each.prompt.values["attention_flops_per_s"]
            / device.bf16_flops_per_s,
            "kv_bytes": each.decode.values["kv_bytes_per_s"] / device.memory_bytes_per_s,
            "allreduce_bytes": each.reduce.values["allreduce_bytes_per_s"]
            / device.link_bytes_per_s,
            "sharpness": each.gemm.values["sharpness"],
            "layer_s": each.layer_s,
            "allreduce_s": each.reduce.values["allreduce_s"],
        }

    all_shares = {gpu: shares_of(each) for gpu, each in kernels.items()}

    found = list(all_shares.values())
    medians = {name: float(f"{median(s[name] for s in found):.4g}") for name in found[0]}

    decode, ttft = [], []
    for device in sorted({p.device for p in points}):
        others = ServingFit([p for p in points if p.device != device])
        for p in points:
            if p.device == device:
                ttft_s, tpot_s = others.predict(p)
                decode.append(p.tpot_s / tpot_s)
                ttft.append(p.ttft_s / ttft_s)
    return Shares(
        **medians,
        step_s=common["step_s"],
        sequence_s=common["sequence_s"],
        held_out=(held_out("decode", decode), held_out("ttft", [r for r in ttft if r > 0])),
        source=(
            f"medians over {', '.join(kernels)} of {SOURCE}; held out: serving points of H100, "
            "H200, B200 and GB200, each predicted without any of its own"
        ),
        date="2026",
    )


if __name__ == "__main__":
    raise SystemExit(main())
