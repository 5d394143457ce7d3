"""Candidates in the twin: what the code that serves would do with the trace on such workers.

Trials run in forked processes, which have the candidates and the trace already; a number goes in
and a result in JSON comes back. A run of the twin is the same in any of them, to the last bit.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import msgspec

from baton.core.cost import CostModel, Link, StepCost, StepShape
from baton.errors import BatonError, ConfigError
from baton.observe.results import RequestResult
from baton.observe.slo import Slo
from baton.planner.plan.candidates import Candidate
from baton.planner.plan.plan_file import config_of
from baton.twin.deployment import Deployment
from baton.twin.setup import deployment
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest

NEVER = 1e9
"""Stands for infinite, which JSON has no number for."""
Ratios = Mapping[str, tuple[float, float]]
"""By `Offer.profile_name`: measured / predicted of steps with prompts, and of steps without."""


class Trial(msgspec.Struct, frozen=True):
    """One run. strain: latency / limit at the quantile that is to be attained, of the worst limit
    of each request; the plan keeps its promise if it is 1 or less. utilisation: mean by role."""

    attainment: float
    strain: float
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    num_failed: int
    utilisation: dict[str, float]
    refused: str = ""


class Question(msgspec.Struct, frozen=True):
    """A candidate, a trace by its name, and how wrong the cost models are taken to be."""

    candidate: Candidate
    trace: str = ""
    ratios: Ratios = {}


class Scaled:
    """A cost model whose steps take so many times as long."""

    def __init__(self, cost: StepCost, prompt: float, decode: float) -> None:
        self._cost, self._prompt, self._decode = cost, prompt, decode

    def step_s(self, shape: StepShape) -> float:
        has_prompt = shape.num_tokens > shape.num_seqs
        return self._cost.step_s(shape) * (self._prompt if has_prompt else self._decode)

    def steady_s(self, shape: StepShape, steps: int) -> list[float]:
        return [each * self._decode for each in self._cost.steady_s(shape, steps)]


class Bench:
    """Runs questions; `traces` may grow between calls of `ask`."""

    def __init__(self, slo: Slo, attainment: float, num_processes: int) -> None:
        self.traces: dict[str, list[TraceRequest]] = {}
        self.num_runs = 0
        self._slo, self._attainment = slo, attainment
        self._num_processes = num_processes

    def ask(
        self, questions: Sequence[Question], ran: Callable[[], object] | None = None
    ) -> list[Trial]:
        """A trial for each question, in their order. `ran` is called when one is done."""
        self.num_runs += len(questions)
        found: dict[int, Trial] = {}
        for number, trial in self._run(questions):
            found[number] = trial
            if ran is not None:
                ran()
        return [found[number] for number in range(len(questions))]

    def _run(self, questions: Sequence[Question]) -> Iterator[tuple[int, Trial]]:
        processes = min(self._num_processes, len(questions))
        if processes < 2:
            for number, question in enumerate(questions):
                yield number, self._answer(question)
            return
        with self._forked(questions, processes) as pipes:
            left = iter(range(len(questions)))
            busy: set[Connection] = set()
            for pipe in pipes:
                if (first := next(left, None)) is not None:
                    pipe.send_bytes(str(first).encode())
                    busy.add(pipe)
            while busy:
                ready = wait(list(busy))
                for pipe in [each for each in busy if each in ready]:
                    number, trial = _received(pipe)
                    yield number, trial
                    if (following := next(left, None)) is None:
                        busy.discard(pipe)
                    else:
                        pipe.send_bytes(str(following).encode())

    @contextmanager
    def _forked(self, questions: Sequence[Question], count: int) -> Iterator[list[Connection]]:
        context = multiprocessing.get_context("fork")
        pipes: list[Connection] = []
        processes: list[ForkProcess] = []
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=self._work, args=(questions, theirs), daemon=True)
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
            yield pipes
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.terminate()
                process.join()

    def _work(self, questions: Sequence[Question], pipe: Connection) -> None:
        gc.freeze()  # what was there before the fork is nobody's garbage here
        while True:
            try:
                number = int(pipe.recv_bytes())
                trial = self._answer(questions[number])
                pipe.send_bytes(msgspec.json.encode((number, trial)))
            except (EOFError, OSError, KeyboardInterrupt):
                return

    def _answer(self, question: Question) -> Trial:
        trace = self.traces[question.trace]
        try:
            simulator = Simulator(deployment_of(question.candidate, trace, question.ratios), trace)
        except ConfigError as error:
            return Trial(0.0, NEVER, NEVER, NEVER, 0.0, len(trace), {}, str(error))
        result = simulator.run()
        busy: dict[str, list[float]] = {}
        for worker in result.workers:
            busy.setdefault(worker.role.value, []).append(worker.utilisation)
        return judge(
            result.requests,
            self._slo,
            self._attainment,
            {role: sum(each) / len(each) for role, each in busy.items()},
        )


def _received(pipe: Connection) -> tuple[int, Trial]:
    try:
        return msgspec.json.decode(pipe.recv_bytes(), type=tuple[int, Trial])
    except EOFError:
        raise BatonError(
            "a process that simulated candidates died: is there enough memory? try --processes 1"
        ) from None


def judge(
    results: Sequence[RequestResult], slo: Slo, attainment: float, utilisation: dict[str, float]
) -> Trial:
    """Reduce a run. A request that failed is late without end."""
    strains: list[float] = []
    ttfts: list[float] = []
    tpots: list[float] = []
    tokens = num_failed = 0
    for each in results:
        if each.failure is not None:
            num_failed += 1
            strains.append(NEVER)
            continue
        values = each.values() if _needs_gaps(slo) else _plain(each)
        shares = [
            value / limit
            for name, limit in slo.limits.items()
            if (value := values[name]) is not None
        ]
        strains.append(max(shares, default=0.0))
        ttfts.append(each.ttft_s or 0.0)
        if (tpot_s := each.tpot_s) is not None:
            tpots.append(tpot_s)
        tokens += each.output_tokens
    span = max(each.end_s for each in results) - min(each.sent_s for each in results)
    return Trial(
        sum(strain <= 1 for strain in strains) / len(strains),
        at_share(strains, attainment),
        at_share(ttfts, attainment),
        at_share(tpots, attainment),
        tokens / max(span, 1e-9),
        num_failed,
        utilisation,
    )


def at_share(values: list[float], share: float) -> float:
    """The least value that this share of all is not above; infinite for none."""
    if not values:
        return NEVER
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _needs_gaps(slo: Slo) -> bool:
    return any(name.startswith("itl") for name in slo.limits)


def _plain(each: RequestResult) -> dict[str, float | None]:
    return {"ttft": each.ttft_s, "tpot": each.tpot_s, "e2e": each.e2e_s}


def deployment_of(
    candidate: Candidate, trace: Sequence[TraceRequest], ratios: Ratios
) -> Deployment:
    """As `baton serve` would start the candidate's configuration, with each kind's own memory."""
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    config = config_of(candidate, longest)
    profiles = {
        role: msgspec.structs.replace(kind.offer.profile_of(role), model=kind.model)
        for role, (kind, _) in candidate.workers.items()
    }
    way = candidate.way
    link = None
    if way is not None:
        link = Link(way.link.bytes_per_s / way.wire_share, way.link.latency_s, way.link.per_block_s)
    whole = deployment(config, profiles, longest=longest, link=link)
    workers = []
    for worker in whole.workers:
        kind, _ = candidate.workers[worker.role]
        useful = worker.limits.max_num_seqs * worker.limits.num_blocks_for(longest + 1)
        held = kind.kv_tokens // worker.limits.kv_format.block_size
        limits = msgspec.structs.replace(worker.limits, num_blocks=min(held, useful))
        own = kind.cost(worker.role)
        ratio = ratios.get(kind.offer.profile_name(worker.role))
        cost: CostModel = own if ratio is None else Scaled(own, *ratio)
        workers.append(msgspec.structs.replace(worker, limits=limits, cost=cost))
    return msgspec.structs.replace(whole, workers=tuple(workers))
