"""`baton profile`: how long Baton's own steps take on this machine, as a file to plan with."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from baton.cli.parser import Parser, UsageError, add_config_flags, config_from
from baton.cli.terminal import print_table
from baton.config import Config, parse_cpus
from baton.core.cost import Profile
from baton.errors import ConfigError

SUMMARY = (
    "Measure how long steps of a model take on this machine: prompts, decoding, both together, at\n"
    "several contexts, and copies of KV. Writes a profile for simulate and plan, with the error\n"
    "that it has on steps which its fit did not see. Keep the machine free of other work so long."
)
EXAMPLES = """\
  baton profile --model ./my-model                         two minutes, profile.json
  baton profile --model ./my-model --threads 2 --cpus 0-1  as one worker will run
  baton profile --model ./my-model --seconds 400 --out xeon.json
"""
DEFAULT_SECONDS = 120
MAX_SECONDS = 540
POOL_TOKENS = 32 * 1024
"""Enough for batches at long contexts; no need to fill the memory."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, metavar="S",
        help=f"How long to measure, at most {MAX_SECONDS}. [{DEFAULT_SECONDS}]",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="profile.json", metavar="FILE", help="Where to write it. [profile.json]"
    )
    parser.add_argument("--name", default="", help="What to call the machine. [its processor]")
    add_config_flags(parser, only=("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write the file, print a table; 0."""
    if not 0 < args.seconds <= MAX_SECONDS:
        raise UsageError(f"--seconds {args.seconds:g} must be more than 0, at most {MAX_SECONDS}")
    config = config_from(args)
    if not config.model.path:
        raise ConfigError("no model to measure: give --model DIR, or model.path in --config FILE")
    profile, num_rounds = _measure(config, args.seconds, args.name)
    try:
        Path(args.out).write_bytes(profile.to_json())
    except OSError as error:
        raise ConfigError(f"cannot write {args.out}: {error.strerror}") from None
    _print(profile, num_rounds)
    print(args.out)
    return 0


def _measure(config: Config, seconds: float, name: str) -> tuple[Profile, int]:
    from baton.core.cost import Rest
    from baton.core.model_shape import model_shape
    from baton.engine.build import load_model, resolve_limits
    from baton.engine.profiling import Bench
    from baton.model.hub import resolve_model
    from baton.observe.progress import counting_progress, loading_progress
    from baton.planner.profile import Measured, Policy, StepTime, fit_profile, step_grid
    from baton.worker.telling import telling

    if config.engine.cpus:
        os.sched_setaffinity(0, parse_cpus(config.engine.cpus, "engine.cpus"))
    model_dir = resolve_model(config.model.path)
    with loading_progress("loading") as told:
        loaded = load_model(config, model_dir, progress=told)
    limits = resolve_limits(config, loaded.spec, loaded.device, loaded.dtype, with_store=False)
    engine = config.engine
    num_blocks = min(limits.num_blocks, POOL_TOKENS // engine.block_size)
    steps = step_grid(
        limits.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens,
        num_blocks * engine.block_size, engine.block_size,
    )  # fmt: skip
    bench = Bench(loaded, num_blocks, engine.block_size, engine.max_num_seqs)
    with counting_progress("measuring, seconds") as counted:
        found = bench.time_steps(
            [chunks for _, chunks in steps], seconds, counted or (lambda done, total: None)
        )
    with telling() as outside:
        policy = bench.time_policy(engine.max_num_seqs, engine.max_num_batched_tokens, outside)
    rests = bench.time_rests()
    export_s, import_s = bench.time_copies()
    times = [
        StepTime(kind, chunks, elapsed_s)
        for (kind, chunks), elapsed_s in zip(steps, found.seconds, strict=True)
        if elapsed_s is not None
    ]
    notes = (
        f"{loaded.numerics}, {limits.threads} threads on cores {limits.cpus}, "
        f"{found.num_rounds} rounds; tokens are drawn at temperature 1."
    )
    measured = Measured(
        engine="baton",
        device=name or _machine(loaded.device),
        model=model_shape(loaded.spec, model_dir.name, loaded.dtype),
        steps=tuple(times),
        policy=tuple(Policy(*each) for each in policy),
        export_s=export_s,
        import_s=import_s,
        block_size=engine.block_size,
        block_bytes=bench.kv.block_bytes,
        rests=tuple(Rest(*each) for each in rests),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
    )
    return fit_profile(measured), found.num_rounds


def _print(profile: Profile, num_rounds: int) -> None:
    rows = [
        (each.kind, str(each.num_points), f"{each.median:.1%}", f"{each.p90:.1%}")
        for each in profile.held_out
    ]
    print_table(("held-out error", "steps", "median", "p90"), rows)
    named = msgspec.structs.asdict(profile.coefficients)
    rates: Sequence[tuple[str, float]] = [(n, v) for n, v in named.items() if v is not None]
    print_table(("coefficient", ""), [(n, f"{v:.4g}") for n, v in rates if v])
    export, load = profile.export_s, profile.import_s
    print(
        f"{profile.device}, {profile.model.name}: {num_rounds} rounds; a block of "
        f"{profile.block_bytes:,} bytes goes into the store in {1e6 * export:.0f} us and comes "
        f"out of it in {1e6 * load:.0f} us."
    )
    if profile.rests:
        after = (
            f"{1000 * each.extra_s:.2g} ms after {1000 * each.rest_s:g}" for each in profile.rests
        )
        print(f"What a step takes longer after a rest: {', '.join(after)} ms.")


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "cpu"
