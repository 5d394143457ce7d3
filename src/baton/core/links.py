"""What is known of the ways to other workers' stores, and in which codec blocks take them.

Blocks of a source that is reached by shared memory come as they are. On a wire the codec follows
from the rate that was measured there and from the quality budget (`codec_choice`); until something
was measured it is raw. A sequence keeps the codec with which its first blocks came, since all its
KV belongs to one numerics class.
"""

from __future__ import annotations

from collections import OrderedDict

from baton.core.codec_choice import RAW, CodecFigures, Link, choose_codec
from baton.core.limits import SchedulerConfig
from baton.core.sequence import SequenceId
from baton.types import Grant

RATE_WEIGHT = 0.3
"""Of the newest transfer in a link's rate."""
MIN_MEASURED_BYTES = 128 << 10
"""A shorter transfer tells of latencies, not of the rate."""
MAX_CHOICES = 1 << 14


class LinkTable:
    """The links of one worker, as a reader; pure, owned by the scheduler."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._figures: dict[str, CodecFigures] = {each.name: each for each in config.codecs}
        self._wires: dict[str, float] = {}  # bytes a second, 0 until measured
        self._choices: OrderedDict[SequenceId, str] = OrderedDict()

    def reached_by_wire(self, source: str) -> None:
        """Blocks of `source` come over a network, not through shared memory."""
        self._wires.setdefault(source, 0.0)

    def observe(self, grant: Grant | None, codec: str, num_blocks: int, elapsed_s: float) -> None:
        """A fetch took so long for so many blocks, all of which came."""
        source = "" if grant is None else grant.source
        figures = self._figures.get(codec)
        block_bytes = figures.encoded_bytes if figures else self._config.kv_format.block_bytes
        num_bytes = num_blocks * block_bytes
        if source not in self._wires or num_bytes < MIN_MEASURED_BYTES or elapsed_s <= 0:
            return
        coding_s = num_blocks * (figures.encode_s + figures.decode_s) if figures else 0.0
        rate = num_bytes / max(elapsed_s - coding_s, elapsed_s / 10)
        before = self._wires[source]
        self._wires[source] = rate if not before else before + RATE_WEIGHT * (rate - before)

    def rate(self, source: str) -> float:
        """Bytes a second from `source`; 0 if that was not measured."""
        return self._wires.get(source, 0.0)

    def codec(self, seq_id: SequenceId, source: str) -> str:
        """In what form blocks for this sequence may come from `source`."""
        chosen = self._choices.get(seq_id)
        if chosen is None:
            chosen = RAW
            if source in self._wires:
                chosen = choose_codec(
                    self._config.kv_format.block_bytes,
                    self._figures.values(),
                    Link(self._wires[source]),
                    self._config.max_kl,
                ).codec
            self._choices[seq_id] = chosen
            if len(self._choices) > MAX_CHOICES:
                self._choices.popitem(last=False)
        return chosen
