"""What befalls a deployment on request: `kill:decode-0@30`, `freeze:prefill-0@30+5`, `slow:…`."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from baton.errors import ConfigError

Kind = Literal["kill", "freeze", "slow"]

_FORM = re.compile(
    r"(?P<kind>kill|freeze|slow):(?P<worker>[^@:]+)@(?P<at>\d+(?:\.\d+)?)"
    r"(?:\+(?P<for>\d+(?:\.\d+)?))?(?:x(?P<factor>\d+(?:\.\d+)?))?"
)


class Failure(msgspec.Struct, frozen=True):
    """kill: the process ends, and is started again. freeze: it stands still for `for_s`.

    slow: for `for_s` the links of its host have `factor` of their bandwidth.
    """

    kind: Kind
    worker_id: str
    at_s: float
    for_s: float = 0.0
    factor: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Failure:
        """Read `kill:WORKER@SECONDS`, `freeze:WORKER@SECONDS+DURATION` or
        `slow:WORKER@SECONDS+DURATIONxFACTOR`.

        Raises:
            ConfigError: it states the grammar.
        """
        match = _FORM.fullmatch(text.strip())
        wants = {"kill": (False, False), "freeze": (True, False), "slow": (True, True)}
        given = match and (match["for"] is not None, match["factor"] is not None)
        if match is None or given != wants[match["kind"]]:
            raise ConfigError(
                f"--fail {text!r}: write kill:WORKER@SECONDS, freeze:WORKER@SECONDS+DURATION or "
                "slow:WORKER@SECONDS+DURATIONxFACTOR, such as slow:decode-0@30+10x0.1"
            )
        kind: Kind = match["kind"]  # type: ignore[assignment]
        numbers = float(match["at"]), float(match["for"] or 0), float(match["factor"] or 1)
        return cls(kind, match["worker"], *numbers)
