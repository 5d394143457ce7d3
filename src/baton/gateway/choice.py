"""One choice of an answer: token deltas in, pieces of text out.

`ChoiceText` owns the detokenizer, the stop-string matcher and the counts of one choice. It works
token by token, so what it says does not depend on how tokens were batched into deltas: the
streamed text is the unstreamed one, cut.
"""

from __future__ import annotations

import msgspec

from baton.errors import Internal, Unavailable, from_wire
from baton.gateway.replies import Finish
from baton.text.detokenizer import Detokenizer
from baton.text.stop import StopMatcher
from baton.text.tokenizer import Tokenizer
from baton.types import FinishReason, SampledLogprobs, TokenDelta


class TextOptions(msgspec.Struct, frozen=True):
    """How tokens become text. `continues`: the text goes on after its prompt's.
    `stop_token_ids`: the ids whose text is not shown when they end the choice.
    `min_tokens`: stop strings are looked for in the text after that many tokens only."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    continues: bool = False


class ShownToken(msgspec.Struct, frozen=True):
    """A token with its log-probabilities. `offset`: characters of text before it."""

    token_id: int
    offset: int
    logprobs: SampledLogprobs


class Piece(msgspec.Struct, frozen=True):
    """News of one choice. `finish` is set in the last one."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    shown: tuple[ShownToken, ...]
    finish: Finish | None


class ChoiceText:
    """The text of the choice that clients see as `index`."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, options: TextOptions, first_offset: int = 0
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached: int | None = None  # as the first leg saw it
        self._options = options
        self._detokenizer = Detokenizer(
            tokenizer, options.skip_special_tokens, continues=options.continues
        )
        self._matcher = StopMatcher(options.stop, options.include_stop) if options.stop else None
        self._offset = first_offset

    def push(self, delta: TokenDelta) -> Piece:
        """What `delta` adds. After a piece with `finish`, nothing more may be pushed.

        Raises:
            ServeError: the choice ended in an error.
        """
        if self.num_cached is None:
            self.num_cached = delta.num_cached
        if delta.finish is FinishReason.ERROR:
            raise from_wire(delta.error) if delta.error else Internal("the request failed")
        if delta.finish is FinishReason.ABORT:
            raise Unavailable("the request was aborted by the server", stage="decode")
        text: list[str] = []
        shown: list[ShownToken] = []
        used = 0
        finish: Finish | None = None
        for position, token_id in enumerate(delta.token_ids):
            used += 1
            self.num_tokens += 1
            if delta.logprobs is not None:
                shown.append(ShownToken(token_id, self._offset, delta.logprobs[position]))
            ends = delta.finish is FinishReason.STOP and used == len(delta.token_ids)
            if ends and self._hides(token_id):
                continue
            if self._take(self._detokenizer.push((token_id,)), text):
                finish = "stop"
                break
        if finish is None and delta.finish is not None:
            finish = "stop" if delta.finish is FinishReason.STOP else "length"
            if self._take(self._detokenizer.flush(), text):
                finish = "stop"
            elif self._matcher is not None:
                text.append(self._matcher.flush())
        return Piece(self.index, "".join(text), delta.token_ids[:used], tuple(shown), finish)

    def _hides(self, token_id: int) -> bool:
        return token_id in self._options.stop_token_ids and not self._options.include_stop

    def _take(self, raw: str, text: list[str]) -> bool:
        """Show what may be shown of `raw`; whether a stop string ended the text."""
        self._offset += len(raw)
        if self._matcher is None or self.num_tokens <= self._options.min_tokens:
            text.append(raw)
            return False
        ready, matched = self._matcher.push(raw)
        text.append(ready)
        return matched is not None
