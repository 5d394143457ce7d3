"""What the twin is given to serve: requests with their times and lengths."""

from __future__ import annotations

import msgspec


class TraceRequest(msgspec.Struct, frozen=True):
    """One request of a trace. Times in seconds from the start of the trace."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    id: str = ""
    blocks: tuple[int, ...] = ()  # ids of the prompt's full blocks, equal id = equal prefix up to there
    block_size: int = 0  # tokens a block of `blocks`; 0: no sharing known
    session: str = ""  # turns of one conversation
    kind: str = ""  # workload class, e.g. chat
    tenant: str = ""
    ttft_s: float | None = None  # measured, where the trace has it
    tpot_s: float | None = None
    e2e_s: float | None = None
