"""In which codec blocks travel over one link: the fastest that the quality budget allows.

    predicted seconds of a block = encode + latency + bytes / bandwidth + decode

The terms are added up, as for a block that travels alone: in a stream they would overlap, so a
codec that beats raw here beats it there as well. Whatever is not known speaks for raw: a link that
nobody measured, a codec whose loss nobody measured, a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

RAW = "raw"


class CodecFigures(msgspec.Struct, frozen=True):
    """What is known of one lossy codec, for blocks of one format on these machines.

    kl: nats by which a next-token distribution moved, as calibration found it; None if it did
    not look.
    """

    name: str
    encoded_bytes: int
    encode_s: float
    decode_s: float
    kl: float | None = None


class Link(msgspec.Struct, frozen=True):
    """A link as it was measured; `bytes_per_s` is 0 where nobody has.

    per_block_s: what each block costs beyond its bytes, whatever its codec.
    """

    bytes_per_s: float
    latency_s: float = 0.0
    per_block_s: float = 0.0


class CodecChoice(msgspec.Struct, frozen=True):
    """The codec, the seconds that a block is predicted to take, and why, as a sentence."""

    codec: str
    predicted_s: float
    reason: str


def choose_codec(
    raw_bytes: int, figures: Iterable[CodecFigures], link: Link, max_kl: float
) -> CodecChoice:
    """The codec with the least predicted time for a block, among those within `max_kl` nats.

    figures: of the lossy codecs, in any order; raw is always possible. A budget of 0 allows no
    loss at all.
    """
    if not (0 < link.bytes_per_s < math.inf and 0 <= link.latency_s < math.inf):
        return CodecChoice(RAW, 0.0, "raw: the link has not been measured")
    raw_s = predict(raw_bytes, 0.0, 0.0, link)
    known = list(figures)
    allowed = [figure for figure in known if _allows(max_kl, figure.kl)]
    if not allowed:
        return CodecChoice(RAW, raw_s, _nothing_allowed(known, max_kl))
    times = {figure: _predict(figure, link) for figure in allowed}
    # Of equal times, the smaller loss; then the name, so that the order given does not matter.
    best = min(allowed, key=lambda figure: (times[figure], figure.kl, figure.name))
    best_s = times[best]
    at = f"at {link.bytes_per_s * 8e-9:.3g} Gbit/s"
    if not best_s < raw_s:  # a time that is no number does not win either
        reason = f"raw: {_ms(raw_s)} a block {at}, {best.name} would take {_ms(best_s)}"
        return CodecChoice(RAW, raw_s, reason)
    return CodecChoice(
        best.name,
        best_s,
        f"{best.name}: {_ms(best_s)} a block {at}, raw would take {_ms(raw_s)}; "
        f"KL {best.kl:.3g} of the {max_kl:g} nats allowed",
    )


def predict(num_bytes: int, encode_s: float, decode_s: float, link: Link) -> float:
    """Seconds for a block that travels alone; the link has been measured."""
    way_s = link.latency_s + link.per_block_s + num_bytes / link.bytes_per_s
    return encode_s + way_s + decode_s


def _predict(figure: CodecFigures, link: Link) -> float:
    seconds = predict(figure.encoded_bytes, figure.encode_s, figure.decode_s, link)
    return seconds if seconds >= 0 else math.inf  # nonsense, NaN included


def _allows(max_kl: float, kl: float | None) -> bool:
    return kl is not None and max_kl > 0 and 0 <= kl <= max_kl


def _nothing_allowed(refused: list[CodecFigures], max_kl: float) -> str:
    if not max_kl > 0:
        return "raw: the budget allows no loss"
    measured = [f"{figure.name} {figure.kl:.3g}" for figure in refused if figure.kl is not None]
    if not measured:
        return "raw: no codec's loss has been measured for this model (baton fabric calibrate)"
    return f"raw: the budget is {max_kl:g} nats, and measured are {', '.join(measured)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
