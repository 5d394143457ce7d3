"""Workers of several key classes at one request table: by whose keys, and who is offered what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from baton.core.handoff import RequestTable
from baton.core.instructions import Offer, Submit
from baton.core.keys import chain, root_key
from baton.core.life import Content, HandoffPolicy, Phase
from baton.core.members import Members
from baton.core.router import Placement, Router, WorkerInfo
from baton.types import FinishReason, Grant, Request, Role, SamplingParams, Sealed, TokenDelta

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}
PROMPT = tuple(range(16))


def info(name: str, block_size: int = 4) -> WorkerInfo:
    key_class = f"exact/{block_size}"
    return WorkerInfo(name, ROLES[name[0]], 1, 100, block_size, 100, True, key_class)


def content(block_size: int = 4, weights: bytes = b"weights") -> Content:
    return Content(weights, "exact", block_size)


def keys(block_size: int) -> list[bytes]:
    return chain(root_key(b"weights", "exact", b""), PROMPT, block_size)


class NotingRouter(Router):
    """Notes by which keys requests are placed, and what workers are believed to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[tuple[list[bytes], str]] = []
        self.keeping: list[tuple[str, list[bytes]]] = []

    def place(
        self,
        request_id: str,
        choice: int,
        num_tokens: int,
        keys: Sequence[bytes],
        key_class: str = "",
        now: float = 0.0,
    ) -> Placement:
        self.placed.append((list(keys), key_class))
        return super().place(request_id, choice, num_tokens, keys, key_class, now)

    def kept(self, worker_id: str, keys: Sequence[bytes]) -> None:
        self.keeping.append((worker_id, list(keys)))
        super().kept(worker_id, keys)


def table_of(*workers: tuple[str, int]) -> tuple[RequestTable, NotingRouter]:
    router = NotingRouter()
    table = RequestTable(router, HandoffPolicy(9.0))
    for name, block_size in workers:
        table.join(info(name, block_size), content(block_size), 0.0)
    return table, router


@pytest.mark.parametrize(
    ("names", "first"), [(("d0", "p1", "p0"), "p0"), (("d0", "u0"), "u0"), (("d1", "d0"), "d0")]
)
def test_requests_go_by_the_keys_of_a_worker_that_computes_prompts(
    names: tuple[str, ...], first: str
) -> None:
    members = Members()
    assert members.reference is None
    for size, name in enumerate(names, start=4):
        members.add(info(name, size), content(size))
    size = 4 + names.index(first)
    assert members.reference == (content(size), f"exact/{size}")
    for name in names:
        members.remove(name)
        members.remove(name)
    assert len(members) == 0
    assert members.reference is not None, "the weights are still known"


def test_who_is_alike() -> None:
    members = Members()
    for name, size in (("p0", 4), ("d0", 4), ("d1", 8)):
        members.add(info(name, size), content(size))
    assert members.are_alike("p0", "d0")
    assert not members.are_alike("p0", "d1")
    assert not members.are_alike("p0", "gone")
    assert not members.are_alike("gone", "gone")
    assert None not in members
    assert members.info(None) is None


@pytest.mark.parametrize(("theirs", "offered"), [(4, True), (8, False)])
def test_only_a_worker_with_the_same_keys_may_fetch_early(theirs: int, offered: bool) -> None:
    table, router = table_of(("p0", 4), ("d0", theirs))
    table.add(Request("r", PROMPT, SamplingParams(5)), 0.0)
    table.take()
    assert router.placed == [(keys(4), "exact/4")]
    sealed = Sealed("r", 0, 0, Grant("g", "p0", 1, "", 9.0, b""), 0, (keys(4)[0],), (b"",), (0,))
    table.sealed("p0", sealed, 1.0)
    told = table.take().instructions
    assert told == ([Offer("d0", sealed)] if offered else [])


def test_what_a_worker_of_other_keys_computes_is_not_looked_for() -> None:
    for theirs, is_kept in ((4, True), (8, False)):
        table, router = table_of(("p0", 4), ("d0", theirs))
        life = table.add(Request("r", PROMPT, SamplingParams(5)), 0.0)
        life.phase, life.worker_id = Phase.SECOND, "d0"
        end = TokenDelta("r", 0, 0, 0, (1, 2, 3, 4, 5), finish=FinishReason.LENGTH)
        table.delivered("d0", end, 1.0)
        assert [name for name, _ in router.keeping] == (["d0"] if is_kept else [])


def test_a_request_that_is_placed_again_has_the_keys_of_who_is_left() -> None:
    table, router = table_of(("u0", 4))
    table.add(Request("r", PROMPT, SamplingParams(5)), 0.0)
    table.join(info("u1", 8), content(8), 0.0)
    table.lose("u0", 1.0)
    assert router.placed == [(keys(4), "exact/4"), (keys(8), "exact/8")]


def test_workers_of_another_block_size_end_nobody_but_those_of_other_weights_do() -> None:
    table, _ = table_of(("u0", 4))
    table.add(Request("r", PROMPT, SamplingParams(5)), 0.0)
    table.lose("u0", 1.0)
    table.take()
    table.join(info("u1", 8), content(8), 2.0)
    (submit,) = table.take().instructions
    assert isinstance(submit, Submit)
    assert submit.request.attempt == 1
    table.lose("u1", 3.0)
    table.take()
    table.join(info("u2", 8), content(8, b"others"), 4.0)
    (delta,) = table.take().deltas
    assert delta.finish is FinishReason.ERROR
