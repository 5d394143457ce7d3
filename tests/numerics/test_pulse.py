"""The sign of life of a real engine: it moves layer by layer, and says what is being done."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from numerics.checkpoints import make_served_checkpoint
from numerics.native_kernels import kernels_named

from baton.config import load_config
from baton.core.step_times import UNKNOWN_STEP_S
from baton.engine.build import build_engine
from baton.engine.engine import Engine
from baton.engine.inbox import Renew, Submit
from baton.engine.loop import EngineLoop
from baton.model.transformer import Transformer
from baton.types import Pulse, Request, SamplingParams

NUM_LAYERS = 3
IDS = (("a", 0, 0), ("b", 0, 0))


def make(tmp_path: Path, kernels: str) -> Engine:
    if kernels == "native":
        kernels_named("native")
    torch.set_num_threads(1)
    path = make_served_checkpoint(tmp_path / "model", "llama")
    options = {"model.path": str(path), "engine.kernels": kernels, "engine.num_kv_blocks": "64"}
    config = load_config(None, {**options, "engine.threads": "1"})
    secret = bytes(32)
    built = build_engine(
        config, path, lambda news: None, worker_id="w", epoch=1, lease_secret=secret
    )
    assert built.engine.pulse() == Pulse()
    return built.engine


def submit(engine: Engine) -> None:
    for name, _, _ in IDS:
        sampling = SamplingParams(4, temperature=0.0)
        engine.inbox.put(Submit(Request(name, (5, 6, 7, 8), sampling)))


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_it_moves_with_every_layer(tmp_path: Path, kernels: str) -> None:
    engine = make(tmp_path, kernels)
    layers = engine._runner.progress
    engine.step()
    assert engine.progress == layers, "nothing is to do"
    submit(engine)
    assert engine.step()
    assert engine._runner.progress - layers == NUM_LAYERS
    assert engine.progress >= NUM_LAYERS + len(IDS), "messages move it too"
    moves = engine.progress
    engine.inbox.put(Renew(("nobody's",)))
    engine.wait()
    assert engine.progress == moves + 1


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_within_a_step_it_says_what_is_being_done(
    tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked from another thread, while the engine's hangs in the forward pass."""
    engine = make(tmp_path, kernels)
    hangs, goes_on = threading.Event(), threading.Event()
    forward = Transformer.forward

    def slow(self: Transformer, *args: object) -> object:
        hangs.set()
        assert goes_on.wait(30)
        return forward(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "forward", slow)
    loop = EngineLoop(engine, lambda error: None)
    submit(engine)
    loop.start()
    assert hangs.wait(30)
    pulse = engine.pulse()
    assert pulse.predicted_s == UNKNOWN_STEP_S, "the first step of all"
    assert engine.pulse().progress == pulse.progress
    assert engine.batch() == IDS
    goes_on.set()
    while engine.pulse().is_working or engine.scheduler.num_sequences:
        time.sleep(0.005)
    assert engine.batch() == ()
    assert engine.pulse().predicted_s < UNKNOWN_STEP_S
    loop.stop()


def test_a_step_that_fails_has_named_who_was_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tmp_path, "torch")

    def fail(self: Transformer, *_: object) -> object:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(Transformer, "forward", fail)
    submit(engine)
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.batch() == IDS
