"""Builds the CPU kernels, if there is a compiler; everything else is in pyproject.toml.

The library is plain C++ behind a C ABI, loaded with ctypes: it needs neither Python's headers nor
torch's. Each instruction set is a file compiled with its own flags, and which of them runs is
decided when the library is loaded. It is not linked to an OpenMP runtime: it takes the symbols of
the one that torch brings, so that a process has one pool of threads and not two.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"),
    # Results must not depend on what a compiler chooses to fuse or reorder.
    *("-ffp-contract=off", "-fno-math-errno"),
    "-fno-strict-aliasing",  # pairs of bf16 are read as words
    # Some compilers' own intrinsics look uninitialised to them, and loops by 16 out of bounds.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-stringop-overflow"),
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


class BuildKernels(build_ext):
    """One object a source, each with its flags; a failure leaves a package without kernels."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        units = ["dispatch", "portable"]
        if platform.machine() in ("x86_64", "AMD64"):
            units += X86
        elif platform.machine() in ("aarch64", "arm64"):
            units.append("neon")
        objects = []
        for unit in units:
            objects += self.compiler.compile(
                [str(SOURCES / f"{unit}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *X86.get(unit, [])],
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
            "baton.model._kernels",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
