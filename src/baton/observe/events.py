"""The life of a request as one waterfall: the only source of its timing.

    received ─ queue ─ prefill ─┬─ first token ─▶ client
                                └─ export ─ handoff ─ import wait ─ transfer ─ decode ─ finished

Stages are measured where they happen: `StageTimes` come from the workers, each on its own
clock; only durations are compared across processes.
"""

from __future__ import annotations

import time
from collections import deque

import msgspec

from baton.types import StageTimes


class Waterfall(msgspec.Struct, kw_only=True):
    """One choice of one request. Durations in seconds; `*_worker` are worker ids.

    queue_s: received to first chunk, all waiting rooms included. prefill_s: first chunk to first
    token. export_s: from there to the last sealed block. import_wait_s: received by the decode
    worker until its blocks are there to be filled. transfer_s: fetching and verifying. decode_s:
    from there to the last token. ttft_s and e2e_s are the gateway's own. num_early_blocks: blocks
    of the prompt that the decode worker had fetched, verified, when the first token came, and so
    before anybody waited for them. received_unix_s: seconds since 1970 when the gateway received
    it, by the wall clock, for traces alone: nothing is decided by it. prompt_blocks: ids of the
    prompt's full blocks of block_size tokens (see `block_ids`): equal where prompts begin alike.
    """

    request_id: str
    choice: int
    num_prompt_tokens: int
    prefill_worker: str | None = None
    decode_worker: str | None = None
    predicted_tokens: int = 0
    num_cached_tokens: int = 0
    num_imported_blocks: int = 0
    num_early_blocks: int = 0
    num_generated_tokens: int = 0
    attempt: int = 0
    finish: str = ""
    error: str | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    export_s: float = 0.0
    import_wait_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    received_unix_s: float = 0.0
    block_size: int = 0
    prompt_blocks: bytes = b""

    def add(self, times: StageTimes, *, took_over: bool) -> None:
        """Count the stages of one leg; `took_over` says that it began with a handoff."""
        if took_over:
            self.import_wait_s += times.queue_s
        else:
            self.queue_s += times.queue_s
        self.prefill_s += times.prefill_s
        self.export_s += times.export_s
        self.transfer_s += times.import_s
        self.decode_s += times.decode_s
        self.num_imported_blocks += times.num_imported_blocks


class RecentRequests:
    """The waterfalls of the last requests to finish."""

    def __init__(self, capacity: int = 1000) -> None:
        self._recent: deque[Waterfall] = deque(maxlen=capacity)

    def add(self, waterfall: Waterfall) -> None:
        """Keep one that has just ended; its `e2e_s` tells when it was received."""
        waterfall.received_unix_s = waterfall.received_unix_s or time.time() - waterfall.e2e_s
        self._recent.append(waterfall)

    def newest_first(self) -> list[Waterfall]:
        return list(reversed(self._recent))
