"""Baton: serve large language models with prefill and decode on separate workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.types import SamplingParams

if TYPE_CHECKING:
    from baton.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # Most of Baton runs without torch, so the engine is imported only by who asks for it.
    if name == "LLM":
        from baton.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'baton' has no attribute {name!r}")
