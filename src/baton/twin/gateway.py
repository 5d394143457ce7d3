"""The gateway of the twin: the real request table and router, on virtual time.

What it tells a worker, and what a worker tells it, arrives `message_s` later, in order. A report
of a worker that has died since is not believed, as its stream would have ended with it: what was
sent before has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.core.handoff import RequestTable
from baton.core.instructions import (
    Ask,
    Instruction,
    Offer,
    Proceed,
    Release,
    Renew,
    Submit,
    Withdraw,
)
from baton.core.life import Content
from baton.core.router import Router, WorkerInfo
from baton.errors import ServeError
from baton.twin.clock import Clock
from baton.twin.deployment import Deployment
from baton.twin.node import Node
from baton.twin.prompts import Prompts, extend_names
from baton.twin.report import Report
from baton.twin.results import Record
from baton.twin.workload import TraceRequest
from baton.types import FinishReason, Request, SamplingParams


class Gateway:
    """Sends every request of a trace on its way, and keeps a record of what became of each."""

    def __init__(
        self,
        clock: Clock,
        deployment: Deployment,
        nodes: Mapping[str, Node],
        trace: Sequence[TraceRequest],
        router: Router,
    ) -> None:
        self.table = RequestTable(router, deployment.policy, extend_names)
        self.records: dict[str, Record] = {}
        self.num_ended = 0
        self._clock = clock
        self._deployment = deployment
        self._nodes = nodes
        self._trace = trace
        self._prompts = Prompts()
        self._epochs: dict[str, int] = {}
        self._wake_at: float | None = None
        for node in nodes.values():
            self._joined(node)
        self._await_request(0)

    @property
    def is_done(self) -> bool:
        """Every request of the trace has ended."""
        return self.num_ended == len(self._trace)

    # Requests --------------------------------------------------------------------------------

    def _await_request(self, number: int) -> None:
        if number < len(self._trace):
            self._clock.at(self._trace[number].arrival_s, lambda: self._arrives(number))

    def _arrives(self, number: int) -> None:
        self._await_request(number + 1)
        asked, deployment = self._trace[number], self._deployment
        request_id = asked.id or f"r{number}"
        if request_id in self.records:
            request_id = f"{request_id}#{number}"
        record = Record(number, asked)
        self.records[request_id] = record
        if len(self.table) >= deployment.max_queued_requests:
            self._fails(record, "http 429", "the gateway has too many requests in flight")
            return
        sampling = SamplingParams(
            asked.num_output_tokens, self._prompts.own_token(number), temperature=0.0
        )
        request = Request(
            request_id,
            self._prompts.tokens(asked, number),
            sampling,
            deadline_s=deployment.request_timeout_s,
            tenant=asked.tenant,
            salt=asked.tenant.encode(),
        )
        try:
            self.table.add(request, self._clock.now)
        except ServeError as error:
            self._fails(record, f"http {error.status}", error.message)
            return
        self._carry_out()

    def _fails(self, record: Record, failure: str, detail: str) -> None:
        record.fail(self._clock.now, failure, detail)
        self.num_ended += 1

    # Workers ---------------------------------------------------------------------------------

    def _joined(self, node: Node) -> None:
        limits = node.setup.limits
        self._epochs[node.setup.worker_id] = node.epoch
        info = WorkerInfo(
            node.setup.worker_id,
            node.setup.role,
            node.epoch,
            limits.num_blocks,
            limits.kv_format.block_size,
            limits.num_frames,
            limits.keep_blocks,
        )
        content = Content(limits.fingerprint, limits.numerics, limits.kv_format.block_size)
        self.table.join(info, content, self._clock.now)
        self._carry_out()

    def joins(self, node: Node) -> None:
        """A worker has started anew."""
        self._clock.after(self._deployment.message_s, lambda: self._joined(node))

    def loses(self, node: Node) -> None:
        """A worker's stream has ended, without a word."""
        self._epochs[node.setup.worker_id] = 0
        self.table.lose(node.setup.worker_id, self._clock.now, None)
        self._carry_out()

    def freezes(self, node: Node) -> None:
        """A worker is found to stand still."""
        self.table.freeze(node.setup.worker_id, self._clock.now, None)
        self._carry_out()

    def thaws(self, node: Node) -> None:
        """A worker that stood still is heard again."""
        self.table.thaw(node.setup.worker_id, self._clock.now)
        self._carry_out()

    def hear(self, node: Node, report: Report) -> None:
        """A worker sends a report now."""
        worker_id, epoch = node.setup.worker_id, node.epoch
        self._clock.after(self._deployment.message_s, lambda: self._heard(worker_id, epoch, report))

    def _heard(self, worker_id: str, epoch: int, report: Report) -> None:
        if self._epochs[worker_id] != epoch:
            return
        table, now = self.table, self._clock.now
        for sealed in report.sealed:
            table.sealed(worker_id, sealed, now)
        for landed in report.landed:
            table.landed(landed)
        for times in report.times:
            table.timed(worker_id, times)
        for tokens in report.tokens:
            table.delivered(worker_id, tokens.delta(), now)
            self._carry_out(tokens.times)
        for handoff in report.handoffs:
            table.handed_off(worker_id, handoff, now)
        for told in report.alone:
            seq_id = (told.request_id, told.choice, told.attempt)
            table.alone(worker_id, seq_id, told.begins)
        self._carry_out()

    def _carry_out(self, times: Sequence[float] = ()) -> None:
        """Do what the table wants done; `times`: when the tokens that it passes on were here."""
        outcome = self.table.take()
        for delta in outcome.deltas:
            record = self.records[delta.request_id]
            record.take(delta, times)
            if delta.finish is FinishReason.ERROR:
                code = "internal_error" if delta.error is None else delta.error.code
                detail = "" if delta.error is None else delta.error.message
                self._fails(record, code, detail)
            elif delta.finish is not None:
                record.end(self._clock.now)
                self.num_ended += 1
        if outcome.instructions:
            self._tell(outcome.instructions)
        due = self.table.next_deadline()
        if due is not None and (self._wake_at is None or due < self._wake_at):
            self._wake_at = due
            self._clock.at(due, lambda: self._wake(due))

    def _wake(self, due: float) -> None:
        if self._wake_at != due:
            return  # an earlier one was set since
        self._wake_at = None
        self.table.tick(self._clock.now)
        self._carry_out()

    def _tell(self, instructions: Sequence[Instruction]) -> None:
        """One message to each worker, as a link's turn makes it."""
        messages: dict[str, list[Instruction]] = {}
        for instruction in instructions:
            messages.setdefault(instruction.worker_id, []).append(instruction)
        for worker_id, message in messages.items():
            self._send(self._nodes[worker_id], self._epochs[worker_id], message)

    def _send(self, node: Node, epoch: int, message: Sequence[Instruction]) -> None:
        def arrive() -> None:
            if node.epoch == epoch:
                for instruction in message:
                    self._instruct(node, instruction)

        self._clock.after(self._deployment.message_s, arrive)

    def _instruct(self, node: Node, instruction: Instruction) -> None:
        scheduler, clock = node.scheduler, self._clock
        match instruction:
            case Submit(_, leg):
                node.put(lambda: scheduler.add(leg, clock.now))
            case Withdraw(_, request_id, choice, attempt):
                node.put(lambda: scheduler.abort((request_id, choice, attempt)))
            case Proceed(_, request_id, choice, attempt):
                node.put(lambda: scheduler.proceed((request_id, choice, attempt)))
            case Ask(_, lend):
                node.put(lambda: scheduler.lend(lend, clock.now))
            case Offer(_, sealed):
                node.put(lambda: scheduler.offer(sealed, clock.now))
            case Renew(_, grant_ids):
                node.put(lambda: scheduler.renew(grant_ids, clock.now))
            case Release(_, grant_id):
                node.put(lambda: scheduler.release((grant_id,)), urgent=False)
