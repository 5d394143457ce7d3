"""Placement: least work, prefix affinity, and books that return to zero."""

from __future__ import annotations

import random

import pytest

from baton.core.predicted import Predicted
from baton.core.router import RATE_WEIGHT, Pair, Router, WorkerInfo
from baton.errors import Unavailable
from baton.types import Role, StageTimes


def _router(**roles: Role) -> Router:
    router = Router()
    for name, role in roles.items():
        router.join(WorkerInfo(name, role, 1, 100, 4))
    return router


def _keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def _split(num_prefill: int = 2, num_decode: int = 2) -> Router:
    roles = {f"p{n}": Role.PREFILL for n in range(num_prefill)}
    return _router(**roles, **{f"d{n}": Role.DECODE for n in range(num_decode)})


def test_least_work_on_both_sides() -> None:
    router = _split()
    first = router.place("a", 0, 100, [])
    second = router.place("b", 0, 10, [])
    third = router.place("c", 0, 10, [])
    assert (first.prefill, first.decode, first.predicted_tokens) == ("p0", "d0", 100)
    assert (second.prefill, second.decode) == ("p1", "d1")
    assert (third.prefill, third.decode, third.predicted_tokens) == ("p1", "d1", 20)


def test_first_token_ends_the_prefill_work_only() -> None:
    router = _split()
    router.place("a", 0, 100, [])
    router.prefilled("a", 0)
    router.prefilled("a", 0)
    placement = router.place("b", 0, 10, [])
    assert (placement.prefill, placement.decode) == ("p0", "d1")


def test_a_known_prefix_attracts_until_it_costs_more() -> None:
    router = _split()
    keys = _keys("1", "2", "3")
    router.place("a", 0, 14, keys)
    router.finished("a", 0)
    router.place("x", 0, 1, [])  # p0 has a little more to do
    placement = router.place("b", 0, 14, keys)
    assert (placement.prefill, placement.predicted_tokens) == ("p0", 1 + 2)
    for n in range(10):
        router.place(f"c{n}", 0, 14, _keys(f"c{n}"))
    assert router.place("d", 0, 14, keys[:1]).predicted_tokens > 14


def test_what_is_remembered_is_bounded() -> None:
    router = Router()
    router.join(WorkerInfo("u", Role.UNIFIED, 1, 2, 4))
    router.place("a", 0, 12, _keys("1", "2", "3"))
    router.finished("a", 0)
    assert router.place("b", 0, 12, _keys("1", "2", "3")).predicted_tokens == 12


def test_unified_alone_does_both() -> None:
    router = _router(u=Role.UNIFIED)
    placement = router.place("a", 0, 10, [])
    assert (placement.prefill, placement.decode) == (None, "u")


def test_unified_and_split_compete() -> None:
    router = _router(u=Role.UNIFIED, p=Role.PREFILL, d=Role.DECODE)
    places = [router.place(f"r{n}", 0, 100, []) for n in range(4)]
    assert {p.prefill for p in places} == {None, "p"}
    assert {p.decode for p in places if p.prefill is None} == {"u"}


@pytest.mark.parametrize(
    ("roles", "missing"),
    [({}, "prefill"), ({"p": Role.PREFILL}, "decode"), ({"d": Role.DECODE}, "prefill")],
)
def test_says_what_is_missing(roles: dict[str, Role], missing: str) -> None:
    router = _router(**roles)
    with pytest.raises(Unavailable, match=f"no {missing} worker"):
        router.place("a", 0, 10, [])
    assert router.roles() == set(roles.values())


def test_leave_and_join() -> None:
    router = _split(1, 2)
    router.place("a", 0, 10, _keys("k", "l"))
    router.leave("d0")
    router.leave("d0")
    assert router.place("b", 0, 10, []).decode == "d1"
    router.leave("p0")
    with pytest.raises(Unavailable):
        router.place("c", 0, 10, [])
    router.join(WorkerInfo("p0", Role.PREFILL, 2, 100, 4))
    assert router.place("d", 0, 10, _keys("k", "l")).predicted_tokens == 10  # its cache is new
    router.finished("a", 0)  # was on workers that are gone
    assert router._workers["p0"].prefill_tokens == 10


def test_placing_again_drops_the_earlier_placement() -> None:
    router = _split()
    router.place("a", 0, 100, [])
    router.place("a", 0, 100, [])
    router.finished("a", 0)
    _assert_zero(router)


def _assert_zero(router: Router) -> None:
    assert not router._placed
    for worker in router._workers.values():
        assert (worker.prefill_tokens, worker.context_tokens, worker.num_requests) == (0, 0, 0)


def test_books_return_to_zero() -> None:
    rng = random.Random(1)
    router = _router(
        u=Role.UNIFIED, p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE
    )
    alive: list[tuple[str, int]] = []
    for n in range(500):
        keys = _keys(*(f"{rng.randrange(3)}.{i}" for i in range(rng.randrange(5))))
        router.place(f"r{n}", n % 3, rng.randrange(1, 200), keys)
        alive.append((f"r{n}", n % 3))
        if rng.random() < 0.3:
            router.prefilled(*rng.choice(alive))
        if rng.random() < 0.6:
            router.finished(*alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.02:
            router.leave("d1")
            router.join(WorkerInfo("d1", Role.DECODE, n, 100, 4))
        assert all(w.prefill_tokens >= 0 for w in router._workers.values())
    for request in alive:
        router.finished(*request)
        router.finished(*request)
    _assert_zero(router)


def test_nothing_is_believed_of_workers_that_have_other_keys() -> None:
    router = Router()
    for name, role, key_class in (
        ("p0", Role.PREFILL, "a"),
        ("p1", Role.PREFILL, "b"),
        ("d0", Role.DECODE, "b"),
    ):
        info = WorkerInfo(name, role, 1, 100, 4, 100, keeps_blocks=True, key_class=key_class)
        router.join(info)
    keys = _keys("k", "l", "m")
    placed = [router.place(f"r{n}", 0, 12, keys, "a").prefill for n in range(2)]
    assert placed == ["p0", "p1"]
    for n in range(2):
        router.finished(f"r{n}", 0)
    assert router.stored("p0") == keys
    assert router.stored("p1") == []
    # p1 has computed the prompt as well, but under keys that nobody here knows.
    assert router.place("r3", 0, 12, keys, "b").predicted_tokens == 12
    router.finished("r3", 0)
    again = router.place("r4", 0, 12, keys, "a")
    assert (again.prefill, again.predicted_tokens, again.lender) == ("p0", 1, None)


def test_candidates_are_every_pair_and_change_nothing() -> None:
    router = _router(
        p1=Role.PREFILL, p0=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE, u=Role.UNIFIED
    )
    router.place("a", 0, 100, _keys("1", "2"))
    before = router.candidates(20, _keys("1", "2"))
    assert [each.name for each in before] == [
        "u", "p0 > d0", "p0 > d1", "p1 > d0", "p1 > d1", "d0", "d1",
    ]  # fmt: skip
    assert [each.name for each in before if not each.considered] == ["d0", "d1"]
    assert router.candidates(20, _keys("1", "2")) == before
    placement = router.place("b", 0, 20, _keys("1", "2"))
    chosen = next(
        c for c in before if (c.prefill, c.decode) == (placement.prefill, placement.decode)
    )
    assert (chosen.work, chosen.predicted) == (placement.predicted_tokens, placement.predicted)


def test_candidates_tell_what_each_would_have_to_do() -> None:
    router = _split(1, 2)
    router.place("a", 0, 100, _keys("1", "2"))
    same, other = router.candidates(20, _keys("1", "2"))[:2]
    assert (same.name, same.queue_tokens, same.prefill_tokens) == ("p0 > d0", 100, 20 - 8)
    assert (same.context_tokens, same.num_requests, same.transfer_blocks) == (100, 1, 5 - 2)
    assert (other.context_tokens, other.num_requests, other.transfer_blocks) == (0, 0, 5)


def test_seconds_follow_from_what_legs_told() -> None:
    router = _split(1, 1)
    nothing = router.place("a", 0, 40, []).predicted
    assert nothing == Predicted(queue_s=0.0)
    router.timed("p0", StageTimes("a", 0, 0, prefill_s=2.0, num_prompt_computed=40))
    router.prefilled("a", 0)
    router.timed("d0", StageTimes("a", 0, 0, import_s=0.5, decode_s=3.0, num_decoded=30))
    router.place("b", 0, 10, [])
    assert router.candidates(20, [])[0].predicted == Predicted(
        queue_s=10 * 0.05, prefill_s=20 * 0.05, transfer_s=5 * 0.05, decode_step_s=0.1
    )
    router.timed("d0", StageTimes("b", 0, 0, import_s=0.0, decode_s=3.0, num_decoded=30))
    early = router.candidates(20, [])[0].predicted
    assert early.transfer_s == pytest.approx(5 * 0.05 * (1 - RATE_WEIGHT)), "no wait counts as well"


def test_a_pinned_request_goes_where_it_is_told_while_that_is_there() -> None:
    router = Router({("a", 0): Pair("p1", "d1"), ("b", 0): Pair(None, "d0")})
    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        router.join(WorkerInfo(name, Role(role), 1, 100, 4))
    told = [router.place(name, 0, 10, []) for name in ("a", "b", "c")]
    assert [(p.prefill, p.decode) for p in told] == [("p1", "d1"), (None, "d0"), ("p0", "d0")]
    router.leave("p1")
    assert router.place("a", 0, 10, []).prefill == "p0"
    for name in ("a", "b", "c"):
        router.finished(name, 0)
    _assert_zero(router)


def test_what_was_used_last_is_remembered() -> None:
    """Against a list: new prompts, old ones, and such as begin like others, in turns."""
    rng = random.Random(5)
    router, limit = Router(), 20
    router.join(WorkerInfo("u", Role.UNIFIED, 1, limit, 4))
    model: list[bytes] = []
    evicted_a_beginning = 0
    for number in range(500):
        shared, own = rng.randrange(3), rng.randrange(8)
        names = [f"s{i}" for i in range(shared)] + [f"{own}/{i}" for i in range(rng.randrange(9))]
        keys = _keys(*names)
        hits = next((i for i, key in enumerate(keys) if key not in model), len(keys))
        evicted_a_beginning += bool(keys) and not hits and any(key in model for key in keys)
        placement = router.place(str(number), 0, 4 * len(keys) + 1, keys)
        router.finished(str(number), 0)
        assert placement.predicted_tokens == 4 * (len(keys) - hits) + 1
        model = [key for key in model if key not in keys] + keys
        del model[: max(0, len(model) - limit)]
    assert evicted_a_beginning


def test_a_worker_that_starts_anew_may_have_another_role() -> None:
    router = _router(u0=Role.UNIFIED, u1=Role.UNIFIED)
    for name, role in (("u0", Role.PREFILL), ("u1", Role.DECODE)):
        router.join(WorkerInfo(name, role, 2, 100, 4))
    assert router.roles() == {Role.PREFILL, Role.DECODE}
    placement = router.place("a", 0, 10, [])
    assert (placement.prefill, placement.decode) == ("u0", "u1")
    router.leave("u0")
    router.leave("u0")
    with pytest.raises(Unavailable, match="no prefill worker"):
        router.place("b", 0, 10, [])
