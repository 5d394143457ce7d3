"""`baton config`: what a file and flags come to, and the reference of all fields."""

from __future__ import annotations

import argparse

from baton.cli.parser import ALIASES, Parser, add_config_flags, config_from
from baton.config import flags, sections, to_yaml

SUMMARY = (
    "show: print the configuration that defaults, file and flags make, as a YAML file.\n"
    "docs: print the reference of all fields, in Markdown."
)
EXAMPLES = """\
  baton config show > baton.yaml                       a file to start from
  baton config show --config baton.yaml --layout 4U    what would `serve` use?
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = "baton config show|docs [options]"
    parser.add_argument("what", choices=["show", "docs"], help="What to print.")
    parser.add_argument("--plain", action="store_true", help="Leave out the comments (show).")
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print; 0."""
    if args.what == "docs":
        print(reference(), end="")
    else:
        print(to_yaml(config_from(args), comments=not args.plain), end="")
    return 0


def reference() -> str:
    """A Markdown table for each section; `docs/configuration.md` is made of it."""
    lines: list[str] = []
    for name, section in sections().items():
        title, _, about = (section.__doc__ or name).partition(": ")
        lines += [f"## {title}", "", about[:1].upper() + about[1:], ""]
        lines += ["| field | flag | value | default | |", "|---|---|---|---|---|"]
        for flag in (flag for flag in flags() if flag.section == name):
            names = f"`{flag.name}`"
            if flag.path in ALIASES:
                names = f"`{ALIASES[flag.path]}`, {names}"
            kind = flag.kind.replace("|", " \\| ")
            default = f"`{flag.default_text}`" if flag.default not in (None, "") else ""
            lines.append(f"| `{flag.path}` | {names} | {kind} | {default} | {flag.help} |")
        lines.append("")
    return "\n".join(lines)
