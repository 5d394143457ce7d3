"""What happened, as a Chrome trace: open it in chrome://tracing or ui.perfetto.dev.

One process a worker, with a row for its steps and one for its fetches; a last one with a row a
request, from arrival over the first token to the end.
"""

from __future__ import annotations

import msgspec

from baton.core.plan import ImportOrder, StepPlan

_STEPS, _FETCHES = 0, 1
_US = 1e6


class Tracer:
    """Collects trace events; all times in seconds of the run."""

    def __init__(self) -> None:
        self._events: list[dict[str, object]] = []
        self._pids: dict[str, int] = {}

    def worker(self, worker_id: str) -> None:
        pid = self._pids.setdefault(worker_id, len(self._pids) + 1)
        self._name(pid, None, worker_id)
        self._name(pid, _STEPS, "steps")
        self._name(pid, _FETCHES, "fetches")

    def step(self, worker_id: str, plan: StepPlan, began: float, ends: list[float]) -> None:
        """One step, or several of one shape that were jumped over."""
        num_tokens, num_seqs = plan.num_tokens, len(plan.chunks)
        kind = "decode" if num_tokens == num_seqs else "prefill"
        times = f" x{len(ends)}" if len(ends) > 1 else ""
        self._slice(
            self._pids[worker_id],
            _STEPS,
            f"{kind}{times}",
            began,
            ends[-1],
            {"step": plan.step, "steps": len(ends), "seqs": num_seqs, "tokens": num_tokens},
        )

    def fetch(self, worker_id: str, order: ImportOrder, began: float, end: float) -> None:
        source = "own store" if order.grant is None else order.grant.source
        name = f"{len(order.wanted)} blocks from {source}"
        args: dict[str, object] = {"blocks": len(order.wanted), "codec": order.codec}
        args["early"] = order.seq_id is None
        self._slice(self._pids[worker_id], _FETCHES, name, began, end, args)

    def request(
        self, number: int, arrival: float, first: float | None, end: float, failure: str | None
    ) -> None:
        """Queue and prefill, then decode."""
        pid = len(self._pids) + 1
        args: dict[str, object] = {"failure": failure} if failure else {}
        self._slice(pid, number, "to first token", arrival, end if first is None else first, args)
        if first is not None:
            self._slice(pid, number, "decode", first, end, args)

    def mark(self, name: str, when: float) -> None:
        """Something that befell the deployment."""
        self._events.append({"name": name, "ph": "i", "s": "g", "ts": when * _US, "pid": 0})

    def to_json(self) -> bytes:
        self._name(len(self._pids) + 1, None, "requests")
        return msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"})

    def _slice(
        self, pid: int, row: int, name: str, began: float, end: float, args: dict[str, object]
    ) -> None:
        event = {"name": name, "ph": "X", "pid": pid, "tid": row, "args": args}
        event |= {"ts": round(began * _US, 3), "dur": round((end - began) * _US, 3)}
        self._events.append(event)

    def _name(self, pid: int, row: int | None, name: str) -> None:
        event: dict[str, object] = {"ph": "M", "pid": pid, "args": {"name": name}}
        event["name"] = "process_name" if row is None else "thread_name"
        if row is not None:
            event["tid"] = row
        self._events.append(event)
