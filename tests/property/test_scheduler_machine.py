"""Random traffic through a prefill and a decode worker: see `serving_machine`."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from serving_machine import ServingMachine
from sim_engine import make_config

COMMON = settings(
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # add Phase.shrink to see the shortest history of a failure
    suppress_health_check=list(HealthCheck),
)


def _run(machine: type[ServingMachine], max_examples: int) -> Counter[str]:
    """Run, and return the sum of both workers' counters over all examples."""
    total: Counter[str] = Counter()

    class Counting(machine):  # type: ignore[misc, valid-type]
        def teardown(self) -> None:
            super().teardown()
            for worker in (self.prefill, self.decode):
                total.update(worker.scheduler.counters)
                total["evictions"] += worker.scheduler.pool.num_evictions
                total["unknown_tokens"] += worker.runner.num_unknown

    run_state_machine_as_test(Counting, settings=settings(COMMON, max_examples=max_examples))
    return total


def test_small_pools() -> None:
    total = _run(ServingMachine, 160)
    # The paths that this is about were taken.
    for name in (
        "preemptions",
        "prefix_hit_tokens",
        "imported_blocks",
        "restored_blocks",
        "early_blocks",
        "early_lost_missing",
        "lent_blocks",
        "evictions",
        "aborts",
        "fallback_import_missing",
        "fallback_import_corrupt",
        "store_full_waits",
    ):
        assert total[name], f"no {name} in all examples"


def test_small_pools_at_depth_2() -> None:
    class Machine(ServingMachine):
        depth = 2

    total = _run(Machine, 120)
    for name in ("preemptions", "imported_blocks", "evictions", "aborts", "unknown_tokens"):
        assert total[name], f"no {name} in all examples"


def test_wide_blocks_without_prefix_cache() -> None:
    class Machine(ServingMachine):
        prefill_config = make_config(
            block_size=4,
            num_blocks=6,
            num_frames=5,
            max_num_seqs=3,
            max_num_batched_tokens=3,
            prefix_cache=False,
        )
        decode_config = make_config(
            block_size=4, num_blocks=6, max_num_seqs=5, max_num_batched_tokens=4
        )

    assert _run(Machine, 50)["preemptions"]


def test_blocks_of_one_token() -> None:
    class Machine(ServingMachine):
        prefill_config = make_config(block_size=1, num_blocks=20, num_frames=14)
        decode_config = make_config(block_size=1, num_blocks=20, max_num_batched_tokens=4)

    assert _run(Machine, 50)["imported_blocks"]


def _unlike(prefill_size: int, decode_size: int, **changes: object) -> type[ServingMachine]:
    """Workers of other block sizes, and what else the decode worker has of its own."""

    class Machine(ServingMachine):
        alike = False
        prefill_config = make_config(
            block_size=prefill_size, num_blocks=20 // prefill_size + 1, num_frames=10,
            max_num_seqs=4, max_num_batched_tokens=5, lease_ttl_s=5.0, keep_blocks=True,
        )  # fmt: skip
        decode_config = msgspec.structs.replace(
            make_config(
                block_size=decode_size, num_blocks=20 // decode_size + 1, num_frames=8,
                max_num_seqs=4, max_num_batched_tokens=7, lease_ttl_s=5.0, keep_blocks=True,
            ),
            **changes,
        )  # fmt: skip

    return Machine


@pytest.mark.parametrize(
    ("prefill_size", "decode_size", "changes"),
    [(2, 4, {}), (4, 2, {}), (2, 3, {}), (3, 2, {"numerics": "gpu-other"})],
)
def test_blocks_of_unlike_workers(
    prefill_size: int, decode_size: int, changes: dict[str, object]
) -> None:
    total = _run(_unlike(prefill_size, decode_size, **changes), 120)
    for name in ("preemptions", "prefix_hit_tokens", "imported_blocks", "converted_blocks",
                 "early_blocks", "aborts", "fallback_import_missing",
                     "fallback_import_corrupt"):  # fmt: skip
        assert total[name], f"no {name} in all examples"
    assert not total["fallback_import_format"]
