"""Numbers that change during a run: learning rate, batch size, weight of the prediction loss, speed of the routing bias
are all the same thing, a `Schedule`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from benthic.config.settings import Settings


class Phase(Settings):
    """One stretch of a schedule: how the factor on the peak moves, and where the stretch ends.

    `until` counts from the start of the run: updates, tokens, or the share of all updates. "linear" and "cosine" go
    from the factor of the phase before to this one's; "constant" holds this one's from its first update.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    until: float = Field(gt=0)
    unit: Literal["steps", "tokens", "share"] = "share"
    factor: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _share_is_a_share(self) -> Self:
        if self.unit == "share" and self.until > 1:
            raise ValueError(
                f"until is {self.until:g}; a share of the run is at most 1 (or set unit to steps or tokens)"
            )
        return self


class Schedule(Settings):
    """A number that changes during a run: `peak` times the factor of the phase the run is in.

    The factor starts at `start` and stays at the last phase's when the phases have ended. A plain number, in YAML or
    on the command line, is a schedule that never changes.
    """

    peak: float = Field(ge=0)
    start: float = Field(1.0, ge=0)
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="after")
    def _moving_phases_have_a_start(self) -> Self:
        for before, phase in zip(self.phases, self.phases[1:], strict=False):
            same = before.unit == phase.unit
            if same and phase.until <= before.until:
                raise ValueError(f"phases must end one after another, but {phase.until:g} follows {before.until:g}")
            if not same and phase.shape != "constant":
                raise ValueError(
                    f"a {phase.shape} phase counted in {phase.unit} follows one counted in {before.unit}, so where it "
                    "starts is unknown; count both alike, or put a constant phase between"
                )
        return self


def _plain_number(value: Any) -> Any:
    # YAML 1.1 takes 1e-3 for text, so text counts as a number here; pydantic says so when it is none.
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return {"peak": value} if is_plain else value


Scheduled = Annotated[Schedule, BeforeValidator(_plain_number)]
