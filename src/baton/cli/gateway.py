"""`baton gateway`: the HTTP service alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, add_config_flags, config_from

SUMMARY = "Run the HTTP gateway. `baton serve` starts it; workers announce themselves to it."
EXAMPLES = """\
  baton gateway --runtime-dir /run/baton --config baton.yaml
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--runtime-dir", required=True, metavar="DIR", help="Directory of sockets and state."
    )
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run until stopped; the exit code is the gateway's."""
    config = config_from(args)
    from baton.gateway.main import run as run_gateway

    return run_gateway(config, Path(args.runtime_dir))
