"""Who computes on which cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from baton.config import Layout, format_cpus, load_config, parse_cpus
from baton.errors import ConfigError
from baton.launch.cores import Share, share_out, waiting
from baton.launch.local import worker_names


@pytest.mark.parametrize(
    ("text", "cpus", "shortest"),
    [
        ("0", (0,), "0"),
        ("0-3,8", (0, 1, 2, 3, 8), "0-3,8"),
        ("8, 2-3 ,1", (1, 2, 3, 8), "1-3,8"),
        ("5-5", (5,), "5"),
        ("0,2,4", (0, 2, 4), "0,2,4"),
    ],
)
def test_lists_of_cores(text: str, cpus: tuple[int, ...], shortest: str) -> None:
    assert parse_cpus(text, "engine.cpus") == cpus
    assert format_cpus(cpus) == shortest


@pytest.mark.parametrize("text", ["", ",", "0,", "-1", "3-1", "a", "0-8192", "1--2", "0x1", "١"])
def test_what_is_no_list_of_cores(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.decode_cpus .* not a list of cores: write it"):
        parse_cpus(text, "launch.decode_cpus")


def test_a_core_named_twice() -> None:
    with pytest.raises(ConfigError, match="names a core twice"):
        parse_cpus("0-3,2", "engine.cpus")


def shared_out(
    layout: str, cores: int = 8, usable: int | None = None, **fields: object
) -> dict[str, tuple[str, int | None, bool]]:
    """Name → (cores, threads, contended) on a machine with cores 0, 1, …"""
    overrides = {name.replace("__", "."): value for name, value in fields.items()}
    config = load_config(None, {"launch.layout": layout, **overrides})
    names = worker_names(Layout.parse(layout))
    shares = share_out(config, names, range(cores), cores if usable is None else usable)
    assert shares.keys() == names.keys()
    return {
        name: (format_cpus(share.cpus), share.threads, share.contended)
        for name, share in shares.items()
    }


def test_cores_are_shared_out_evenly_in_runs() -> None:
    assert shared_out("1P1D", 2) == {"prefill-0": ("0", 1, False), "decode-0": ("1", 1, False)}
    assert shared_out("1U", 2) == {"unified-0": ("0-1", 2, False)}
    assert shared_out("1P2D") == {
        "prefill-0": ("0-2", 3, False),
        "decode-0": ("3-5", 3, False),
        "decode-1": ("6-7", 2, False),
    }


@pytest.mark.parametrize("num_workers", range(1, 9))
def test_every_core_belongs_to_one_worker(num_workers: int) -> None:
    shares = shared_out(f"{num_workers}U").values()
    owned = [cpu for cpus, _, _ in shares for cpu in parse_cpus(cpus, "")]
    assert sorted(owned) == list(range(8))
    assert {threads for _, threads, _ in shares} <= {8 // num_workers, 8 // num_workers + 1}


def test_more_workers_than_cores_compute_with_one_thread_each() -> None:
    shares = shared_out("5U", 2)
    assert [cpus for cpus, _, _ in shares.values()] == ["0", "0", "0", "1", "1"]
    assert {share[1:] for share in shares.values()} == {(1, True)}
    assert shared_out("1P1D1U", 2)["unified-0"] == ("1", 1, False)


def test_a_list_is_shared_out() -> None:
    assert shared_out("2U", engine__cpus="1-2,5-6") == {
        "unified-0": ("1-2", 2, False),
        "unified-1": ("5-6", 2, False),
    }


def test_roles_may_have_lists_of_their_own() -> None:
    both = shared_out("1P2D", launch__prefill_cpus="0-5", launch__decode_cpus="6-7")
    assert both == {
        "prefill-0": ("0-5", 6, False),
        "decode-0": ("6", 1, False),
        "decode-1": ("7", 1, False),
    }
    assert shared_out("1P1D", 4, launch__decode_cpus="1") == {
        "prefill-0": ("0,2-3", 3, False),
        "decode-0": ("1", 1, False),
    }
    # A list of a role that has no worker takes nothing away.
    assert shared_out("1U", 2, launch__decode_cpus="1") == {"unified-0": ("0-1", 2, False)}


def test_shared_means_all_cores_for_all() -> None:
    assert set(shared_out("1P1D", 2, engine__cpus="shared").values()) == {("", 2, True)}
    assert shared_out("1U", 2, engine__cpus="shared") == {"unified-0": ("", 2, False)}


def test_a_quota_gives_threads_but_no_cores() -> None:
    assert set(shared_out("2U", 64, usable=4).values()) == {("", 2, True)}
    assert set(shared_out("3U", 64, usable=2).values()) == {("", 1, True)}
    # Unless the cores are named.
    assert shared_out("1U", 64, usable=4, engine__cpus="8-9") == {"unified-0": ("8-9", 2, False)}


def test_threads_may_be_set() -> None:
    assert shared_out("1U", 4, engine__threads=2) == {"unified-0": ("0-3", 2, False)}
    assert shared_out("1U", 4, engine__threads=5) == {"unified-0": ("0-3", 5, True)}


def test_workers_on_a_gpu_run_anywhere() -> None:
    assert shared_out("1U", engine__device="cuda") == {"unified-0": ("", None, False)}
    named = shared_out("1U", engine__device="cuda", engine__cpus="3")
    assert named == {"unified-0": ("3", 1, False)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine__cpus": "1-9"}, r"engine\.cpus '1-9' names 8-9, and .* here are 0-7"),
        ({"launch__prefill_cpus": "8"}, r"launch\.prefill_cpus '8' names 8"),
        ({"launch__prefill_cpus": "0-7"}, r"leave no core for decode-0"),
        ({"engine__cpus": "2-3", "launch__decode_cpus": "2-3"}, r"leave no core for prefill-0"),
    ],
)
def test_lists_that_cannot_be_had(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shared_out("1P1D", **fields)


def test_flags_of_a_worker() -> None:
    assert Share((0, 1), 2, False).flags() == ["--engine.cpus", "0-1", "--engine.threads", "2"]
    assert Share((), 2, True).flags() == ["--engine.threads", "2"]
    assert Share((), None, False).flags() == []


def test_threads_that_share_cores_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert waiting(Share((0,), 1, True)) == {"OMP_WAIT_POLICY": "passive"}
    assert waiting(Share((0,), 1, False)) == {"GOMP_SPINCOUNT": "1000"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert waiting(Share((0,), 1, True)) == {}


_PINNED = """
import json, os, sys
from baton.config import load_config
from baton.launch.cores import pinned
config = pinned(load_config(None, json.loads(sys.argv[1])))
assert "torch" not in sys.modules
print(json.dumps([sorted(os.sched_getaffinity(0)), config.engine.threads]))
"""


def pinned_to(**fields: object) -> list[object]:
    overrides = {f"engine.{name}": value for name, value in fields.items()}
    out = subprocess.run(
        [sys.executable, "-c", _PINNED, json.dumps(overrides)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    found: list[object] = json.loads(out)
    return found


def test_a_worker_stays_on_its_cores() -> None:
    here = sorted(os.sched_getaffinity(0))
    last = here[-1]
    assert pinned_to(cpus=str(last)) == [[last], 1]
    assert pinned_to(cpus=str(last), threads=3) == [[last], 3]
    assert pinned_to(cpus="shared") == [here, None]
    assert pinned_to() == [here, None]
