"""Workers that stand still in the middle of their work: stopped processes, engines that hang, and
requests that take workers along. Every answer is token for token the one without a fault.

The tests run on one deployment, one after the other; each leaves it whole.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.hurt import DEADLY, HANG, POISON
from faults.served import LONG, SMALL, Stream, Victim, async_http, make_long_model, prompt_of, until

from baton.core.liveness import HEARTBEAT_S, PATIENCE_S

KNOWN_S = PATIENCE_S + 4 * HEARTBEAT_S
"""By then the gateway knows of it; keepalive would take 20 s."""

KILL_S = 25.0
BACK_S = 60.0
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SEEDS = (2, 3, 4, 5)
NUM_TOKENS = 600


class Hurt(Victim):
    """A deployment whose engines a prompt can hurt, through files in `folder`."""

    program = "faults.hurt"
    folder: Path

    def events(self) -> dict[str, float]:
        """What befell requests and workers at the gateway so far."""
        name = "baton_gateway_events_total"
        return {
            dict(lab)["event"]: total for (n, lab), total in self.metrics().items() if n == name
        }

    def send(self, name: str, number: signal.Signals) -> float:
        """A signal to a worker; returns when."""
        os.kill(self.processes()[name], number)
        return time.monotonic()

    def busy(self, role: str) -> list[str]:
        """Workers of a role that have sequences in their steps."""
        names = [name for name in WORKERS if name.startswith(role)]
        return [name for name in names if self.gauge(name, "num_requests_running") > 0]

    def is_whole(self) -> bool:
        ups = [self.gauge(name, "up") - self.gauge(name, "frozen") for name in WORKERS]
        return self.is_ready() and ups == [1.0] * len(WORKERS)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hurt]:
    model = make_long_model(tmp_path_factory.mktemp("served") / "org-long")
    folder = tmp_path_factory.mktemp("hurt")
    flags = (*SMALL, *LONG, "--launch.kill-frozen-after-s", f"{KILL_S:g}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HURT_FOLDER", str(folder))
        with Hurt.start(model, "2P2D", *flags, faults_expected=True) as deployment:
            assert isinstance(deployment, Hurt)
            deployment.folder = folder
            yield deployment


@pytest.fixture(scope="module")
def wanted(deployment: Hurt) -> dict[int, list[int]]:
    """Answers without faults, by the seed of their prompt of 50."""
    return {seed: deployment.ask(prompt_of(50, seed), NUM_TOKENS) for seed in SEEDS}


@pytest.fixture
def served(deployment: Hurt) -> Iterator[Hurt]:
    """Whole before and after, with nothing left over."""
    deployment.until(deployment.is_whole, BACK_S, "its being whole")
    answer = deployment.ask(prompt_of(100, 1), 20)
    yield deployment
    deployment.until(deployment.is_whole, BACK_S, "its coming back")
    for _ in range(4):  # on whichever workers
        assert deployment.ask(prompt_of(100, 1), 20) == answer
    deployment.until(deployment.is_idle, 5, "becoming idle")


def check(streams: dict[int, Stream], wanted: dict[int, list[int]]) -> None:
    for seed, stream in streams.items():
        assert stream.done, vars(stream)
        assert stream.token_ids == wanted[seed]


@pytest.mark.timeout(240)
def test_a_decode_worker_that_is_stopped(served: Hurt, wanted: dict[int, list[int]]) -> None:
    async def run() -> None:
        pids, before = served.processes(), served.events()
        async with async_http(served) as client:
            streams = {s: Stream(client, served.body(prompt_of(50, s), NUM_TOKENS)) for s in SEEDS}
            for stream in streams.values():
                await stream.until_tokens(10)
            victim = served.busy("decode")[0]
            stopped = served.send(victim, signal.SIGSTOP)
            try:
                await until(
                    lambda: served.events()["workers_silent"] > before["workers_silent"], KNOWN_S
                )
                print(f"known_s={time.monotonic() - stopped:.2f}")
                for stream in streams.values():
                    await stream.end()
                print(f"done_s={time.monotonic() - stopped:.2f}")
                check(streams, wanted)
                now = served.events()
                assert now["placed_again"] > before["placed_again"]
                assert now["workers_silent"] == before["workers_silent"] + 1
                assert served.gauge(victim, "frozen") == 1
                # It is given nothing more, so that nobody waits for it.
                asked = time.monotonic()
                for seed in SEEDS:
                    part = await asyncio.to_thread(served.ask, prompt_of(50, seed), 20)
                    assert part == wanted[seed][:20]
                assert time.monotonic() - asked < 20
                assert served.events()["workers_silent"] == now["workers_silent"]
            finally:
                served.send(victim, signal.SIGCONT)
        await until(
            lambda: served.events()["workers_thawed"] > before["workers_thawed"], 5, "its return"
        )
        assert served.processes() == pids, "nobody was started anew"
        assert served.events()["given_up"] == before["given_up"]

    asyncio.run(run())


@pytest.mark.timeout(240)
def test_a_prefill_worker_that_is_stopped(served: Hurt) -> None:
    async def run() -> None:
        pids, before = served.processes(), served.events()
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(6000, 11), 20))
            await until(lambda: served.busy("prefill"))
            (victim,) = served.busy("prefill")
            stopped = served.send(victim, signal.SIGSTOP)
            try:
                await until(
                    lambda: served.events()["workers_silent"] > before["workers_silent"], KNOWN_S
                )
                print(f"known_s={time.monotonic() - stopped:.2f}")
                await stream.end()
                print(f"done_s={time.monotonic() - stopped:.2f}")
            finally:
                served.send(victim, signal.SIGCONT)
        assert stream.done, vars(stream)
        await until(
            lambda: served.events()["workers_thawed"] > before["workers_thawed"], 5, "its return"
        )
        assert served.processes() == pids
        assert stream.token_ids == await asyncio.to_thread(served.ask, prompt_of(6000, 11), 20)

    asyncio.run(run())


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_hangs(served: Hurt, wanted: dict[int, list[int]], role: str) -> None:
    """Its process answers, its step does not get on: those that were in it are run again alone."""
    hung = served.folder / f"hung-{role}"
    prompt = [*prompt_of(50, 20), HANG]
    whole = served.ask(prompt, 60)

    async def run() -> None:
        pids, before = served.processes(), served.events()
        async with async_http(served) as client:
            streams = {s: Stream(client, served.body(prompt_of(50, s), NUM_TOKENS)) for s in SEEDS}
            for stream in streams.values():
                await stream.until_tokens(10)
            (served.folder / f"hang-{role}").touch()
            hanging = Stream(client, served.body(prompt, 60))
            try:
                await until(hung.exists)
                began = time.monotonic()
                await until(
                    lambda: served.events()["workers_stuck"] > before["workers_stuck"],
                    KNOWN_S + 1,
                )
                print(f"known_s={time.monotonic() - began:.2f}")
                for stream in (hanging, *streams.values()):
                    await stream.end()
                print(f"done_s={time.monotonic() - began:.2f}")
            finally:
                hung.unlink(missing_ok=True)
        check(streams, wanted)
        assert hanging.done, vars(hanging)
        assert hanging.token_ids == whole
        await until(
            lambda: served.events()["workers_thawed"] > before["workers_thawed"], 5, "its return"
        )
        now = served.events()
        assert served.processes() == pids
        assert now["workers_stuck"] == before["workers_stuck"] + 1
        assert now["workers_silent"] == before["workers_silent"], "its process did answer"
        assert now["given_up"] == before["given_up"]

    asyncio.run(run())


@pytest.mark.timeout(300)
def test_a_request_that_takes_workers_along(served: Hurt, wanted: dict[int, list[int]]) -> None:
    """It takes two, and ends; what was beside it the first time was not there the second time."""

    async def run() -> None:
        before, said = served.events(), len(served.lines)
        poison = served.folder / "poison-decode"
        poison.touch()
        try:
            async with async_http(served) as client:
                streams = {
                    seed: Stream(client, served.body(prompt_of(50, seed), NUM_TOKENS))
                    for seed in SEEDS
                }
                for stream in streams.values():
                    await stream.until_tokens(5)
                poisoned = Stream(client, served.body([*prompt_of(50, 21), POISON], 60))
                await poisoned.end(BACK_S)
                for stream in streams.values():
                    await stream.end(2 * BACK_S)
        finally:
            poison.unlink()
        assert poisoned.error is not None, vars(poisoned)
        assert (poisoned.error["code"], poisoned.error["stage"]) == ("worker_lost", "decode")
        check(streams, wanted)
        failed = [line for line in served.lines[said:] if "RuntimeError: a poisoned step" in line]
        assert len(failed) == 2
        crashes = (served.folder / "crashes-decode").read_text().split()
        assert int(crashes[0]) > 1, "others were beside it"
        assert crashes[1:] == ["1"], "and then it was alone"
        assert served.events()["given_up"] == before["given_up"] + 1

    asyncio.run(run())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("role", "how"), [("decode", "SIGSEGV"), ("prefill", "SIGKILL")])
def test_a_request_that_ends_workers_without_a_word(
    served: Hurt, wanted: dict[int, list[int]], role: str, how: str
) -> None:
    """The kernel ends the process, so nobody names what was in its step. Whoever was there is run
    again alone; only the one that is alone the second time ends."""

    async def run() -> None:
        before, said = served.events(), len(served.lines)
        crashed = served.folder / f"crashes-{role}"
        crashed.unlink(missing_ok=True)
        deadly = served.folder / f"deadly-{role}"
        deadly.write_text(how)
        try:
            async with async_http(served) as client:
                streams = {
                    seed: Stream(client, served.body(prompt_of(50, seed), NUM_TOKENS))
                    for seed in SEEDS
                }
                for stream in streams.values():
                    await stream.until_tokens(5)
                lethal = Stream(client, served.body([*prompt_of(50, 22), DEADLY], 60))
                await lethal.end(BACK_S)
                for stream in streams.values():
                    await stream.end(2 * BACK_S)
        finally:
            deadly.unlink()
        assert lethal.error is not None, vars(lethal)
        assert (lethal.error["code"], lethal.error["stage"]) == ("worker_lost", role)
        check(streams, wanted)
        await until(lambda: len(ends(served.lines[said:], how)) == 2, 10, "the supervisor's word")
        crashes = crashed.read_text().split()
        if role == "decode":
            assert int(crashes[0]) > 1, "others were beside it"
        assert crashes[1:] == ["1"], "and then it was alone"
        assert served.events()["given_up"] == before["given_up"] + 1

    asyncio.run(run())


def ends(lines: list[str], how: str) -> list[str]:
    """What the supervisor has said of workers that a signal has ended."""
    return [line for line in lines if f"ended with signal {how}" in line]


@pytest.mark.timeout(240)
def test_a_fetch_that_does_not_return(served: Hurt, wanted: dict[int, list[int]]) -> None:
    """What waits for it is recomputed, nobody else waits, and no worker counts as frozen. The
    blocks are written after all, when others have long been computing."""
    fetching = served.folder / "fetching-decode"
    prompt = prompt_of(400, 23)
    whole = served.ask(prompt, 60)

    def total(event: str) -> float:
        return sum(served.gauge(name, event) for name in WORKERS)

    async def run() -> None:
        pids, before = served.processes(), served.events()
        overdue = sum(total(f"{name}_overdue") for name in ("early_lost", "fallback_import"))
        (served.folder / "fetch-decode").touch()
        async with async_http(served) as client:
            waiting = Stream(client, served.body(prompt_of(400, 24), 60))
            try:
                await until(fetching.exists)
                began = time.monotonic()
                streams = {
                    seed: Stream(client, served.body(prompt_of(50, seed), NUM_TOKENS))
                    for seed in SEEDS
                }
                for stream in streams.values():
                    await stream.until_tokens(5)
                assert not waiting.ended, "it waits for its blocks"
                print(f"others_s={time.monotonic() - began:.2f}")
                await waiting.end()
                print(f"done_s={time.monotonic() - began:.2f}")
                assert await asyncio.to_thread(served.ask, prompt, 60) == whole
            finally:
                fetching.unlink()
            for stream in streams.values():
                await stream.end()
        check(streams, wanted)
        assert waiting.done, vars(waiting)
        assert waiting.token_ids == await asyncio.to_thread(served.ask, prompt_of(400, 24), 60)
        now = sum(total(f"{name}_overdue") for name in ("early_lost", "fallback_import"))
        assert now > overdue
        after = served.events()
        assert served.processes() == pids
        for event in ("workers_stuck", "workers_silent", "placed_again", "given_up"):
            assert after[event] == before[event], event

    asyncio.run(run())


@pytest.mark.timeout(240)
def test_a_copier_that_hangs(served: Hurt) -> None:
    """Its engine goes on, or waits for it; but nothing leaves this worker any more."""
    copying = served.folder / "copying-prefill"
    prompt = prompt_of(400, 25)

    async def run() -> None:
        pids, before = served.processes(), served.events()
        (served.folder / "copy-prefill").touch()
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt, 60))
            try:
                await until(copying.exists)
                began = time.monotonic()
                await until(
                    lambda: served.events()["workers_stuck"] > before["workers_stuck"],
                    KNOWN_S + 1,
                )
                print(f"known_s={time.monotonic() - began:.2f}")
                await stream.end()
                print(f"done_s={time.monotonic() - began:.2f}")
            finally:
                copying.unlink()
        assert stream.done, vars(stream)
        await until(
            lambda: served.events()["workers_thawed"] > before["workers_thawed"], 5, "its return"
        )
        assert stream.token_ids == await asyncio.to_thread(served.ask, prompt, 60)
        now = served.events()
        assert served.processes() == pids
        assert now["workers_stuck"] == before["workers_stuck"] + 1
        assert now["workers_silent"] == before["workers_silent"]
        assert now["given_up"] == before["given_up"]

    asyncio.run(run())


@pytest.mark.timeout(240)
def test_one_that_stays_frozen_is_started_anew(served: Hurt, wanted: dict[int, list[int]]) -> None:
    async def run() -> None:
        pids, said = served.processes(), len(served.lines)
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 2), NUM_TOKENS))
            await stream.until_tokens(10)
            (victim,) = served.busy("decode")
            served.send(victim, signal.SIGSTOP)
            await stream.end()
            check({2: stream}, wanted)
        line = await asyncio.to_thread(
            served.wait_for_line, f"{victim} has stood still for", KILL_S + 15, start=said
        )
        assert "killing it" in line
        await until(served.is_whole, BACK_S, "its coming back")
        now = served.processes()
        assert {name for name in pids if pids[name] != now[name]} == {victim}

    asyncio.run(run())
