"""Several engines in one process, with real stores and the real fabric, and no RPC or HTTP.

    prompts ─▶ prefill engines ──token 1, Handoff──▶ decode engines ─▶ answers
    prompts ─▶ unified engines ─▶ answers

`Engines` does what a gateway does for its requests: it passes the commit record on, refuses a
token out of order, and releases each lease.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType

import msgspec
from numerics.prompts import greedy

from baton.config import Layout, load_config
from baton.core.scheduler import Scheduler
from baton.engine.build import build_engine
from baton.engine.engine import Emitted
from baton.engine.inbox import Offer, Release, Submit
from baton.engine.loop import EngineLoop
from baton.fabric.arena import Arena
from baton.fabric.descriptors import DescriptorServer
from baton.fabric.shm import ShmTransport
from baton.fabric.thread import Fabric
from baton.types import FinishReason, Grant, Request, SampledLogprobs, TokenDelta

ANSWER_TIMEOUT_S = 100.0


@dataclass
class Answer:
    """What came for one prompt."""

    request: Request
    prefill: str
    decode: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    grant: Grant | None = None
    handed_off: bool = False


class _Worker:
    """An engine on its thread, with store and fabric, as a worker process puts them together."""

    def __init__(
        self,
        name: str,
        model: Path,
        runtime_dir: Path,
        options: dict[str, object],
        emitted: SimpleQueue[tuple[str, Emitted | BaseException]],
    ) -> None:
        config = load_config(None, {"model.path": str(model), "engine.threads": 1, **options})
        epoch, secret = secrets.randbits(63), secrets.token_bytes(32)
        built = build_engine(
            config,
            model,
            lambda news: emitted.put((name, news)),
            worker_id=name,
            epoch=epoch,
            lease_secret=secret,
        )
        kv_format, limits = built.scheduler_config.kv_format, built.limits
        self.scheduler: Scheduler = built.engine.scheduler
        self._arena = Arena.create(limits.num_frames, limits.block_bytes, epoch, kv_format)
        self._descriptors = DescriptorServer(runtime_dir, name, self._arena, secret)
        self._fabric = Fabric(
            self._arena,
            lambda _, theirs: ShmTransport(runtime_dir, theirs or kv_format),
            built.engine.inbox.put,
        )
        built.engine.fabric = self._fabric
        self.loop = EngineLoop(built.engine, lambda error: emitted.put((name, error)))
        self.loop.start()

    def close(self) -> None:
        self._fabric.stop()  # its last answers go before the engine's end
        self.loop.stop()
        self._descriptors.stop()
        self._arena.close()

    def check_empty(self) -> None:
        """Assert that nothing is held. Only after `close`: the engine's thread owns all this."""
        scheduler = self.scheduler
        scheduler.check()
        scheduler.exports.index.check()
        assert scheduler.num_sequences == scheduler.num_transfers == 0
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        index = scheduler.exports.index
        assert index.num_used == index.num_cached
        assert index.num_reserved == len(scheduler.exports.leases) == 0
        fallbacks = {n: count for n, count in scheduler.counters.items() if "fallback" in n}
        assert not any(fallbacks.values()), fallbacks


class Engines:
    """The engines of a layout; `options` are those of the configuration, by dotted path.

    `of_role`: further options of the workers of a role. If there are any the ends are unlike, and
    no block is offered early.

    Use it in a `with` statement, whose end asserts that every engine is empty. `counters` of a
    worker may be read after that.
    """

    def __init__(
        self,
        model: Path,
        layout: str,
        of_role: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
        **options: object,
    ) -> None:
        self._emitted: SimpleQueue[tuple[str, Emitted | BaseException]] = SimpleQueue()
        self._model, self._options, self._of_role = model, options, of_role
        self._names = {
            role.value: [f"{role.value}-{i}" for i in range(count)]
            for role, count in Layout.parse(layout).counts().items()
        }
        self._workers: dict[str, _Worker] = {}
        self._num_sent = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Engines]:
        with tempfile.TemporaryDirectory(prefix="bt") as runtime_dir:
            try:
                for role, name in [(r, name) for r, names in self._names.items() for name in names]:
                    options = {**self._options, **self._of_role.get(role, {})}
                    self._workers[name] = _Worker(
                        name, self._model, Path(runtime_dir), options, self._emitted
                    )
                yield self
            finally:
                for worker in self._workers.values():
                    worker.close()
        for worker in self._workers.values():
            worker.check_empty()

    def counters(self, role: str) -> Counter[str]:
        """Totals over the workers of `role`."""
        totals: Counter[str] = Counter()
        for name in self._names[role]:
            totals.update(self._workers[name].scheduler.counters)
        return totals

    def generate(
        self, requests: Sequence[tuple[list[int], int]], *, logprobs: int | None = None
    ) -> list[Answer]:
        """Answer prompts greedily, each with so many tokens; dealt out to the workers in turn."""
        firsts = self._names.get("unified") or self._names["prefill"]
        seconds = self._names.get("unified") or self._names["decode"]
        answers = {}
        sampling = greedy(requests, logprobs=logprobs)
        for i, ((prompt, _), params) in enumerate(zip(requests, sampling, strict=True)):
            hand_off = "unified" not in self._names
            request = Request(f"request-{self._num_sent}", tuple(prompt), params, hand_off=hand_off)
            self._num_sent += 1
            prefill = firsts[i % len(firsts)]
            # Not the same pairs all the time, but pairs of the same worker where there is no other.
            decode = seconds[(i // len(firsts)) % len(seconds)] if hand_off else prefill
            answers[request.id] = Answer(request, prefill, decode)
        for answer in answers.values():
            self._workers[answer.prefill].loop.put(Submit(answer.request))
        while any(answer.finish is None for answer in answers.values()):
            name, news = self._emitted.get(timeout=ANSWER_TIMEOUT_S)
            if isinstance(news, BaseException):
                raise news
            for delta in news.update.deltas:
                self._take(answers[delta.request_id], name, delta)
            for sealed in news.update.sealed:
                answer = answers[sealed.request_id]
                answer.grant = sealed.grant
                if not self._of_role:
                    self._workers[answer.decode].loop.put(Offer(sealed))
            for handoff in news.update.handoffs:
                answer = answers[handoff.request_id]
                assert not answer.handed_off and len(answer.token_ids) == 1
                answer.grant, answer.handed_off = handoff.grant, True
                second = msgspec.structs.replace(
                    answer.request,
                    hand_off=False,
                    emitted=tuple(answer.token_ids),
                    handoff=handoff,
                )
                self._workers[answer.decode].loop.put(Submit(second))
        return list(answers.values())

    def _take(self, answer: Answer, name: str, delta: TokenDelta) -> None:
        assert delta.error is None, delta.error
        assert answer.finish is None and delta.first_index == len(answer.token_ids)
        assert name == (answer.decode if answer.token_ids else answer.prefill)
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs or ()
        answer.finish = delta.finish
        if answer.grant is not None and (len(answer.token_ids) == 2 or answer.finish):
            self._workers[answer.prefill].loop.put(Release((answer.grant.grant_id,)))
