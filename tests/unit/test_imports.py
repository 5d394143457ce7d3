"""The house rules that can be read off the source: who may import whom, and what nobody may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "baton"

RANKS = {
    "__main__": 7,
    "cli": 6,
    "launch": 6,
    "worker": 5,
    "gateway": 5,
    "planner": 5,
    "engine": 4,
    "twin": 4,
    "model": 3,
    "fabric": 3,
    "rpc": 3,
    "text": 3,
    "observe": 3,
    "core": 2,
    "types": 1,
    "errors": 1,
    "config": 1,
    "model_spec": 1,
}
WITHOUT_TORCH = {"core", "text", "gateway", "planner", "twin"}
# The gateway's own protocol module is all that the supervisor and the CLI may see of it, and so
# on: within one rank rooms do not know each other, except the two at the top.
NEIGHBOURS = {("cli", "launch"), ("errors", "types"), ("types", "errors"), ("config", "errors")}
NEIGHBOURS |= {("config", "types"), ("model_spec", "errors"), ("model_spec", "types")}
BANNED_MODULES = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "_pickle"}
BANNED_CALLS = {"eval", "exec"}


@cache
def _files(root: Path) -> list[tuple[str, Path, ast.Module]]:
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path, ast.parse(path.read_text(), str(path))))
    return found


def _is_for_types(node: ast.AST) -> bool:
    test = getattr(node, "test", None)
    name = getattr(test, "id", None) or getattr(test, "attr", None)
    return isinstance(node, ast.If) and name == "TYPE_CHECKING"


def _imports(name: str, is_package: bool, tree: ast.AST, lazy: bool = True) -> Iterator[str]:
    """Every module that is imported in the file, except for type checkers only.

    Without `lazy`, only what is imported together with the module itself.
    """
    for node in ast.iter_child_nodes(tree):
        if _is_for_types(node):
            continue
        if not lazy and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from _imports(name, is_package, node, lazy)


@cache
def _graph(root: Path, lazy: bool = True) -> dict[str, set[str]]:
    """Module -> what it imports; only names of modules that exist, for our own."""
    found = _files(root)
    ours = {name for name, _, _ in found}
    graph = {}
    for name, path, tree in found:
        imported = set(_imports(name, path.stem == "__init__", tree, lazy))
        graph[name] = {m for m in imported if m in ours or m.split(".")[0] != "baton"}
    return graph


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def upward_imports(root: Path) -> list[str]:
    """Imports that do not point down."""
    wrong = []
    for name, imported in _graph(root).items():
        for other in sorted(imported):
            here, there = _room(name), _room(other)
            if other.split(".")[0] != "baton" or not here or not there or here == there:
                continue
            if here not in RANKS or there not in RANKS:
                wrong.append(f"{name} -> {other}: a room without a place in the house")
            elif RANKS[there] >= RANKS[here] and (here, there) not in NEIGHBOURS:
                wrong.append(f"{name} -> {other}")
    return wrong


def torch_imports(root: Path) -> list[str]:
    """Ways from a room that must do without torch to torch, as chains of modules.

    These rooms do not import it anywhere; what they import may do so later, within a function.
    """
    everywhere, graph = _graph(root), _graph(root, lazy=False)
    wrong = []
    for start in graph:
        if _room(start) not in WITHOUT_TORCH:
            continue
        direct = {m for m in everywhere[start] if m.split(".")[0] == "torch"}
        wrong += [f"{start} -> {m}" for m in sorted(direct)]
        parts = start.split(".")
        chains = {".".join(parts[: i + 1]): [start] for i in range(len(parts))}
        queue = list(chains)
        while queue:
            name = queue.pop(0)
            for other in sorted(graph.get(name, ())):
                if other.split(".")[0] == "torch":
                    wrong.append(" -> ".join([*chains[name], other]))
                # Importing a.b.c runs a and a.b first.
                parts = other.split(".")
                for parent in (".".join(parts[: i + 1]) for i in range(len(parts))):
                    if parent in graph and parent not in chains:
                        chains[parent] = [*chains[name], parent]
                        queue.append(parent)
    return wrong


def reaches_inside(root: Path) -> list[str]:
    """Private fields and methods of core that are used through another object than their own."""
    return [
        f"{name}:{node.lineno} uses {ast.unparse(node)}"
        for name, _, tree in _files(root)
        if _room(name) == "core"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]


def banned(root: Path) -> list[str]:
    """Unsafe modules and calls."""
    wrong = []
    for name, path, tree in _files(root):
        for module in _imports(name, path.stem == "__init__", tree):
            if BANNED_MODULES & set(module.split(".")) or module == "torch.load":
                wrong += [f"{name} imports {module}"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{name}:{node.lineno} uses torch.load")
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                wrong.append(f"{name}:{node.lineno} calls {node.func.id}")
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "shell" and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    wrong.append(f"{name}:{node.lineno} runs a shell")
    return wrong


def test_there_is_something_to_read() -> None:
    assert len(_graph(SOURCE)) > 20


def test_imports_point_down() -> None:
    assert upward_imports(SOURCE) == []


def test_policy_imports_without_torch() -> None:
    assert torch_imports(SOURCE) == []


def test_core_keeps_to_public_names() -> None:
    assert reaches_inside(SOURCE) == []


def test_nothing_unsafe() -> None:
    assert banned(SOURCE) == []


def _tree(root: Path, files: dict[str, str]) -> Path:
    package = root / "baton"
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"core/a.py": "from baton.engine import x", "engine/__init__.py": ""}, 1),
        ({"core/a.py": "from baton import engine", "engine/__init__.py": ""}, 1),
        ({"core/a.py": "from ..engine import x", "engine/__init__.py": ""}, 1),
        ({"core/a.py": "def f():\n  import baton.worker.b", "worker/b.py": ""}, 1),
        ({"rpc/a.py": "import baton.fabric.b", "fabric/b.py": ""}, 1),
        ({"gateway/a.py": "import baton.worker.b", "worker/b.py": ""}, 1),
        ({"cellar/a.py": "import baton.core.b", "core/b.py": ""}, 1),
        ({"engine/a.py": "import baton.core.b", "core/b.py": "from baton.core import c"}, 0),
        (
            {
                "core/a.py": "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n  import baton.engine.b",
                "engine/b.py": "",
            },
            0,
        ),
    ],
)
def test_finds_upward_imports(tmp_path: Path, files: dict[str, str], wrong: int) -> None:
    assert len(upward_imports(_tree(tmp_path, files))) == wrong


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"core/a.py": "import torch"}, 1),
        ({"gateway/a.py": "def f():\n  from torch.nn import functional"}, 1),
        ({"text/a.py": "from baton.fabric import b", "fabric/b.py": "import torch"}, 1),
        (
            {
                "text/a.py": "from baton.fabric.b import c",
                "fabric/__init__.py": "import torch",
                "fabric/b.py": "",
            },
            1,
        ),
        (
            {
                "core/a.py": "x = 1",
                "__init__.py": "from baton.model import b",
                "model/b.py": "import torch",
            },
            1,
        ),
        (
            {
                "core/a.py": "x = 1",
                "__init__.py": "def f():\n  from baton.model import b",
                "model/b.py": "import torch",
            },
            0,
        ),
        ({"model/a.py": "import torch", "core/b.py": "import msgspec"}, 0),
    ],
)
def test_finds_torch(tmp_path: Path, files: dict[str, str], wrong: int) -> None:
    found = torch_imports(_tree(tmp_path, files))
    assert (len(found) > 0) == bool(wrong), found


def test_finds_what_reaches_inside(tmp_path: Path) -> None:
    text = "def f(pool, own):\n  pool._refs[0] = 1\n  own.pool._take()\n"
    own = "class A:\n  def f(self):\n    return self._x + self.__class__.__name__\n"
    tree = _tree(tmp_path, {"core/a.py": text, "core/b.py": own, "rpc/c.py": text})
    where = [each.split(" ")[0] for each in reaches_inside(tree)]
    assert where == ["baton.core.a:2", "baton.core.a:3"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.reduction, marshal",
        "def f():\n  import cloudpickle as c",
        "import shelve",
        "eval('1')",
        "x = exec('1')",
        "import torch\ntorch.load('f')",
        "from torch import load",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=bool(1))",
    ],
)
def test_finds_unsafe(tmp_path: Path, text: str) -> None:
    assert banned(_tree(tmp_path, {"rpc/a.py": text}))


def test_safe_is_not_reported(tmp_path: Path) -> None:
    text = "import json\nmodel.eval()\njson.load(f)\nrun(['ls'], shell=False)\n"
    assert banned(_tree(tmp_path, {"rpc/a.py": text})) == []
