"""`baton profile` for real: its file, and what telling a gateway of steps takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from baton.core.cost import Profile
from baton.core.plan import Update
from baton.core.step_cost import ChunkShape, StepShape
from baton.engine.engine import Emitted
from baton.types import TokenDelta, WorkerLoad
from baton.worker.telling import READER, telling

DEMO = Path(__file__).parents[2] / "models" / "baton-demo"
NUM_STEPS = 400


def test_a_profile_of_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    words = [sys.executable, "-m", "baton", "profile", "--model", str(DEMO)]
    words += ["--seconds", "2", "--threads", "1", "--engine.max-num-seqs", "16", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    profile = Profile.from_json(out.read_bytes())
    assert profile.measured and profile.engine == "baton"
    cost = profile.cost()
    one, many = (StepShape.of((ChunkShape(1, 200, True),) * num) for num in (1, 16))
    extra = [each.extra_s for each in profile.rests]
    assert len(extra) == 4 and extra == sorted(extra) and extra[0] >= 0.0
    assert 1e-5 < cost.step_s(one) < cost.step_s(many) < 1.0


def test_telling_takes_what_a_real_stream_takes() -> None:
    """More tokens take more; and all of it is read, by somebody who lets go of it at the end."""
    with telling() as outside:
        few, many = (_cpu_s_a_step(outside.told, outside.cpu_s, num) for num in (1, 1000))
        assert outside.server.gateways() == [READER]
    assert 3e-5 < few < many < 0.05, (few, many)


def _cpu_s_a_step(told: object, cpu_s: object, num_seqs: int) -> float:
    assert callable(told) and callable(cpu_s)
    deltas = [TokenDelta(f"request-{number}", 0, 0, 5, (17,)) for number in range(num_seqs)]
    counters = {f"counter_{number}": number for number in range(30)}
    before = cpu_s()
    for _ in range(NUM_STEPS):
        told(Emitted(Update(deltas=deltas), WorkerLoad(), counters, False))
        time.sleep(0.001)
    return float(cpu_s() - before) / NUM_STEPS
