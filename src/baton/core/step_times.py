"""What a worker's steps have taken, by their size, and what the next one will take by that."""

from __future__ import annotations

UNKNOWN_STEP_S = 12.0
"""What is predicted before any step was seen: kernels may still have to be compiled for it."""

MUCH_LARGER_STEP_S = 2.0
"""The least that is predicted for a step much larger than any that was seen: it may need others."""

_SIMILAR = 2
"""Steps of at most 4 times the size are not much larger."""

_WEIGHT = 0.2
"""Of the newest step in the moving average of its size."""


class StepTimes:
    """Moving averages over sizes that are powers of two. Deterministic; owned by the engine.

    A size that was not seen yet takes at most what the next larger one took, and at most so many
    times what the next smaller one took as it has more tokens.
    """

    def __init__(self) -> None:
        self._usual: dict[int, float] = {}  # seconds, by the bit length of the number of tokens

    def observe(self, num_tokens: int, elapsed_s: float) -> None:
        """A step of `num_tokens` took `elapsed_s`."""
        size = num_tokens.bit_length()
        before = self._usual.get(size, elapsed_s)
        self._usual[size] = before + _WEIGHT * (elapsed_s - before)

    def predict(self, num_tokens: int) -> float:
        """Seconds that a step of `num_tokens` will take."""
        size = num_tokens.bit_length()
        if size in self._usual:
            return self._usual[size]
        larger = min((known for known in self._usual if known > size), default=None)
        if larger is not None:
            return self._usual[larger]
        smaller = max(self._usual, default=None)
        if smaller is None:
            return UNKNOWN_STEP_S
        scaled = self._usual[smaller] * 2.0 ** (size - smaller)
        return scaled if size - smaller <= _SIMILAR else max(scaled, MUCH_LARGER_STEP_S)
