"""The reference of all metrics, from the table that declares them; `docs/metrics.md` is it."""

from __future__ import annotations

from baton.observe.audit import Stage
from baton.observe.metrics import (
    GATEWAY_EVENTS,
    METRICS,
    PLAN_STALE,
    PREDICTION_ERROR,
    WORKER_EVENTS,
    Metric,
)
from baton.observe.plan_watch import Reason

_INTRODUCTION = f"""\
The gateway serves these at `/metrics` on its admin listener (`gateway.admin_host`,
`gateway.admin_port`; by default `http://127.0.0.1:8001/metrics`), in the text format of Prometheus.
Times are in seconds. Workers have no listener of their own: what they report with every step stands
here under the label `worker`. When a worker starts anew its own totals begin at 0 again;
`{WORKER_EVENTS.name}` goes on from where it was.
"""

EVENTS: dict[str, str] = {
    "tokens_computed": "Tokens that went through the model, prompt and generated.",
    "tokens_generated": "Tokens drawn.",
    "prompt_tokens_computed": "Prompt tokens computed for the first time.",
    "prompt_tokens_recomputed": "Prompt tokens computed again after a preemption.",
    "prefix_query_tokens": "Tokens looked up in the prefix cache at admission.",
    "prefix_hit_tokens": "Of these, the tokens found.",
    "preemptions": "Sequences that gave back their blocks because the KV pool was full.",
    "imported_blocks": "Blocks fetched from another worker's store, for a sequence that waited for "
    "them, and verified.",
    "restored_blocks": "Blocks that came back from this worker's own store.",
    "early_blocks": "Blocks fetched, and verified, before the sequence that needs them came.",
    "lossy_blocks_*": "Of these two, blocks that came in the lossy codec of the ending.",
    "converted_blocks": "Of the imported and the early ones, blocks that were made of a worker's "
    "whose blocks are unlike: of another size, type or device.",
    "early_lost_*": "Blocks that could not be fetched early; the ending says why. They are asked "
    "for again. 0 without faults.",
    "blocks_by_*": "Blocks fetched from other workers over `shm`, `tcp` or `nixl`, and verified.",
    "ms_by_*": "Milliseconds spent fetching over `shm`, `tcp` or `nixl`, failures included.",
    "lent_blocks": "Blocks of the store opened to a worker that computes a prompt with the same "
    "beginning.",
    "fallback_import_*": "Blocks, or whole handoffs, that could not be used and were recomputed; "
    "the ending says why. 0 without faults.",
    "fallback_export_failed": "Blocks that could not be copied into the store. 0 without faults.",
    "store_full_waits": "Steps in which a prompt had to wait because the store was full.",
    "leases_expired": "Leases that ended because nobody renewed them.",
    "late_renewals": "Renewals of a lease that had ended.",
    "refused": "Requests refused by the worker: invalid, or it is draining.",
    "aborts": "Sequences ended because the gateway asked for it.",
}
"""What the label `event` of `WORKER_EVENTS` may be; `*` stands for any ending."""


REQUEST_EVENTS: dict[str, str] = {
    "lenders_late": "Requests that went on without the blocks of a lender, which had not answered "
    "in time, or was lost.",
    "stale_messages": "Messages of workers about a request, an attempt or a leg that is over; what "
    "they would hold is let go. Some are ordinary: they crossed an abort.",
    "placed_again": "Requests placed anew, with what was emitted, because their worker was lost, "
    "stands still or drains. 0 without faults.",
    "given_up": "Requests that ended with an error because their retries, or the time to wait for "
    "a worker, were used up. 0 without faults.",
    "workers_silent": "Workers that nothing was heard of for too long; their requests were placed "
    "again. 0 without faults.",
    "workers_stuck": "Workers whose step, or copies, did not get on for too long; the same. "
    "0 without faults.",
    "workers_thawed": "Of these two, workers that went on.",
}
"""What the label `event` of `GATEWAY_EVENTS` may be."""


STAGES: dict[Stage, str] = {
    Stage.QUEUE: "Until the first chunk of the prompt.",
    Stage.PREFILL: "From there to the first token.",
    Stage.TRANSFER: "What the decode worker waited for blocks of the prompt.",
    Stage.DECODE: "The mean gap between two tokens of a request.",
    Stage.PROMPT_STEP: "A step with prompts in it, by the profile of the worker's role.",
    Stage.DECODE_STEP: "A step without, by the same.",
}
"""What the label `stage` of `PREDICTION_ERROR` may be."""


REASONS: dict[Reason, str] = {
    Reason.RATE_HIGH: "More requests a second than the plan holds for (`plan.max_rate`).",
    Reason.RATE_LOW: "For a day so few that another plan wins (`plan.min_rate`).",
    Reason.PROMPT_LENGTHS: "Prompts of other lengths (`plan.prompt_tokens`).",
    Reason.OUTPUT_LENGTHS: "Answers of other lengths (`plan.output_tokens`).",
    Reason.ATTAINMENT: "Fewer requests keep the promise (`plan.slo`, `plan.attainment`).",
    Reason.STEP_ERROR: "Steps are further off than the profile's held-out error explains "
    "(`plan.prompt_step_error`, `plan.decode_step_error`).",
}
"""What the label `reason` of `PLAN_STALE` may be."""


def reference() -> str:
    """The page, in Markdown."""
    lines = ["# Metrics", "", *_INTRODUCTION.splitlines(), ""]
    lines += ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    lines += [_line(metric) for metric in METRICS]
    lines += ["", f"## Events of `{WORKER_EVENTS.name}`", ""]
    lines += ["An event that has not happened has no series.", ""]
    lines += ["| event | meaning |", "|---|---|"]
    lines += [f"| `{event}` | {meaning} |" for event, meaning in EVENTS.items()]
    lines += ["", f"## Events of `{GATEWAY_EVENTS.name}`", ""]
    lines += ["| event | meaning |", "|---|---|"]
    lines += [f"| `{event}` | {meaning} |" for event, meaning in REQUEST_EVENTS.items()]
    lines += ["", f"## Stages of `{PREDICTION_ERROR.name}`", ""]
    lines += ["Requests are predicted by the router when it places them. See `audit.md`.", ""]
    lines += ["| stage | what is predicted and measured |", "|---|---|"]
    lines += [f"| `{stage}` | {meaning} |" for stage, meaning in STAGES.items()]
    lines += ["", f"## Reasons of `{PLAN_STALE.name}`", ""]
    lines += ["| reason | what no longer holds |", "|---|---|"]
    lines += [f"| `{reason}` | {meaning} |" for reason, meaning in REASONS.items()]
    lines += ["", "## Buckets of the histograms", "", "| name | upper bounds |", "|---|---|"]
    lines += [
        f"| `{metric.name}` | {', '.join(f'{bound:g}' for bound in metric.buckets)} |"
        for metric in METRICS
        if metric.buckets
    ]
    return "\n".join(lines) + "\n"


def _line(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"
