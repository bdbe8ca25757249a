"""What a search makes large: how much of each skill's gain a merge retains, and one number of all skills."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from intarsia.errors import IntarsiaError, nearest

Losses = Mapping[str, float]  # skill -> held-out loss, nats a token


@dataclass(frozen=True)
class Gains:
    """What each adapter alone gains on its own skill: from the base's loss to the adapter's.

    Raises:
        IntarsiaError: for a loss that is not finite, and an adapter that gains nothing: no share of that can be retained.
    """

    base: Losses
    single: Losses

    def __post_init__(self) -> None:
        faults = []
        for skill, base in self.base.items():
            single = self.single[skill]
            if not math.isfinite(base) or not math.isfinite(single):
                faults.append(
                    f"{skill}: loss {base} of the base, {single} of the adapter alone; expected finite numbers"
                )
            elif single >= base:
                faults.append(
                    f"{skill}: the adapter alone has loss {single:.4f} on these rows, the base {base:.4f}: it gains nothing, "
                    "so there is no gain to retain. Are these the rows of its skill?"
                )
        if faults:
            raise IntarsiaError("\n".join(faults))

    def retained(self, losses: Losses) -> dict[str, float]:
        """Skill -> (base - fused) / (base - single): 1 is all of the gain, 0 the base's loss; it may lie beyond both."""
        return {
            skill: (base - losses[skill]) / (base - self.single[skill]) for skill, base in self.base.items()
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"base": dict(self.base), "single": dict(self.single)}


@dataclass(frozen=True)
class Objective:
    """One number of the retained shares of all skills; more is better.

    ``worst``: the least of them. ``mean``: their mean. ``weighted``: sum_s c_s r_s / sum_s c_s with the ``importance`` c.

    Raises:
        IntarsiaError: for an unknown name, and importances that are not positive.
    """

    name: str = "worst"
    importance: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise IntarsiaError(f"unknown objective {self.name!r}; {nearest(self.name, OBJECTIVES)}")
        if (self.name == "weighted") != bool(self.importance):
            raise IntarsiaError("importances belong to the objective 'weighted', and it needs them: {skill: number}")
        if bad := {s: c for s, c in self.importance.items() if not (math.isfinite(c) and c > 0)}:
            raise IntarsiaError(f"the importance of a skill is a positive number; found {bad}")

    def check(self, skills: Mapping[str, Any]) -> None:
        """Raises IntarsiaError unless every skill, and nothing else, has an importance where they are wanted."""
        if self.name == "weighted" and set(self.importance) != set(skills):
            raise IntarsiaError(f"importances of {', '.join(self.importance)}; the skills are {', '.join(skills)}")

    def __call__(self, retained: Mapping[str, float]) -> float:
        if self.name == "worst":
            return min(retained.values())
        c = self.importance or dict.fromkeys(retained, 1.0)
        return sum(c[skill] * share for skill, share in retained.items()) / sum(c.values())

    @property
    def title(self) -> str:
        """For a sentence: "the worst skill's" (retained share)."""
        return {"worst": "the worst skill's", "mean": "the mean", "weighted": "the weighted mean"}[self.name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name} | ({"importance": dict(self.importance)} if self.importance else {})


OBJECTIVES = ("worst", "mean", "weighted")
