from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_fixtures import Target, ToyModel, serve, toy_model, toy_model_dir
from integration.runs import NUM_STREAMS, Run, run_mixed_prompts, run_streams
from numerics.checkpoints import make_served_checkpoint
from numerics.tiny_models import reference_model

from baton.gateway.app import create_app
from baton.gateway.limits import Limits
from baton.observe.metrics import Metrics
from baton.text.chat_template import ChatTemplate


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_dir(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy_target(toy_dir: Path) -> Iterator[tuple[Target, ToyModel]]:
    tokenizer, dispatcher = toy_model(toy_dir)
    limits = Limits(max_body_bytes=1 << 20)
    app = create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_dir(toy_dir),
        model_name="org/toy",
        metrics=Metrics(),
        limits=limits,
    )
    served = dispatcher.model()
    assert served is not None
    with serve(app) as root:
        yield (
            Target(root, "org/toy", served.max_model_len, served.vocab_size, limits.max_body_bytes),
            dispatcher,
        )


@pytest.fixture(scope="session")
def target(toy_target: tuple[Target, ToyModel]) -> Target:
    """The gateway that the suites over HTTP run against."""
    return toy_target[0]


@pytest.fixture(scope="session")
def num_running(toy_target: tuple[Target, ToyModel]) -> Callable[[], int]:
    """How many choices the workers behind `target` are busy with."""
    return lambda: toy_target[1].num_running


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama in fp32 that can be served, with one token a byte."""
    return make_served_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_reference(tiny_llama: Path) -> Any:
    """`tiny_llama` as transformers runs it."""
    return reference_model(tiny_llama)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model of this repository."""
    return Path(__file__).parents[2] / "models" / "baton-demo"


@pytest.fixture(scope="session")
def mixed_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of mixed prompts on a layout; each layout runs once, whoever asks first."""

    @functools.cache
    def run(layout: str) -> Run:
        return run_mixed_prompts(tiny_llama, layout, tmp_path_factory.mktemp(f"log{layout}"))

    return run


@pytest.fixture(scope="session")
def stream_run(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """200 questions that the demo model knows, streamed at once."""
    with gzip.open(demo_model / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    chosen = questions[:: len(questions) // NUM_STREAMS][:NUM_STREAMS]
    return run_streams(demo_model, chosen, tmp_path_factory.mktemp("log200"))
