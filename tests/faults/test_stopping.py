"""The end of a deployment: in order, by force, and without its supervisor."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

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
    wait_for,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("served") / "org-long")


def test_sigterm_lets_running_requests_finish(model: Path) -> None:
    async def run(served: Victim) -> None:
        wanted = [await asyncio.to_thread(served.ask, prompt_of(50, s), 200) for s in range(3)]
        async with async_http(served) as client:
            streams = [Stream(client, served.body(prompt_of(50, seed), 1500)) for seed in range(3)]
            for stream in streams:
                await stream.until_tokens(5)
            streams.append(Stream(client, served.body(prompt_of(6000, 8), 30)))
            whole = asyncio.create_task(
                client.post(COMPLETIONS, json=served.body(prompt_of(6000, 7), 30))
            )
            await until(lambda: served.gauge("prefill-0", "num_requests_running") >= 1)
            served.signal(signal.SIGTERM)
            await asyncio.to_thread(served.wait_for_line, "SIGTERM: finishing open requests")
            await until(lambda: refuses(served.url), 5, "refusing new connections")
            for stream in streams:
                assert not stream.ended, vars(stream)
            for stream in streams:
                await stream.end()
                assert stream.done, vars(stream)
            response = await whole
        assert [stream.token_ids[:200] for stream in streams[:3]] == wanted
        assert [len(stream.token_ids) for stream in streams] == [1500, 1500, 1500, 30]
        assert len(response.json()["choices"][0]["token_ids"]) == 30

    with Victim.start(model, "1P1D", *SMALL, *LONG) as served:
        assert isinstance(served, Victim)
        pids = {served.pid, *served.processes().values()}
        asyncio.run(run(served))
        assert served.end() == 0, served.output
        assert not served.left(pids)
        assert "killing" not in served.output
        assert "Traceback" not in served.output


def test_a_second_signal_forces(model: Path) -> None:
    async def run(served: Victim) -> None:
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 1), 8000))
            await stream.until_tokens(5)
            served.signal(signal.SIGINT)
            await asyncio.to_thread(served.wait_for_line, "a second signal stops at once")
            count = len(stream.token_ids)
            await stream.until_tokens(count + 20)  # it goes on
            asked = time.monotonic()
            served.signal(signal.SIGINT)
            await stream.end(5)
            assert not stream.done
            assert stream.broken is not None or stream.error is not None
            code = await asyncio.to_thread(served.end)
            print(f"forced_s={time.monotonic() - asked:.3f}")
            assert time.monotonic() - asked < 3
            assert code == 1

    with Victim.start(model, "1U", *SMALL, *LONG) as served:
        assert isinstance(served, Victim)
        pids = {served.pid, *served.processes().values()}
        assert len(pids) == 3
        asyncio.run(run(served))
        assert not served.left(pids)


def test_kill_9_of_the_supervisor_leaves_no_process(model: Path) -> None:
    async def run(served: Victim) -> None:
        async with async_http(served) as client:
            stream = Stream(client, served.body(prompt_of(50, 1), 8000))
            await stream.until_tokens(5)
            served.signal(signal.SIGKILL)
            await stream.end(5)
            assert stream.broken is not None

    with Victim.start(model, "1U", *SMALL, *LONG) as served:
        assert isinstance(served, Victim)
        pids = {served.pid, *served.processes().values()}
        asyncio.run(run(served))
        assert served.end() == -signal.SIGKILL
        print(f"gone_s={wait_for(lambda: not served.left(pids), 3.0, 'their end'):.3f}")


def refuses(url: str) -> bool:
    try:
        httpx.get(url + "/health", timeout=2, trust_env=False)
    except httpx.ConnectError:
        return True
    return False
