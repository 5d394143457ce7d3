"""Whether a prompt may begin: room for it now, and for what it and the others will want.

A prompt is admitted when its blocks are free beyond those that the running sequences are predicted
to want before they end. How long answers become is learned from those that ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from baton.core.block_pool import BlockPool
from baton.core.exports import ExportTable
from baton.core.limits import SchedulerConfig
from baton.core.sequence import Sequence
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


class Admission:
    """Gives prompts their blocks; pure, owned by the scheduler.

    num_admitted_tokens is the clock by which `prompt_order` tells age.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        exports: ExportTable,
        counters: Counter[str],
    ) -> None:
        self.lengths = OutputLengths()
        self.num_admitted_tokens = 0
        self._config = config
        self._pool = pool
        self._exports = exports
        self._counters = counters

    def growth(self, seq: Sequence) -> int:
        """Blocks that `seq` is predicted to want beyond those for the tokens it has."""
        rest = self.lengths.predict_rest(seq.request, seq.num_generated)
        return self._config.num_blocks_for(rest)

    def promised(self, running: Iterable[Sequence]) -> int:
        """The sum of their `growth`."""
        estimate, size = self.lengths.estimate(), self._config.kv_format.block_size
        blocks = 0
        for seq in running:
            request = seq.request
            most = request.sampling.max_tokens
            rest = (most if most < estimate else estimate) + seq.num_prompt - len(seq.token_ids)
            if rest > 0 and not request.hand_off:
                blocks += -(-rest // size)
        return blocks

    def admit(self, seq: Sequence, promised: int, now: float, *, alone: bool) -> bool:
        """Give `seq` what the prefix cache has of it and blocks for the rest, if there is room.

        `promised` blocks are free now and will be wanted by those that run already. A sequence
        that is alone may use everything: its worst case fits.
        """
        # The last token is always computed: without it there is nothing to draw from.
        covered = seq.num_tokens - 1
        pool = self._pool
        hits = pool.lookup(seq.class_keys(covered)) if self._config.prefix_cache else []
        needed = self._config.num_blocks_for(seq.num_tokens) - len(hits)
        wanted = needed + pool.num_unreferenced(hits)
        if not alone:
            wanted += promised + self.growth(seq)
        if wanted > pool.num_free:
            return False
        if seq.request.hand_off and not self._exports.open(seq):
            self._counters["store_full_waits"] += 1
            return False
        self.num_admitted_tokens += seq.num_tokens
        pool.acquire(hits)
        seq.blocks = hits + pool.allocate(needed)
        seq.num_published = seq.num_kept = len(hits)
        seq.num_computed = seq.num_scheduled = len(hits) * seq.block_size
        if not seq.first_scheduled:
            seq.first_scheduled = now
            seq.num_cached = seq.num_computed
        self._counters["prefix_query_tokens"] += covered
        self._counters["prefix_hit_tokens"] += seq.num_computed
        return True
