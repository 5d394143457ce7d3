"""The argument parser of every command: nearest-flag hints, and the configuration as flags."""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

from baton.config import Config, Flag, flags, load_config, sections

ALIASES: dict[str, str] = {
    "model.path": "--model",
    "model.dtype": "--dtype",
    "model.served_name": "--served-name",
    "model.max_model_len": "--max-model-len",
    "engine.device": "--device",
    "engine.cpus": "--cpus",
    "engine.threads": "--threads",
    "gateway.host": "--host",
    "gateway.port": "--port",
    "gateway.admin_port": "--admin-port",
    "gateway.api_keys_file": "--api-keys-file",
    "launch.layout": "--layout",
    "launch.prefill_cpus": "--prefill-cpus",
    "launch.decode_cpus": "--decode-cpus",
    "log.level": "--log-level",
    "log.decision_log": "--decision-log",
}
"""Short names of the fields that are set by hand most often."""

_METAVARS = {
    "model.path": "DIR",
    "log.decision_log": "DIR",
    "launch.layout": "LAYOUT",
    "engine.cpus": "LIST",
    "launch.prefill_cpus": "LIST",
    "launch.decode_cpus": "LIST",
    "gateway.host": "ADDR",
    "gateway.admin_host": "ADDR",
    "fabric.tcp_host": "ADDR",
    "rpc.host": "ADDR",
}


class UsageError(Exception):
    """The command line cannot be read; `main` prints it and exits with 2."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One metavar an option (`--model, --model.path DIR`), aligned, at most 100 columns wide."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        super().__init__(prog, max_help_position=40, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        default = self._get_default_metavar_for_optional(action)
        args = self._format_args(action, default) if action.nargs != 0 else ""
        return f"{', '.join(action.option_strings)} {args}".strip()


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors suggest what was probably meant."""

    def __init__(self, prog: str, *, summary: str, examples: str = "") -> None:
        super().__init__(
            prog,
            usage=f"{prog} [options]",
            description=summary,
            epilog=f"Examples:\n{examples}" if examples else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Like `parse_args`, but raises `UsageError` and hints at the nearest flag."""
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        given = unknown[0].partition("=")[0]
        if not given.startswith("-"):
            raise UsageError(f"unexpected argument {given!r}")
        raise UsageError(f"unknown option {given}{hint(given, self._options())}")

    def _options(self) -> set[str]:
        """Of this parser and of its subcommands."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(*(command._options() for command in action.choices.values()))
        return found

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def hint(given: str, known: Iterable[str]) -> str:
    """`; did you mean --x?` for the nearest known name, or nothing."""
    names = {name.rpartition(".")[2].lstrip("-"): name for name in known}
    names.update({name.lstrip("-"): name for name in known})
    near = difflib.get_close_matches(given.lstrip("-").replace("_", "-"), names, 1, cutoff=0.6)
    return f"; did you mean {names[near[0]]}?" if near else ""


def add_config_flags(parser: Parser, only: Collection[str] | None = None) -> None:
    """Add `--config` and a flag for every field of the sections named in `only` (all if None)."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the fields below; flags override it.",
    )
    groups = {
        name: parser.add_argument_group(" (".join((cls.__doc__ or name)[:-1].split(": ")) + ")")
        for name, cls in sections().items()
        if only is None or name in only
    }
    for flag in flags():
        if flag.section in groups:
            _add_flag(groups[flag.section], flag)


def config_from(args: argparse.Namespace) -> Config:
    """The configuration that the parsed flags and their `--config` file make.

    Raises:
        ConfigError: see `load_config`.
    """
    known = {flag.path for flag in flags()}
    return load_config(args.config, {k: v for k, v in vars(args).items() if k in known})


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [ALIASES[flag.path]] if flag.path in ALIASES else []
    metavar = "FILE" if flag.field.endswith("_file") else _METAVARS.get(flag.path, flag.kind)
    default = f" [{flag.default_text}]" if flag.default not in (None, "") else ""
    is_switch = flag.kind == "BOOL"
    group.add_argument(
        *names,
        flag.name,
        dest=flag.path,
        default=argparse.SUPPRESS,
        metavar=metavar,
        nargs="?" if is_switch else None,
        const="true" if is_switch else None,
        help=(flag.help + default).replace("%", "%%"),
    )
