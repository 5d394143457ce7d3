"""Runs Baton out of a wheel: is everything in it that the commands read?

    python tests/check_wheel.py build/wheel/baton_serve-….whl

The wheel alone is installed into an empty folder, and used from there; what it depends on comes
from this Python's environment. The checkout is out of sight: if a file were missing in the wheel,
nothing would be found in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSIDE = """
import baton, filecmp, pathlib, sys
from baton.engine.kv_quality import BUILT_IN
from baton.fabric import codec_native, digest
from baton.model import native
from baton.planner.hardware import data_dir, devices
from baton.planner.profiles import bundled_profiles

package, checkout = pathlib.Path(baton.__file__).parent, pathlib.Path(sys.argv[1])
assert package == pathlib.Path.cwd() / "baton", package
assert (package / "py.typed").exists() and BUILT_IN.exists()
for name in ("hardware", "profiles"):
    found = filecmp.dircmp(checkout / "data" / name, data_dir(name))
    assert data_dir(name).is_relative_to(package), data_dir(name)
    assert not (found.left_only or found.right_only or found.diff_files), vars(found)
assert len(bundled_profiles()) > 10 and len(devices()) > 10
for where in (native.find_kernels, codec_native.find, digest.find_copier):
    assert where("portable") is not None, where
print("data and kernels are there")
"""
SIMULATE = ("simulate", "--profile", "h100-sxm.vllm.llama-3.1-70b.8bit", "--layout", "1P1D")
SIMULATE += ("--engine.num-kv-blocks", "4000", "--num-requests", "20", "--slo", "ttft=10s")


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        run([*install, "--no-index", "--target", folder, str(wheel.resolve())], Path.cwd())
        run(["-c", INSIDE, str(ROOT)], Path(folder))
        for arguments in (("plan", "--help"), SIMULATE):
            run(["-m", "baton", *arguments], Path(folder))
    print(f"{wheel.name}: well")


def run(arguments: list[str], folder: Path) -> None:
    """A Python of its own that stands in the folder, and finds it before what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
