"""The `baton` command: finds the command's module, and turns errors into messages.

A command is a module with `SUMMARY`, `EXAMPLES`, `add_arguments(parser)` and `run(args)`; it is
imported only when it is asked for, so that `baton --help` costs nothing.
Exit codes: 0 done, 1 failed, 2 wrong usage, configuration or checkpoint, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from baton import __version__
from baton.errors import BatonError, ConfigError, ModelError

COMMANDS: dict[str, tuple[str, str]] = {
    "analyze": ("Measure", "what a trace says about its traffic; prefill against decode"),
    "profile": ("Measure", "how long a model's steps take on this machine, to plan with"),
    "simulate": ("Predict", "what a deployment would do with a trace, on a virtual clock"),
    "plan": ("Predict", "whether to split, on what hardware, what it costs, how sure that is"),
    "serve": ("Run", "start gateway and workers on this machine, and keep them running"),
    "chat": ("Run", "talk to a served model in the terminal"),
    "bench": ("Compare", "load any OpenAI-compatible server; latency, goodput, frontier"),
    "fabric": ("Operate", "measure what the ways that KV blocks travel do to a model"),
    "explain": ("Operate", "why a request went where it did, and what else it might have got"),
    "replay": ("Operate", "repeat the decisions of a logged run, and show any difference"),
    "config": ("Operate", "show the configuration that a file and flags make"),
    "worker": ("Parts that serve starts", "run one worker"),
    "gateway": ("Parts that serve starts", "run the HTTP gateway"),
}
"""Name: (group in the help, what it does). The groups follow the user's path."""

EXAMPLES = """\
  baton serve --model ./my-model                     one prefill, one decode worker, port 8000
  baton serve --model ./my-model --layout 2P3D       two prefill, three decode workers
  baton chat                                         ask it something
  baton analyze requests.jsonl --html traffic.html   what is the traffic like?
  baton plan --model Llama-3.1-8B --trace requests.jsonl --slo ttft=2s,tpot=50ms
  baton bench --rate 4 --slo ttft=2s,tpot=40ms       does it keep its promises at 4 requests/s?
  baton bench --sweep auto --plot frontier.png       and how far does it go?
"""


class Command(Protocol):
    """What a command's module has; `add_arguments` takes a `baton.cli.parser.Parser`."""

    SUMMARY: str
    EXAMPLES: str
    add_arguments: Callable[[object], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"baton {__version__}")
        return 0
    try:
        return _run(args[0], args[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away: `baton ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(name: str, argv: list[str]) -> int:
    from baton.cli.parser import Parser, UsageError, hint

    prog = f"baton {name}"
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        guess = hint(name, COMMANDS)
        print(f"baton: unknown {kind} {name}{guess} (see baton --help)", file=sys.stderr)
        return 2
    command = cast(Command, importlib.import_module(f"baton.cli.{name}"))
    parser = Parser(prog, summary=command.SUMMARY, examples=command.EXAMPLES)
    command.add_arguments(parser)
    try:
        return command.run(parser.parse(argv))
    except UsageError as error:
        print(f"{prog}: {error} (see {prog} --help)", file=sys.stderr)
        return 2
    except BatonError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | ModelError) else 1
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


def overview() -> str:
    """The text of `baton --help`."""
    lines = [
        "baton: serve large language models, prefill and decode on separate workers",
        "",
        "Usage: baton COMMAND [options]        baton COMMAND --help for its options",
    ]
    group = None
    for name, (heading, summary) in COMMANDS.items():
        if heading != group:
            group = heading
            lines += ["", heading]
        lines.append(f"  {name:<10}{summary}")
    lines += ["", "Examples", EXAMPLES.rstrip(), "", "baton --version shows the version."]
    return "\n".join(lines)
