"""What a placement is predicted to bring, so that it can be kept next to what then happens."""

from __future__ import annotations

import msgspec


class Predicted(msgspec.Struct, frozen=True):
    """Seconds of one request on the workers of one placement; None is not known.

    queue_s: until the first chunk of its prompt. prefill_s: from there to its first token.
    transfer_s: fetching what the decode worker then lacks. decode_step_s: between two tokens.
    Each is what `StageTimes` of the leg in question will say, decode_step_s a gap of its decode_s.
    """

    queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    decode_step_s: float | None = None
