"""Packed weights: right whatever the shapes, shared by processes, and never the wrong ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from numerics.by_hand import Handmade, Sequence_, random_prompt
from numerics.native_kernels import kernels_named
from numerics.tiny_models import VOCAB_SIZE, make_checkpoint
from safetensors.torch import load_file, save_file

from baton.config import load_config
from baton.engine.build import load_model
from baton.errors import ConfigError, ModelError
from baton.model import packed
from baton.model.loader import load_weights
from baton.model.native import Kernels, Packed
from baton.model.packed import PackedWeights, PackRefused, load_packed, map_packed
from baton.model.region import HUGE_BYTES, create_memfd, is_sealed, release, reserve, seal
from baton.model.weights import entries
from baton.model_spec import load_model_spec

ODD: dict[str, object] = {
    "hidden_size": 60, "intermediate_size": 81, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 10,
}  # fmt: skip
"""Q, K and V of 60 and 30 rows: they end within panels of 32."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = kernels_named("native")
    assert found is not None
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "llama", "llama", dtype="bfloat16")


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = create_memfd("test")
    yield fd
    os.close(fd)


def load(path: Path, kernels: Kernels, fd: int | None = None) -> PackedWeights:
    return load_packed(path, load_model_spec(path), "bfloat16", kernels, fd)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", ["llama", "qwen2", "odd"])
@pytest.mark.parametrize("piece_bytes", [100, 1000, 8 << 20])
def test_rows_in_any_pieces_are_packed_as_a_whole_matrix_is(
    tmp_path: Path,
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    dtype: str,
    piece_bytes: int,
) -> None:
    path = (
        make_checkpoint(tmp_path, "llama", **ODD)
        if model == "odd"
        else make_checkpoint(tmp_path, model)
    )
    spec = load_model_spec(path)
    monkeypatch.setattr("baton.model.checkpoint._PIECE_BYTES", piece_bytes)
    found = load_packed(path, spec, dtype, kernels)
    expected = load_weights(path, spec, dtype, "cpu")
    assert found.fingerprint == expected.fingerprint
    for entry in entries(spec):
        layer, _, field = entry.name.rpartition(".")
        whole = getattr(expected.layers[int(layer)] if layer else expected, field)
        if field in ("qkv", "o", "gate_up", "down", "lm_head") or (
            field == "embed" and spec.tie_word_embeddings
        ):
            name = "lm_head" if field == "embed" else entry.name
            memory = Packed(kernels, whole.clone()).memory.flatten()
            assert torch.equal(found.matrix(name).memory, memory), entry.name
            bias = found.matrix(name).bias
            biases = getattr(expected.layers[int(layer)], f"{field}_bias") if layer else None
            assert (bias is None) == (biases is None)
        else:
            tensor = found.tensor(entry.name)
            assert tensor is not None and torch.equal(tensor, whole), entry.name
            assert found.address(entry.name) == tensor.data_ptr() != 0
    assert found.address("0.no_such_norm") == 0


def test_shared_and_private_weights_give_the_same_bits(
    llama: Path, kernels: Kernels, memfd: int
) -> None:
    prompt = random_prompt(40, VOCAB_SIZE, seed=1)
    logits = []
    for fd in (None, memfd, memfd):
        model = Handmade.load(llama, "bfloat16", kernels=kernels, weights_fd=fd)
        logits.append(model.step([(Sequence_(prompt), 40)], every=True))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_the_second_maps_what_the_first_packed(
    llama: Path, kernels: Kernels, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(llama, kernels, memfd)
    assert is_sealed(memfd) and os.fstat(memfd).st_size % HUGE_BYTES == 0

    def read(*_: object) -> bytes:
        raise AssertionError("the checkpoint was read again")

    monkeypatch.setattr("baton.model.checkpoint.Checkpoint.read", read)
    monkeypatch.setattr("baton.model.packed.weights_fingerprint", read)
    second = load(llama, kernels, memfd)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.matrix("0.qkv").memory, first.matrix("0.qkv").memory)


@pytest.mark.parametrize("bytes_per_s", [1 << 50, 256 << 20])
def test_weights_are_the_same_in_small_pages(
    llama: Path, kernels: Kernels, memfd: int, monkeypatch: pytest.MonkeyPatch, bytes_per_s: int
) -> None:
    whole = load(llama, kernels, memfd)
    monkeypatch.setattr("baton.model.region._SLOWEST_BYTES_PER_S", bytes_per_s)
    monkeypatch.setattr("baton.model.region._COLLAPSE_BYTES", HUGE_BYTES)
    found = load(llama, kernels)
    for name in ("0.qkv", "2.down", "lm_head"):
        assert torch.equal(found.matrix(name).memory, whole.matrix(name).memory)


@pytest.mark.parametrize("num_bytes", [1, 64 << 20])
def test_memory_may_be_reserved_before(
    llama: Path, kernels: Kernels, memfd: int, num_bytes: int
) -> None:
    whole = load(llama, kernels)
    reserve(memfd, num_bytes)
    size = os.fstat(memfd).st_size
    assert size >= num_bytes and os.fstat(memfd).st_blocks * 512 >= num_bytes
    os.pwrite(memfd, b"\xff" * size, 0)  # as a packer that died may have left it
    found = load(llama, kernels, memfd)
    assert is_sealed(memfd)
    for name in ("0.qkv", "2.down", "lm_head"):
        assert torch.equal(found.matrix(name).memory, whole.matrix(name).memory)
    before = os.fstat(memfd).st_size
    reserve(memfd, 1 << 30)
    release(memfd)
    assert os.fstat(memfd).st_size == before


_LOCK = """
import fcntl, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_nothing_is_reserved_behind_a_packer(memfd: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK, str(memfd)], pass_fds=[memfd],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as packer:  # fmt: skip
        assert packer.stdout is not None and packer.stdout.readline() == b"locked\n"
        reserve(memfd, 1)
        assert os.fstat(memfd).st_size == 0
        packer.kill()
    reserve(memfd, 1)
    assert os.fstat(memfd).st_size == HUGE_BYTES


def test_reserved_memory_goes_back_when_nobody_packs(llama: Path, memfd: int) -> None:
    reserve(memfd, 1)
    config = load_config(None, {"model.path": str(llama), "engine.kernels": "torch"})
    load_model(config, llama, memfd)
    assert os.fstat(memfd).st_size == 0


def test_nobody_can_change_them(llama: Path, kernels: Kernels, memfd: int) -> None:
    load(llama, kernels, memfd)
    for change in (
        lambda: os.pwrite(memfd, b"x", 1 << 16),
        lambda: os.ftruncate(memfd, 0),
        lambda: os.ftruncate(memfd, 1 << 30),
    ):
        with pytest.raises(PermissionError):
            change()


_WRITE = """
import ctypes, os, sys
from pathlib import Path
from baton.model.native import ISAS, find_kernels
from baton.model.packed import load_packed
from baton.model_spec import load_model_spec
path = Path(sys.argv[1])
kernels = next(k for k in map(find_kernels, ISAS) if k)
weights = load_packed(path, load_model_spec(path), "bfloat16", kernels)
print("mapped", flush=True)
ctypes.memset(weights.matrix("0.qkv").memory.data_ptr(), 0, 1)
print("written", flush=True)
"""


def test_a_stray_write_ends_the_process(llama: Path, kernels: Kernels) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _WRITE, str(llama)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (-signal.SIGSEGV, "mapped\n"), run.stderr


# Refusals


def rewritten(fd: int, **fields: Any) -> int:
    """A sealed copy of memfd `fd` whose header has other `fields`."""
    header, data_at = packed._read_header(fd)
    text = msgspec.msgpack.encode(msgspec.structs.replace(header, **fields))
    copy = create_memfd("copy")
    data = os.pread(fd, os.fstat(fd).st_size - data_at, data_at)
    os.pwrite(copy, packed.MAGIC + len(text).to_bytes(8, "little") + text, 0)
    os.pwrite(copy, data, packed._data_at(text))
    seal(copy)
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 0}, "another version: 0, not"),
        ({"isa": "abacus"}, "another isa: abacus, not"),
        ({"dtype": "float32"}, "another dtype: float32, not bfloat16"),
        ({"slots": ()}, "another slots"),
        ({"stamp": b"", "fingerprint": bytes(32)}, "the checkpoint has changed"),
    ],
)
def test_other_weights_are_refused_and_packed_again(
    llama: Path,
    kernels: Kernels,
    memfd: int,
    fields: dict[str, object],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = load(llama, kernels, memfd)
    spec = load_model_spec(llama)
    wrong = rewritten(memfd, **fields)
    try:
        with pytest.raises(PackRefused, match=message):
            map_packed(llama, spec, "bfloat16", kernels, wrong)
        again = load(llama, kernels, wrong)
    finally:
        os.close(wrong)
    assert "for this worker alone" in caplog.text and message in caplog.text
    assert again.fingerprint == right.fingerprint
    assert torch.equal(again.matrix("1.down").memory, right.matrix("1.down").memory)


def test_a_copy_that_differs_in_nothing_is_taken(llama: Path, kernels: Kernels, memfd: int) -> None:
    load(llama, kernels, memfd)
    same = rewritten(memfd)
    map_packed(llama, load_model_spec(llama), "bfloat16", kernels, same)
    os.close(same)


@pytest.mark.parametrize("content", [b"", b"BATONWT\0", b"x" * 100, b"BATONWT\0" + b"\xff" * 100])
def test_garbage_is_refused(llama: Path, kernels: Kernels, memfd: int, content: bytes) -> None:
    spec = load_model_spec(llama)
    os.pwrite(memfd, content, 0)
    with pytest.raises(PackRefused, match="not sealed"):
        map_packed(llama, spec, "bfloat16", kernels, memfd)
    seal(memfd)
    with pytest.raises(PackRefused):
        map_packed(llama, spec, "bfloat16", kernels, memfd)
    load(llama, kernels, memfd)  # packs for itself


def test_memory_that_is_too_short_is_refused(llama: Path, kernels: Kernels, memfd: int) -> None:
    load(llama, kernels, memfd)
    short = create_memfd("short")
    os.pwrite(short, os.pread(memfd, 1 << 15, 0), 0)
    seal(short)
    with pytest.raises(PackRefused, match="cut short"):
        map_packed(llama, load_model_spec(llama), "bfloat16", kernels, short)
    os.close(short)


def test_new_dates_are_no_new_weights_but_new_bytes_are(
    llama: Path, kernels: Kernels, memfd: int
) -> None:
    first = load(llama, kernels, memfd)
    spec = load_model_spec(llama)
    file = llama / "model.safetensors"
    os.utime(file, (1, 1))
    assert map_packed(llama, spec, "bfloat16", kernels, memfd).fingerprint == first.fingerprint
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file)
    with pytest.raises(PackRefused, match="has changed"):
        map_packed(llama, spec, "bfloat16", kernels, memfd)
    fresh = load(llama, kernels, memfd)
    assert fresh.fingerprint != first.fingerprint
    norm, old = fresh.tensor("norm"), first.tensor("norm")
    assert norm is not None and old is not None and not torch.equal(norm, old)


def test_a_checkpoint_that_cannot_be_served_leaves_the_memory_free(
    llama: Path, kernels: Kernels, memfd: int
) -> None:
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError):
        load(llama, kernels, memfd)
    assert not is_sealed(memfd)
    file.write_bytes(whole)
    load(llama, kernels, memfd)
    assert is_sealed(memfd)


def test_what_is_no_memfd_is_refused(llama: Path, kernels: Kernels, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as file:
        for fd in (file.fileno(), 9999):
            with pytest.raises(ConfigError, match="not a memfd"):
                load(llama, kernels, fd)


# Processes

_WORKER = """
import json, os, sys, time
from pathlib import Path
import torch
from baton.model import packer
from baton.model.native import ISAS, find_kernels
from baton.model.packed import load_packed
from baton.model_spec import load_model_spec

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

path, fd, stop_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
kernels = next(k for k in map(find_kernels, ISAS) if k)
count, put = 0, packer.Packer.put

def counted(self, *args):
    global count
    count += 1
    if count == stop_after:
        print("packing", flush=True)
        time.sleep(60)
    put(self, *args)

packer.Packer.put = counted
spec = load_model_spec(path)
before = status("VmHWM")
weights = load_packed(path, spec, "bfloat16", kernels, fd)
peak = status("VmHWM") - before
found = [weights.matrix(name).memory for name in ("0.qkv", "lm_head")]
sums = [int(memory.view(torch.int16).long().sum()) for memory in found]
print(json.dumps({"puts": count, "sums": sums, "peak": peak}), flush=True)
sys.stdin.read()
"""


def start(path: Path, fd: int, stop_after: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(path), str(fd), str(stop_after)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(fd,),
    )


def line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def shares(pid: int, inode: int) -> dict[str, int]:
    """Bytes that a process has mapped of file `inode`, by the kind of line in its smaps."""
    found: dict[str, int] = {}
    inside = False
    for text in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = text.split()
        if "-" in words[0] and len(words) >= 5:
            inside = words[4] == str(inode)
            if inside:
                found[words[1]] = 1
        elif inside and words[-1] == "kB":
            found[words[0]] = found.get(words[0], 0) + int(words[1]) * 1024
    return found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """64 MB in bf16."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32_000}
    return make_checkpoint(tmp_path / "large", "llama", dtype="bfloat16", **sizes)


def test_processes_share_one_memory(large: Path, memfd: int, kernels: Kernels) -> None:
    size = 2 * load_model_spec(large).num_parameters()
    workers = [start(large, memfd) for _ in range(3)]
    try:
        said = [line(worker) for worker in workers]
        assert sorted(one["puts"] > 0 for one in said) == [False, False, True]
        assert len({tuple(one["sums"]) for one in said}) == 1
        # A packer needs the weights and a few pieces; who maps them, what it has looked at.
        assert size < max(one["peak"] for one in said) < size + (50 << 20)
        inode = os.fstat(memfd).st_ino
        for worker in workers:
            mapped = shares(worker.pid, inode)
            assert mapped["Size:"] >= size
            assert "r--p" in mapped and mapped["Private_Dirty:"] == 0
            assert 0 < mapped["Pss:"] <= mapped["Rss:"] // 2
        assert os.fstat(memfd).st_blocks * 512 < size + 2 * HUGE_BYTES
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_a_packer_that_dies_blocks_nobody(large: Path, memfd: int, kernels: Kernels) -> None:
    first = start(large, memfd, stop_after=5)
    assert first.stdout is not None and first.stdout.readline() == "packing\n"
    second = start(large, memfd)
    try:
        time.sleep(0.5)
        assert not is_sealed(memfd)
        first.kill()
        said = line(second)
        assert said["puts"] > 5 and is_sealed(memfd)
        weights = load(large, kernels)
        assert said["sums"] == [
            int(weights.matrix(name).memory.view(torch.int16).long().sum())
            for name in ("0.qkv", "lm_head")
        ]
    finally:
        for worker in (first, second):
            worker.kill()
            worker.communicate()
