"""A worker stays known to its gateways, also to one that has given it up in silence."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rpc_ends import SECRET, run, until

from baton.rpc.listener import Tcp
from baton.rpc.messages import Announce, AnnounceReply
from baton.rpc.server import RegistryServer
from baton.types import Role
from baton.worker import announcer
from baton.worker.announcer import stay_announced

SAID = Announce("decode-0", "10.0.0.2:9", Role.DECODE, 7)


@pytest.mark.parametrize("over_tcp", [True, False])
def test_it_repeats_itself_over_tcp_and_after_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_tcp: bool
) -> None:
    monkeypatch.setattr(announcer, "AGAIN_S", 0.2)
    callers: list[str | None] = []
    refusal = ""

    def on_announce(said: Announce, caller: str | None) -> AnnounceReply:
        assert said == SAID
        callers.append(caller)
        return AnnounceReply(not refusal, refusal)

    async def main() -> None:
        nonlocal refusal
        registry = RegistryServer(on_announce, SECRET)
        here = await registry.start(f"unix:{tmp_path}/g", Tcp("127.0.0.1", 0, None))
        gateway = registry._listener.tcp_address if over_tcp else here
        lost = asyncio.Event()
        task = asyncio.create_task(stay_announced(gateway, SAID, SECRET, None, lost))
        await until(lambda: callers)
        if over_tcp:
            await until(lambda: len(callers) >= 4)
        else:
            await asyncio.sleep(0.7)
            assert len(callers) == 1, "the kernel tells both ends at once"
        num_before = len(callers)
        lost.set()
        await until(lambda: len(callers) > num_before)
        refusal = "go away"
        lost.set()
        assert await asyncio.wait_for(task, 20.0) == "go away"
        assert set(callers) == {"127.0.0.1" if over_tcp else None}
        await registry.stop(0.2)

    run(main())
