"""How long to wait before a process is started again. Pure."""

from __future__ import annotations


class Backoff:
    """Doubling pauses, from `first_s` to `max_s`; a run of `healthy_s` seconds starts afresh."""

    def __init__(self, first_s: float, max_s: float, healthy_s: float = 60.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._healthy_s = healthy_s
        self.num_failures = 0  # in a row

    def after(self, uptime_s: float) -> float:
        """Seconds to wait after a run that lasted `uptime_s` seconds."""
        if uptime_s >= self._healthy_s:
            self.num_failures = 0
        pause = min(self._max_s, self._first_s * 2.0 ** min(self.num_failures, 60))
        self.num_failures += 1
        return pause
