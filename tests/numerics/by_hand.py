"""The smallest possible engine: block tables kept by hand around `Transformer.forward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.model.attention import Batch
from baton.model.bodies import Body
from baton.model.kv_cache import KvCache
from baton.model.loader import load_weights
from baton.model.native import Kernels
from baton.model.packed import load_packed
from baton.model.transformer import Transformer
from baton.model_spec import load_model_spec

BLOCK_SIZE = 8


@dataclass
class Handmade:
    """A model and a pool whose free slots are poisoned; blocks are handed out in a shuffle."""

    model: Transformer
    kv: KvCache
    free: list[int]

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: str = "float32",
        device: str = "cpu",
        num_blocks: int = 300,
        kernels: Body = None,
        weights_fd: int | None = None,
    ) -> Handmade:
        spec = load_model_spec(path)
        kv = KvCache(spec, num_blocks, BLOCK_SIZE, dtype, device)
        kv.data.fill_(float("nan"))
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        if isinstance(kernels, Kernels):
            packed = load_packed(path, spec, dtype, kernels, weights_fd)
            return cls(Transformer(spec, packed), kv, order.tolist())
        weights = load_weights(path, spec, dtype, device)
        return cls(Transformer(spec, weights, kernels), kv, order.tolist())

    def step(self, chunks: Sequence[tuple[Sequence_, int]], every: bool = False) -> torch.Tensor:
        """Compute the next n tokens of each sequence together; logits of the last token of each.

        `every` gives the logits of all tokens instead.
        """
        tokens, positions, slots, starts, contexts = [], [], [], [0], []
        for sequence, count in chunks:
            end = sequence.computed + count
            assert end <= len(sequence.tokens)
            while len(sequence.table) * BLOCK_SIZE < end:
                sequence.table.append(self.free.pop())
            for position in range(sequence.computed, end):
                tokens.append(sequence.tokens[position])
                positions.append(position)
                block = sequence.table[position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            sequence.computed = end
            contexts.append(end)
            starts.append(len(tokens))
        width = max(len(sequence.table) for sequence, _ in chunks)
        tables = [s.table + [0] * (width - len(s.table)) for s, _ in chunks]
        rows = range(len(tokens)) if every else [start - 1 for start in starts[1:]]
        device = self.kv.data.device
        batch = Batch(
            token_ids=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            query_starts=starts,
            context_lens=contexts,
            block_tables=torch.tensor(tables, device=device),
            sample_rows=torch.tensor(list(rows), device=device),
        )
        return self.model.forward(batch, self.kv)

    def release(self, *sequences: Sequence_) -> None:
        for sequence in sequences:
            self.kv.data[sequence.table] = float("nan")
            self.free += sequence.table


@dataclass
class Sequence_:
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
