"""The child's side: cells come as JSON lines on stdin, answers go to stdout, one line each.

Between two cells a child does nothing; the parent stops the whole process group besides, so that
no thread of an idle engine spins while another one is measured.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

FIRST_ID = 256
"""Token ids below are bytes; prompts are made of the words above them."""

Cell = dict[str, Any]
"""The fields of `cells.Cell`, and `seed`."""


def draw_prompts(seed: str, count: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """The same prompts for every engine; a new seed has no prompt in common with another."""
    rng = random.Random(seed)
    return [rng.choices(range(FIRST_ID, vocab_size), k=num_tokens) for _ in range(count)]


def serve(start: Callable[[], tuple[str, Callable[[Cell], float]]], mixes: bool = True) -> None:
    """Start the engine, tell its flags, and answer until stdin ends.

    `start` gives a description and the function that measures a cell, in seconds. `mixes` says
    whether prompts are taken in while other sequences decode; if not, the time of a mixed cell is
    a sum of phases. What the engine's libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    about, measure = start()
    print(json.dumps({"about": about, "mixes": mixes}), file=answers)
    for line in sys.stdin:
        try:
            answer: dict[str, object] = {"seconds": measure(json.loads(line))}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
