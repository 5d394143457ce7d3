"""What a step, a transfer and their power cost on hardware that may not be here.

A `Profile` is what was fitted for one (model family, device, engine), with the error that it had
on measurements which the fit did not see. `Profile.model()` is the cost model that the simulator
runs on. How profiles are made is `planner/calibrate`'s business; what a step's seconds consist of
is `step_cost`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from baton.core.codec_choice import CodecFigures, Link
from baton.core.model_shape import ModelShape, model_shape
from baton.core.step_cost import (
    ChunkShape,
    Coefficients,
    CostModel,
    Parallel,
    Power,
    SteadyCost,
    StepCost,
    StepParts,
    StepShape,
    shape,
)
from baton.errors import ConfigError

__all__ = [
    "ChunkShape",
    "Coefficients",
    "CostModel",
    "HeldOut",
    "Link",
    "ModelShape",
    "Parallel",
    "Power",
    "Profile",
    "Rest",
    "SteadyCost",
    "StepCost",
    "StepParts",
    "StepShape",
    "after_rest_s",
    "model_shape",
    "shape",
    "transfer_s",
]


class HeldOut(msgspec.Struct, frozen=True):
    """How far predictions were off on measurements that the fit had not seen.

    kind: of what, such as `step`, `decode`, `prefill`. median, p90: of |measured / predicted - 1|.
    ratios: quantiles of measured / predicted at equal steps from the least to the greatest; to draw
    from them is to draw an error.
    """

    kind: str
    num_points: int
    median: float
    p90: float
    ratios: tuple[float, ...] = ()


class Rest(msgspec.Struct, frozen=True):
    """A step takes `extra_s` longer if its worker had nothing to do for `rest_s` before: caches are
    cold by then, and cores asleep."""

    rest_s: float
    extra_s: float


def after_rest_s(rests: Sequence[Rest], rest_s: float) -> float:
    """Seconds that a step takes longer, between those measured (in order of `rest_s`) by a line."""
    before = Rest(0.0, 0.0)
    for each in rests:
        if rest_s < each.rest_s:
            share = (rest_s - before.rest_s) / (each.rest_s - before.rest_s)
            return before.extra_s + share * (each.extra_s - before.extra_s)
        before = each
    return before.extra_s


class Profile(msgspec.Struct, frozen=True):
    """A calibrated cost model. `measured` is false where all of it comes from a datasheet.

    model: the shape that was measured. fits: which coefficients the data determined; the others are
    assumptions, told in `notes`. export_s, import_s: seconds a block of KV takes into the store and
    out of it. rests: what steps after a rest take longer. date: of the measurements, ISO 8601.
    """

    engine: str
    device: str
    model: ModelShape
    coefficients: Coefficients
    held_out: tuple[HeldOut, ...]
    source: str
    date: str
    measured: bool
    power: Power | None = None
    fits: tuple[str, ...] = ()
    notes: str = ""
    block_size: int = 0
    block_bytes: int = 0
    export_s: float = 0.0
    import_s: float = 0.0
    rests: tuple[Rest, ...] = ()
    format: Literal[1] = 1

    def cost(self, model: ModelShape | None = None, parallel: Parallel | None = None) -> StepCost:
        """The cost model of `model` (the measured one) on workers of `parallel` (one device)."""
        return StepCost(model or self.model, self.coefficients, parallel or Parallel())

    def error(self, kind: str) -> HeldOut | None:
        """The held-out error of `kind`, else the first one; None if nothing was measured."""
        for each in self.held_out:
            if each.kind == kind:
                return each
        return self.held_out[0] if self.held_out else None

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Profile:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is no profile of this version.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"this is no profile of this version of Baton: {error}") from None


def transfer_s(
    num_bytes: float, link: Link, num_blocks: int = 1, codec: CodecFigures | None = None
) -> float:
    """Seconds for blocks to pass a link that nobody else uses.

    num_bytes: of all blocks, as they lie in the pool; a codec makes them smaller and costs time at
    both ends of each block. The stages of a stream overlap: the slowest decides, and the others
    show once.

    Raises:
        ValueError: the link has no rate.
    """
    if not link.bytes_per_s > 0:
        raise ValueError("a link without a rate: nobody can tell how long a transfer takes")
    if not num_blocks or not num_bytes:
        return 0.0
    wire_bytes = num_bytes if codec is None else float(codec.encoded_bytes * num_blocks)
    coding = (0.0, 0.0) if codec is None else (codec.encode_s, codec.decode_s)
    stages = (*coding, link.per_block_s + wire_bytes / num_blocks / link.bytes_per_s)
    return link.latency_s + sum(stages) + (num_blocks - 1) * max(stages)
