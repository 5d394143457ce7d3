"""kill -9 of each process of a deployment: every request that a worker had goes on elsewhere, token
for token as if nothing had happened, and everything comes back.

The tests run on one deployment, one after the other; each leaves it whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from faults.served import (
    COMPLETIONS,
    LONG,
    SMALL,
    Stream,
    Victim,
    async_http,
    make_long_model,
    prompt_of,
    until,
)

TOLD_S = 1.0
BACK_S = 60.0
CHECK = prompt_of(100, 1)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    model = make_long_model(tmp_path_factory.mktemp("served") / "org-long")
    with Victim.start(model, "1P2D", *SMALL, *LONG, faults_expected=True) as deployment:
        assert isinstance(deployment, Victim)
        yield deployment


@pytest.fixture(scope="module")
def wanted(deployment: Victim) -> dict[int, list[int]]:
    """Answers without faults, of 400 tokens, by the seed of their prompt of 50."""
    return {seed: deployment.ask(prompt_of(50, seed), 400) for seed in range(2, 8)}


@pytest.fixture
def served(deployment: Victim) -> Iterator[Victim]:
    """Whole before and after, and answering as it did before the fault."""
    whole = {"gateway", "prefill-0", "decode-0", "decode-1"}
    before = deployment.processes()
    assert before.keys() == whole
    answer = deployment.ask(CHECK, 40)
    yield deployment
    deployment.until(
        lambda: (
            deployment.is_ready()
            and sum(v.get("up", 0) for v in deployment.counters().values()) == 3
        ),
        BACK_S,
        "its coming back",
    )
    assert deployment.processes().keys() == whole
    for _ in range(4):  # on whichever decode worker
        assert deployment.ask(CHECK, 40) == answer
    deployment.until(deployment.is_idle, 5, "becoming idle")


def events(served: Victim) -> dict[str, float]:
    """What befell requests at the gateway so far."""
    found = served.metrics()
    name = "baton_gateway_events_total"
    return {dict(labels)["event"]: total for (n, labels), total in found.items() if n == name}


def attempts(served: Victim, num_last: int) -> list[int]:
    """How often each of the last requests to end had been placed again."""
    return [waterfall["attempt"] for waterfall in served.requests()[:num_last]]


def test_prefill_worker_mid_prefill(served: Victim, wanted: dict[int, list[int]]) -> None:
    async def run() -> None:
        pids = served.processes()
        before = events(served)["placed_again"]
        async with async_http(served) as client:
            decoding = [Stream(client, served.body(prompt_of(50, seed), 800)) for seed in (2, 3, 4)]
            for stream in decoding:
                await stream.until_tokens(5)
            prefilling = Stream(client, served.body(prompt_of(7000, 11), 20))
            whole = asyncio.create_task(
                client.post(COMPLETIONS, json=served.body(prompt_of(7000, 12), 20))
            )
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            killed = time.monotonic()
            served.kill("prefill-0")
            await until(lambda: not served.is_ready(), 2.0, "the gateway's knowing")
            # No prefill worker: not ready, and a new request is refused at once, by name.
            refused = await client.post(COMPLETIONS, json=served.body(CHECK, 5))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert not prefilling.ended and not whole.done(), "they wait for its return"
            for stream, seed in zip(decoding, (2, 3, 4), strict=True):
                await stream.end()
                assert (stream.done, len(stream.token_ids)) == (True, 800)
                assert stream.token_ids[:400] == wanted[seed]
            await prefilling.end(BACK_S)
            response = await whole
            print(f"done_s={time.monotonic() - killed:.3f}")
        assert prefilling.done, vars(prefilling)
        assert prefilling.token_ids == await asyncio.to_thread(served.ask, prompt_of(7000, 11), 20)
        answer = response.json()["choices"][0]["token_ids"]
        assert answer == await asyncio.to_thread(served.ask, prompt_of(7000, 12), 20)
        assert events(served)["placed_again"] == before + 2
        now = served.processes()
        assert {name for name in pids if pids[name] != now[name]} == {"prefill-0"}

    asyncio.run(run())
    served.wait_for_line("prefill-0 ended with signal SIGKILL; starting it again")


def test_decode_worker_mid_stream(served: Victim, wanted: dict[int, list[int]]) -> None:
    """Greedy streams, and one that draws: all as they would have been."""
    drawn = {"temperature": 1.0, "seed": 12345}

    async def run() -> None:
        before = events(served)["placed_again"]
        async with async_http(served) as client:
            streams = {
                seed: Stream(client, served.body(prompt_of(50, seed), 800)) for seed in wanted
            }
            drawing = [
                Stream(client, served.body(prompt_of(50, seed), 800, **drawn)) for seed in (8, 9)
            ]
            for stream in (*streams.values(), *drawing):
                await stream.until_tokens(10)
            on_it = served.gauge("decode-0", "num_requests_running")
            assert 0 < on_it < len(streams) + len(drawing)
            served.kill("decode-0")
            for stream in (*streams.values(), *drawing):
                await stream.end()
                assert (stream.done, len(stream.token_ids)) == (True, 800), vars(stream)
            ready = await asyncio.to_thread(served.is_ready)  # there is another decode worker
        num_again = sum(attempts(served, len(streams) + len(drawing)))
        assert 0 < num_again <= on_it  # one may have ended before the kill
        assert events(served)["placed_again"] == before + num_again
        print(f"placed_again={num_again}")
        for seed, stream in streams.items():
            assert stream.token_ids[:400] == wanted[seed]
            whole = await asyncio.to_thread(served.ask, prompt_of(50, seed), 800)
            assert stream.token_ids == whole
        for seed, stream in zip((8, 9), drawing, strict=True):
            whole = await asyncio.to_thread(served.ask, prompt_of(50, seed), 800, **drawn)
            assert stream.token_ids == whole
        assert ready

    asyncio.run(run())


def test_one_choice_of_several_is_lost(served: Victim) -> None:
    """The others go on beside it; the request ends with all of them."""

    async def run() -> None:
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 30), 1000, n=4))
            await stream.until_tokens(40)
            assert served.gauge("decode-0", "num_requests_running") > 0
            assert served.gauge("decode-1", "num_requests_running") > 0
            served.kill("decode-1")
            await stream.end()
            assert stream.done, vars(stream)
        assert set(attempts(served, 4)) == {0, 1}
        whole = await asyncio.to_thread(served.ask, prompt_of(50, 30), 1000)
        assert sorted(stream.token_ids) == sorted(whole * 4)

    asyncio.run(run())


def test_prefill_worker_at_the_handoff(served: Victim) -> None:
    """Whatever it had done by then: each request is answered, and rightly."""

    async def run() -> None:
        async with async_http(served) as client:
            streams = {
                seed: Stream(client, served.body([*prompt_of(400, 60 + seed)], 60))
                for seed in range(8)
            }
            await streams[0].until_tokens(1)
            served.kill("prefill-0")
            for stream in streams.values():
                await stream.end()
                assert stream.done, vars(stream)
        print(f"placed again: {sum(attempts(served, 8))} of {len(streams)}")
        await until(served.is_ready, BACK_S, "readiness")
        for seed, stream in streams.items():
            whole = await asyncio.to_thread(served.ask, prompt_of(400, 60 + seed), 60)
            assert stream.token_ids == whole

    asyncio.run(run())


def test_all_decode_workers(served: Victim) -> None:
    """Not ready without one. What was on them, and a prompt under way elsewhere, waits for one."""

    async def run() -> None:
        async with async_http(served) as client:
            streams = [Stream(client, served.body(prompt_of(50, seed), 800)) for seed in (2, 3)]
            for stream in streams:
                await stream.until_tokens(10)
            prompt = Stream(client, served.body(prompt_of(4000, 40), 5))
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            served.kill("decode-0")
            served.kill("decode-1")
            await until(lambda: not served.is_ready(), 2.0, "the gateway's knowing")
            for stream in (*streams, prompt):
                await stream.end(BACK_S)
                assert stream.done, vars(stream)
        for seed, stream in zip((2, 3), streams, strict=True):
            whole = await asyncio.to_thread(served.ask, prompt_of(50, seed), 800)
            assert stream.token_ids == whole
        assert prompt.token_ids == await asyncio.to_thread(served.ask, prompt_of(4000, 40), 5)
        await until(lambda: served.gauge("prefill-0", "num_leases") == 0, 1.0)

    asyncio.run(run())


@pytest.mark.timeout(240)
def test_death_after_death(served: Victim) -> None:
    """Three are survived; the fourth is the request's typed end, after an exact prefix."""

    async def run() -> None:
        before = events(served)
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 50), 5000))
            for number in range(4):
                await until(
                    lambda number=number: (
                        events(served)["placed_again"] == before["placed_again"] + number
                    ),
                    TOLD_S,
                    "its being placed again",
                )
                await stream.until_tokens(len(stream.token_ids) + 20, BACK_S)
                holders = [
                    name
                    for name in ("decode-0", "decode-1")
                    if served.gauge(name, "up") and served.gauge(name, "num_requests_running") > 0
                ]
                assert len(holders) == 1 and not stream.ended, (number, vars(stream))
                killed = time.monotonic()
                served.kill(holders[0])
            await stream.end(5)
            assert stream.ended - killed < TOLD_S
        assert stream.status == 200 and not stream.done
        assert stream.error is not None
        assert stream.error["code"] == "worker_lost"
        assert stream.error["type"] == "server_error"
        assert stream.error["stage"] == "decode"
        assert "/" not in stream.error["message"], "a path, which is no client's business"
        assert events(served)["given_up"] == before["given_up"] + 1
        await until(served.is_ready, BACK_S, "readiness")
        count = len(stream.token_ids)
        assert stream.token_ids == await asyncio.to_thread(served.ask, prompt_of(50, 50), count)

    asyncio.run(run())


def test_gateway(served: Victim) -> None:
    async def run() -> None:
        pids = served.processes()
        said = len(served.lines)
        async with async_http(served) as client:
            streams = [Stream(client, served.body(prompt_of(50, seed), 6000)) for seed in (2, 3)]
            for stream in streams:
                await stream.until_tokens(10)
            streams.append(Stream(client, served.body(prompt_of(7000, 21), 20)))
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            killed = time.monotonic()
            served.kill("gateway")
            for stream in streams:
                await stream.end()
                assert isinstance(stream.broken, httpx.TransportError)
                assert stream.ended - killed < TOLD_S

        def given_up() -> list[int]:
            """How many requests each worker has aborted on losing the gateway."""
            lines = [line for line in served.lines[said:] if "forgotten, num_aborted=" in line]
            return [int(line.rpartition("=")[2]) for line in lines]

        await until(lambda: len(given_up()) == 3, 5.0, "the workers' giving up")
        print(f"reclaimed_s={time.monotonic() - killed:.3f}")
        assert sum(given_up()) in (2, 3)  # the prompt may have been done by then
        await until(served.is_ready, BACK_S, "readiness")
        await until(lambda: len(served.counters()) == 3, 5)
        await until(served.is_idle, 4.0)  # a lease that nobody renews runs out
        now = served.processes()
        assert {name for name in pids if pids[name] != now[name]} == {"gateway"}

    asyncio.run(run())
