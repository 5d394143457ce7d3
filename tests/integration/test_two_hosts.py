"""Prefill and decode on two hosts: network namespaces, TCP with TLS, and a wire that is cut.

Right answers, nothing left behind, and no stranger gets in. The first deployment has its gateway
and decode worker here and the prefill worker there, the second its decode worker there.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults.served import COMPLETIONS, LONG, Victim, prompt_of
from two_hosts import HERE, THERE, TOLD_S, Network, TwoHosts

pytest_plugins = ["faults.expected"]

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 200, 700))]
NUM_TOKENS = 24
NUM_LONG = 3000
AFTER = ("--fabric.fetch-early", "false")


@pytest.fixture(scope="module")
def prefill_there(model: Path) -> Iterator[TwoHosts]:
    where = {"prefill-0": THERE, "decode-0": HERE}
    with (
        Network.open() as network,
        TwoHosts.start(network, model, where, *LONG, *AFTER) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def decode_there(model: Path) -> Iterator[TwoHosts]:
    where = {"prefill-0": HERE, "decode-0": THERE}
    with Network.open() as network, TwoHosts.start(network, model, where, *LONG) as served:
        yield served


@pytest.fixture(params=["prefill_there", "decode_there"])
def served(request: pytest.FixtureRequest) -> TwoHosts:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, TwoHosts)
    return found


def heals(served: TwoHosts, expected: Victim, prompt: list[int]) -> None:
    """All are there again, hold nothing, and answer a new prompt rightly and without a fallback."""
    served.until_whole()
    served.check_drained()
    lost = served.lost()
    assert served.ask(prompt, NUM_TOKENS) == expected.ask(prompt, NUM_TOKENS)
    served.check_drained()
    assert served.lost() == lost


@contextlib.contextmanager
def cut_off(served: TwoHosts, worker: str) -> Iterator[None]:
    """Cut the wire for so long that both ends have noticed; it is whole again afterwards."""
    num_before = served.output(worker).count("forgotten")
    with served.network.cut():
        served.until(lambda: not served.is_ready(), "the gateway's knowing", TOLD_S)
        served.until(
            lambda: served.output(worker).count("forgotten") > num_before, "its giving up", TOLD_S
        )
        yield


def test_answers_over_two_hosts_are_those_of_one(served: TwoHosts, expected: Victim) -> None:
    wanted = [expected.ask(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert [served.ask(prompt, NUM_TOKENS) for prompt in PROMPTS] == wanted
    of = served.counters()["decode-0"]
    assert of["prompt_tokens_computed"] == 0
    came = of.get("imported_blocks", 0) + of.get("early_blocks", 0)
    assert of["blocks_by_tcp"] == came == 1 + 1 + 1 + 2 + 13 + 44
    assert "blocks_by_shm" not in of
    assert served.lost() == {}
    served.check_drained()
    said = served.output("decode-0")
    assert "transport source=prefill-0 name=tcp reason=it is not on this host: " in said
    for name in ("gateway", *(name for name, host in served.where.items() if host == THERE)):
        assert f"listening address=10.77.0.{1 if name == 'gateway' else 2}:" in served.output(name)
    assert "tls=True" in said and "tls=False" not in served.output()


def test_the_check_measures_the_wire(prefill_there: TwoHosts) -> None:
    prefill_there.ask(prompt_of(300, 48), 40)
    with prefill_there.http("admin") as client:
        report = client.post("/fabric/check").raise_for_status().json()
    ways = {(link["source"], link["reader"], link["transport"]) for link in report["links"]}
    assert ("prefill-0", "decode-0", "tcp") in ways
    assert {transport for _, _, transport in ways} == {"tcp"}
    for link in report["links"]:
        assert link["problem"] == "" and link["bytes_per_s"] > 1e6, link
    prefill_there.check_drained()


def test_on_one_host_it_is_shared_memory(prefill_there: TwoHosts) -> None:
    """A second prefill worker, beside the decode worker: both ways, each where it is due."""
    served = prefill_there
    served.where["prefill-1"] = HERE
    served.run("prefill-1")
    try:
        served.until_whole()
        prompts = iter(range(500, 600))

        def both_were_used() -> bool:
            with ThreadPoolExecutor(4) as pool:
                asked = [prompt_of(300, next(prompts)) for _ in range(4)]
                list(pool.map(lambda prompt: served.ask(prompt, 4), asked))
            of = served.counters()["decode-0"]
            return of.get("blocks_by_shm", 0) > 0

        served.until(both_were_used, "the use of both", 60)
    finally:
        code = served.terminate("prefill-1")
        del served.where["prefill-1"]
    assert code == 0
    said = served.output("decode-0")
    assert "source=prefill-1 name=shm reason=it is on this host" in said
    assert "source=prefill-1 name=tcp" not in said
    assert "source=prefill-0 name=shm" not in said
    assert served.lost() == {}
    served.check_drained()


@pytest.mark.timeout(240)
def test_strangers_are_not_taken(prefill_there: TwoHosts) -> None:
    """Another authority's certificate, one for another role, another secret, plain text."""
    served = prefill_there
    plain = ("--rpc.allow-insecure", "--fabric.allow-insecure")
    strangers: dict[str, dict[str, Any]] = {
        "decode-7": {"certificate": "stranger"},
        "decode-8": {"certificate": None},
        "prefill-7": {"certificate": "gateway"},
        "prefill-8": {},
    }
    flags = {"decode-8": plain, "prefill-8": ("--rpc.secret-file", served.secret_file("other"))}
    for name, options in strangers.items():
        served.where[name] = THERE
        served.run(name, *flags.get(name, ()), **options)
    try:
        for name, reason in (("prefill-7", "lacks the name"), ("prefill-8", "the secrets differ")):
            assert served.end_of(name) == 1
            assert "refused this worker: UNAUTHENTICATED" in served.output(name)
            assert reason in served.output(name)
        for name in ("decode-7", "decode-8"):
            served.until(lambda name=name: "cannot reach gateway" in served.output(name), name, 90)
        assert "CERTIFICATE_VERIFY_FAILED" in served.output("decode-7")
        assert not served.counters().keys() & strangers.keys()
        assert not any(name in served.output("gateway") for name in strangers)
    finally:
        for name in strangers:
            if served.is_running(name):
                served.kill(name)
            del served.where[name]
    served.until_whole()
    served.check_drained()


def test_a_cut_before_the_blocks_are_read(prefill_there: TwoHosts, expected: Victim) -> None:
    """Handed off, but out of reach: computed again, at the price of a read that was in vain."""
    served, prompt = prefill_there, prompt_of(400, 40)
    before = served.lost()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as cut:
        with served.stopped("decode-0"):
            asked = pool.submit(served.ask, prompt, NUM_TOKENS)
            served.until_handed_off()
            cut.enter_context(served.network.cut())
        tokens = asked.result(30)
    assert tokens == expected.ask(prompt, NUM_TOKENS)
    grown = {name for name, total in served.lost().items() if total > before.get(name, 0)}
    assert grown in (
        {"decode-0: fallback_import_timed_out"},
        {"decode-0: fallback_import_unreachable"},
    )
    heals(served, expected, prompt_of(400, 41))


@pytest.mark.timeout(240)
def test_a_cut_while_the_prompt_is_computed(prefill_there: TwoHosts, expected: Victim) -> None:
    """The worker forgets the request, joins again when it can, and is given it again."""
    served, prompt = prefill_there, prompt_of(6000, 42)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.ask, prompt, 20)
        served.until(
            lambda: served.counter("prefill-0", "num_requests_running"), "the prompt's start"
        )
        with cut_off(served, "prefill-0"):
            assert not asked.done(), "it waits for the worker"
        assert asked.result(60) == expected.ask(prompt, 20)
    heals(served, expected, prompt_of(400, 43))


@pytest.mark.timeout(240)
def test_a_cut_that_the_worker_sees_first(prefill_there: TwoHosts, expected: Victim) -> None:
    """It is back, and known, before the gateway gives it up: it has to say once more that it is."""
    served = prefill_there

    def times(name: str, words: str) -> int:
        return served.output(name).count(words)

    forgotten, gone = "forgotten, num_aborted", "worker id=prefill-0 gone"
    before = times("prefill-0", forgotten), times("gateway", gone)
    with served.network.cut():
        served.until(
            lambda: times("prefill-0", forgotten) > before[0], "the worker's giving up", TOLD_S
        )
        assert times("gateway", gone) == before[1], "it does not know yet"
    served.until(lambda: times("gateway", gone) > before[1], "the gateway's giving up", TOLD_S)
    heals(served, expected, prompt_of(400, 52))


@pytest.mark.timeout(240)
def test_a_cut_in_the_middle_of_an_answer(decode_there: TwoHosts, expected: Victim) -> None:
    """The stream stands still, and goes on when the worker is there again."""
    served, prompt = decode_there, prompt_of(50, 44)
    tokens: list[int] = []
    errors: list[dict[str, Any]] = []
    body = {**served.body(prompt, NUM_LONG), "stream": True}
    with served.http() as client, client.stream("POST", COMPLETIONS, json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        for line in lines:
            tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
            if len(tokens) > 20:
                break
        with cut_off(served, "decode-0"):
            pass
        for line in lines:
            event = json.loads(line[6:])
            if "error" in event:
                errors.append(event["error"])
            else:
                tokens += event["choices"][0].get("token_ids") or []
    assert errors == []
    assert tokens == expected.ask(prompt, NUM_LONG)
    heals(served, expected, prompt_of(400, 45))


def test_a_worker_that_dies_is_told_at_once(decode_there: TwoHosts, expected: Victim) -> None:
    """Its host closes its connections: no need to wait for keepalive."""
    served, prompt = decode_there, prompt_of(50, 49)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.ask, prompt, NUM_LONG)
        served.until(lambda: served.counter("decode-0", "num_requests_running"), "decoding")
        served.kill("decode-0")
        served.until(lambda: not served.is_ready(), "the gateway's knowing", 5.0)
        served.run("decode-0")
        assert asked.result(60) == expected.ask(prompt, NUM_LONG)
    heals(served, expected, prompt_of(400, 50))


def test_a_gateway_that_starts_anew_finds_all(decode_there: TwoHosts, expected: Victim) -> None:
    served = decode_there
    served.kill("gateway")
    served.run("gateway")
    heals(served, expected, prompt_of(400, 51))


def test_a_short_cut_is_not_noticed(decode_there: TwoHosts, expected: Victim) -> None:
    """Nothing is lost on the way, so a second later it goes on."""
    served, prompt = decode_there, prompt_of(50, 46)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.ask, prompt, 1500)
        served.until(lambda: served.counter("decode-0", "num_requests_running"), "decoding")
        with served.network.cut():
            time.sleep(1.0)
        assert asked.result(60) == expected.ask(prompt, 1500)
    heals(served, expected, prompt_of(400, 47))
