"""Keeps the processes of one deployment running, and ends them in order.

    starting ── /ready ──▶ serving ── signal ──▶ draining ──▶ over
        └── a child keeps failing, or time is up ──▶ over (exit code 1)
                                       second signal, or drain time over: everything is killed

Draining: the gateway first (it takes nothing new and finishes what is open), then the workers.

A worker that stands still is left alone, unless `launch.kill_frozen_after_s` says for how long: it
may be stopped in a debugger, or on a machine that swaps, and go on; meanwhile it is given nothing,
and what its store holds can be read. Killed, it starts again like any that has died.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from baton.config import LaunchConfig
from baton.errors import BatonError
from baton.launch.backoff import Backoff
from baton.launch.console import Console
from baton.launch.process import Child, describe_exit

MAX_START_FAILURES: Final = 2
USAGE_EXIT_CODE: Final = 2  # wrong usage or configuration: another try cannot help
PROBE_EVERY_S: Final = 0.2
LOOK_EVERY_S: Final = 1.0  # for workers that stand still
WORKER_EXIT_S: Final = 2.0  # at least so long for workers to exit, once the gateway is gone
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Probe = Callable[[], Awaitable[str | None]]
"""Asks whether the deployment can serve: None if so, otherwise why not."""


Frozen = Callable[[], Awaitable[dict[str, float]]]
"""Asks which workers stand still, and for how many seconds that has been known."""


class GaveUp(BatonError):
    """A process keeps failing, or the deployment did not become ready in time."""


class Supervisor:
    """Runs `gateway` and `workers` until a signal; `on_ready` is told the seconds it took."""

    def __init__(
        self,
        gateway: Child,
        workers: Sequence[Child],
        config: LaunchConfig,
        probe: Probe,
        on_ready: Callable[[float], None],
        console: Console,
        frozen: Frozen,
    ) -> None:
        self._frozen = frozen
        self._gateway = gateway
        self._workers = workers
        self._config = config
        self._probe = probe
        self._on_ready = on_ready
        self._console = console
        self._was_ready = False
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._keepers: dict[Child, asyncio.Task[None]] = {}

    async def run(self) -> int:
        """Start everything and stay until it is over; the exit code of `baton serve`."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        children = (self._gateway, *self._workers)
        self._keepers = {child: asyncio.create_task(self._keep(child)) for child in children}
        ready = asyncio.create_task(self._wait_until_ready())
        killing = asyncio.create_task(self._kill_frozen())
        stop = asyncio.create_task(self._stopping.wait())
        pending: set[asyncio.Task[None]] = {ready, killing, *self._keepers.values()}
        failure: BaseException | None = None
        try:
            while not stop.done() and failure is None:
                done, _ = await asyncio.wait({stop, *pending}, return_when=asyncio.FIRST_COMPLETED)
                for task in pending & done:
                    failure = failure or task.exception()
                pending -= done
            if failure is None:
                return 0 if await self._drain() else 1
            if not isinstance(failure, GaveUp):
                raise failure
            self._console.status("")
            self._console.line(f"baton serve: {failure}")
            if self._was_ready:
                self._stopping.set()
                await self._drain()
            return 1
        finally:
            self._console.status("")
            ready.cancel()
            killing.cancel()
            stop.cancel()
            await self._end_all()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self, name: str) -> None:
        if self._stopping.is_set():
            self._forced.set()
            return
        self._stopping.set()
        self._console.status("")
        self._console.line(
            f"{name}: finishing open requests, at most {self._config.drain_timeout_s:g} s; "
            "a second signal stops at once"
        )

    async def _wait_until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        reason = "the gateway is starting"
        while (elapsed := loop.time() - started) < self._config.start_timeout_s:
            self._console.status(f"starting, {elapsed:.0f} s: {reason}")
            answer = await self._probe()
            if answer is None:
                self._was_ready = True
                self._console.status("")
                self._on_ready(loop.time() - started)
                return
            reason = answer
            await asyncio.sleep(PROBE_EVERY_S)
        raise GaveUp(f"not ready after {self._config.start_timeout_s:g} s: {reason}")

    async def _keep(self, child: Child) -> None:
        """Run `child`, again and again, until the deployment stops."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(self._config.restart_backoff_s, self._config.restart_backoff_max_s)
        while not self._stopping.is_set():
            started = loop.time()
            code = await child.run()
            if self._stopping.is_set():
                return
            end = f"{child.name} ended with {describe_exit(code)}"
            pause = backoff.after(loop.time() - started)
            if self._should_give_up(code, backoff.num_failures):
                raise GaveUp(
                    "\n  ".join([f"{end}, giving up; its last output:", *child.last_lines])
                )
            self._console.line(f"{end}; starting it again in {pause:g} s")
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    async def _kill_frozen(self) -> None:
        """End workers that have stood still for as long as they may; `_keep` starts them again."""
        limit = self._config.kill_frozen_after_s
        while limit is not None and not self._stopping.is_set():
            await asyncio.sleep(LOOK_EVERY_S)
            for name, for_s in (await self._frozen()).items():
                for child in self._workers:
                    if child.name == name and for_s > limit:
                        self._console.line(f"{name} has stood still for {for_s:.0f} s: killing it")
                        child.kill()

    def _should_give_up(self, code: int, num_failures: int) -> bool:
        if not self._was_ready:
            return code == USAGE_EXIT_CODE or num_failures >= MAX_START_FAILURES
        limit = self._config.max_restarts
        return limit is not None and num_failures > limit

    async def _drain(self) -> bool:
        """End everything in order; whether it went without killing."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_timeout_s
        self._gateway.terminate()
        if not await self._ended([self._gateway], deadline - loop.time()):
            return self._kill_rest()
        for worker in self._workers:
            worker.terminate()
        remaining = max(deadline - loop.time(), WORKER_EXIT_S)
        if not await self._ended(self._workers, remaining):
            return self._kill_rest()
        return True

    async def _ended(self, children: Sequence[Child], timeout_s: float) -> bool:
        """Wait until `children` have ended: False when time is over or a stop is forced."""
        ends = asyncio.gather(*(self._keepers[child] for child in children), return_exceptions=True)
        forced = asyncio.create_task(self._forced.wait())
        both: set[asyncio.Future[object]] = {ends, forced}  # type: ignore[arg-type]
        await asyncio.wait(both, timeout=max(timeout_s, 0), return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        return ends.done()

    def _kill_rest(self) -> bool:
        why = "stopping at once" if self._forced.is_set() else "time is over"
        left = [child.name for child, task in self._keepers.items() if not task.done()]
        self._console.line(f"{why}: killing {', '.join(left)}")
        return False

    async def _end_all(self) -> None:
        """Kill what is left and wait for its end."""
        self._stopping.set()
        for child, keeper in self._keepers.items():
            if not keeper.done():
                child.kill()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
