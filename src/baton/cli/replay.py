"""`baton replay`: repeat the decisions of a logged run."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, UsageError

SUMMARY = (
    "Repeat every step plan and placement of a run from its decision log (see log.decision_log)\n"
    "and compare. The exit code is 0 when nothing differs."
)
EXAMPLES = """\
  baton replay logs/*.log
  baton replay logs/*.log --set scheduler.max_num_batched_tokens=256    what would change?
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton replay LOG... [options]"
    parser.add_argument("logs", nargs="+", metavar="LOG", help="Decision log of a process.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Replay with another setting; repeat for several.",
    )


def run(args: argparse.Namespace) -> int:
    """Replay, print the report; 0 without differences, else 1."""
    changes: dict[str, str] = {}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise UsageError(f"--set {item!r} is not NAME=VALUE")
        changes[name] = value
    from baton.core.replay import replay_files

    report = replay_files([Path(log) for log in args.logs], changes)
    print(report)
    return 1 if report.num_differences else 0
