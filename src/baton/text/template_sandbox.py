"""Where chat templates run: Jinja2's immutable sandbox, with every render on a budget.

Templates come from the model directory, never from a client; messages come from clients. What
bounds what, so that no messages wedge a thread or fill the memory:

    loops, calls, macros (recursion too)    MAX_STEPS, and MAX_RENDER_S of wall time
    range()                                 jinja2.sandbox.MAX_RANGE items
    + * ~ on strings and lists              max_chars of the result
    % on strings                            widths of at most five digits
    ** and * on integers                    MAX_INT_BITS of the result
    deep recursion                          Python's recursion limit
    the output                              max_chars, checked as it is generated

Every loop's body and condition, and every call, spends one step. Filters and string methods run in
C, in time linear in data that the other bounds keep small; a template *written* to build a bomb
out of them is not stopped, only one that messages could turn into one.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
MAX_RENDER_S = 5.0
MAX_INT_BITS = 4096

_WIDE = r"(?:\d{6}|\*)"
_WIDE_FORMAT = re.compile(rf"%(?:\([^)]*\))?[-+ #0]*(?:{_WIDE}|\d*\.{_WIDE})")


class RenderLimitError(Exception):
    """A render overran its budget; the message says which part of it."""


class _Budget(threading.local):
    """What is left of the render that this thread is in."""

    steps = 0
    max_chars = 0
    deadline = 0.0


class _Generation(Extension):
    """`{% generation %}` marks training targets; for serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _SpendSteps(NodeTransformer):
    """Puts a step at the head of every loop's condition and body, and a guard on every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (jinja2's protocol)
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(nodes.EnvironmentAttribute("step"), node.test)
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("step")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        guard = nodes.EnvironmentAttribute("concatenate")
        return nodes.Call(guard, node.nodes, [], None, None).set_lineno(node.lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that the field's chat templates are written for. Safe to share by threads."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]
        self._budget = _Budget()

    def run(self, template: Any, variables: dict[str, Any], max_chars: int) -> str:
        """Render within the budget.

        Raises:
            RenderLimitError: more steps, time or characters than allowed.
            Exception: whatever the template raises.
        """
        budget = self._budget
        budget.steps, budget.max_chars = MAX_STEPS, max_chars
        budget.deadline = time.monotonic() + MAX_RENDER_S
        return "".join(self._within(template.generate(variables)))

    def _within(self, pieces: Iterator[str]) -> Iterator[str]:
        total = 0
        for piece in pieces:
            total += len(piece)
            self._check_length(total)
            yield piece

    @property
    def step(self) -> bool:
        """Spends one step. Always true, so that it can stand in a condition; a property, because
        compiled templates reach it without the cost of a sandboxed call."""
        budget = self._budget
        budget.steps -= 1
        if budget.steps < 0:
            raise RenderLimitError(f"take more than {MAX_STEPS} steps to render")
        if budget.steps % 16 == 0 and time.monotonic() > budget.deadline:
            raise RenderLimitError(f"take more than {MAX_RENDER_S:g} s to render")
        return True

    def concatenate(self, *values: Any) -> str:
        parts = [str(value) for value in values]
        self._check_length(sum(map(len, parts)))
        return "".join(parts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Jinja2's hook for every call; the odd names keep keyword arguments apart."""
        _ = __self.step
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                self._check_bits(left.bit_length() + right.bit_length())
            else:
                self._check_length(_length(left) * _count(right))
                self._check_length(_length(right) * _count(left))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * max(right, 0))
        elif operator == "+":
            self._check_length(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            # It would allocate before there is a result to measure.
            raise RenderLimitError("format text to a width of six digits or more")
        return super().call_binop(context, operator, left, right)

    def _check_length(self, length: int) -> None:
        if length > self._budget.max_chars:
            raise RenderLimitError(f"render to more than {self._budget.max_chars} characters")

    def _check_bits(self, bits: int) -> None:
        if bits > MAX_INT_BITS:
            raise RenderLimitError(f"compute with integers of more than {MAX_INT_BITS} bits")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        _SpendSteps().visit(parsed)
        return parsed.set_environment(self)  # type: ignore[return-value]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _count(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja2's HTML escapes, and with non-ASCII text as it is."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
