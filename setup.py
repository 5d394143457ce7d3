"""Builds the CPU kernels, if there is a compiler, and takes the data along; the rest is in
pyproject.toml.

The libraries are plain C++ behind a C ABI, loaded with ctypes: they need neither Python's headers
nor torch's. Each instruction set is a file compiled with its own flags, and which of them runs is
decided when the library is loaded. The model's is not linked to an OpenMP runtime: it takes the
symbols of the one that torch brings, so that a process has one pool of threads and not two. The
fabric's has no threads, and loads without torch.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

LIBRARIES = {  # where their sources are, and what only they are compiled with
    "baton.model._kernels": (Path("csrc"), ["-fopenmp"]),
    "baton.fabric._digest": (Path("csrc/digest"), []),
    "baton.fabric._codec": (Path("csrc/codec"), ["-fno-trapping-math"]),
}
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
AVX512BF16 = [*AVX512, "-mavx512bf16"]
X86 = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "avx512amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
}


DATA = ("hardware", "profiles")
"""Folders of `data` that the commands read; a wheel carries them inside the package."""


class BuildPackage(build_py):
    """The package, and the data that it needs."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there they lie beside it
            for name in DATA:
                self.copy_tree(f"data/{name}", str(Path(self.build_lib, "baton", "data", name)))


class BuildKernels(build_ext):
    """One object a source, each with its flags; a failure leaves a package without that library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        directory, flags = LIBRARIES[ext.name]
        units = ["dispatch", "portable"]
        if platform.machine() in ("x86_64", "AMD64"):
            units += [unit for unit in X86 if (directory / f"{unit}.cpp").exists()]
        elif platform.machine() in ("aarch64", "arm64") and (directory / "neon.cpp").exists():
            units.append("neon")
        objects = []
        for unit in units:
            objects += self.compiler.compile(
                [str(directory / f"{unit}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *flags, *X86.get(unit, [])],
                depends=ext.depends,
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
            sources=sorted(map(str, directory.glob("*.cpp"))),
            depends=sorted(map(str, directory.glob("*.h"))),
            optional=True,
        )
        for name, (directory, _) in LIBRARIES.items()
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
)
