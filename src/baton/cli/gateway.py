"""`baton gateway`: the HTTP service alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, add_config_flags, config_from

SUMMARY = "Run the HTTP gateway. `baton serve` starts it; workers announce themselves to it."
EXAMPLES = """\
  baton gateway --runtime-dir /run/baton --config baton.yaml
  baton gateway --runtime-dir /run/baton --config baton.yaml --rpc.host 10.0.0.1 --rpc.port 7000
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--runtime-dir",
        required=True,
        metavar="DIR",
        help="Directory of sockets and state; made if it is not there.",
    )
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run until stopped; the exit code is the gateway's."""
    config = config_from(args)
    from baton.gateway.main import run as run_gateway

    runtime_dir = Path(args.runtime_dir)
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return run_gateway(config, runtime_dir)
