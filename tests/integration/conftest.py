from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_fixtures import Target, ToyModel, serve, toy_model, toy_model_dir

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
