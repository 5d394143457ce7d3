"""Batches of tokens for the demo model, made of what `demo_data` has found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from demo_data import (
    ASSISTANT_ID,
    BOS_ID,
    END_ID,
    MAX_POSITIONS,
    PAD_ID,
    SYSTEM_ID,
    USER_ID,
    Pair,
)
from tokenizers import Tokenizer
from torch import Tensor

TOKENS_PER_STEP = 3072


class Batch(NamedTuple):
    """Token ids and, where the loss counts, the next token; -100 elsewhere. Both int64."""

    inputs: Tensor
    targets: Tensor
    pairs: list[int]  # the pair of each row, when a row is one question and its answer


class Data:
    """Pairs and running text as token ids, and the batches made of them."""

    def __init__(
        self, tokenizer: Tokenizer, pairs: list[Pair], texts: list[str], rng: random.Random
    ) -> None:
        def encode(items: list[str]) -> list[list[int]]:
            return [row.ids for row in tokenizer.encode_batch(items)]

        self.rng = rng
        self.questions = [
            [USER_ID, *ids, END_ID, ASSISTANT_ID] for ids in encode([p.question for p in pairs])
        ]
        self.answers = [[*ids, END_ID] for ids in encode([p.answer for p in pairs])]
        self.text = [token for ids in encode(texts) for token in ids]
        system = encode(["You are a helpful assistant.", "Answer briefly.", "You know Python."])
        self.systems = [[SYSTEM_ID, *ids, END_ID] for ids in system]
        self.wrong = [True] * len(pairs)  # as last seen in training

    def _turn(self, index: int) -> list[tuple[int, bool]]:
        """The tokens of a question and its answer, each with whether the loss counts it."""
        question = [(token, False) for token in self.questions[index]]
        return question + [(token, True) for token in self.answers[index]]

    def _system(self, max_text: int) -> list[tuple[int, bool]]:
        ids = self.rng.choice(self.systems)
        if max_text and self.rng.random() < 0.5:
            size = self.rng.randrange(max_text)
            start = self.rng.randrange(len(self.text) - size)
            ids = [SYSTEM_ID, *self.text[start : start + size], END_ID]
        return [(token, False) for token in ids]

    @staticmethod
    def _batch(rows: list[list[tuple[int, bool]]], pairs: list[int]) -> Batch:
        longest = max(len(row) for row in rows)
        inputs = torch.full((len(rows), longest), PAD_ID)
        targets = torch.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            tokens = torch.tensor([token for token, _ in row])
            counts = torch.tensor([counts for _, counts in row])
            inputs[i, 0] = BOS_ID
            inputs[i, 1 : len(row)] = tokens[:-1]
            targets[i, : len(row)] = tokens.masked_fill(~counts, -100)
        return Batch(inputs, targets, pairs)

    def questions_once(self, indices: list[int]) -> list[Batch]:
        """One conversation a row, rows of like length together, in random order."""
        rows = []
        for index in indices:
            prefix = self._system(0) if self.rng.random() < 0.1 else []
            rows.append((index, prefix + self._turn(index)))
        rows.sort(key=lambda row: len(row[1]))
        batches: list[Batch] = []
        while rows:
            count = max(1, TOKENS_PER_STEP // len(rows[-1][1]))
            part, rows = rows[-count:], rows[:-count]
            batches.append(self._batch([row for _, row in part], [index for index, _ in part]))
        self.rng.shuffle(batches)
        return batches

    def long_chats(self) -> Batch:
        """Conversations of many turns, of one random length up to the model's limit."""
        size = self.rng.randrange(200, MAX_POSITIONS)
        rows = []
        for _ in range(max(1, TOKENS_PER_STEP // size)):
            row = self._system(size // 2) if self.rng.random() < 0.5 else []
            while len(row) < size:
                row += self._turn(self.rng.randrange(len(self.questions)))
            rows.append(row[:size])
        return self._batch(rows, [])

    def running(self) -> Batch:
        """Plain text, every token counted."""
        size = self.rng.choice((128, 512, 1024))
        starts = (self.rng.randrange(len(self.text) - size) for _ in range(TOKENS_PER_STEP // size))
        return self._batch([[(t, True) for t in self.text[s : s + size]] for s in starts], [])

    def batches(self, progress: list[float], chats: float) -> Iterator[Batch]:
        """Without end: every question once an epoch, with what was answered wrong asked again.

        progress[0], which the caller moves from 0 to 1, thins out the running text; chats is the
        number of batches of long conversations for each batch of single questions.
        """
        while True:
            indices = list(range(len(self.questions)))
            if progress[0] > 0.5:
                wrong = [index for index in indices if self.wrong[index]]
                indices += wrong * 2
            for batch in self.questions_once(indices):
                yield batch
                if self.rng.random() < chats:
                    yield self.long_chats()
                if self.rng.random() < 0.12 * (1 - progress[0]):
                    yield self.running()
