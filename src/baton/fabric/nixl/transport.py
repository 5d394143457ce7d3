"""The reading half: a `Transport` whose blocks come through NIXL.

A fetch is cut into sections, each into batches of one bank:

    reads    pages of headers ► frames of batch 1 ► of batch 2 ► … ► pages of headers ► next section
    helper                             └► check, copy out  └► check, copy out

The fetching thread does nothing but read, section after section; a thread of the transport's does
the rest meanwhile. So frames are read before their headers are looked at, into staging memory; but
only what the headers say is right is copied from there.

`NixlTransport` owns the peers, the memory they land in (`MAX_STAGINGS` at most, quarantined ones
included) and the helper.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

from baton.fabric.arena import PAGE_BYTES, Geometry, first_bytes, kv_format_hash
from baton.fabric.nixl.agent import warm_up
from baton.fabric.nixl.door import Doors, knock
from baton.fabric.nixl.peer import Peer, PeerLost
from baton.fabric.nixl.sections import Landing, sections
from baton.fabric.nixl.staging import NUM_BANKS, Staging
from baton.fabric.nixl.wire import Unreadable
from baton.fabric.transport import ReadResult, Wanted
from baton.types import Grant, KvFormat

logger = logging.getLogger(__name__)

MAX_EPOCHS_PER_SOURCE: Final = 2
MAX_PEERS: Final = 64
MAX_STAGINGS: Final = 4


class NixlTransport:
    """A `Transport` over NIXL; cannot enforce a grant once a store's door has opened.

    kv_format: ours; a store of another format answers WRONG_FORMAT.

    Raises:
        ConfigError: NIXL is not installed, or does not start.
    """

    def __init__(self, doors: Doors, kv_format: KvFormat) -> None:
        warm_up()
        self._doors = doors
        self._kv_format_hash = kv_format_hash(kv_format)
        self._frame_bytes = kv_format.block_bytes
        self._peers: dict[tuple[str, int], Peer] = {}  # last used last
        self._free: list[Staging] = []
        self._num_stagings = 0
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="baton-nixl-copy")

    @property
    def quarantined_bytes(self) -> int:
        """Memory in which reads that missed their deadlines may still land."""
        stuck = [peer.stuck_in for peer in self._peers.values()]
        return sum(staging.num_bytes for staging in stuck if staging is not None)

    @property
    def num_reads(self) -> int:
        """NIXL transfers begun with the peers there are now."""
        return sum(peer.num_reads for peer in self._peers.values())

    def fetch(
        self, grant: Grant, wanted: Sequence[Wanted], deadline: float, codec: str = "raw"
    ) -> list[ReadResult]:
        """See `Transport.fetch`. Blocks come as they are stored, whatever the codec.

        Takes at most `ASK_TIMEOUT_S` to reach a source that is new. A source that owes us a read
        is UNREACHABLE at once, until it has ended.
        """
        results: list[ReadResult | None] = [None] * len(wanted)
        rest, reason = ReadResult.UNREACHABLE, ""
        for _ in range(2):  # its serving process may just have been started again
            rest, reason, lost = self._try(grant, wanted, results, deadline)
            if lost is None:
                break
            # Only here, where no traceback refers to it any more, does the agent end at once.
            self._destroy(lost)
        if reason:
            logger.warning(
                "cannot read source=%r epoch=%d result=%s reason=%s",
                grant.source,
                grant.epoch,
                rest,
                reason,
            )
        return [rest if result is None else result for result in results]

    def forget(self, source: str) -> None:
        """End the agents for `source`, which is gone: what it owed us cannot come any more."""
        self._keep_newest(source, 0)

    def rest(self) -> None:
        """See what has become of overdue reads. There is nothing of the peers' to let go of."""
        self._settle()

    def close(self) -> None:
        """End all agents and the thread."""
        for at in list(self._peers):
            self._destroy(at)
        self._helper.shutdown()

    def _try(
        self,
        grant: Grant,
        wanted: Sequence[Wanted],
        results: list[ReadResult | None],
        deadline: float,
    ) -> tuple[ReadResult, str, tuple[str, int] | None]:
        """Fill in what can be known. Returns the result of the rest, why, and whom we have lost."""
        at = grant.source, grant.epoch
        staging = None
        try:
            peer = self._peer(grant, deadline)
            staging = self._take_staging()
            self._fetch(peer, staging, wanted, results, deadline)
            return ReadResult.OK, "", None
        except Unreadable as error:
            return error.result, str(error), None
        except TimeoutError:
            if staging is not None and peer.stuck_in is staging:
                staging = None  # it is not ours to use again
                return ReadResult.TIMED_OUT, "a read missed its deadline", None
            return ReadResult.TIMED_OUT, "the deadline had passed", None
        except PeerLost as error:
            return ReadResult.UNREACHABLE, str(error), at
        finally:
            if staging is not None:
                self._free.append(staging)

    def _fetch(
        self,
        peer: Peer,
        staging: Staging,
        wanted: Sequence[Wanted],
        results: list[ReadResult | None],
        deadline: float,
    ) -> None:
        """Read section after section, while the helper takes out what has been read.

        Neither destinations nor `staging` are touched any more by us when this returns or raises.
        """
        per_bank = staging.banks.frames_per_bank
        under_way: deque[Future[None]] = deque()  # one for each bank that is not empty
        turn = 0
        landed: list[Landing] = []
        try:
            for section in sections(peer.geometry, wanted, results):
                peer.read_pages(staging, False, section.pages, deadline)
                _check_epoch(peer.geometry, staging.page_0(False))
                here = Landing(section, wanted, staging.headers(False, section.places))
                for start in range(0, len(section.frames), per_bank):
                    if len(under_way) == NUM_BANKS:
                        under_way.popleft().result()
                    bank, turn = turn % NUM_BANKS, turn + 1
                    batch = slice(start, start + per_bank)
                    peer.read_frames(staging, bank, section.frames[batch], deadline)
                    under_way.append(
                        self._helper.submit(
                            here.take_out, peer.geometry, staging.banks, bank, batch
                        )
                    )
                peer.read_pages(staging, True, section.pages, deadline)
                _check_epoch(peer.geometry, staging.page_0(True))
                here.after = staging.headers(True, section.places)
                landed.append(here)
        finally:
            wait(under_way)
            for here in landed:
                here.finish(results)
        for copy in under_way:
            copy.result()

    def _peer(self, grant: Grant, deadline: float) -> Peer:
        if time.monotonic() >= deadline:
            raise TimeoutError
        at = grant.source, grant.epoch
        if (peer := self._peers.pop(at, None)) is None:
            door = knock(self._doors, grant, deadline, self._kv_format_hash, self._frame_bytes)
            try:
                peer = Peer(door)
            except BaseException:
                door.close()
                raise
        self._peers[at] = peer
        self._keep_newest(grant.source, MAX_EPOCHS_PER_SOURCE)
        if len(self._peers) > MAX_PEERS:
            self._destroy(next(iter(self._peers)))
        if peer.stuck_in is not None:
            if (freed := peer.settle()) is None:
                raise Unreadable(ReadResult.UNREACHABLE, "it owes us a read")
            self._free.append(freed)
        return peer

    def _take_staging(self) -> Staging:
        if not self._free:
            self._settle()
        if self._free:
            return self._free.pop()
        if self._num_stagings >= MAX_STAGINGS:
            raise Unreadable(ReadResult.UNREACHABLE, "too many reads are overdue")
        self._num_stagings += 1
        return Staging(-(-self._frame_bytes // PAGE_BYTES) * PAGE_BYTES)

    def _settle(self) -> None:
        lost = []
        for at, peer in self._peers.items():
            try:
                if (freed := peer.settle()) is not None:
                    self._free.append(freed)
            except PeerLost:
                lost.append(at)
        for at in lost:
            self._destroy(at)

    def _keep_newest(self, source: str, num_kept: int) -> None:
        known = [at for at in self._peers if at[0] == source]
        for at in known[: len(known) - num_kept]:
            self._destroy(at)

    def _destroy(self, at: tuple[str, int]) -> None:
        if (peer := self._peers.pop(at, None)) and (freed := peer.destroy()):
            self._free.append(freed)


def _check_epoch(geometry: Geometry, page_0: bytes) -> None:
    if not page_0.startswith(first_bytes(geometry)):
        raise Unreadable(ReadResult.STALE_EPOCH, "its first page has changed")
