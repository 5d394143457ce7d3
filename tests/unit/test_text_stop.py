"""StopMatcher: what it emits depends on the text alone, never on how the text was cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.text.stop import StopMatcher


def by_definition(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The module's rule, written down naively: first end, then longest."""
    for end in range(1, len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def held_by_definition(text: str, stop: tuple[str, ...]) -> int:
    """The longest suffix of `text` that begins a stop string."""
    lengths = [
        size for string in stop for size in range(len(string)) if text.endswith(string[:size])
    ]
    return max(lengths, default=0)


def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=len(text) + 1)))
    edges = [0, *cuts, len(text)]
    return [text[low:high] for low, high in itertools.pairwise(edges)]


# Few letters, so that overlaps, nested and self-overlapping stops are the rule.
letters = st.sampled_from("ab")
stops = st.lists(st.text(letters, min_size=1, max_size=5), max_size=4).map(tuple)
unicode_stops = st.lists(st.text("日😀e\u0301\n", min_size=1, max_size=3), max_size=3).map(tuple)


@settings(deadline=None, max_examples=1000)
@given(st.data(), st.booleans())
def test_any_cut_gives_what_the_rule_gives_for_the_whole(data, include):
    if data.draw(st.booleans()):
        stop, text = data.draw(stops), data.draw(st.text(letters, max_size=25))
    else:
        stop, text = data.draw(unicode_stops), data.draw(st.text("日😀e\u0301\n", max_size=20))
    matcher = StopMatcher(stop, include)
    emitted, matched = "", None
    for piece in pieces_of(data.draw, text):
        more, matched = matcher.push(piece)
        emitted += more
        assert matcher.matched == matched
    emitted += matcher.flush()
    assert (emitted, matched) == by_definition(text, stop, include)


@settings(deadline=None, max_examples=500)
@given(stops, st.text(letters, max_size=25))
def test_no_more_is_held_back_than_must_be(stop, text):
    matcher = StopMatcher(stop)
    emitted = ""
    for end, char in enumerate(text, 1):
        more, matched = matcher.push(char)
        emitted += more
        if matched is not None:
            break
        assert emitted == text[: end - held_by_definition(text[:end], stop)]


def test_without_stop_strings_text_passes_at_once():
    matcher = StopMatcher(())
    assert matcher.push("any text") == ("any text", None)
    assert matcher.flush() == ""


def test_a_stop_across_pushes():
    matcher = StopMatcher(("\n\nHuman:",))
    assert matcher.push("Yes.\n") == ("Yes.", None)
    assert matcher.push("\n") == ("", None)
    assert matcher.push("Hum") == ("", None)
    assert matcher.push("an: and more") == ("", "\n\nHuman:")
    assert matcher.push("ignored") == ("", "\n\nHuman:")
    assert matcher.flush() == ""


def test_a_false_start_is_released():
    matcher = StopMatcher(("STOP",))
    assert matcher.push("a ST") == ("a ", None)
    assert matcher.push("ST") == ("ST", None)
    assert matcher.push("UB") == ("STUB", None)
    assert matcher.push("S") == ("", None)
    assert matcher.flush() == "S"
    assert matcher.flush() == ""


def test_first_end_wins_and_then_the_longest():
    assert StopMatcher(("abcd", "bc")).push("xabcd") == ("xa", "bc")
    assert StopMatcher(("bc", "abc")).push("xabcd") == ("x", "abc")
    assert StopMatcher(("abc", "ab")).push("xabcd") == ("x", "ab")


def test_include_stop():
    matcher = StopMatcher(("</s>",), include_stop=True)
    assert matcher.push("end<") == ("end", None)
    assert matcher.push("/s>tail") == ("</s>", "</s>")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(("a", ""))
    assert caught.value.param == "stop"


def test_work_per_character_is_constant_on_text_that_keeps_almost_matching():
    """A count, not a clock: steps along failure links are paid for by earlier matches."""
    steps = 0

    class Counted(dict):  # type: ignore[type-arg]
        def get(self, *args):
            nonlocal steps
            steps += 1
            return super().get(*args)

    stop = "a" * 200 + "b"
    matcher = StopMatcher((stop,))
    todo = [matcher._root]
    while todo:
        state = todo.pop()
        todo.extend(state.next.values())
        state.next = Counted(state.next)
    text = ("a" * 199 + "c") * 20
    emitted = "".join(matcher.push(char)[0] for char in text) + matcher.flush()
    assert emitted == text
    assert steps <= 3 * len(text)
