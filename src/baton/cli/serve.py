"""`baton serve`: gateway and workers on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.cli.parser import Parser, add_config_flags, config_from
from baton.errors import ConfigError

SUMMARY = (
    "Start the gateway and the workers of a layout on this machine, restart what dies, and\n"
    "drain on Ctrl-C (a second Ctrl-C stops at once). Every field of the configuration is a flag."
)
EXAMPLES = """\
  baton serve --model ./my-model
  baton serve --model ./my-model --layout 2P2D --port 9000 --engine.max-num-seqs 64
  baton serve --config baton.yaml --log-level debug
"""


def add_arguments(parser: Parser) -> None:
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; the exit code is the supervisor's."""
    config = config_from(args)
    if not config.model.path:
        raise ConfigError("no model to serve: give --model DIR, or model.path in --config FILE")
    if config.launch.needs:
        raise ConfigError(
            f"this configuration needs what Baton cannot run yet: {config.launch.needs}; choose "
            "another layout, or take launch.needs out if that is no longer so"
        )
    if files := config.plan.profile_files():
        from baton.planner.profiles import read_profile

        for file in files.values():
            read_profile(Path(file).expanduser())
    from baton.launch.local import serve

    return serve(config)
