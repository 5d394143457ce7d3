"""Baton beside other engines: same model, weights, prompts and threads, in one run.

    python bench/peers.py [--model 0.5B,demo] [--engines baton,transformers,llama.cpp,vllm]
                          [--cells d1,p512,...] [--rounds 5] [--threads 2] [--json FILE]
    python bench/peers.py --http [...]      the same as servers, with one client

Every engine is a process of its own that is loaded once (llama.cpp's own bench tool maps its file
again for each cell) and is stopped while another one is measured. In each round every cell is
measured in every engine, one after the other, in an order that turns from round to round; before
each cell the machine's memory bandwidth and its peak of bf16 matrix products are measured, and the
table sets the cell's time against what they allow (`roofline`: least time ÷ time; see
`parts/peers/cells.py`). Absolute times are those of this machine at this time: compare ratios.

Prompts are random and never repeated, so that no prefix cache answers. Models of real shapes
(0.1B, 0.5B, 1B) have random weights and are written at first use below `--peers`, as a Hugging
Face directory and as GGUF with the same bits; `demo` is the demo model, one sequence, Baton and
llama.cpp only. `make peers` builds the engines; one that is not there is named with its reason.

Cells: d1 d8 d32 d64 (decode at B), d8c4096 (at context 4,096), p128 p512 p2048 (prefill), mixed
(prompts arrive while 32 sequences decode).
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

import msgspec
from parts.peers.cells import CELLS, Cell, cost
from parts.peers.engines import NAMES, Broken, Child, Missing, Setting, started
from parts.peers.http import compare_servers
from parts.peers.models import prepare
from parts.peers.table import Result, Window, render

DEMO_ENGINES = ("baton", "llama.cpp")
DEMO_CELLS = ("d1",)
WARM_UP = Cell(name="warm-up", kind="decode", batch=8, steps=4)


def main() -> int:
    args = _parse()
    documents = []
    for name in args.model:
        engines = [e for e in args.engines if name != "demo" or e in DEMO_ENGINES]
        cells = [CELLS[c] for c in (DEMO_CELLS if name == "demo" else args.cells)]
        directory, gguf, spec = prepare(name, args.peers)
        kv_tokens = max(cell.num_kv_tokens for cell in cells)
        setting = Setting(directory, gguf, spec, args.threads, kv_tokens, args.peers)
        logs = args.peers / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        if args.http:
            documents.append(compare_servers(setting, engines, args.rounds, logs))
        else:
            documents.append(_compare(setting, engines, cells, args.rounds, logs))
        if args.json is not None:
            data = msgspec.json.encode(documents)
            args.json.write_bytes(msgspec.json.format(data, indent=2) + b"\n")
    return 0


def _compare(
    setting: Setting, engines: list[str], cells: list[Cell], rounds: int, logs: Path
) -> dict[str, object]:
    """Run all rounds, print the table after each, and give everything for the JSON file."""
    costs = {cell.name: cost(cell, setting.spec) for cell in cells}
    seed = secrets.token_hex(4)
    results: list[Result] = []
    with started(["probe", *engines], setting, logs) as (children, missing):
        probe = children.pop("probe")
        print(f"## {setting.model.name}: {setting.spec.num_parameters() / 1e9:.2f} B parameters\n")
        for child in children.values():
            print(f"- {child.name}: {child.about} (ready after {child.start_s:.1f} s)", flush=True)
            child.measure(WARM_UP, f"{seed}/warm-up")
        for number in range(rounds):
            for cell in cells:
                window = _measure_window(probe)
                for child in _turned(list(children.values()), number):
                    try:
                        seconds = child.measure(cell, f"{seed}/{number}/{cell.name}")
                    except Broken as error:
                        missing.append(Missing(f"{child.name}, {cell.name}", str(error)))
                    else:
                        results.append(Result(child.name, cell, number, seconds, window))
            load = os.getloadavg()[0]
            print(f"\nAfter round {number + 1} of {rounds}, load average {load:.1f}:\n")
            print(render(results, costs, missing), flush=True)
        abouts = {child.name: child.about for child in children.values()}
    return {
        "model": setting.model.name,
        "num_parameters": setting.spec.num_parameters(),
        "threads": setting.threads,
        "seed": seed,
        "engines": abouts,
        "missing": missing,
        "costs": costs,
        "results": results,
    }


def _measure_window(probe: Child) -> Window:
    rates = {kind: probe.ask({"kind": kind}) for kind in ("bandwidth", "torch", "native")}
    return Window(rates["bandwidth"], rates["torch"], rates["native"])


def _turned(children: list[Child], number: int) -> list[Child]:
    """In another order each round, so that none is always measured behind the same one."""
    start = number % len(children)
    return children[start:] + children[:start]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=_names(None), default=["0.5B", "demo"], help="[0.5B,demo]")
    add("--engines", type=_names(NAMES), default=list(NAMES), help=f"[{','.join(NAMES)}]")
    add("--cells", type=_names(tuple(CELLS)), default=list(CELLS), help=f"[{','.join(CELLS)}]")
    add("--rounds", type=int, default=5, help="[5]")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[all cores]")
    add("--peers", type=Path, default=Path(".peers"), help="what `make peers` filled [.peers]")
    add("--http", action="store_true", help="as servers, at 1, 8 and 32 streams")
    add("--json", type=Path, metavar="FILE", help="also write every measurement here")
    args = parser.parse_args()
    args.peers = args.peers.resolve()
    return args


def _names(known: tuple[str, ...] | None):  # type: ignore[no-untyped-def]
    """A parser of comma-separated names, each one of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
