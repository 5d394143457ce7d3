"""One request's life: ends, errors, disconnects, deadlines, slow readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from asgi_client import Exchange
from fastapi import FastAPI
from http_fixtures import toy_model_dir

from baton.errors import Overloaded, ServeError, Unavailable, WireError
from baton.gateway.app import create_app
from baton.gateway.dispatch import Readiness, ServedModel
from baton.gateway.limits import Limits
from baton.observe.metrics import (
    DISCONNECTS,
    ERRORS,
    GENERATION_TOKENS,
    HTTP_REQUESTS,
    RUNNING,
    Metrics,
)
from baton.text.chat_template import ChatTemplate
from baton.text.tokenizer import Tokenizer
from baton.types import FinishReason, Request, TokenDelta

Script = Callable[[Request], AsyncIterator[TokenDelta]]
STREAM_PATHS = ("/v1/completions", "/v1/chat/completions")


class ScriptedDispatcher:
    """Runs `script`, keeps every request, and knows which token streams are open."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.open: set[tuple[str, int]] = set()
        self.served: ServedModel | None = ServedModel(max_model_len=512, vocab_size=500)
        self.ready = Readiness(True)

    def readiness(self) -> Readiness:
        return self.ready

    def model(self) -> ServedModel | None:
        return self.served

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        self.open.add((request.id, request.choice))
        try:
            async for delta in self.script(request):
                yield delta
        finally:
            self.open.discard((request.id, request.choice))


def tokens(request: Request, ids: list[int], first: int = 0, **more: Any) -> TokenDelta:
    return TokenDelta(request.id, request.choice, 0, first, tuple(ids), **more)


async def endless(request: Request) -> AsyncIterator[TokenDelta]:
    index = 0
    while True:
        await asyncio.sleep(0)
        yield tokens(request, [70], index)
        index += 1


async def stuck(request: Request) -> AsyncIterator[TokenDelta]:
    await asyncio.Event().wait()
    yield tokens(request, [70])


async def stuck_after_one(request: Request) -> AsyncIterator[TokenDelta]:
    yield tokens(request, [70])
    await asyncio.Event().wait()


async def three(request: Request) -> AsyncIterator[TokenDelta]:
    yield tokens(request, [70], num_cached=2)
    yield tokens(request, [71, 72], 1, finish=FinishReason.LENGTH)


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_dir(tmp_path_factory.mktemp("toy"))


class House:
    def __init__(self, toy_dir: Path, script: Script, **limits: Any) -> None:
        self.dispatcher = ScriptedDispatcher(script)
        self.metrics = Metrics()
        self.tokenizer = Tokenizer.from_dir(toy_dir)
        self.app: FastAPI = create_app(
            dispatcher=self.dispatcher,
            tokenizer=self.tokenizer,
            chat_template=ChatTemplate.from_dir(toy_dir),
            model_name="toy",
            metrics=self.metrics,
            limits=Limits(**limits),
        )

    def ask(self, path: str, **fields: Any) -> Exchange:
        what: dict[str, Any] = {"prompt": "Hello"}
        if "chat" in path:
            what = {"messages": [{"role": "user", "content": "Hello"}]}
        return Exchange(self.app, path, {"model": "toy", **what, **fields})


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(coroutine, 20)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came about")


@pytest.mark.parametrize("path", STREAM_PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_closes_every_token_stream(
    toy_dir: Path, path: str, stream: bool
) -> None:
    async def scenario() -> None:
        house = House(toy_dir, stuck_after_one)
        exchange = house.ask(path, n=3, stream=stream)
        await until(lambda: len(house.dispatcher.open) == 3)
        if stream:
            await exchange.got_chunk.wait()
        exchange.leave()
        turns = 0
        while house.dispatcher.open:
            await asyncio.sleep(0)
            turns += 1
            assert turns < 10
        await exchange.done()
        assert not exchange.ended
        assert house.metrics.value(DISCONNECTS) == 1
        assert house.metrics.value(RUNNING) == 0
        status = "200" if stream else "499"
        assert house.metrics.value(HTTP_REQUESTS, endpoint=path, status=status) == 1

    run(scenario())


def test_a_client_that_leaves_before_the_first_token(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, stuck)
        exchange = house.ask(STREAM_PATHS[0], stream=True)
        await until(lambda: bool(house.dispatcher.open))
        exchange.leave()
        await exchange.done()
        assert exchange.status is None
        assert not house.dispatcher.open

    run(scenario())


def test_a_slow_reader_stops_its_own_work_and_nobody_elses(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, endless, request_timeout_s=60)
        slow = house.ask(STREAM_PATHS[0], stream=True)
        await slow.got_chunk.wait()
        slow.reading.clear()
        for _ in range(500):
            await asyncio.sleep(0)
        before = house.metrics.value(GENERATION_TOKENS)
        for _ in range(500):
            await asyncio.sleep(0)
        assert house.metrics.value(GENERATION_TOKENS) == before < 200
        fast = house.ask(STREAM_PATHS[0], stream=True)
        await until(lambda: len(fast.chunks) > 100)
        slow.leave()
        fast.leave()
        await slow.done()
        await fast.done()
        assert not house.dispatcher.open

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_aborts_the_work(toy_dir: Path, stream: bool) -> None:
    async def scenario() -> None:
        house = House(toy_dir, endless)
        letter = house.tokenizer.token_text(70)
        exchange = house.ask(STREAM_PATHS[0], stop=letter * 5, stream=stream, max_tokens=400)
        await exchange.done()
        assert not house.dispatcher.open
        if stream:
            *chunks, last = exchange.events()
            assert last == "data: [DONE]"
            choices = [chunk["choices"][0] for chunk in chunks]
            text, finish = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
        else:
            choice = exchange.json()["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
            assert exchange.json()["usage"]["completion_tokens"] == 5
        assert (text, finish) == ("", "stop")

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_own_status(toy_dir: Path, stream: bool) -> None:
    async def refused(request: Request) -> AsyncIterator[TokenDelta]:
        raise Overloaded("too much to do", stage="queue", retry_after_s=2.4)
        yield tokens(request, [70])

    async def scenario() -> None:
        house = House(toy_dir, refused)
        exchange = await house.ask(STREAM_PATHS[0], stream=stream).done()
        assert exchange.status == 429
        assert exchange.headers["retry-after"] == "3"
        assert exchange.json()["error"] == {
            "message": "too much to do",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
            "stage": "queue",
        }
        assert house.metrics.value(ERRORS, code="overloaded", stage="queue") == 1

    run(scenario())


@pytest.mark.parametrize("how", ["delta", "raised", "bug", "silence"])
@pytest.mark.parametrize("path", STREAM_PATHS)
def test_an_error_in_a_stream_is_an_event_and_then_the_end(
    toy_dir: Path, path: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(request: Request) -> AsyncIterator[TokenDelta]:
        yield tokens(request, [70])
        await asyncio.sleep(0.01)
        if how == "delta":
            error = WireError("worker_lost", "the worker is gone", "decode")
            yield tokens(request, [], 1, finish=FinishReason.ERROR, error=error)
        if how == "raised":
            raise ServeError("something", stage="transfer")
        if how == "bug":
            raise ZeroDivisionError

    async def scenario() -> None:
        house = House(toy_dir, fails)
        exchange = await house.ask(path, stream=True).done()
        assert exchange.status == 200
        assert exchange.ended
        *_, chunk, last = exchange.events()
        assert chunk["choices"]
        code, stage = {
            "delta": ("worker_lost", "decode"),
            "raised": ("internal_error", "transfer"),
        }.get(how, ("internal_error", "gateway"))
        assert (last["error"]["code"], last["error"]["stage"]) == (code, stage)
        assert house.metrics.value(ERRORS, code=code, stage=stage) == 1
        assert not house.dispatcher.open

    run(scenario())


def test_an_error_of_one_choice_ends_the_others(toy_dir: Path) -> None:
    async def second_fails(request: Request) -> AsyncIterator[TokenDelta]:
        if request.choice == 1:
            raise Unavailable("no worker", stage="queue")
        async for delta in endless(request):
            yield delta

    async def scenario() -> None:
        house = House(toy_dir, second_fails)
        exchange = await house.ask(STREAM_PATHS[0], n=3).done()
        assert exchange.status == 503
        assert not house.dispatcher.open

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [stuck, stuck_after_one])
def test_the_deadline_ends_a_request(toy_dir: Path, script: Script, stream: bool) -> None:
    async def scenario() -> None:
        house = House(toy_dir, script, request_timeout_s=0.2)
        started = time.monotonic()
        exchange = await house.ask(STREAM_PATHS[0], stream=stream).done()
        assert 0.2 <= time.monotonic() - started < 10
        if stream and script is stuck_after_one:
            error = exchange.events()[-1]["error"]
        else:
            assert exchange.status == 504
            error = exchange.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert not house.dispatcher.open
        assert 0 < (house.dispatcher.requests[0].deadline_s or 0) <= 0.2

    run(scenario())


def test_the_deadline_holds_for_a_reader_that_does_not_read(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, endless, request_timeout_s=0.2)
        exchange = house.ask(STREAM_PATHS[0], stream=True)
        exchange.reading.clear()
        started = time.monotonic()
        await exchange.done()
        assert time.monotonic() - started < 10
        assert not house.dispatcher.open

    run(scenario())


def test_too_many_requests_are_refused(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, stuck, max_queued_requests=2)
        held = [house.ask(STREAM_PATHS[0]) for _ in range(2)]
        await until(lambda: len(house.dispatcher.open) == 2)
        refused = await house.ask(STREAM_PATHS[1]).done()
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        for exchange in held:
            exchange.leave()
            await exchange.done()
        house.dispatcher.script = three
        assert (await house.ask(STREAM_PATHS[0]).done()).status == 200

    run(scenario())


def test_ids_and_seeds_are_minted_here(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, three)
        for _ in range(2):
            await house.ask(STREAM_PATHS[0], prompt=["one", "two"], n=2).done()
        requests = house.dispatcher.requests
        assert len({(r.id, r.choice) for r in requests}) == 8
        assert {r.choice for r in requests} == {0, 1}
        by_id = {r.id: r.sampling.seed for r in requests}
        assert len(by_id) == len(set(by_id.values())) == 4
        for request in requests:
            assert request.sampling.seed == by_id[request.id]
            assert (request.attempt, request.emitted, request.hand_off) == (0, (), False)
            assert request.handoff is None

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seed": -1}, {"seed": (1 << 64) - 1}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": None, "top_p": None}, {"temperature": 1.0, "top_p": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 5, "min_p": 0.25}, {"top_k": 5, "min_p": 0.25}),
        ({"logit_bias": {"7": -3}}, {"logit_bias": {7: -3.0}}),
        ({"stop_token_ids": [9, 9], "ignore_eos": True}, {"stop_token_ids": (9,)}),
        ({"stop_token_ids": [9]}, {"stop_token_ids": (9, 1)}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"max_tokens": 3, "min_tokens": 2}, {"max_tokens": 3, "min_tokens": 2}),
        ({}, {"max_tokens": 16, "logprobs": None, "stop_token_ids": (1,)}),
        ({"min_tokens": 40}, {"max_tokens": 40}),
        (
            {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5},
            {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5},
        ),
    ],
)
def test_parameters_reach_the_sampler(
    toy_dir: Path, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    async def scenario() -> None:
        house = House(toy_dir, three)
        exchange = await house.ask(STREAM_PATHS[0], **fields).done()
        assert exchange.status == 200, exchange.body
        sampling = house.dispatcher.requests[0].sampling
        assert {name: getattr(sampling, name) for name in expected} == expected

    run(scenario())


def test_a_chat_may_use_all_that_is_left(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, three)
        await house.ask(STREAM_PATHS[1]).done()
        request = house.dispatcher.requests[0]
        assert request.sampling.max_tokens == 512 - len(request.prompt)

    run(scenario())


def test_long_prompts_are_tokenized_off_the_loop(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, three)
        served = house.dispatcher.served = ServedModel(1 << 20, 500)
        assert served is not None
        exchange = house.ask(STREAM_PATHS[0], prompt="many words " * 60_000)
        longest, before = 0.0, time.perf_counter()
        while not exchange.task.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        whole = await exchange.done()
        assert whole.status == 200
        house.tokenizer.encode("many words " * 60_000)
        took = time.perf_counter() - before
        assert longest < 0.7 * took, (longest, took)

    run(scenario())


def test_not_ready_without_workers(toy_dir: Path) -> None:
    async def scenario() -> None:
        house = House(toy_dir, three)
        house.dispatcher.ready = Readiness(False, "no decode worker has said hello")
        house.dispatcher.served = None
        for exchange in (
            Exchange(house.app, "/ready", method="GET"),
            house.ask(STREAM_PATHS[0]),
        ):
            await exchange.done()
            assert exchange.status == 503
            assert "no decode worker" in exchange.json()["error"]["message"]
            assert exchange.headers["retry-after"]
        assert (await Exchange(house.app, "/health", method="GET").done()).status == 200

    run(scenario())
