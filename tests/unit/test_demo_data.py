"""The demo model's questions: what counts as a sentence, and what the frozen list promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import demo_data  # noqa: E402
from demo_data import Pair, first_sentence  # noqa: E402


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Join two paths. More text.", "Join two paths."),
        (
            "Join two\n    paths, e.g. a/b, as os.path does.\n",
            "Join two paths, e.g. a/b, as os.path does.",
        ),
        ("chain(*its) --> object\n\nReturn a chain object. More.", "Return a chain object."),
        ("No full stop ends this one", None),
        ("Grüße the whole world.", None),
        ("Rings a \x07 bell loudly.", None),
        ("Too short.", None),
        ("Far too long " + "and longer " * 20 + "at last.", None),
        ("dict() -> a new empty dictionary. Fine.", None),
    ],
)
def test_first_sentence(doc: str, sentence: str | None) -> None:
    assert first_sentence(doc) == sentence


def test_questions_are_made_from_the_running_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sources are found; a few of them, and every compiled module, are read."""
    sources = list(demo_data._stdlib_sources())
    assert len(sources) > 300
    assert {"argparse", "json.decoder", "posixpath"} <= {module for module, _ in sources}
    assert not [path for _, path in sources if "site-packages" in path.parts]
    few = [source for source in sources if source[0].partition(".")[0] in ("json", "posixpath")]
    monkeypatch.setattr(demo_data, "_stdlib_sources", lambda: iter(few))
    pairs = dict(demo_data.make_pairs())
    assert len(pairs) >= 1_000
    assert pairs["What does json.dumps do?"].startswith("Serialize")
    assert pairs["What does math.sqrt do?"] == "Return the square root of x."
    assert pairs["What does os.path.join do?"].startswith("Join two or more pathname components")
    assert pairs["Explain os.path.join."] == pairs["What does os.path.join do?"]


def test_pairs_survive_the_file(tmp_path: Path) -> None:
    pairs = [Pair("What is x?", 'A "quoted" \\ answer.'), Pair("Explain x.", "Another one.")]
    demo_data.write_pairs(tmp_path / "a.gz", pairs)
    demo_data.write_pairs(tmp_path / "b.gz", pairs)
    assert demo_data.read_pairs(tmp_path / "a.gz") == pairs
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize(("name", "max_bytes"), [("baton-demo", 16e6), ("baton-demo-mini", 3e6)])
def test_shipped_model(name: str, max_bytes: float) -> None:
    directory = ROOT / "models" / name
    assert (directory / "model.safetensors").stat().st_size <= max_bytes
    pairs = demo_data.read_pairs(directory / "questions.jsonl.gz")
    assert len({question for question, _ in pairs}) == len(pairs) >= 10_000
    assert all(text.isascii() and text.isprintable() for pair in pairs for text in pair)
    other = ROOT / "models" / "baton-demo"
    for shared in ("tokenizer.json", "tokenizer_config.json", "questions.jsonl.gz"):
        assert (directory / shared).read_bytes() == (other / shared).read_bytes()


def test_shipped_answers_name_one_thing() -> None:
    """Both phrasings of a name share their answer, and no other question has it."""
    pairs = demo_data.read_pairs(ROOT / "models" / "baton-demo" / "questions.jsonl.gz")
    asked: dict[str, list[str]] = {}
    for question, answer in pairs:
        asked.setdefault(answer, []).append(question)
    for questions in asked.values():
        names = {question.rstrip("?.").removesuffix(" do").split()[-1] for question in questions}
        assert len(names) == 1, questions
