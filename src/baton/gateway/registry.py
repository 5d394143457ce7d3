"""The workers that a gateway knows, and its stream to each.

    Announce ──▶ connecting ──Hello fits──▶ joined ──stream lost──▶ gone
                     │  └──Hello that does not fit──▶ refused: told so at its next Announce
                     └──stream lost──▶ gone

Workers need not be alike: what `core.unlike` can convert may join.
All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from baton.core.unlike import End, misfit
from baton.gateway.dispatch import Readiness
from baton.rpc.channel import is_numeric, split_tcp_address
from baton.rpc.client import WorkerLink
from baton.rpc.messages import Address, Announce, AnnounceReply, Hello, StepReport
from baton.rpc.tls import RpcTls
from baton.types import Role, WorkerLoad

logger = logging.getLogger(__name__)

_WORKER_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MUST_AGREE = ("model", "vocab_size", "max_model_len")
_ROLES = (Role.PREFILL, Role.UNIFIED, Role.DECODE)
"""Those that compute prompts come first."""
_MAX_REFUSED = 64


class Member:
    """One worker: its link, and from its Hello on what it last said of itself."""

    __slots__ = ("announced", "counters", "draining", "frozen", "hello", "link", "load")

    def __init__(self, announced: Announce, link: WorkerLink) -> None:
        self.announced = announced
        self.link = link
        self.hello: Hello | None = None
        self.load = WorkerLoad()
        self.counters: dict[str, int] = {}
        self.draining = False
        self.frozen = False  # it stands still; see `gateway.watch`


class Registry:
    """Members by worker id. `expected` is the number of workers of each role in the layout."""

    def __init__(
        self,
        gateway_id: str,
        gateway_epoch: int,
        secret: bytes,
        runtime_dir: Path,
        expected: Mapping[Role, int],
        *,
        on_join: Callable[[Hello], None],
        on_report: Callable[[str, StepReport], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self._gateway_id = gateway_id
        self._gateway_epoch = gateway_epoch
        self._secret = secret
        self._runtime_dir = runtime_dir
        self._expected = {role: count for role, count in expected.items() if count}
        self._on_join = on_join
        self._on_report = on_report
        self._on_lost = on_lost
        self._members: dict[str, Member] = {}
        self._refused: dict[tuple[str, int], str] = {}  # by worker id and epoch, oldest first
        self._was_complete = False
        self._tls: RpcTls | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def open_to_hosts(self, tls: RpcTls | None) -> None:
        """Speak `tls` (None: plain text) with workers that announce themselves over TCP."""
        self._tls = tls

    def announce(self, message: Announce, caller: str | None = None) -> AnnounceReply:
        """A worker says that it is there; a new start of it takes the place of the old one.

        caller: the host that it calls from; None through the Unix socket.
        """
        worker_id = message.worker_id
        if not _WORKER_ID.fullmatch(worker_id):
            return AnnounceReply(False, "a worker id has 1 to 64 letters, digits, '_', '.', '-'")
        problem = self._unfollowable(message, caller)
        if problem is None:
            problem = self._refused.get((worker_id, message.epoch))
        if problem is not None:
            return AnnounceReply(False, problem)
        known = self._members.get(worker_id)
        if known is not None:
            if known.announced.epoch == message.epoch:
                return AnnounceReply(True)
            self._remove(worker_id, "started anew")
        link = WorkerLink(
            message.address,
            self._gateway_id,
            self._gateway_epoch,
            self._secret,
            on_hello=lambda hello: self._greeted(message, hello),
            on_report=lambda report: self._reported(message, report),
            on_lost=lambda reason: self._lost(message, reason),
            tls=self._tls,
        )
        self._members[worker_id] = Member(message, link)
        link.start()
        return AnnounceReply(True)

    def _unfollowable(self, message: Announce, caller: str | None) -> str | None:
        """Why the address is not followed: a peer does not send this side where it likes.

        On this host a worker is where its socket must be. Elsewhere it is TLS that says whether a
        worker of ours answers there, and without TLS it must be where it called from.
        """
        if caller is None:
            if message.address == f"unix:{self._runtime_dir / message.worker_id}.sock":
                return None
            return "the worker's socket is not in this runtime directory"
        host = (split_tcp_address(message.address) or ("", 0))[0]
        if not is_numeric(host):
            return f"{message.address} is not the numeric address and port of a worker"
        if self._tls is None and host != caller:
            return f"without TLS a worker must announce the host that it calls from, {caller}"
        return None

    def link(self, worker_id: str) -> WorkerLink | None:
        member = self._members.get(worker_id)
        return None if member is None else member.link

    def joined(self) -> list[Member]:
        """Members that have said a fitting Hello, by worker id."""
        return [self._members[i] for i in sorted(self._members) if self._members[i].hello]

    def set_frozen(self, worker_id: str, frozen: bool) -> None:
        """A worker stands still, or goes on."""
        member = self._members.get(worker_id)
        if member is not None:
            member.frozen = frozen

    def hello(self) -> Hello | None:
        """Of a worker that computes prompts, if one is there: requests are placed by its keys."""
        hellos = [member.hello for member in self.joined() if member.hello is not None]
        return min(hellos, key=lambda hello: _ROLES.index(hello.role), default=None)

    def hello_of(self, worker_id: str) -> Hello | None:
        """What one member has said of itself."""
        member = self._members.get(worker_id)
        return None if member is None else member.hello

    def readiness(self) -> Readiness:
        """Ready when the layout has been complete once and no worker pool is empty now."""
        have = dict.fromkeys(self._expected, 0)
        for member in self.joined():
            if not member.draining and not member.frozen:
                role = member.announced.role
                have[role] = have.get(role, 0) + 1
        wanted = dict.fromkeys(self._expected, 1) if self._was_complete else self._expected
        missing = [
            f"{have[role]} of {count} {role.value} workers are there"
            for role, count in wanted.items()
            if have[role] < count
        ]
        if missing:
            return Readiness(False, "; ".join(missing))
        self._was_complete = True
        return Readiness(True)

    async def close(self) -> None:
        for member in self._members.values():
            self._close(member.link)
        await asyncio.gather(*self._closing)

    def _is_current(self, announced: Announce) -> bool:
        member = self._members.get(announced.worker_id)
        return member is not None and member.announced is announced

    def _greeted(self, announced: Announce, hello: Hello) -> None:
        if not self._is_current(announced):
            return
        problem = self._misfit(announced, hello)
        if problem is not None:
            logger.error("worker id=%s refused: %s", announced.worker_id, problem)
            self._refused[announced.worker_id, announced.epoch] = problem
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._remove(announced.worker_id, problem)
            return
        self._members[announced.worker_id].hello = hello
        logger.info("worker id=%s role=%s joined pid=%d", hello.worker_id, hello.role, hello.pid)
        self._tell_peers()
        self._on_join(hello)

    def _tell_peers(self) -> None:
        """Every worker hears where the others serve their blocks to other hosts."""
        hellos = [member.hello for member in self.joined()]
        addresses = tuple(
            Address(
                hello.worker_id,
                hello.epoch,
                hello.fabric_host,
                hello.fabric_port,
                hello.nixl_port,
            )
            for hello in hellos
            if hello is not None and (hello.fabric_port or hello.nixl_port)
        )
        if addresses:
            for member in self.joined():
                member.link.tell_peers(addresses)

    def _misfit(self, announced: Announce, hello: Hello) -> str | None:
        said = (announced.worker_id, announced.epoch, announced.role)
        if (hello.worker_id, hello.epoch, hello.role) != said:
            return "its Hello is not what it announced"
        for member in self.joined():
            if member.hello is not None and (problem := _difference(hello, member.hello)):
                return problem
        return None

    def _reported(self, announced: Announce, report: StepReport) -> None:
        if not self._is_current(announced):
            return
        member = self._members[announced.worker_id]
        member.load = report.load
        member.draining = report.draining
        if report.counters:
            member.counters = report.counters
        if report.fatal is not None:
            logger.error("worker id=%s fatal: %s", announced.worker_id, report.fatal.message)
        self._on_report(announced.worker_id, report)

    def _lost(self, announced: Announce, reason: str) -> None:
        if self._is_current(announced):
            self._remove(announced.worker_id, reason)

    def _remove(self, worker_id: str, reason: str) -> None:
        member = self._members.pop(worker_id)
        logger.warning("worker id=%s gone: %s", worker_id, reason)
        self._close(member.link)
        self._on_lost(worker_id, reason)

    def _close(self, link: WorkerLink) -> None:
        # Not awaited here: this may be one of the link's own callbacks.
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _difference(hello: Hello, other: Hello) -> str | None:
    """Why these two cannot serve together, as a sentence with the field and both values."""
    found: tuple[str, object, object] | None = next(
        (
            (field, getattr(hello, field), getattr(other, field))
            for field in _MUST_AGREE
            if getattr(hello, field) != getattr(other, field)
        ),
        None,
    ) or misfit(_end(hello), _end(other))
    if found is None:
        return None
    field, theirs, ours = found
    return (
        f"its {field} is {theirs}, that of {other.worker_id} is {ours}: "
        "their KV cannot be converted, so give both the same"
    )


def _end(hello: Hello) -> End:
    return End(hello.fingerprint, hello.numerics, hello.kv_format)
