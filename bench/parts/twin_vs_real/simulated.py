"""The twin's side: the same configuration, the same requests, the measured profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.config import load_config
from baton.core.cost import Profile
from baton.observe.results import RequestResult
from baton.twin.setup import deployment
from baton.twin.simulator import Simulator
from baton.twin.workload import TraceRequest
from baton.types import Role


def simulate(
    settings: Mapping[str, str], profile: Profile, trace: Sequence[TraceRequest], message_s: float
) -> list[RequestResult]:
    """What the twin says of each request.

    settings: those of the server, by dotted path. message_s: from gateway to worker, or back.
    """
    longest = max(each.num_prompt_tokens + each.num_output_tokens for each in trace)
    twin = deployment(
        load_config(None, settings),
        dict.fromkeys(Role, profile),
        longest=longest,
        message_s=message_s,
    )
    return Simulator(twin, trace).run().requests
