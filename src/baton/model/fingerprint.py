"""The files of a checkpoint, and what tells them apart: a hash of all, a stamp for a quick look."""

from __future__ import annotations

import hashlib
from pathlib import Path

import xxhash

from baton.errors import ModelError
from baton.model_spec.fields import read_json

_READ_BYTES = 8 << 20
_INDEX = "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: what its index names, or the single file.

    Raises:
        ModelError: there is none, it is unclear which, or the index names one that is missing.
    """
    if (path / _INDEX).exists():
        named = read_json(path / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise ModelError(f"weight_map of {_INDEX} must map tensor names to file names")
        names = sorted(set(named.values()))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{_INDEX} names files outside the model directory")
        files = [path / name for name in names]
    elif (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    else:
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            raise ModelError(f"{path} has several safetensors files but no {_INDEX}")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ModelError(f"{path} lacks {missing[0] if missing else 'model.safetensors'}")
    return files


def weights_fingerprint(path: Path) -> bytes:
    """32 bytes that tell checkpoints apart: SHA-256 over config.json and each weight file's hash.

    The weights go through XXH3-128, which runs at the speed of the disk: the fingerprint guards
    against mix-ups, not against forgery.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    files = weight_files(path)
    digests = []
    for file in files:
        with HashedFile(file) as stream:
            digests.append(stream.digest())
    return fingerprint(path, files, digests)


def fingerprint(path: Path, files: list[Path], digests: list[bytes]) -> bytes:
    """`weights_fingerprint` of files whose hashes (`HashedFile.digest`) are known.

    Raises:
        ModelError: config.json cannot be read.
    """
    total = hashlib.sha256()
    try:
        config = (path / "config.json").read_bytes()
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
    total.update(len(config).to_bytes(8, "little") + config)
    for file, digest in zip(files, digests, strict=True):
        name = file.name.encode()
        total.update(len(name).to_bytes(8, "little") + name + digest)
    return total.digest()


def checkpoint_stamp(path: Path) -> bytes:
    """32 bytes that change when a file of the checkpoint is written or replaced, in no time.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    total = hashlib.sha256()
    for file in (path / "config.json", *weight_files(path)):
        try:
            stat = file.stat()
        except OSError as error:
            raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
        at = (file.name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        total.update(repr(at).encode())
    return total.digest()


class HashedFile:
    """A file that is read front to back, and the XXH3-128 of all that is in it.

    Raises:
        ModelError: it cannot be read; also from the methods.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._at = 0
        try:
            self._stream = file.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, size: int) -> memoryview:
        """The next `size` bytes, in a buffer that the next call overwrites."""
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        if self._fill(size) < size:
            raise ModelError(f"{self._file.name} has become shorter")
        return self._buffer[:size]

    def skip_to(self, offset: int) -> None:
        """Go on to `offset`, which is not behind."""
        while self._at < offset:
            self.read(min(offset - self._at, len(self._buffer)))

    def digest(self) -> bytes:
        """Of the whole file, read to its end."""
        while self._fill(len(self._buffer)):
            pass
        return self._hash.digest()

    def _fill(self, size: int) -> int:
        """Read and hash up to `size` bytes, less only at the end of the file; how many."""
        count = 0
        try:
            while count < size and (read := self._stream.readinto(self._buffer[count:size])):
                count += read
        except OSError as error:
            raise ModelError(f"{self._file} cannot be read: {error.strerror}") from error
        self._hash.update(self._buffer[:count])
        self._at += count
        return count
