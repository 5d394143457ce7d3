"""kill -9 of each process of a deployment: a typed end within a second, and everything comes back.

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


def assert_worker_lost(stream: Stream, killed: float, wanted: list[int]) -> None:
    """A typed error, at once, after an exact prefix."""
    assert stream.error is not None, vars(stream)
    assert stream.error["code"] == "worker_lost"
    assert stream.error["type"] == "server_error"
    assert "/" not in stream.error["message"], "a path, which is no client's business"
    assert not stream.done
    assert stream.token_ids[: len(wanted)] == wanted[: len(stream.token_ids)]
    assert stream.ended - killed < TOLD_S


def test_prefill_worker_mid_prefill(served: Victim, wanted: dict[int, list[int]]) -> None:
    async def run() -> None:
        pids = served.processes()
        async with async_http(served) as client:
            decoding = [
                Stream(client, served.body(prompt_of(50, seed), 1500)) for seed in (2, 3, 4)
            ]
            for stream in decoding:
                await stream.until_tokens(5)
            prefilling = Stream(client, served.body(prompt_of(7000, 11), 20))
            whole = asyncio.create_task(
                client.post(COMPLETIONS, json=served.body(prompt_of(7000, 12), 20))
            )
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            killed = time.monotonic()
            served.kill("prefill-0")
            await prefilling.end(5)
            assert prefilling.status == 503  # nothing was sent yet, so the status tells
            assert_worker_lost(prefilling, killed, [])
            response = await whole
            assert time.monotonic() - killed < TOLD_S
            print(f"told_s={time.monotonic() - killed:.3f}")
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "worker_lost"
            assert response.json()["error"]["stage"] in ("prefill", "queue")
            # No prefill worker: not ready, and a new request is refused at once, by name.
            assert not await asyncio.to_thread(served.is_ready)
            refused = await client.post(COMPLETIONS, json=served.body(CHECK, 5))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            for stream, seed in zip(decoding, (2, 3, 4), strict=True):
                await stream.end()
                assert (stream.done, len(stream.token_ids)) == (True, 1500)
                assert stream.token_ids[:400] == wanted[seed]
        await until(served.is_ready, BACK_S, "readiness")
        now = served.processes()
        assert {name for name in pids if pids[name] != now[name]} == {"prefill-0"}

    asyncio.run(run())
    served.wait_for_line("prefill-0 ended with signal SIGKILL; starting it again")


def test_decode_worker_mid_stream(served: Victim, wanted: dict[int, list[int]]) -> None:
    async def run() -> None:
        async with async_http(served) as client:
            streams = {
                seed: Stream(client, served.body(prompt_of(50, seed), 1500)) for seed in wanted
            }
            for stream in streams.values():
                await stream.until_tokens(10)
            on_it = served.gauge("decode-0", "num_requests_running")
            assert 0 < on_it < len(streams)
            killed = time.monotonic()
            served.kill("decode-0")
            for stream in streams.values():
                await stream.end()
            ready = await asyncio.to_thread(served.is_ready)  # there is another decode worker
        lost = {seed: stream for seed, stream in streams.items() if not stream.done}
        assert 0 < len(lost) <= on_it  # one may have ended before the kill
        for seed, stream in lost.items():
            assert stream.status == 200
            assert_worker_lost(stream, killed, wanted[seed])
            assert stream.error is not None and stream.error["stage"] == "decode"
            print(f"told_s={stream.ended - killed:.3f}")
        for seed in wanted.keys() - lost.keys():
            assert len(streams[seed].token_ids) == 1500
            assert streams[seed].token_ids[:400] == wanted[seed]
        assert ready

    asyncio.run(run())


def test_one_choice_of_several_is_lost(served: Victim) -> None:
    """The request ends with the error, once, and its choices on the other worker are aborted."""

    async def run() -> None:
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 30), 6000, n=4))
            await stream.until_tokens(40)
            assert served.gauge("decode-0", "num_requests_running") > 0
            assert served.gauge("decode-1", "num_requests_running") > 0
            killed = time.monotonic()
            served.kill("decode-1")
            await stream.end()
            assert stream.error is not None and stream.error["code"] == "worker_lost"
            assert stream.ended - killed < TOLD_S
            await until(lambda: served.gauge("decode-0", "num_requests_running") == 0, TOLD_S)

    asyncio.run(run())


def test_prefill_worker_at_the_handoff(served: Victim, wanted: dict[int, list[int]]) -> None:
    """Whatever it had done by then: each request ends once, rightly or with a typed error."""

    async def run() -> None:
        async with async_http(served) as client:
            streams = {
                seed: Stream(client, served.body([*prompt_of(400, 60 + seed)], 60))
                for seed in range(8)
            }
            await streams[0].until_tokens(1)
            killed = time.monotonic()
            served.kill("prefill-0")
            for stream in streams.values():
                await stream.end()
        lost = [stream for stream in streams.values() if not stream.done]
        for stream in lost:
            assert stream.error is not None and stream.error["code"] == "worker_lost"
            assert stream.ended - killed < TOLD_S
        print(f"lost {len(lost)} of {len(streams)}")
        # All may have ended before the gateway knew of the death.
        await until(lambda: not served.is_ready(), 2.0, "the gateway's knowing")
        await until(served.is_ready, BACK_S, "readiness")
        for seed, stream in streams.items():
            whole = await asyncio.to_thread(served.ask, prompt_of(400, 60 + seed), 60)
            assert stream.token_ids == whole[: len(stream.token_ids)]
            assert stream.error or stream.token_ids == whole

    asyncio.run(run())


def test_all_decode_workers(served: Victim) -> None:
    """Not ready without one. What was on them is lost; a prompt under way elsewhere goes on, and
    is lost only if there is still none when it is done."""

    async def run() -> None:
        async with async_http(served) as client:
            streams = [Stream(client, served.body(prompt_of(50, seed), 4000)) for seed in (2, 3)]
            for stream in streams:
                await stream.until_tokens(10)
            prompt = Stream(client, served.body(prompt_of(7000, 40), 5))
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            killed = time.monotonic()
            served.kill("decode-0")
            served.kill("decode-1")
            for stream in streams:
                await stream.end()
                assert stream.error is not None and stream.error["code"] == "worker_lost"
                assert stream.ended - killed < TOLD_S
            assert not await asyncio.to_thread(served.is_ready)
            await prompt.end()
            if prompt.error is not None:
                assert prompt.error["code"] == "worker_lost"
            else:
                assert len(prompt.token_ids) == 5
            await until(lambda: served.gauge("prefill-0", "num_leases") == 0, 1.0)

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
