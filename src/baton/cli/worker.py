"""`baton worker`: one worker process. Its role stands in its command line, for `ps` to show."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, add_config_flags, config_from
from baton.errors import ConfigError
from baton.types import Role

SUMMARY = (
    "Run one worker. `baton serve` starts those of its own host; start the others by hand, or one\n"
    "to look at it alone."
)
EXAMPLES = """\
  baton worker --role prefill --id prefill-0 --runtime-dir /run/baton --config baton.yaml
  baton worker --role decode --id decode-1 --runtime-dir /run/baton --gateway 10.0.0.1:7000
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--role", required=True, choices=[role.value for role in Role], help="What it is used for."
    )
    parser.add_argument("--id", required=True, help="Its name, unique in the deployment.")
    parser.add_argument(
        "--runtime-dir",
        required=True,
        metavar="DIR",
        help="Directory of sockets and state; made if it is not there.",
    )
    parser.add_argument(
        "--gateway",
        action="append",
        default=[],
        metavar="ADDR",
        help="Gateway to announce itself to, unix:PATH or HOST:PORT; repeat for several.",
    )
    parser.add_argument(
        "--weights-fd", type=int, metavar="FD", help="Descriptor of the host's packed weights."
    )
    add_config_flags(parser, only=("model", "engine", "store", "fabric", "rpc", "launch", "log"))


def run(args: argparse.Namespace) -> int:
    """Run until stopped; the exit code is the worker's."""
    config = config_from(args)
    if not config.model.path:
        raise ConfigError("no model to serve: give --model DIR, or model.path in --config FILE")
    from baton.launch.cores import pinned

    role = Role(args.role)
    config = pinned(config.for_role(role))
    from baton.worker.main import run as run_worker  # only now torch, and OpenMP with it

    return run_worker(config, role, args.id, Path(args.runtime_dir), args.gateway, args.weights_fd)
