"""The running totals of one worker, and those of one gateway."""

from __future__ import annotations

from collections import Counter

COUNTERS = (
    "refused",
    "aborts",
    "preemptions",
    "tokens_computed",
    "tokens_generated",
    "prompt_tokens_computed",
    "prompt_tokens_recomputed",
    "prefix_query_tokens",
    "prefix_hit_tokens",
    "imported_blocks",
    "restored_blocks",
    "early_blocks",
    "lent_blocks",
    "store_full_waits",
    "late_renewals",
    "leases_expired",
    "fallback_export_failed",
)
"""There from the start; `fallback_import_<reason>`, `early_lost_<reason>` come as they happen."""


REQUEST_COUNTERS = (
    "lenders_late",
    "stale_messages",
    "placed_again",
    "given_up",
    "workers_silent",
    "workers_stuck",
    "workers_thawed",
)
"""Of a gateway, there from the start; `observe.metrics_docs` tells what they mean."""


def new_request_counters() -> Counter[str]:
    """All at zero."""
    return Counter(dict.fromkeys(REQUEST_COUNTERS, 0))


def new_counters() -> Counter[str]:
    """All at zero."""
    return Counter(dict.fromkeys(COUNTERS, 0))
