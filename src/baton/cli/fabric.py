"""`baton fabric`: what the ways that KV blocks travel do to a model.

A subcommand is an entry of `_SUBCOMMANDS`: its summary, its examples, its flags, and what it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from baton.cli import fabric_check
from baton.cli.parser import Parser, add_config_flags, config_from
from baton.cli.terminal import print_table
from baton.errors import ConfigError

SUMMARY = (
    "check: measure the ways between the workers of a running deployment.\n"
    "calibrate: measure what each wire codec for KV does to a model's next tokens."
)
EXAMPLES = """\
  baton fabric check                                              what does the passage of KV cost?
  baton fabric calibrate --model ./my-model                       before serving over a slow link
  baton fabric calibrate --model ./my-model --text chats.txt      on text like your own
"""


class _Subcommand(NamedTuple):
    summary: str
    examples: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton fabric COMMAND [options]"
    subparsers = parser.add_subparsers(dest="what", metavar="COMMAND", required=True)
    for name, command in _SUBCOMMANDS.items():
        own = subparsers.add_parser(name, summary=command.summary, examples=command.examples)
        own.usage = f"baton fabric {name} [options]"
        command.add_arguments(own)


def run(args: argparse.Namespace) -> int:
    return _SUBCOMMANDS[args.what].run(args)


def _add_calibrate(parser: Parser) -> None:
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to measure on, instead of the built-in one."
    )
    add_config_flags(parser, only=("model", "engine", "fabric"))


def _calibrate(args: argparse.Namespace) -> int:
    """Measure, store, print a table; 0."""
    config = config_from(args)
    if not config.model.path:
        raise ConfigError("no model to calibrate: give --model DIR, or model.path in --config FILE")
    from baton.engine.kv_quality import calibrate
    from baton.fabric.calibration import save_calibration
    from baton.model.hub import resolve_model

    text = None if args.text is None else Path(args.text)
    found = calibrate(config, resolve_model(config.model.path), text, _tell)
    file = save_calibration(found)
    limit = config.fabric.max_kl
    rows = [
        (
            name,
            f"{loss.bytes_per_token:,.0f}",
            *(f"{nats:.2g}" for nats in (loss.kl_mean, loss.kl_p99, loss.kl_max)),
            "always" if name == "raw" else "yes" if limit > 0 and loss.kl_max <= limit else "no",
        )
        for name, loss in found.codecs.items()
    ]
    columns = ("codec", "bytes a token", "KL mean", "p99", "max", f"within {limit:g} nats")
    print_table(columns, rows)
    print(
        f"{found.num_positions} positions of {found.text} text, {found.numerics}, blocks of "
        f"{found.block_size} tokens; the budget fabric.max_kl is held against max.\n{file}"
    )
    return 0


def _tell(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rwindow {done + 1} of {total}", end="\n" if done + 1 == total else "",
              file=sys.stderr, flush=True)  # fmt: skip


_SUBCOMMANDS: dict[str, _Subcommand] = {
    "calibrate": _Subcommand(
        "Measure what each wire codec for KV does to the model's next-token distributions, on a\n"
        "text, and keep the figures for the workers: they send only what fabric.max_kl allows.",
        EXAMPLES,
        _add_calibrate,
        _calibrate,
    ),
    "check": _Subcommand(
        fabric_check.SUMMARY, fabric_check.EXAMPLES, fabric_check.add_arguments, fabric_check.run
    ),
}
