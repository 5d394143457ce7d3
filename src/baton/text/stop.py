"""Stop strings in a stream.

Which match counts: the one that *ends* first, and of those that end at the same character the
longest. That is what a generation that looked at its text after every character would stop at, so
it depends neither on how the text was cut into pushes nor on text after the match, and nobody has
to generate on in order to decide. (The leftmost *start* would need that: with stops `abcd` and
`bc`, `abc` must not wait for a `d`.) Emission is the text before the match, with the match if
`include_stop`.

The matcher is an Aho-Corasick automaton over all stop strings. The depth of its state is the
length of the longest suffix of the text that begins a stop string: exactly what is held back.
A push costs O(1) amortised a character.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from baton.errors import InvalidRequest


class _State:
    """One prefix of a stop string. `match`: the longest stop string that ends here."""

    __slots__ = ("depth", "fail", "match", "next")

    def __init__(self, depth: int) -> None:
        self.next: dict[str, _State] = {}
        self.fail: _State | None = None  # only the root has none
        self.depth = depth
        self.match: str | None = None


def _build(stop: Iterable[str]) -> _State:
    root = _State(0)
    for string in stop:
        state = root
        for char in string:
            state = state.next.setdefault(char, _State(state.depth + 1))
        state.match = string
    queue = deque([root])
    while queue:
        state = queue.popleft()
        for char, child in state.next.items():
            child.fail = root if state is root else _step(state.fail or root, char)
            child.match = child.match or child.fail.match
            queue.append(child)
    return root


def _step(state: _State, char: str) -> _State:
    while True:
        if (child := state.next.get(char)) is not None:
            return child
        if state.fail is None:
            return state
        state = state.fail


class StopMatcher:
    """Looks for stop strings in one choice's text. Owns the held-back text."""

    def __init__(self, stop: tuple[str, ...], include_stop: bool = False) -> None:
        """Raises:
        InvalidRequest: an empty stop string (`param` is `stop`).
        """
        if "" in stop:
            raise InvalidRequest("a stop string must not be empty", stage="validate", param="stop")
        self._state = _build(stop)
        self._root = self._state
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown now, the stop string that ended the text or None).

        After a match everything is swallowed and the same stop string is returned again.
        """
        if self.matched is not None:
            return "", self.matched
        state = self._state
        for index, char in enumerate(text):
            state = _step(state, char)
            if state.match is not None:
                self.matched = state.match
                seen = self._held + text[: index + 1]
                self._held = ""
                end = len(seen) if self._include_stop else len(seen) - len(state.match)
                return seen[:end], state.match
        self._state = state
        seen = self._held + text
        shown = len(seen) - state.depth
        self._held = seen[shown:]
        return seen[:shown], None

    def flush(self) -> str:
        """The held-back text, at an end without a match; empty after a match."""
        held, self._held = self._held, ""
        self._state = self._root
        return held
