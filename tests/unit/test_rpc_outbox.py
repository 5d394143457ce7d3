from baton.rpc.outbox import Outbox


def test_numbers_keeps_and_drops() -> None:
    box = Outbox()
    assert (box.last, box.can_resume_after(0), box.can_resume_after(1)) == (0, True, False)
    for i in range(1, 6):
        box.append(bytes([i]) * i)
    assert (box.last, len(box), box.num_bytes) == (5, 5, 15)
    assert box.after(3) == [b"\4" * 4, b"\5" * 5]
    assert box.after(0, limit=2) == [b"\1", b"\2\2"]
    box.drop_through(2)
    box.drop_through(1)
    assert (box.last, len(box), box.num_bytes) == (5, 3, 12)
    assert [box.can_resume_after(i) for i in range(-1, 7)] == [False] * 3 + [True] * 4 + [False]
    assert box.after(0) == box.after(2)
    box.drop_through(99)
    assert (box.last, len(box), box.num_bytes, box.after(0)) == (5, 0, 0, [])
    box.append(b"six")
    assert (box.last, box.after(5)) == (6, [b"six"])
