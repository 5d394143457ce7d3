"""Numbers on the command line: each reads one, or says which are allowed."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def whole(text: str) -> int:
    """0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def positive(text: str) -> float:
    """Above 0; `inf` is, too."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def finite(text: str) -> float:
    """Above 0, and finite."""
    value = positive(text)
    if value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def share(text: str) -> float:
    """Between 0 and 1, neither of them."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
