"""The running totals of one worker."""

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


def new_counters() -> Counter[str]:
    """All at zero."""
    return Counter(dict.fromkeys(COUNTERS, 0))
