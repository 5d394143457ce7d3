"""What arithmetic says of a candidate: enough to leave out what cannot do it, not to choose.

A steady state: prompts take their share of a worker's time, and as many sequences decode as come in
while one lasts. Queues are those of random arrivals. `least_*` have no queue in them: no run of the
trace is faster, so a candidate whose least is over a limit needs no run. A plan is chosen by the
twin; this model also finds where choices would flip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from baton.core.cost import ChunkShape, StepShape
from baton.observe.slo import Slo
from baton.planner.plan.candidates import Candidate, Way
from baton.planner.plan.kinds import Kind
from baton.planner.plan.traffic import Traffic
from baton.planner.steady import joined
from baton.types import Role

MAX_SEQS = 256
"""Sequences in a step, as `engine.max_num_seqs` has it."""
MAX_LOAD = 1.0
SLACK = 1.05
"""A bound has to be missed by so much: the twin does not see means alone."""


class Watts(msgspec.Struct, frozen=True):
    """Of one worker with all its devices."""

    idle: float
    busy: float


class Prediction(msgspec.Struct, frozen=True):
    """load: the busiest resource's share of its time; 1 or more never catches up. TTFT is that at
    the quantile that is to be attained, TPOT the mean."""

    load: float
    ttft_s: float
    tpot_s: float
    least_ttft_s: float
    least_tpot_s: float
    e2e_s: float
    least_e2e_s: float
    watts: Mapping[Role, Watts] = {}

    def strain(self, slo: Slo) -> float:
        """The worst of latency / limit and load; 1 is just kept."""
        if self.load >= MAX_LOAD:
            return math.inf
        return _worst(slo, self.ttft_s, self.tpot_s, self.e2e_s)

    def may_hold(self, slo: Slo) -> bool:
        """Whether it is worth a run."""
        least = _worst(slo, self.least_ttft_s, self.least_tpot_s, self.least_e2e_s)
        return self.load < MAX_LOAD * SLACK and least <= SLACK


def _worst(slo: Slo, ttft_s: float, tpot_s: float, e2e_s: float) -> float:
    values = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
    return max(
        (values[name] / each for name, each in slo.limits.items() if name in values), default=0.0
    )


class _Decoding(NamedTuple):
    """A worker that only decodes, `batch` sequences at a time. watts: of one device."""

    batch: int
    step_s: float
    watts: float | None


class _Prompts:
    """Seconds that prompts take on one kind of worker, in one role, that does nothing else.

    watts: of one of its devices meanwhile. ride: what a prompt costs beside `most // 2` running
    answers, as a share of what it costs alone.
    """

    def __init__(self, kind: Kind, role: Role, traffic: Traffic) -> None:
        self.cost = cost = kind.cost(role)
        alone: list[float] = []
        for whole, new, _ in traffic.samples:
            seconds = 0.0
            for start in range(whole - new, whole, kind.budget):
                size = min(kind.budget, whole - start)
                chunk = ChunkShape(size, start, start + size == whole)
                seconds += cost.step_s(StepShape.of([chunk]))
            alone.append(seconds)
        self.alone_s = sorted(alone)
        self.mean_s = sum(alone) / len(alone)
        self.mean_square = sum(each * each for each in alone) / len(alone)
        size = max(1, round(sum(new for _, new, _ in traffic.samples) / len(alone)))
        shape = StepShape.of([ChunkShape(min(size, kind.budget), 0, True)])
        self.power = power = kind.power
        self.watts = None if power is None else cost.watts(shape, power)
        self.most = max(1, min(MAX_SEQS, int(kind.kv_tokens / traffic.context)))
        beside = _decode_shape(max(1, self.most // 2), traffic)
        added = cost.stage_s(joined(beside, shape)) - cost.stage_s(beside)
        self.ride = min(1.0, max(added / cost.stage_s(shape), 0.0))

    def at(self, quantile: float) -> float:
        return self.alone_s[min(len(self.alone_s) - 1, int(quantile * len(self.alone_s)))]


class Arithmetic:
    """Predictions for one traffic. Keeps what it has worked out of each kind."""

    def __init__(self, traffic: Traffic, attainment: float) -> None:
        self.traffic = traffic
        self._quantile = attainment
        self._prompts: dict[object, _Prompts] = {}
        self._decodings: dict[object, _Decoding | None] = {}
        outputs = sorted(out for _, _, out in traffic.samples)
        # Tokens after the first one, at the quantile.
        self._gaps = outputs[min(len(outputs) - 1, int(attainment * len(outputs)))] - 1

    def predict(self, candidate: Candidate) -> Prediction:
        workers, way = candidate.workers, candidate.way
        if Role.PREFILL not in workers:
            return self._unified(*workers[Role.UNIFIED], share=1.0)
        assert way is not None  # `candidates` gives every split one its way
        if Role.UNIFIED not in workers:
            return self._split(workers, way, share=1.0)
        found = []
        for tenth in range(1, 10):  # the router balances; nobody tells it the share
            both = self._unified(*workers[Role.UNIFIED], share=tenth / 10)
            apart = self._split(workers, way, share=1 - tenth / 10)
            found.append(_worse(both, apart))
        return min(found, key=lambda each: each.load)

    def least_workers(self, kind: Kind, role: Role) -> int:
        """The least number of workers of one role that keep up; 0 if no number does."""
        rate, prompts = self.traffic.rate, self._of(kind, role)
        if role is Role.PREFILL:
            return max(1, math.ceil(rate * prompts.mean_s / MAX_LOAD))
        count = 1
        while count <= 1024:
            if role is Role.DECODE:
                held = self._decoding(kind, rate / count) is not None
            else:
                held = self._unified(kind, count, 1.0).load < MAX_LOAD
            if held:
                return count
            count += max(1, count // 8)
        return 0

    # The two styles --------------------------------------------------------------------------

    def _unified(self, kind: Kind, count: int, share: float) -> Prediction:
        traffic, prompts = self.traffic, self._of(kind, Role.UNIFIED)
        cost, ride = prompts.cost, prompts.ride
        rate = traffic.rate * share / count
        busy = rate * prompts.mean_s * ride
        batch = self._batch(prompts, rate, busy)
        if batch is None:
            return _saturated(max(busy, MAX_LOAD * SLACK))
        shape = _decode_shape(batch, traffic)
        step_s = cost.stage_s(shape)
        tpot_s = step_s / (1 - busy)
        chunks = math.ceil(traffic.mean_prompt / kind.budget)
        alone_s = prompts.at(self._quantile)
        wait_s = _wait_s(rate, prompts.mean_square * ride**2, busy, count, self._quantile)
        power = prompts.power
        watts = {}
        if power is not None and prompts.watts is not None:
            mean = busy * prompts.watts + (1 - busy) * cost.watts(shape, power)
            watts[Role.UNIFIED] = Watts(power.idle_w * kind.num_devices, mean * kind.num_devices)
        ttft_s = alone_s + chunks * step_s + wait_s
        load = max(busy, batch / (prompts.most + 1))
        return self._prediction(load, ttft_s, tpot_s, alone_s, tpot_s, watts)

    def _split(
        self, workers: Mapping[Role, tuple[Kind, int]], way: Way, share: float
    ) -> Prediction:
        traffic = self.traffic
        (first, num_first), (second, num_second) = workers[Role.PREFILL], workers[Role.DECODE]
        rate = traffic.rate * share
        prompts = self._of(first, Role.PREFILL)
        busy = rate / num_first * prompts.mean_s
        num_bytes = traffic.mean_prompt * first.model.kv_bytes_per_token * way.wire_share
        wire = rate * num_bytes / way.link.bytes_per_s / min(num_first, num_second)
        decoding = self._decoding(second, rate / num_second)
        if decoding is None or max(busy, wire) >= MAX_LOAD * SLACK:
            return _saturated(max(busy, wire, MAX_LOAD * SLACK))
        alone_s = prompts.at(self._quantile)
        below = min(busy, 0.999)
        wait_s = _wait_s(rate / num_first, prompts.mean_square, below, num_first, self._quantile)
        pass_s = way.link.latency_s + num_bytes / way.link.bytes_per_s / max(1 - wire, 1e-3)
        gap_s = pass_s / max(1.0, traffic.mean_output - 1)
        watts = {}
        for role, mean in ((Role.PREFILL, prompts.watts), (Role.DECODE, decoding.watts)):
            kind = workers[role][0]
            power = kind.power
            if power is not None and mean is not None:
                watts[role] = Watts(power.idle_w * kind.num_devices, mean * kind.num_devices)
        return self._prediction(
            max(busy, wire, decoding.batch / (self._of(second, Role.DECODE).most + 1)),
            alone_s + wait_s,
            decoding.step_s + gap_s,
            alone_s,
            decoding.step_s,
            watts,
        )

    def _prediction(
        self,
        load: float,
        ttft_s: float,
        tpot_s: float,
        least_ttft_s: float,
        least_tpot_s: float,
        watts: Mapping[Role, Watts],
    ) -> Prediction:
        return Prediction(
            load,
            ttft_s,
            tpot_s,
            least_ttft_s,
            least_tpot_s,
            ttft_s + self._gaps * tpot_s,
            self._gaps * least_tpot_s,
            watts,
        )

    # What they share -------------------------------------------------------------------------

    def _of(self, kind: Kind, role: Role) -> _Prompts:
        key = kind.key(role)
        found = self._prompts.get(key)
        if found is None:
            found = self._prompts[key] = _Prompts(kind, role, self.traffic)
        return found

    def _decoding(self, kind: Kind, rate: float) -> _Decoding | None:
        """At so many sequences a second for each worker; None if they grow without end."""
        name = (kind.key(Role.DECODE), rate)
        if name not in self._decodings:
            known = self._of(kind, Role.DECODE)
            found, batch = None, self._batch(known, rate, 0.0)
            if batch is not None:
                shape = _decode_shape(batch, self.traffic)
                watts = None if known.power is None else known.cost.watts(shape, known.power)
                found = _Decoding(batch, known.cost.stage_s(shape), watts)
            self._decodings[name] = found
        return self._decodings[name]

    def _batch(self, worker: _Prompts, rate: float, busy: float) -> int | None:
        """Sequences that decode at a time on one worker; None if they grow without end.

        The iteration rises to the least fixed point and so ends at once or at the most.
        """
        if busy >= 1:
            return None
        cost, most, batch = worker.cost, worker.most, 1
        while True:
            step_s = cost.stage_s(_decode_shape(batch, self.traffic)) / (1 - busy)
            needed = math.ceil(rate * self.traffic.mean_output * step_s)
            if needed > most:
                return None
            if needed <= batch:
                return batch
            batch = needed


def _decode_shape(batch: int, traffic: Traffic) -> StepShape:
    context = round(batch * traffic.context)
    return StepShape(batch, batch, batch, context, float(context))


def _wait_s(rate: float, mean_square: float, busy: float, count: int, quantile: float) -> float:
    """In a queue of random arrivals that `count` workers share, at that quantile of requests."""
    mean = rate * mean_square / (2 * (1 - busy)) / count
    return mean * max(1.0, -math.log(max(1 - quantile, 1e-6)))


def _saturated(load: float) -> Prediction:
    return Prediction(load, math.inf, math.inf, 0.0, 0.0, math.inf, 0.0)


def _worse(one: Prediction, other: Prediction) -> Prediction:
    """Of both halves of a mixed layout, what holds for all requests."""
    return Prediction(
        max(one.load, other.load),
        max(one.ttft_s, other.ttft_s),
        max(one.tpot_s, other.tpot_s),
        min(one.least_ttft_s, other.least_ttft_s),
        min(one.least_tpot_s, other.least_tpot_s),
        max(one.e2e_s, other.e2e_s),
        min(one.least_e2e_s, other.least_e2e_s),
        {**one.watts, **other.watts},
    )
