"""`baton replay`: repeat the decisions of a logged run."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, UsageError
from baton.cli.terminal import print_table
from baton.errors import ConfigError

SUMMARY = (
    "Repeat every step plan and placement of a run from its decision logs (see log.decision_log)\n"
    "and compare. The exit code is 0 when nothing differs."
)
EXAMPLES = """\
  baton replay logs/*
  baton replay logs/* --set scheduler.max_num_batched_tokens=256    what would change?
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton replay LOG... [options]"
    parser.add_argument("logs", nargs="+", metavar="LOG", help="Decision log of a process.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="scheduler.NAME=N",
        help="Replay workers with another setting; repeat for several.",
    )


def run(args: argparse.Namespace) -> int:
    """Replay each log, print a line for each; 0 without differences, else 1."""
    changes = dict(_change(item) for item in args.set)
    from baton.core.replay import replay

    reports = [replay(_read(Path(name)), changes) for name in args.logs]
    rows = [
        (
            report.source,
            f"{report.num_records:,}",
            f"{report.num_decisions:,}",
            f"{report.num_differences:,}",
            "-" if report.first is None else f"{report.first:,}",
        )
        for report in reports
    ]
    print_table(("process", "inputs", "decisions", "differences", "first"), rows)
    for report in reports:
        if report.parted is not None:
            print(f"{report.source}: not comparable from there on: {report.parted}")
    return 1 if any(report.num_differences for report in reports) else 0


def _change(item: str) -> tuple[str, int]:
    name, _, value = item.partition("=")
    field = name.removeprefix("scheduler.")
    if field == name or not value.isdecimal():
        raise UsageError(f"--set {item!r} is not scheduler.NAME=N, N a whole number")
    return field, int(value)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
