"""The bench of the start reads the log as the processes write it, and tells medians."""

from __future__ import annotations

import start
from parts.start import Reached, Started, _reached


def test_lines_of_the_log_tell_how_far_a_process_came() -> None:
    lines = [
        (1.0, "[gateway] 10:00:00 INFO gateway baton.gateway.main loading model=m"),
        (1.5, "[decode-0] 10:00:00 INFO decode-0 baton.worker.main loading role=decode model=m"),
        (1.7, "[gateway] 10:00:01 INFO gateway baton.gateway.main listening host=h port=1"),
        (2.0, "[decode-0] something else"),
        (2.5, "[decode-0] 10:00:02 INFO decode-0 baton.engine.build engine device=cpu"),
        (2.6, "[decode-0] 10:00:02 INFO decode-0 baton.engine.build engine dtype=bfloat16"),
        (3.0, "[decode-0] 10:00:02 INFO decode-0 baton.worker.worker worker id=decode-0 a=b ready"),
        (3.1, "[stranger] 10:00:02 INFO stranger baton.worker.worker worker id=stranger ready"),
    ]
    assert _reached({"gateway": 0.3, "decode-0": 0.4}, lines) == {
        "gateway": Reached(0.3, 1.0, 0.0, 1.7),
        "decode-0": Reached(0.4, 1.5, 2.5, 3.0),
    }


def test_the_table_has_medians() -> None:
    starts = [
        Started("1U", ready, {"unified-0": Reached(0.3, imported, 2.5, 3.0)})
        for ready, imported in ((4.0, 1.0), (3.0, 1.2), (9.0, 8.0))
    ]
    assert start.render(starts).splitlines()[2:] == [
        "| 1U | all | | | | | **4.00** (3.00–9.00) |",
        "| 1U | unified-0 | 0.30 | 1.20 | 2.50 | 3.00 | |",
    ]
