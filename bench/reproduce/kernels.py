"""Seconds of a vLLM step from kernels that were measured one by one.

A step is the sum of its kernels: those that see every token (projections, norms, activations),
those that see every sequence (head, sampler), attention, and routed experts. Tables and units are
those of the measurements: microseconds, by tokens, by sequences, and for attention by (tokens of
the prompt's chunk, its KV before the chunk, decoding sequences, their KV). Nothing is fitted.

What the tables leave open is decided here:
* several chunks of prompts in a step: each adds what it adds when it is alone beside the decodes;
* decoding sequences of unlike lengths: their mean, moved towards their greatest by the share that
  was measured for such mixtures (`Skew`);
* a step of few tokens is padded to the next size for which a CUDA graph was captured;
* between devices, bytes over the link's rate and its latency, per collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from baton.core.plan import Chunk, StepPlan
from reproduce.tables import Curve, Grid, read_rows

MICROSECOND = 1e-6
NORMS_A_LAYER = 2
ONCE = ("embedding", "final_layernorm")
ELEMENT_BYTES = 2


class Served(msgspec.Struct, frozen=True):
    """What ran: the model's sizes and how it lay over its devices.

    experts, top_k: 0 in a dense model. tensor: devices that share each layer. expert_ranks: devices
    over which the experts lie, each computing attention for its own sequences.
    """

    name: str
    layers: int
    hidden: int
    experts: int = 0
    top_k: int = 0
    tensor: int = 1
    expert_ranks: int = 1


class LinkOf(msgspec.Struct, frozen=True):
    """Between the devices of one server."""

    bytes_per_s: float
    latency_s: float


class StepKernels:
    """Step times of one model on one kind of device."""

    def __init__(
        self,
        served: Served,
        directory: Path,
        prefix: str,
        link: LinkOf,
        max_graph: int,
        usual_skew: float | None,
    ) -> None:
        """directory/prefix_{attention,dense,per_sequence[,moe][,skew]}.csv.gz hold the kernels.

        max_graph: the largest number of tokens for which a CUDA graph was captured. usual_skew: the
        share for mixtures of a class that was not measured; None where none was, and the mean of
        the lengths has to do.
        """
        self._served, self._link = served, link
        self._graphs = _graph_sizes(max_graph)
        self._dense = _dense(directory / f"{prefix}_dense.csv.gz", served.layers)
        self._sequences = _by_size(directory / f"{prefix}_per_sequence.csv.gz", "sequences")
        self.attention = Attention(directory / f"{prefix}_attention.csv.gz")
        self._skew = None
        if usual_skew is not None:
            self._skew = Skew(directory / f"{prefix}_skew.csv.gz", usual_skew)
        self._experts = _experts(directory / f"{prefix}_moe.csv.gz") if served.experts else None

    def step_s(self, plans: Sequence[StepPlan]) -> float:
        """Seconds of a step. Plans of data-parallel ranks go in lock-step; the slowest decides."""
        totals = [plan.num_tokens for plan in plans]
        tokens = self._padded(max(totals))
        seconds = MICROSECOND * max(self._rank_us(plan, tokens) for plan in plans)
        if self._experts is not None:
            seconds += MICROSECOND * self._served.layers * self._experts_us(sum(totals))
        return seconds + self._collectives_s(tokens)

    def attention_us(self, plan: StepPlan) -> float:
        """Attention of one layer."""
        prompts = [(c.num_tokens, c.start) for c in plan.chunks if not _is_decode(c)]
        decodes = [c.end for c in plan.chunks if _is_decode(c)]
        if not decodes:
            return self._attend(prompts, 0, 0.0)
        mean, longest = sum(decodes) / len(decodes), max(decodes)
        usual = self._attend(prompts, len(decodes), mean)
        if self._skew is None or longest == min(decodes):
            return usual
        share = self._skew(prompts, decodes)
        return usual + share * max(0.0, self._attend(prompts, len(decodes), longest) - usual)

    def _attend(self, prompts: Sequence[tuple[int, int]], num_decodes: int, kv: float) -> float:
        alone = self.attention(0, 0, num_decodes, kv)
        return alone + sum(self.attention(n, kp, num_decodes, kv) - alone for n, kp in prompts)

    def _rank_us(self, plan: StepPlan, tokens: int) -> float:
        if not plan.chunks:
            return 0.0
        sequences = self._sequences(len(plan.chunks))
        return self._dense(tokens) + sequences + self._served.layers * self.attention_us(plan)

    def _experts_us(self, num_tokens: int) -> float:
        """Routed experts of a layer. Every rank sees all ranks' tokens, but only its own experts.

        Tokens choose their experts at random; of the rank's experts, those that anyone chose run.
        """
        served = self._served
        skipped = (1 - served.top_k / served.experts) ** num_tokens
        active = served.experts / served.expert_ranks * (1 - skipped)
        assert self._experts is not None
        return self._experts(num_tokens / served.expert_ranks, active)

    def _collectives_s(self, tokens: int) -> float:
        """Two a layer: all-reduces of tensor parallelism, or to the experts and back."""
        served, link = self._served, self._link
        ranks = max(served.tensor, served.expert_ranks)
        if ranks == 1:
            return 0.0
        share = 2 * (ranks - 1) / ranks if served.tensor > 1 else 1.0
        num_bytes = share * tokens * served.hidden * ELEMENT_BYTES
        return 2 * served.layers * (link.latency_s + num_bytes / link.bytes_per_s)

    def _padded(self, tokens: int) -> int:
        return next((size for size in self._graphs if size >= tokens), tokens)


class Attention:
    """Time of attention in one layer, in microseconds, from the doubling grid of the measurements.

    Other measured points are not used; `points` gives them all, to see how far off the grid is.
    """

    def __init__(self, path: Path) -> None:
        self.points = {
            tuple(
                float(row[name])
                for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
            ): float(row["time_us"])
            for row in read_rows(path)
        }
        grid = {key: us for key, us in self.points.items() if all(map(_is_doubling, key))}
        self._decodes = Grid({key[2:]: us for key, us in grid.items() if not key[0]})
        prompts = {key[:2]: us for key, us in grid.items() if key[0] and not key[2]}
        histories = {key[1] for key in prompts}
        self._prompts = Grid({**prompts, **{(0.0, kp): 0.0 for kp in histories}})
        mixed = {key: us for key, us in grid.items() if key[0] and key[2]}
        counts = {key[2] for key in mixed}
        alone = {
            (0.0, kp, *key[2:]): us
            for key, us in grid.items()
            if not key[0] and key[2] in counts
            for kp in histories
        }
        self._mixed = Grid({**mixed, **alone})

    def __call__(self, chunk: float, history: float, num_decodes: float, kv: float) -> float:
        if not chunk:
            return self._decodes(num_decodes, kv) if num_decodes else 0.0
        if not num_decodes:
            return self._prompts(chunk, history)
        return self._mixed(chunk, history, num_decodes, kv)

    def is_on_grid(self, point: tuple[float, ...]) -> bool:
        return all(map(_is_doubling, point))


class Skew:
    """How far a batch of unlike lengths lies from its mean towards its greatest length.

    The measurements give a share per class of batches, and one for the classes that were not met.
    Classes are by prompt chunk, number of decodes, where the mean lies between the least
    and the greatest length, the greatest, and the prompt's history.
    """

    def __init__(self, path: Path, usual: float) -> None:
        self._shares: dict[tuple[float, str, str, str, str], float] = {}
        for row in read_rows(path):
            key = (
                float(row["pc"]), row["n_label"], row["skew_rate_label"],
                row["kv_big_label"], row["kp_label"],
            )  # fmt: skip
            self._shares[key] = float(row["alpha"])
        self._usual = usual
        self._chunks = sorted({key[0] for key in self._shares})

    def __call__(self, prompts: Sequence[tuple[int, int]], decodes: Sequence[int]) -> float:
        least, longest = min(decodes), max(decodes)
        mean = sum(decodes) / len(decodes)
        chunk = sum(n for n, _ in prompts)
        history = sum(kp for _, kp in prompts)
        key = (
            min(self._chunks, key=lambda each: abs(each - chunk)),
            "n" + _label(len(decodes), (2, 4, 8, 16, 32, 64, 128, 256)),
            "sr" + _label(100 * (mean - least) / (longest - least), (5, 15, 40, 70), "%"),
            "kvB" + _label(longest / 1024, (1, 4, 16), "k"),
            _history_label(history) if chunk else "kp=0",
        )
        return self._shares.get(key, self._usual)


def _label(value: float, edges: tuple[int, ...], unit: str = "") -> str:
    edge = next((edge for edge in edges if value <= edge), None)
    return f">{edges[-1]}{unit}" if edge is None else f"<={edge}{unit}"


def _history_label(history: float) -> str:
    if not history:
        return "kp=0"
    return "kp<=512" if history <= 512 else "kp" + _label(history / 1024, (1, 2, 4, 8), "k")


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.start > 0


def _is_doubling(value: float) -> bool:
    return value == 0 or (value.is_integer() and int(value).bit_count() == 1)


def _graph_sizes(largest: int) -> list[int]:
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    return [size for size in sizes if size <= largest]


def _dense(path: Path, layers: int) -> Curve:
    """All kernels that see every token, of all layers, over the number of tokens."""
    points: dict[float, float] = {}
    for row in read_rows(path):
        name = row["layer"]
        times = 1 if name in ONCE else layers * (NORMS_A_LAYER if name == "layernorm" else 1)
        tokens = float(row["tokens"])
        points[tokens] = points.get(tokens, 0.0) + times * float(row["time_us"])
    return Curve(points)


def _by_size(path: Path, column: str) -> Curve:
    points: dict[float, float] = {}
    for row in read_rows(path):
        size = float(row[column])
        points[size] = points.get(size, 0.0) + float(row["time_us"])
    return Curve(points)


def _experts(path: Path) -> Grid:
    rows = read_rows(path)
    return Grid(
        {
            (float(row["tokens"]), float(row["activated_experts"])): float(row["time_us"])
            for row in rows
        }
    )
