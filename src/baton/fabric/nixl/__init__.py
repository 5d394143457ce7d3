"""Reading blocks through NIXL: RDMA, NVLink or shared memory, whatever UCX finds between two ends.

    worker with a store                                  worker that reads
      NixlStore, a thread                                  NixlTransport
        │ spawns and feeds                                   │ connects, asks with a grant
        ▼                                                    │ (door.py: Unix, or TCP with TLS)
      serving process: nothing but                           ▼
      the arena, read-only, and NIXL  ◄── one-sided READ ── one NIXL agent for each source
                                                             │ into a Staging of our own
                                                             ▼
                                                           copied and digested into the pool

The serving half is a process of its own, because UCX ends the process when a reader dies in the
middle of a read over TCP (it aborts in `ucp_request_inl`), and because who can read through NIXL
can read whatever memory it likes of the process that serves. That process holds the arena, which
readers may see, and nothing else; when it ends it is started again, with a new agent.

NIXL knows no deadlines: a read from a peer that does not answer stays in progress for ever, and
what was asked for may still arrive later, even after the request is released and the peer's
metadata is taken out; only the end of the whole agent keeps it out. So blocks land in memory of
ours, never in the pool; a read that misses its deadline keeps that memory, which is then
quarantined, until NIXL says that the read has ended or the agent is destroyed because the peer is
known to be dead.

NIXL cannot enforce a grant: one trust domain, one isolated network. Metadata are taken only from a
door; NIXL's listener and its descriptors, which are pickles, are never used.
"""

from baton.fabric.nixl.store import NixlStore
from baton.fabric.nixl.transport import NixlTransport

__all__ = ["NixlStore", "NixlTransport"]
