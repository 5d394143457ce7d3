"""How much room a sequence will want before it ends."""

from __future__ import annotations

from baton.types import Request

_NUM_BUCKETS = 32


class OutputLengths:
    """A quantile of output lengths, learned from those that finished.

    Lengths are counted in buckets of powers of two; old ones fade, halved every `window`
    sequences, so that the estimate follows the traffic. Deterministic and O(1).
    """

    def __init__(self, quantile: float = 0.5, window: int = 256) -> None:
        self._quantile = quantile
        self._window = window
        self._counts = [0.0] * _NUM_BUCKETS
        self._num_seen = 0
        self._estimate = 0

    def observe(self, num_tokens: int) -> None:
        """Count one finished output of `num_tokens`."""
        self._counts[min(num_tokens.bit_length(), _NUM_BUCKETS - 1)] += 1
        self._num_seen += 1
        if self._num_seen % self._window == 0:
            self._counts = [count / 2 for count in self._counts]
        wanted = self._quantile * sum(self._counts)
        bucket = 0
        while bucket < _NUM_BUCKETS - 1 and wanted > self._counts[bucket]:
            wanted -= self._counts[bucket]
            bucket += 1
        self._estimate = (1 << bucket) - 1

    def estimate(self) -> int:
        """Upper edge of the bucket that holds the quantile, in tokens; 0 before any was seen."""
        return self._estimate

    def predict_rest(self, request: Request, num_generated: int) -> int:
        """How many more tokens `request` will want here, after `num_generated`."""
        if request.hand_off:
            return 0  # its first token ends this leg, and needs no KV here
        return max(0, min(request.sampling.max_tokens, self.estimate()) - num_generated)
