"""A small file of every form of trace, as text."""

from __future__ import annotations

import json
from typing import Any

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,0\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:00.017335+00:00,2399,6\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    '{"timestamp": 3000, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]}\n\n'
    '{"timestamp": 3000, "input_length": 100, "output_length": 1, "hash_ids": [4]}\n'
)
COLUMNS = "ts;x,in,out,who\n100,10,1,a\n1600,20,2,b\n"
COLUMNS_MAP = "arrival=ts;x:ms,prompt=in,output=out,tenant=who"
LENGTHS = "num_prefill_tokens,num_decode_tokens\n74,918\n290,905\n"


def vllm(**changes: Any) -> str:
    """What `vllm bench serve --save-detailed` writes, with changes; None removes a list."""
    document: dict[str, Any] = {
        "date": "20260101-000000",
        "input_lens": [10, 20, 30],
        "output_lens": [3, 1, 0],
        "start_times": [105.0, 100.0, 101.0],
        "ttfts": [0.5, 0.25, 0.0],
        "itls": [[0.1, 0.3], [], []],
        "errors": ["", "", "timeout"],
    } | changes
    return json.dumps({name: value for name, value in document.items() if value is not None})


def bench(num_runs: int = 1, **changes: Any) -> str:
    """What `baton bench --json` writes."""
    request = {
        "sent_s": 1.0, "prompt_tokens": 12, "cached_tokens": 4, "output_tokens": 3,
        "failure": None, "ttft_s": 0.5, "tpot_s": 0.1, "e2e_s": 0.7,
    } | changes  # fmt: skip
    failed = request | {"sent_s": 0.0, "failure": "timeout"}
    runs = [{"rate": 1.0, "requests": [request, failed]}] * num_runs
    return json.dumps({"format": "baton-bench/1", "runs": runs}, indent=1)


def waterfall(**changes: Any) -> dict[str, Any]:
    """One of what the gateway's /requests gives."""
    return {
        "request_id": "r1", "choice": 0, "num_prompt_tokens": 40, "num_cached_tokens": 16,
        "num_generated_tokens": 5, "finish": "stop", "ttft_s": 0.2, "e2e_s": 1.0,
        "received_unix_s": 1.7e9,
    } | changes  # fmt: skip


def call(**changes: Any) -> dict[str, Any]:
    """A line of an access log."""
    return {
        "created": 1_700_000_000,
        "status": 200,
        "model": "m",
        "usage": {"prompt_tokens": 100, "completion_tokens": 9},
    } | changes


def lines(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
