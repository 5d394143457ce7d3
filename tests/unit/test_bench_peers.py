"""The arithmetic of `bench/peers.py`: least costs, roofline, medians of ratios."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import peers
import pytest
from parts.peers import cells, child, engines, servers, table

from baton.model_spec import ModelSpec, RopeSpec

BENCH = Path(__file__).parents[2] / "bench"

HALF = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=32_000, hidden_size=1536, intermediate_size=4096,
    num_layers=16, num_heads=24, num_kv_heads=8, head_dim=64, max_position=8192,
    rms_norm_eps=1e-5, rope=RopeSpec(), qk_norm=False, qkv_bias=False, o_bias=False,
    mlp_bias=False, sliding_window=(None,) * 16, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
WINDOW = table.Window(50e9, 900e9, 1000e9)


def result(engine, seconds, number=0, cell=None, window=WINDOW, summed=False):
    return table.Result(engine, cell or cells.decode(1), number, seconds, window, summed)


class TestCost:
    def test_a_decode_step_reads_all_weights_but_the_embedding(self) -> None:
        """904 MB is what `num_parameters` leaves without embedding and norms."""
        weights = HALF.num_parameters() - 32_000 * 1536 - 33 * 1536
        kv = (128 + 16) * HALF.kv_bytes_per_token()
        assert cells.cost(cells.decode(1), HALF).bytes == 2 * weights + kv

    def test_context_costs_its_kv_bytes(self) -> None:
        short, long = (cells.cost(cells.decode(8, c), HALF) for c in (128, 4096))
        assert long.bytes - short.bytes == 8 * (4096 - 128) * HALF.kv_bytes_per_token()

    def test_a_batch_multiplies_the_arithmetic(self) -> None:
        one, many = (cells.cost(cells.decode(b), HALF) for b in (1, 32))
        assert many.flops == 32 * one.flops

    def test_a_prefill_projects_the_last_token_only(self) -> None:
        head = 32_000 * 1536
        layers = HALF.num_parameters() - 2 * head - 33 * 1536
        attention = 4 * 16 * 24 * 64 * 512**2 / 2
        expected = 2 * (512 * layers + head) + attention
        assert cells.cost(cells.prefill(512), HALF).flops == expected

    def test_mixed_is_its_steps_and_its_prompts(self) -> None:
        step = cells.cost(cells.decode(32), HALF)
        prompt = cells.cost(cells.prefill(512), HALF)
        found = cells.cost(cells.MIXED, HALF)
        assert found.flops == 32 * step.flops + 4 * prompt.flops
        assert found.bytes == 32 * step.bytes

    def test_the_floor_is_the_larger_time(self) -> None:
        assert cells.Cost(bytes=100.0, flops=10.0).floor_s(10.0, 10.0) == 10.0
        assert cells.Cost(bytes=100.0, flops=1000.0).floor_s(10.0, 10.0) == 100.0


class TestTable:
    def test_the_share_is_least_time_over_time(self) -> None:
        cost = cells.Cost(bytes=1e9, flops=1.0)
        assert table.roofline_share(result("baton", 0.04), cost) == pytest.approx(0.5)

    def test_the_peak_is_the_better_of_both_products(self) -> None:
        assert WINDOW.flops_per_s == 1000e9

    def test_ratios_are_taken_within_a_round(self) -> None:
        """The machine is half as fast in round 1: the ratio stays 2, a ratio of medians too."""
        own = [result("vllm", s, i) for i, s in enumerate((2.0, 4.0, 2.0))]
        ours = [result("baton", s, i) for i, s in enumerate((1.0, 2.0, 1.0))]
        assert table.speed_ratio(own, ours) == 2.0
        assert table.speed_ratio(own, ours[:1]) == 2.0
        assert table.speed_ratio(own, []) is None

    def test_rows_show_median_range_and_who_is_missing(self) -> None:
        results = [result("baton", s, i) for i, s in enumerate((0.010, 0.030, 0.020))]
        results += [result("vllm", 0.040, i) for i in range(3)]
        costs = {"decode B=1": cells.Cost(bytes=0.5e9, flops=1.0)}
        gone = [engines.Missing("llama.cpp", "no compiler")]
        text = table.render(results, costs, gone)
        assert "| decode B=1 | baton | 20 | 10–30 | 50 | 0.50 |  | 50 | 1000 |" in text
        assert "| decode B=1 | vllm | 40 | 40–40 | 25 | 0.25 | 2.00 | 50 | 1000 |" in text
        assert "| llama.cpp | not measured: no compiler |" in text
        assert "†" not in text

    def test_a_sum_of_phases_is_marked_and_explained(self) -> None:
        results = [result("baton", 1.0, cell=cells.MIXED)]
        results += [result("llama.cpp", 2.0, cell=cells.MIXED, summed=True)]
        text = table.render(results, {cells.MIXED.name: cells.Cost(bytes=1e9, flops=1.0)}, [])
        assert "| mixed 32 + 4 x 512 | baton | 1,000 |" in text
        assert "| mixed 32 + 4 x 512 | llama.cpp † | 2,000 |" in text
        assert text.splitlines()[-1].startswith("† Not measured as one")


class FakeEngine:
    """An engine, or the probe: everything takes a second."""

    about = "fake"

    def __init__(self, name: str, mixes: bool) -> None:
        self.name, self.mixes = name, mixes

    def measure(self, cell: cells.Cell, seed: str) -> float:
        return 1.0

    def ask(self, question: dict[str, object]) -> float:
        return 1e9


def test_what_is_published_says_which_times_are_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = engines.Setting(tmp_path, tmp_path, HALF, 2, 4096, tmp_path)
    fakes = [FakeEngine("baton", True), FakeEngine("llama.cpp", False)]
    both = [cells.decode(1), cells.MIXED]
    document = peers._compare(FakeEngine("probe", True), fakes, [], setting, both, 1)
    written = json.loads(msgspec.json.encode(document))["results"]
    summed = [(r["engine"], r["cell"]["kind"]) for r in written if r["summed"]]
    assert summed == [("llama.cpp", "mixed")]
    assert "| llama.cpp † | 1,000 |" in capsys.readouterr().out


def test_the_process_of_llama_cpp_tells_that_it_cannot_mix() -> None:
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    ran = subprocess.run(
        [sys.executable, "-m", "parts.peers.run_llama", "bin", "model.gguf", "2"],
        env=environment, input="", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout)["mixes"] is False


def test_every_engine_gets_the_same_prompts_and_no_two_runs_do() -> None:
    first = child.draw_prompts("a/0", 3, 16, 32_000)
    assert first == child.draw_prompts("a/0", 3, 16, 32_000)
    assert len({tuple(p) for p in first + child.draw_prompts("a/1", 3, 16, 32_000)}) == 6
    assert all(256 <= token < 32_000 for prompt in first for token in prompt)


def test_a_peer_that_was_not_built_says_why(tmp_path: Path) -> None:
    assert engines.find_missing("vllm", tmp_path).reason == "run `make peers`"
    (tmp_path / "vllm.reason").write_text("no such version\n")
    assert engines.find_missing("vllm", tmp_path).reason == "no such version"
    (tmp_path / "vllm.done").touch()
    assert engines.find_missing("vllm", tmp_path) is None


def members(group: int) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if os.getpgid(int(directory.name)) == group:
                found.append(int(directory.name))
    return found


def state(pid: int) -> str:
    """As the kernel writes it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_server_is_stopped_while_it_is_not_measured_and_ends_all_the_same(tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    url = f"http://127.0.0.1:{port}"
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text('{"data": [{"id": "fake"}]}')
    # As vLLM's worker: a process that the one which was started has started.
    program = "import subprocess, sys; subprocess.run([sys.executable, '-m', *sys.argv[1:]])"
    directory = ("--directory", str(tmp_path), "--bind", "127.0.0.1")
    words = (sys.executable, "-c", program, "http.server", str(port), *directory)
    server = servers.Server("fake", url, (servers.Process(words, url),), "")
    with servers.running(server, tmp_path / "log") as served:
        (group,) = served._groups
        pids = members(group)
        assert len(pids) == 2
        served.pause()
        wait_until(lambda: [state(pid) for pid in pids] == ["T", "T"])
        served.go_on()
        wait_until(lambda: "T" not in [state(pid) for pid in pids])
        served.pause()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_loop_waits_for_its_threads_as_a_served_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    setting = engines.Setting(tmp_path, tmp_path, HALF, 1, 4096, tmp_path)
    assert engines.environment("baton", setting) == {"GOMP_SPINCOUNT": "1000"}
    assert engines.environment("llama.cpp", setting) == {}
