"""How long fetching takes, learned from fetches that were made: `asking + blocks * each`.

A rate a block would not do. What one block takes is mostly the asking, so that after a fetch of one
a hundred would seem to take a hundred times as long, and would be computed instead; and as only
fetches teach what fetches take, that would stay so. For the same reason, a belief that fetching is
dearer lapses when it has decided so `MAX_UNTESTED` times in a row.
"""

from __future__ import annotations

FORGET = 0.2
"""Of what was known, with each fetch."""

MAX_UNTESTED = 16


class FetchTime:
    """Of one worker. Pure; owned by the router."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._num_untested = 0
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def observe(self, num_blocks: int, seconds: float) -> None:
        """A fetch of so many blocks, at least one, took so long."""
        keep = 1.0 - FORGET
        self._num_untested = 0
        self._weight = keep * self._weight + 1.0
        self._n = keep * self._n + num_blocks
        self._t = keep * self._t + seconds
        self._nn = keep * self._nn + num_blocks * num_blocks
        self._nt = keep * self._nt + num_blocks * seconds

    def predict(self, num_blocks: int) -> float | None:
        """Seconds for so many blocks; None: nothing is known.

        As long as all fetches were of one size, all of their time may have been the asking.
        """
        if not self._weight:
            return None
        blocks, seconds = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - blocks * blocks
        each = 0.0
        if variance > 1e-6 * blocks * blocks:
            each = (self._nt / self._weight - blocks * seconds) / variance
            each = min(max(0.0, each), seconds / blocks)  # neither part takes less than nothing
        return seconds + each * (num_blocks - blocks)

    def is_dearer(self, num_blocks: int, than_s: float | None) -> bool:
        """Whether fetching so many is believed to take longer; not if one of both is unknown."""
        predicted = self.predict(num_blocks)
        if predicted is None or than_s is None or predicted <= than_s:
            return False
        self._num_untested += 1
        if self._num_untested > MAX_UNTESTED:
            self._forget()
            return False
        return True
