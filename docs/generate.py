"""Writes the pages of this directory that are made from the code: `python docs/generate.py`."""

from __future__ import annotations

from pathlib import Path

from baton.cli import config
from baton.observe import metrics_docs

_CONFIGURATION = """\
# Configuration

Each field is a key of the YAML file given with `--config`, and a flag; flags win over the file, the
file over the defaults. `baton config show` prints what they come to, as a file to start from. Sizes
may be written as `256MiB` or `8GB`. An unknown key is an error that names it.

"""


def pages() -> dict[str, str]:
    """File name → content."""
    return {
        "configuration.md": _CONFIGURATION + config.reference().rstrip("\n") + "\n",
        "metrics.md": metrics_docs.reference(),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
