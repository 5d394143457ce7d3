"""Made-up prompts, no two alike, so that no prefix cache answers unless a trace asks for it.

Words are short and common, hence about one token each in most vocabularies; token ids are exact.
A trace's blocks give the same text for the same id, so prefixes are shared as in the trace.
"""

from __future__ import annotations

import random

from baton.cli.load.workload import Arrival, Prompt
from baton.errors import ConfigError

FIRST_TOKEN_ID = 100
"""Lower ids are often special tokens."""
_TRIES = 1000
WORDS = (  # noqa: SIM905
    "the of and to in is was for on are with as at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other "
    "about out many then them these so some her would make like him into time has look two more "
    "write go see number no way could people my than first water been call who oil its now find "
    "long down day did get come made may part over new sound take only little work know place year "
    "live me back give most very after thing our just name good man think say great where help "
    "through much before line right too mean old any same tell boy follow came want show also "
    "around form three small set put end does another well large must big even such because turn "
    "here why ask went men read need land home us move try kind hand picture again change off play"
).split()


class PromptSource:
    """Makes the prompt of each arrival; the same seed makes the same prompts in the same order.

    vocabulary: token ids below this number are sent instead of words; None sends words.
    """

    def __init__(self, seed: str, vocabulary: int | None = None) -> None:
        if vocabulary is not None and vocabulary <= FIRST_TOKEN_ID:
            raise ConfigError(f"--token-ids {vocabulary}: must be more than {FIRST_TOKEN_ID}")
        self._seed = seed
        self._rng = random.Random(f"{seed}/prompts")
        self._vocabulary = vocabulary
        self._seen: set[int] = set()

    def make(self, arrival: Arrival) -> Prompt:
        """A prompt of the arrival's length, or the data set's own.

        Raises:
            ConfigError: there are too few prompts of that length to keep all different.
        """
        if arrival.prompt is not None:
            return arrival.prompt
        ids: list[int] = []
        for block in arrival.blocks:
            ids += self._draw(random.Random(f"{self._seed}/{block}"), arrival.block_tokens)
        if arrival.blocks:
            missing = max(0, arrival.prompt_tokens - len(ids))
            ids = ids[: arrival.prompt_tokens] + self._draw(self._rng, missing)
        else:
            ids = self._draw_new(arrival.prompt_tokens)
        return ids if self._vocabulary is not None else " ".join(WORDS[i] for i in ids)

    def _draw(self, rng: random.Random, count: int) -> list[int]:
        if self._vocabulary is None:
            return rng.choices(range(len(WORDS)), k=count)
        return rng.choices(range(FIRST_TOKEN_ID, self._vocabulary), k=count)

    def _draw_new(self, count: int) -> list[int]:
        for _ in range(_TRIES):
            ids = self._draw(self._rng, count)
            fingerprint = hash(tuple(ids))
            if fingerprint not in self._seen:
                self._seen.add(fingerprint)
                return ids
        raise ConfigError(
            f"no more different prompts of {count} tokens: make --prompt-tokens larger"
        )
