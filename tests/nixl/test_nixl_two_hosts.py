"""Between two network namespaces, as between hosts, where the machine allows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from nixl_ends import NUM_BLOCKS, SOURCE_DIR, TESTS_DIR
from nixl_two_hosts import SYSFS, Story

NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--mount")


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    """Fails where the machine gives out no network namespaces, unless somebody says why."""
    wire = f"{SYSFS} && ip link add here type veth peer name there && unshare --net {SYSFS}"
    try:
        tried = subprocess.run([*NAMESPACES, "sh", "-c", wire], capture_output=True, text=True)
    except FileNotFoundError as error:
        problem = str(error)
    else:
        if not tried.returncode:
            return
        problem = tried.stderr.strip()
    if reason := os.environ.get("BATON_NO_NAMESPACES"):
        pytest.skip(f"BATON_NO_NAMESPACES: {reason}")
    pytest.fail(
        f"this machine gives out no network namespaces ({problem}): allow it, or say in "
        "BATON_NO_NAMESPACES why it cannot be"
    )


@pytest.mark.parametrize("tls", ["tcp", "all"])
def test_two_hosts(tmp_path: Path, tls: str) -> None:
    ran = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "nixl_two_hosts", str(tmp_path), tls],
        env=os.environ | {"PYTHONPATH": f"{SOURCE_DIR}:{TESTS_DIR}"},
        stdout=subprocess.PIPE,
        timeout=100,
    )
    assert ran.returncode == 0
    story = msgspec.json.decode(ran.stdout, type=Story)
    assert story.together.results == {"ok": NUM_BLOCKS}
    assert story.together.num_right == NUM_BLOCKS
    if tls == "tcp":
        assert story.cut.results == {"timed_out": NUM_BLOCKS}
        assert 0.49 < story.cut.elapsed_s < 0.8 and story.cut.quarantined_bytes > 0
        assert story.again.results == {"unreachable": NUM_BLOCKS}
        assert story.again.elapsed_s < 0.1, "at once"
    assert story.mended.results == {"ok": NUM_BLOCKS}
    assert story.mended.num_right == NUM_BLOCKS
    assert story.dead.results == {"unreachable": NUM_BLOCKS}
    assert story.dead.elapsed_s < 1.0 and story.dead.quarantined_bytes == 0
