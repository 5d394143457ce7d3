"""The environment variables that vLLM's CPU build is tuned by."""

from __future__ import annotations

from collections.abc import Iterable


def vllm_env(kv_bytes: int, cores: Iterable[int]) -> dict[str, str]:
    """KV cache in whole GiB, rounded up, and one thread on each of `cores`; no usage report."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(-(-kv_bytes // (1 << 30))),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
