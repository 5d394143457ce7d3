"""Real workers on native kernels: one packed copy of the weights, and cores for each."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from integration.deployment import Deployment
from numerics.native_kernels import available
from numerics.tiny_models import make_checkpoint
from unit import toy_tokenizers

from baton.launch.cores import usable_cores

FLAGS = ("--engine.kernels", "native", "--engine.num-kv-blocks", "64", "--engine.max-num-seqs", "4",
         "--store.max-bytes", "16MiB", "--launch.restart-backoff-s", "0.1")  # fmt: skip
WORKERS = ("prefill-0", "decode-0")
PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MB of bf16 weights."""
    if not available():
        pytest.skip("no native kernels here: torch shares no packed weights between workers")
    path = tmp_path_factory.mktemp("shared") / "model"
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 16_000}
    make_checkpoint(path, "llama", dtype="bfloat16", **sizes)
    return toy_tokenizers.write_model_dir(path, toy_tokenizers.byte_level_bpe())


def weights(pid: int) -> tuple[set[str], dict[str, int]]:
    """The inodes of packed weights that a process has mapped, and their smaps sums in bytes."""
    inodes, sums, inside = set(), dict.fromkeys(("Rss:", "Pss:", "Shared_Clean:"), 0), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "/memfd:baton-weights" in line
            if inside:
                assert words[1] == "r--p", line
                inodes.add(words[4])
        elif inside and words[0] in sums:
            sums[words[0]] += int(words[1]) * 1024
    return inodes, sums


def ask(served: Deployment) -> str:
    answer = served.client().completions.create(
        model=served.model, prompt=PROMPT, max_tokens=8, temperature=0
    )
    return answer.choices[0].text


def test_workers_map_one_copy_and_a_new_one_finds_it(model: Path) -> None:
    with Deployment.start(model, "1P1D", *FLAGS, faults_expected=True) as served:
        answer = ask(served)
        pids = served.processes()
        found = {name: weights(pids[name]) for name in WORKERS}
        (inode,) = set.union(*(inodes for inodes, _ in found.values()))
        for inodes, sums in found.values():
            assert inodes == {inode}
            assert sums["Rss:"] > 50 << 20
            assert sums["Pss:"] < 0.75 * sums["Rss:"]
        assert len(re.findall(r"weights packed num_bytes", served.output)) == 1
        # The supervisor keeps it; workers need no descriptor of what they have mapped.
        assert descriptors(served.pid) == {inode}
        assert all(not descriptors(pid) for pid in pids.values())

        said = len(served.lines)
        os.kill(pids["decode-0"], signal.SIGKILL)
        served.wait_for_line("registry worker id=decode-0 role=decode joined", 60, start=said)
        assert weights(served.processes()["decode-0"])[0] == {inode}
        assert len(re.findall(r"weights packed num_bytes", served.output)) == 1
        assert ask(served) == answer

    with Deployment.start(model, "1U", *FLAGS) as alone:
        assert ask(alone) == answer


def descriptors(pid: int) -> set[str]:
    """The inodes of packed weights that a process has open."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:baton-weights"):
            found.add(str(entry.stat().st_ino))
    return found


@pytest.mark.skipif(usable_cores() < len(os.sched_getaffinity(0)), reason="a quota of CPU time")
def test_each_worker_keeps_to_its_cores(model: Path) -> None:
    here = sorted(os.sched_getaffinity(0))
    with Deployment.start(model, "1P1D", *FLAGS) as served:
        pids = served.processes()
        cores = {name: threads_on(pids[name]) for name in WORKERS}
        assert all(len(sets) == 1 for sets in cores.values()), cores  # every thread of it
        prefill, decode = (set(next(iter(cores[name]))) for name in WORKERS)
        assert threads_on(pids["gateway"]) == {tuple(here)}
        if len(here) > 1:
            assert not prefill & decode and sorted(prefill | decode) == here
        for name, own in zip(WORKERS, (prefill, decode), strict=True):
            assert served.wait_for_line(f"[{name}] ", 1) is not None
            said = [line for line in served.lines if line.startswith(f"[{name}] ")]
            assert any(line.rstrip().endswith(f"engine threads={len(own)}") for line in said)
            assert any("engine cpus=" in line for line in said)
        ask(served)


def threads_on(pid: int) -> set[tuple[int, ...]]:
    """The sets of cores that the threads of a process may run on."""
    tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return {tuple(sorted(os.sched_getaffinity(task))) for task in tasks}
