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
(prompts arrive while 32 sequences decode). The tools that llama.cpp and transformers are measured
by take no prompts in meanwhile: their mixed time is a sum of phases, and marked so (†, `summed`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Protocol

import msgspec
from parts.peers.cells import CELLS, Cell, cost
from parts.peers.engines import NAMES, TOKEN_BUDGET, Broken, Child, Missing, Setting, started
from parts.peers.http_engine import HTTP_CELLS, HttpEngine
from parts.peers.models import prepare
from parts.peers.servers import SERVERS, running
from parts.peers.table import Result, Window, render

DEMO_ENGINES = ("baton", "llama.cpp")
DEMO_CELLS = ("d1",)
LOOPS = ("baton",)
HTTP_SERVERS = {"baton": "baton-1U", "llama.cpp": "llama-server", "vllm": "vllm"}


class Engine(Protocol):
    """What measures a cell: a child process, or a server behind HTTP."""

    name: str
    about: str
    mixes: bool

    def measure(self, cell: Cell, seed: str) -> float: ...


def main() -> int:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the engines, too
    documents = []
    for name in args.model:
        engines = [e for e in args.engines if name != "demo" or e in DEMO_ENGINES]
        cells = [CELLS[c] for c in (DEMO_CELLS if name == "demo" else args.cells)]
        cells = HTTP_CELLS if args.http else cells
        directory, gguf, spec = prepare(name, args.peers)
        kv_tokens = max(4096, *(cell.num_kv_tokens for cell in cells))  # 4096: the warm-up
        setting = Setting(directory, gguf, spec, args.threads, kv_tokens, args.peers)
        logs = args.peers / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        print(f"## {name}: {spec.num_parameters() / 1e9:.2f} B parameters\n")
        with contextlib.ExitStack() as stack:
            children = ["probe", *(LOOPS if args.http else engines)]
            found, missing = stack.enter_context(started(children, setting, logs))
            probe = found.pop("probe")
            measured: list[Engine] = list(found.values())
            if args.http:
                measured = _serve(stack, engines, setting, logs, missing) + _renamed(measured)
            documents.append(_compare(probe, measured, missing, setting, cells, args.rounds))
        if args.json is not None:
            data = msgspec.json.encode(documents)
            args.json.write_bytes(msgspec.json.format(data, indent=2) + b"\n")
    return 0


def _serve(
    stack: contextlib.ExitStack,
    engines: list[str],
    setting: Setting,
    logs: Path,
    missing: list[Missing],
) -> list[Engine]:
    """Start a server of each of `engines`; what cannot be had goes into `missing`."""
    servers: list[Engine] = []
    for name in engines:
        if name not in HTTP_SERVERS:
            missing.append(Missing(name, "it has no server"))
            continue
        server = SERVERS[HTTP_SERVERS[name]](setting, TOKEN_BUDGET)
        if isinstance(server, Missing):
            missing.append(server)
            continue
        try:
            served = stack.enter_context(running(server, logs / f"{name}-server.log"))
        except Broken as error:
            missing.append(Missing(name, str(error)))
            continue
        servers.append(HttpEngine(name, server.flags, served, setting.spec.vocab_size))
    return servers


def _renamed(loops: list[Engine]) -> list[Engine]:
    for loop in loops:
        loop.name = f"{loop.name}, no HTTP"
    return loops


def _compare(
    probe: Child,
    engines: list[Engine],
    missing: list[Missing],
    setting: Setting,
    cells: list[Cell],
    rounds: int,
) -> dict[str, object]:
    """Run all rounds, print the table after each, and give everything for the JSON file."""
    costs = {cell.name: cost(cell, setting.spec) for cell in cells}
    seed = secrets.token_hex(4)
    results: list[Result] = []
    warm_up = Cell(name="warm-up", kind=cells[0].kind, batch=8, steps=8)
    for engine in engines:
        print(f"- {engine.name}: {engine.about}", flush=True)
        engine.measure(warm_up, f"{seed}/warm-up")
    for number in range(rounds):
        for cell in cells:
            window = _measure_window(probe)
            for engine in _turned(engines, number):
                try:
                    seconds = engine.measure(cell, f"{seed}/{number}/{cell.name}")
                except Broken as error:
                    missing.append(Missing(f"{engine.name}, {cell.name}", str(error)))
                else:
                    summed = cell.kind == "mixed" and not engine.mixes
                    results.append(Result(engine.name, cell, number, seconds, window, summed))
        load = os.getloadavg()[0]
        print(f"\nAfter round {number + 1} of {rounds}, load average {load:.1f}:\n")
        print(render(results, costs, missing), flush=True)
    return {
        "model": setting.model.name,
        "num_parameters": setting.spec.num_parameters(),
        "threads": setting.threads,
        "seed": seed,
        "engines": {engine.name: engine.about for engine in engines},
        "missing": missing,
        "costs": costs,
        "results": results,
    }


def _measure_window(probe: Child) -> Window:
    rates = {kind: probe.ask({"kind": kind}) for kind in ("bandwidth", "torch", "native")}
    return Window(rates["bandwidth"], rates["torch"], rates["native"])


def _turned(engines: list[Engine], number: int) -> list[Engine]:
    """In another order each round, so that none is always measured behind the same one."""
    start = number % len(engines)
    return engines[start:] + engines[:start]


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
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
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
