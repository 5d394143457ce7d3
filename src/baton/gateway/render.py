"""Pieces of choices in the shapes of OpenAI's two completion operations.

A renderer lives as long as one request. Streaming asks it for chunks as pieces come; otherwise it
keeps the pieces and gives the whole answer at the end.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from baton.gateway.choice import Piece, ShownToken
from baton.gateway.prepare import Work
from baton.gateway.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Finish,
    Message,
    TopLogprob,
    Usage,
)
from baton.text.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's stand-in for "as good as impossible"; JSON has no infinity


class Shape(msgspec.Struct, frozen=True):
    """What is the same in every part of one answer. `chunk_usage`: UNSET, or None where each
    chunk but the last shows a null."""

    id: str
    created: int
    model: str
    logprobs: bool
    token_ids: bool
    chunk_usage: UnsetType | None


class _Collected:
    """The pieces of one choice, joined."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.shown: list[ShownToken] = []
        self.finish: Finish = "stop"

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.token_ids += piece.token_ids
        self.shown += piece.shown
        if piece.finish is not None:
            self.finish = piece.finish


class CompletionRenderer:
    """/v1/completions. The echo of a prompt goes before its choice's first piece."""

    def __init__(self, shape: Shape, work: Work, tokenizer: Tokenizer) -> None:
        self._shape = shape
        self._work = work
        self._tokenizer = tokenizer
        self._started: set[int] = set()
        self._collected = [_Collected() for _ in work.requests]

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        first = piece.index not in self._started
        self._started.add(piece.index)
        choice = self._choice(
            piece.index, piece.text, piece.token_ids, piece.shown, piece.finish, first
        )
        return [self._completion([choice], self._shape.chunk_usage)]

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._completion([], usage)

    def collect(self, piece: Piece) -> None:
        self._collected[piece.index].add(piece)

    def whole(self, usage: Usage) -> msgspec.Struct:
        choices = [
            self._choice(
                index, "".join(c.text), tuple(c.token_ids), tuple(c.shown), c.finish, first=True
            )
            for index, c in enumerate(self._collected)
        ]
        return self._completion(choices, usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        shape = self._shape
        return Completion(shape.id, shape.created, shape.model, choices, usage)

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: tuple[int, ...],
        shown: tuple[ShownToken, ...],
        finish: Finish | None,
        first: bool,
    ) -> CompletionChoice:
        ids: list[int] | UnsetType = UNSET
        prompt_ids: list[int] | UnsetType = UNSET
        if self._shape.token_ids:
            ids = list(token_ids)
            if first:
                prompt_ids = list(self._work.requests[index].prompt)
        return CompletionChoice(
            index=index,
            text=self._work.echo[index // self._work.n] + text if first else text,
            logprobs=self._logprobs(shown) if self._shape.logprobs else None,
            finish_reason=finish,
            token_ids=ids,
            prompt_token_ids=prompt_ids,
        )

    def _logprobs(self, shown: tuple[ShownToken, ...]) -> CompletionLogprobs:
        text = self._tokenizer.token_text
        top = []
        for token in shown:
            best = {text(t.token_id): _clamp(t.logprob) for t in token.logprobs.top}
            chosen = token.logprobs.chosen
            best.setdefault(text(chosen.token_id), _clamp(chosen.logprob))
            top.append(best)
        return CompletionLogprobs(
            tokens=[text(token.token_id) for token in shown],
            token_logprobs=[_clamp(token.logprobs.chosen.logprob) for token in shown],
            top_logprobs=top,
            text_offset=[token.offset for token in shown],
        )


class ChatRenderer:
    """/v1/chat/completions. A chunk with the role goes before a choice's first piece."""

    def __init__(self, shape: Shape, work: Work, tokenizer: Tokenizer) -> None:
        self._shape = shape
        self._work = work
        self._tokenizer = tokenizer
        self._started: set[int] = set()
        self._collected = [_Collected() for _ in work.requests]

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        chunks: list[msgspec.Struct] = []
        if piece.index not in self._started:
            prompt_ids: list[int] | UnsetType = UNSET
            if self._shape.token_ids and not self._started:
                prompt_ids = list(self._work.requests[0].prompt)
            self._started.add(piece.index)
            role = ChunkChoice(piece.index, Delta(role="assistant", content=""))
            chunks.append(self._chunk([role], self._shape.chunk_usage, prompt_ids))
        logprobs = self._logprobs(piece.shown) if self._shape.logprobs else None
        choice = ChunkChoice(
            piece.index,
            Delta(content=piece.text) if piece.text else Delta(),
            logprobs,
            piece.finish,
            list(piece.token_ids) if self._shape.token_ids else UNSET,
        )
        chunks.append(self._chunk([choice], self._shape.chunk_usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._chunk([], usage)

    def collect(self, piece: Piece) -> None:
        self._collected[piece.index].add(piece)

    def whole(self, usage: Usage) -> msgspec.Struct:
        shape = self._shape
        choices = [
            ChatChoice(
                index,
                Message("".join(c.text)),
                self._logprobs(tuple(c.shown)) if shape.logprobs else None,
                c.finish,
                c.token_ids if shape.token_ids else UNSET,
            )
            for index, c in enumerate(self._collected)
        ]
        prompt_ids = list(self._work.requests[0].prompt) if shape.token_ids else UNSET
        return ChatCompletion(
            shape.id, shape.created, shape.model, choices, usage, prompt_token_ids=prompt_ids
        )

    def _chunk(
        self,
        choices: list[ChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        shape = self._shape
        return ChatChunk(
            shape.id, shape.created, shape.model, choices, usage, prompt_token_ids=prompt_ids
        )

    def _logprobs(self, shown: tuple[ShownToken, ...]) -> ChatLogprobs:
        return ChatLogprobs(
            [
                ChatLogprob(
                    self._tokenizer.token_text(token.token_id),
                    _clamp(token.logprobs.chosen.logprob),
                    list(self._tokenizer.token_bytes(token.token_id)),
                    [
                        TopLogprob(
                            self._tokenizer.token_text(top.token_id),
                            _clamp(top.logprob),
                            list(self._tokenizer.token_bytes(top.token_id)),
                        )
                        for top in token.logprobs.top
                    ],
                )
                for token in shown
            ]
        )


Renderer = CompletionRenderer | ChatRenderer


def _clamp(logprob: float) -> float:
    return logprob if logprob > _MIN_LOGPROB else _MIN_LOGPROB
