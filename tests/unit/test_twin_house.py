"""The twin decides nothing itself: its policy objects are those that the server runs.

Read off the source. A class of the twin may drive a scheduler, but neither be one nor look like
one, and nothing of core may be replaced from outside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "baton"

POLICIES = {
    "Scheduler": "baton.core.scheduler",
    "StoreIndex": "baton.core.store_index",
    "LeaseTable": "baton.core.lease",
    "Router": "baton.core.router",
    "RequestTable": "baton.core.handoff",
}
"""What the twin and the server both make, and where both must have it from."""

SERVER = ("engine", "worker", "gateway")

DECISIONS = {
    "schedule", "admit", "preempt", "evict", "allocate", "acquire", "publish", "lookup", "place",
    "route", "choose", "reserve", "unreserve", "hold", "unhold", "mint", "cover", "expire",
    "sealed", "handed_off", "delivered", "rank", "grow", "steady_steps",
}  # fmt: skip
"""Methods by which core's policies are known; a class of the twin has none of them."""

WORDS = ("scheduler", "router", "allocator", "pool", "evict", "preempt", "admission")
"""What no class or function of the twin is called, in whole or in part."""


def _trees(room: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(room.rglob("*.py")):
        yield str(path.relative_to(room.parent)), ast.parse(path.read_text(), str(path))


def _imported(trees: Iterator[tuple[str, ast.Module]]) -> dict[str, set[str]]:
    """Name -> modules from which it is imported."""
    found: dict[str, set[str]] = {}
    for _, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found.setdefault(alias.name, set()).add(node.module or "")
    return found


def other_classes(root: Path) -> list[str]:
    """Policies that the twin does not have from where the server has them."""
    twin = _imported(_trees(root / "twin"))
    server = _imported(tree for room in SERVER for tree in _trees(root / room))
    wrong = []
    for name, module in POLICIES.items():
        if twin.get(name) != {module}:
            wrong.append(f"the twin has {name} from {sorted(twin.get(name, ()))}")
        if server.get(name) != {module}:
            wrong.append(f"the server has {name} from {sorted(server.get(name, ()))}")
    return wrong


def own_policies(room: Path) -> list[str]:
    """Whatever in the twin is, extends, imitates or replaces a policy."""
    wrong = []
    for name, tree in _trees(room):
        core = _from_core(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                wrong += [f"{name}: {each}" for each in _wrong_class(node, core)]
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(word in node.name.lower() for word in WORDS):
                    wrong.append(f"{name}: {node.name} sounds like a policy")
            elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    owner = target.value if isinstance(target, ast.Attribute) else None
                    if isinstance(owner, ast.Name) and owner.id in core:
                        wrong.append(f"{name}: replaces {ast.unparse(target)}")
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "setattr" or (called == "type" and len(node.args) == 3):
                    wrong.append(f"{name}: {called} at line {node.lineno}")
    return wrong


def _from_core(tree: ast.Module) -> set[str]:
    """Names in this file that belong to core."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("baton.core")
        for alias in node.names
    }


def _wrong_class(node: ast.ClassDef, core: set[str]) -> list[str]:
    wrong = []
    if any(word in node.name.lower() for word in WORDS):
        wrong.append(f"class {node.name} sounds like a policy")
    wrong += [
        f"class {node.name} extends {ast.unparse(base)}"
        for base in node.bases
        if ast.unparse(base).split(".")[0] in core
    ]
    is_protocol = any(ast.unparse(base) == "Protocol" for base in node.bases)
    methods = {each.name.lstrip("_") for each in node.body if isinstance(each, ast.FunctionDef)}
    if not is_protocol:
        wrong += [f"class {node.name} decides: {m}" for m in sorted(methods & DECISIONS)]
    return wrong


def test_the_twin_runs_the_servers_classes() -> None:
    assert other_classes(SOURCE) == []


def test_the_twin_has_no_policy_of_its_own() -> None:
    assert own_policies(SOURCE / "twin") == []


@pytest.mark.parametrize(
    "text",
    [
        "class FastScheduler:\n  pass",
        "class Batcher:\n  def schedule(self): ...",
        "class Batcher:\n  def _admit(self): ...",
        "class Chooser:\n  def place(self, keys): ...",
        "class Blocks:\n  def allocate(self, n): ...",
        "from baton.core.scheduler import Scheduler\nclass Quick(Scheduler):\n  pass",
        "from baton.core import router as r\nclass Quick(r.Router):\n  pass",
        "from baton.core.scheduler import Scheduler\nScheduler._admit = lambda *a: True",
        "from baton.core import prompt_order\nsetattr(prompt_order, 'rank', min)",
        "def evict_oldest(blocks): ...",
        "from baton.core.router import Router\nQuick = type('Quick', (Router,), {})",
    ],
)
def test_finds_a_policy(tmp_path: Path, text: str) -> None:
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "node.py").write_text(text)
    assert own_policies(tmp_path / "twin")


def test_finds_another_class(tmp_path: Path) -> None:
    for room in ("twin", *SERVER):
        (tmp_path / room).mkdir()
    imports = "\n".join(f"from {module} import {name}" for name, module in POLICIES.items())
    (tmp_path / "engine" / "build.py").write_text(imports)
    (tmp_path / "twin" / "node.py").write_text(imports)
    assert other_classes(tmp_path) == []
    (tmp_path / "twin" / "node.py").write_text(imports.replace("core.router", "twin.router"))
    assert other_classes(tmp_path)
    (tmp_path / "twin" / "node.py").write_text(imports)
    (tmp_path / "engine" / "build.py").write_text(imports.replace("core.lease", "core.lease2"))
    assert other_classes(tmp_path)
