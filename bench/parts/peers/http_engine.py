"""A running server as an engine: the same cells, asked over HTTP by the client of `baton bench`."""

from __future__ import annotations

import asyncio

import msgspec
import uvloop

from baton.cli.load.client import Target, run_load
from baton.cli.load.prompts import PromptSource
from baton.cli.load.workload import Arrival
from baton.observe.results import RequestResult
from parts.peers.cells import Cell
from parts.peers.child import draw_prompts
from parts.peers.engines import Broken
from parts.peers.servers import Running

BURST = Cell(name="burst", kind="burst", context=128, steps=64)
HTTP_CELLS = [
    msgspec.structs.replace(BURST, name=f"{count} streams", batch=count) for count in (1, 8, 32)
]


class HttpEngine:
    """Measures burst cells: `batch` streams at once, from the first request to the last token.

    The server is paused, if it can be, except while it is measured.
    """

    mixes = True

    def __init__(self, name: str, about: str, server: Running, vocab_size: int) -> None:
        self.name = name
        self.about = about
        self._server = server
        # Without token ids: not every engine knows them, and those that do would send more events.
        self._target = Target(server.endpoint, token_ids=False, extra={"temperature": 0})
        self._vocab_size = vocab_size
        server.pause()

    def measure(self, cell: Cell, seed: str) -> float:
        """Seconds.

        Raises:
            Broken: a request failed, or came back with another number of tokens.
        """
        assert cell.kind == "burst"
        prompts = draw_prompts(seed, cell.batch, cell.context, self._vocab_size)
        arrivals = [Arrival(0.0, cell.context, cell.steps, prompt) for prompt in prompts]
        self._server.go_on()
        try:
            results = run(self._target, arrivals, seed, self._vocab_size)
        finally:
            self._server.pause()
        for result in results:
            if result.failure is not None:
                raise Broken(f"{self.name}: {result.failure}: {result.detail}")
            if result.output_tokens != cell.steps:
                raise Broken(f"{self.name}: {result.output_tokens} tokens, not {cell.steps}")
        return max(r.end_s for r in results) - min(r.sent_s for r in results)


def run(target: Target, arrivals: list[Arrival], seed: str, vocab_size: int) -> list[RequestResult]:
    """Send `arrivals`; prompts that they lack are made of token ids, all different."""
    prompts = PromptSource(seed, vocab_size)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_load(target, arrivals, prompts))
