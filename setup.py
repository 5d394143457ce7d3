"""Builds the libraries of csrc, if there is a compiler; everything else is in pyproject.toml.

They are plain C++ behind a C ABI, loaded with ctypes: they need neither Python's headers nor
torch's. Each instruction set is a file compiled with its own flags, and which of them runs is
decided when the library is loaded. The kernels are not linked to an OpenMP runtime: they take the
symbols of the one that torch brings, so that a process has one pool of threads and not two. The
other libraries have one thread, and load without torch.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"),
    # Results must not depend on what a compiler chooses to fuse or reorder.
    *("-ffp-contract=off", "-fno-math-errno"),
    "-fno-strict-aliasing",  # pairs of bf16 are read as words
    # Some compilers' own intrinsics look uninitialised to them, and loops by 16 out of bounds.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-stringop-overflow"),
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
WIDE = ["-mprefer-vector-width=512"]  # for loops that the compiler turns into vectors itself

LIBRARIES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "baton.model._kernels": (
        ["-fopenmp"],
        {
            "dispatch": [],
            "portable": [],
            "avx2": AVX2,
            "avx512": AVX512,
            "avx512bf16": [*AVX512, "-mavx512bf16"],
        },
    ),
    "baton.fabric._codec": (
        ["-fno-trapping-math"],
        {
            "codec_dispatch": [],
            "codec_portable": [],
            "codec_avx2": AVX2,
            "codec_avx512": [*AVX512, *WIDE],
        },
    ),
}
"""Module: its flags, and its sources with theirs; a source with flags of its own is for x86."""


class BuildLibraries(build_ext):
    """One object a source, each with its flags; a failure leaves a package without that library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        own_flags, units = LIBRARIES[ext.name]
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        objects = []
        for unit, flags in units.items():
            if flags and not is_x86:
                continue
            objects += self.compiler.compile(
                [str(SOURCES / f"{unit}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *own_flags, *flags],
                depends=[str(path) for path in SOURCES.glob("*.h")],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-lstdc++", "-lm"], target_lang="c++"
        )


setup(
    ext_modules=[
        Extension(
            name,
            sources=[str(SOURCES / f"{unit}.cpp") for unit in units],
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            optional=True,
        )
        for name, (_, units) in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildLibraries},
)
