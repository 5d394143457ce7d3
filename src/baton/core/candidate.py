"""A way in which a request can be placed, with what the router knows and expects of it.

It decides by tokens and blocks, which its own books tell; seconds (`Predicted`) follow from the
rates that finished legs have told of (`Router.timed`).
"""

from __future__ import annotations

import msgspec

from baton.core.predicted import Predicted


class Candidate(msgspec.Struct, frozen=True):
    """One placement, as it looked before it was made; without `prefill`, `decode` does it alone.

    considered: whether the router would choose it if it looked best. Any worker can take any
    request, but only unified ones are given whole ones.

    queue_tokens: work that the worker which computes the prompt has before this one, in prompt
    tokens. prefill_tokens: of this prompt, without what that worker's cache is believed to hold.
    transfer_blocks: of the prompt, that pass to the decode worker; 0 without a handoff.
    context_tokens, num_requests: what the decode worker keeps already.
    """

    prefill: str | None
    decode: str
    considered: bool = True
    queue_tokens: int = 0
    prefill_tokens: int = 0
    transfer_blocks: int = 0
    context_tokens: int = 0
    num_requests: int = 0
    predicted: Predicted = Predicted()

    @property
    def name(self) -> str:
        """Such as `prefill-0 > decode-1`, or `unified-0`."""
        return self.decode if self.prefill is None else f"{self.prefill} > {self.decode}"

    @property
    def work(self) -> int:
        """Prompt tokens to compute before the first token."""
        return self.queue_tokens + self.prefill_tokens


def ttft_s(predicted: Predicted) -> float | None:
    """Seconds to the first token, which does not wait for the transfer; None: not known."""
    return plus(predicted.queue_s, predicted.prefill_s)


def e2e_s(predicted: Predicted, num_tokens: int) -> float | None:
    """Seconds to the last of `num_tokens` tokens; None: not known."""
    decode_s = times(max(0, num_tokens - 1), predicted.decode_step_s)
    return plus(ttft_s(predicted), predicted.transfer_s, decode_s)


def plus(*seconds: float | None) -> float | None:
    """The sum; None if a part of it is not known."""
    known = [part for part in seconds if part is not None]
    return sum(known) if len(known) == len(seconds) else None


def times(count: int, each_s: float | None) -> float | None:
    """Seconds for so many; nothing takes none, whatever one takes."""
    return 0.0 if not count else None if each_s is None else count * each_s
