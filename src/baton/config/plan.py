"""The section in which a plan's assumptions travel with the configuration that it chose."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from baton.config.sections import Section
from baton.errors import ConfigError
from baton.types import Role

NUM_DECILES = 9
PROFILE_FIELDS = {Role.PREFILL: "prefill_profile_file", Role.DECODE: "decode_profile_file"}
"""What a role's workers may have in place of `profile_file`."""

Rate = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Limit = Annotated[float, Meta(ge=0, le=1e9)]


class PlanConfig(Section, frozen=True):
    """Plan: what was assumed in choosing this deployment; serve says when it holds no more."""

    profile_file: Annotated[
        str | None,
        Meta(
            description="Cost model, from baton profile or baton plan, whose step times are kept "
            "next to the measured ones."
        ),
    ] = None
    prefill_profile_file: Annotated[
        str | None,
        Meta(description="That of prefill workers, where they run on something else."),
    ] = None
    decode_profile_file: Annotated[str | None, Meta(description="That of decode workers.")] = None
    rate: Annotated[
        Rate | None, Meta(description="Requests a second in the busiest time that was planned for.")
    ] = None
    min_rate: Annotated[
        Rate | None, Meta(description="Rate at which, from there down, another plan wins.")
    ] = None
    max_rate: Annotated[Rate | None, Meta(description="Rate up to which the plan holds.")] = None
    prompt_tokens: Annotated[
        str | None,
        Meta(description="Lengths of prompts: 9 numbers, the first to the ninth decile."),
    ] = None
    output_tokens: Annotated[
        str | None, Meta(description="Lengths of answers, as those of prompts.")
    ] = None
    slo: Annotated[str | None, Meta(description="Promise, such as ttft=2s,tpot=50ms.")] = None
    attainment: Annotated[
        Share | None, Meta(description="Share of requests that must keep the promise.")
    ] = None
    predicted_attainment: Annotated[
        Share | None, Meta(description="Share of requests that kept it in the twin.")
    ] = None
    predicted_ttft_s: Annotated[
        Limit | None, Meta(description="Time to first token in the twin, at that share.")
    ] = None
    predicted_tpot_s: Annotated[
        Limit | None, Meta(description="Mean gap between tokens in the twin, at that share.")
    ] = None
    prompt_step_error: Annotated[
        Limit | None,
        Meta(
            description="The held-out error, on steps with prompts, of the profile of workers "
            "that compute these: nine tenths were off by less, as a share of the prediction."
        ),
    ] = None
    decode_step_error: Annotated[
        Limit | None,
        Meta(description="The same of steps without prompts, and of workers that decode."),
    ] = None

    def profile_field(self, role: Role) -> str:
        """The field that says what steps of this role's workers cost; it may hold nothing."""
        own = PROFILE_FIELDS.get(role)
        return own if own and getattr(self, own) else "profile_file"

    def profile_files(self) -> dict[str, str]:
        """By the field that names it: each file that is named."""
        names = ("profile_file", *PROFILE_FIELDS.values())
        return {name: file for name in names if (file := getattr(self, name))}

    def validate(self) -> None:
        """Check what no type can.

        Raises:
            ConfigError: it names the field and what to change.
        """
        for name in ("prompt_tokens", "output_tokens"):
            parse_deciles(getattr(self, name), name)
        if self.min_rate and self.max_rate and self.min_rate > self.max_rate:
            raise ConfigError(
                f"plan.min_rate {self.min_rate:g} is above plan.max_rate {self.max_rate:g}: "
                "swap them"
            )


def parse_deciles(text: str | None, name: str) -> tuple[float, ...]:
    """Nine rising numbers; none at all for nothing.

    Raises:
        ConfigError: it names the field and what to write.
    """
    if text is None:
        return ()
    try:
        values = tuple(float(word) for word in text.split())
    except ValueError:
        values = ()
    rising = all(0 <= a <= b < 1e9 for a, b in pairwise(values))
    if len(values) != NUM_DECILES or not rising:
        raise ConfigError(
            f"plan.{name} {text!r}: write {NUM_DECILES} rising numbers with spaces between, the "
            "first to the ninth decile"
        )
    return values
