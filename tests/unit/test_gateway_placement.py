"""The request table's driver: links told, readers served, the clock heeded. No network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.core.keys import chain, root_key
from baton.core.life import HandoffPolicy
from baton.core.router import Router
from baton.errors import WorkerLost
from baton.gateway.placement import PlacingDispatcher
from baton.gateway.worker_metrics import export
from baton.observe.block_ids import ID_BYTES
from baton.observe.events import Waterfall
from baton.observe.metrics import GATEWAY_EVENTS, Metrics
from baton.rpc.messages import Hello, StepReport
from baton.types import (
    Alone,
    FinishReason,
    Grant,
    KvFormat,
    Pulse,
    Request,
    Role,
    SamplingParams,
    Sealed,
    StageTimes,
    TokenDelta,
    WorkerLoad,
)

PROMPT = tuple(range(8))
FORMAT = KvFormat(4, "fake", 1, 1, 1, 96)


class FakeLink:
    """Keeps what it was told; `gone` refuses what is submitted."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.gone = False

    def submit(self, request: Request) -> None:
        if self.gone:
            raise WorkerLost("the worker is gone")
        self.told.append(("submit", request))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what: self.told.append((name, *what))

    def legs(self) -> list[Request]:
        return [what[1] for what in self.told if what[0] == "submit"]


class Harness:
    """A dispatcher whose workers are fake links."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *workers: str,
        patience_s: float = 60.0,
        **policy: Any,
    ) -> None:
        self.dispatcher = PlacingDispatcher(
            "g",
            1,
            b"secret",
            Path("/nowhere"),
            {},
            router=Router(),
            policy=HandoffPolicy(policy.pop("lease_ttl_s", 10.0), **policy),
            patience_s=patience_s,
        )
        self.links: dict[str, FakeLink] = {}
        monkeypatch.setattr(self.dispatcher.registry, "link", self.links.get)
        for name in workers:
            self.join(name)

    def join(self, name: str, **more: Any) -> None:
        self.links[name] = FakeLink()
        role = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}[name[0]]
        self.dispatcher._joined(
            Hello(name, role, 1, "m", b"w", "exact", FORMAT, 99, 99, 9, 9, 99, "cpu", "f32",
                  num_frames=99, **more)
        )  # fmt: skip

    def lose(self, name: str) -> None:
        del self.links[name]
        self.dispatcher._lost(name, "a reason")

    def report(self, worker: str, **what: Any) -> None:
        self.dispatcher._reported(worker, StepReport(1, WorkerLoad(), **what))

    def read(self, name: str = "r") -> AsyncIterator[TokenDelta]:
        return self.dispatcher.generate(Request(name, PROMPT, SamplingParams(9)))


async def begin(tokens: AsyncIterator[TokenDelta]) -> asyncio.Future[TokenDelta]:
    """Ask for the next delta, and let the request be placed."""
    asked = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    return asked


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def delta(first: int, attempt: int = 0, **fields: Any) -> TokenDelta:
    return TokenDelta("r", 0, attempt, first, (7,), **fields)


def test_tokens_reach_their_reader_and_the_waterfall_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        tokens = here.read()
        asked = await begin(tokens)
        assert [leg.id for leg in here.links["u0"].legs()] == ["r"]
        here.report("u0", deltas=(delta(0, num_cached=4),))
        assert (await asked).token_ids == (7,)
        last = delta(1, finish=FinishReason.LENGTH)
        here.report("u0", times=(StageTimes("r", 0, 0, prefill_s=2.0),), deltas=(last,))
        assert [d async for d in tokens] == [last]
        (waterfall,) = here.dispatcher.recent.newest_first()
        assert (waterfall.finish, waterfall.num_generated_tokens) == ("length", 2)
        assert (waterfall.num_cached_tokens, waterfall.prefill_s) == (4, 2.0)
        assert (waterfall.decode_worker, waterfall.prefill_worker) == ("u0", None)
        assert 0 < waterfall.ttft_s <= waterfall.e2e_s
        assert not here.dispatcher._readers

    asyncio.run(run())


def test_prompts_that_begin_alike_have_equal_ids_and_no_text_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def serve(here: Harness, prompt: tuple[int, ...], salt: bytes = b"tenant") -> Waterfall:
        request = Request("r", prompt, SamplingParams(9), salt=salt)
        tokens = here.dispatcher.generate(request)
        asked = await begin(tokens)
        here.report("u0", deltas=(delta(0), delta(1, finish=FinishReason.LENGTH)))
        await asked
        _ = [each async for each in tokens]
        return here.dispatcher.recent.newest_first()[0]

    async def run() -> None:
        here = Harness(monkeypatch)
        here.join("u0", keeps_blocks=True)  # its answers have keys as well
        first = await serve(here, (1, 2, 3, 4, 5, 6, 7, 8, 9))
        alike = await serve(here, (1, 2, 3, 4, 5, 6, 7, 0))
        foreign = await serve(here, (1, 2, 3, 4), salt=b"another tenant")
        elsewhere = await serve(Harness(monkeypatch, "u0"), (1, 2, 3, 4))
        assert first.block_size == 4
        # Full blocks of the prompt: not one that the answer fills.
        assert len((await serve(here, (1, 2, 3, 4, 5, 6, 7))).prompt_blocks) == ID_BYTES
        assert len(first.prompt_blocks) == len(alike.prompt_blocks) == 2 * ID_BYTES
        assert first.prompt_blocks[:ID_BYTES] == alike.prompt_blocks[:ID_BYTES]
        assert first.prompt_blocks[ID_BYTES:] != alike.prompt_blocks[ID_BYTES:]
        assert foreign.prompt_blocks != first.prompt_blocks[:ID_BYTES]
        assert elsewhere.prompt_blocks != first.prompt_blocks[:ID_BYTES]
        key = chain(root_key(b"w", "exact", b"tenant"), (1, 2, 3, 4), 4)[0]
        assert first.prompt_blocks[:ID_BYTES] not in (key[:ID_BYTES], key[-ID_BYTES:])

    asyncio.run(run())


def test_a_reader_that_leaves_frees_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "p0", "d0")
        tokens = here.read()
        asked = await begin(tokens)
        grant = Grant("g", "p0", 1, "", 10.0, b"")
        here.report("p0", sealed=(Sealed("r", 0, 0, grant, 0, (), (), ()),))
        here.report("p0", deltas=(delta(0),))
        await asked
        await tokens.aclose()  # type: ignore[attr-defined]
        assert here.links["p0"].told[1:] == [("abort", "r", 0, 0), ("release", "g")]
        assert here.links["d0"].told[0][0] == "offer"
        (waterfall,) = here.dispatcher.recent.newest_first()
        assert waterfall.finish == "abort"

    asyncio.run(run())


def test_the_clock_wakes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lender that does not answer, and leases that are renewed."""

    async def run() -> None:
        here = Harness(monkeypatch, "p0", "p1", "d0", lease_ttl_s=0.15, borrow_wait_s=0.03)
        first = await begin(here.read("x"))
        second = await begin(here.read())
        assert here.links["p0"].told[-1][0] == "lend"
        assert not here.links["p1"].told
        await until(here.links["p1"].legs)
        assert [leg.id for leg in here.links["p1"].legs()] == ["r"]
        grant = Grant("g", "p1", 1, "", 10.0, b"")
        here.report("p1", sealed=(Sealed("r", 0, 0, grant, 0, (), (), ()),))
        await until(lambda: here.links["p1"].told.count(("renew", "g")) == 2)
        metrics = Metrics()
        export(here.dispatcher, metrics)
        assert metrics.value(GATEWAY_EVENTS, event="lenders_late") == 1
        assert metrics.value(GATEWAY_EVENTS, event="given_up") == 0
        await here.dispatcher.close()
        for asked in (first, second):
            asked.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

    asyncio.run(run())


def test_a_link_that_is_over_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        here.links["u0"].gone = True
        (only,) = [d async for d in here.read()]
        assert only.error is not None
        assert only.error.code == "worker_lost"

    asyncio.run(run())


def test_the_clock_wakes_the_table_for_what_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "p0", "p1", "d0", lease_ttl_s=1000.0, borrow_wait_s=0.03)
        first = await begin(here.read("x"))
        grant = Grant("g", "p0", 1, "", 1000.0, b"")
        here.report("p0", sealed=(Sealed("x", 0, 0, grant, 0, (), (), ()),))
        second = await begin(here.read())
        await until(here.links["p1"].legs)
        await here.dispatcher.close()
        for asked in (first, second):
            asked.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("crashes", "ends"),
    [((False, False, False), False), ((True, False, False), False), ((True, True), True)],
)
def test_a_worker_that_says_that_its_step_failed_is_not_given_it_a_third_time(
    monkeypatch: pytest.MonkeyPatch, crashes: tuple[bool, ...], ends: bool
) -> None:
    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        asked = await begin(here.read())
        for attempt, crashed in enumerate(crashes):
            assert [leg.attempt for leg in here.links["u0"].legs()] == [attempt]
            if crashed:
                here.report(
                    "u0",
                    fatal=WorkerLost("engine failed").to_wire(),
                    suspects=(("r", 0, attempt),),
                )
            here.lose("u0")
            here.join("u0")
        await asyncio.sleep(0)
        assert asked.done() == ends
        if ends:
            error = asked.result().error
            assert error is not None
            assert error.code == "worker_lost"
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(run())


def test_a_worker_that_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had is a suspect, is given leave to be alone, and ends if that worker ends then."""

    async def run() -> None:
        here = Harness(monkeypatch, "u0")
        asked = await begin(here.read())
        here.lose("u0")
        here.join("u0")
        assert [(leg.attempt, leg.alone) for leg in here.links["u0"].legs()] == [(1, True)]
        here.report("u0", alone=(Alone("r", 0, 1),))
        assert here.links["u0"].told[-1] == ("proceed", "r", 0, 1)
        here.lose("u0")
        await asyncio.sleep(0)
        error = asked.result().error
        assert error is not None
        assert error.code == "worker_lost"

    asyncio.run(run())


def test_a_worker_that_falls_silent_and_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request goes to the other one, it is told to forget it, and it is given work again."""

    async def run() -> None:
        here = Harness(monkeypatch, "u0", "u1", patience_s=0.2)
        frozen: list[tuple[str, bool]] = []
        registry = here.dispatcher.registry
        monkeypatch.setattr(registry, "set_frozen", lambda *what: frozen.append(what))
        asked = await begin(here.read())
        here.report("u0", deltas=(delta(0),))
        await asked

        def is_placed_again() -> bool:
            here.report("u1", pulse=Pulse())
            return bool(here.links["u1"].legs())

        await until(is_placed_again)
        (leg,) = here.links["u1"].legs()
        assert (leg.attempt, leg.emitted) == (1, (7,))
        assert here.links["u0"].told[-1] == ("abort", "r", 0, 0)
        assert frozen == [("u0", True)]
        assert list(here.dispatcher.watch.frozen()) == ["u0"]
        here.report("u0", pulse=Pulse())
        assert frozen[1:] == [("u0", False)]
        assert here.dispatcher.counters["workers_thawed"] == 1
        other = await begin(here.read("x"))
        assert [leg.id for leg in here.links["u0"].legs()] == ["r", "x"]
        await here.dispatcher.close()
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("draining", [False, True])
def test_a_worker_whose_step_is_stuck(monkeypatch: pytest.MonkeyPatch, draining: bool) -> None:
    """What was in the step is to run alone. One that drains is given nothing when it goes on."""

    async def run() -> None:
        here = Harness(monkeypatch, "u0", patience_s=0.2)
        asked = await begin(here.read())
        stuck = Pulse(5, True, 0.01, (("r", 0, 0),))

        def is_known() -> bool:
            here.report("u0", pulse=stuck, draining=draining)
            return here.dispatcher.counters["workers_stuck"] > 0

        await until(is_known)
        assert here.links["u0"].told[-1] == ("abort", "r", 0, 0)
        assert len(here.links["u0"].legs()) == 1
        here.report("u0", pulse=Pulse(6, True), draining=draining)
        legs = here.links["u0"].legs()
        assert [(leg.attempt, leg.alone) for leg in legs[1:]] == ([] if draining else [(1, True)])
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await here.dispatcher.close()

    asyncio.run(run())
