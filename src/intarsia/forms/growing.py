"""The growing form: an update of rank R that gets more of them in training, from a reserve that was trained before.    dW = s_R B diag(lam) A

Shapes: O out_features, I in_features, c the most ranks a weight may have. All c are there from the start, so that shapes stay, as compiled
code, checkpoints and DDP want it; the first R are in use, the next ones are the reserve, and the rest wait as they were drawn.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, LowRank
from intarsia.errors import IntarsiaError
from intarsia.forms.importance import Sensed
from intarsia.forms.paced import Paced
from intarsia.site import Site
from intarsia.support import Shape

FAINT = 1e-5  # lam of the reserve: it is trained, and the output hardly sees it


class Growing(Paced, Sensed):
    """State: ``A`` (c, I), ``B`` (O, c), ``lam`` (c,); ``count``, R, and ``reserve``, how many come after them; ``step`` and ``began``
    (c,), the step when each was taken into use; ``weight``, one over the number of weights, 0 until the first reallocation.
    In eval mode, and so in the edit, only the R in use act.
    """

    target: int  # rank of a weight at the end, on average
    top: int  # weights that grow in a round
    warmup: float  # share of the run before the first round
    until: float  # share of the run after which no rank is added
    warm: int  # optimizer steps in which a rank that is new comes up to full speed

    @abstractmethod
    def room(self, shape: Shape) -> int:
        """c."""

    @abstractmethod
    def scale_at(self, R: Any) -> Any:
        """s_R, of a number or a tensor."""

    @property
    def added(self) -> int:
        """Ranks that a weight gets in a round."""
        return max(1, self.target // 2)

    def trained_count(self, shape: Shape) -> int:
        return self.room(shape) * (sum(shape) + 1)

    def begin(self, site: Site, trained: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The state of these tensors with ``count`` ranks in use and no reserve."""
        device, wide = site.weight.device, torch.promote_types(site.weight.dtype, torch.float32)
        state: dict[str, Tensor] = {k: nn.Parameter(t.to(device, wide, copy=True)) for k, t in trained.items()}
        whole = {"count": count, "reserve": 0, "step": 0}
        state |= {k: torch.tensor(number, device=device) for k, number in whole.items()}
        state["began"] = torch.full((len(trained["lam"]),), -self.warm, device=device)
        state["weight"] = torch.zeros((), dtype=wide, device=device)
        return self.sensed(self.kept(state, ("A", "B", "lam")))

    def stays_wide(self) -> frozenset[str]:
        return super().stays_wide() | {
            "A",
            "B",
            "lam",
        }  # they are multiplied in the dtype that is stored, as in the edit

    def factors(self, p: Any) -> tuple[Tensor, Tensor]:
        """Their product, times the scale, is dW. (O, c), (c, I)."""
        acts, wide = _first(p, p.count + p.reserve if p.training else p.count), torch.promote_types(p.B.dtype, p.dtype)
        return (p.B * torch.where(acts, p.lam, 0)).to(wide), p.A.to(wide)

    def scale_now(self, p: Any) -> Any:
        """s_R as it is, in float64."""
        return self.scale_at(p.count.double())

    def delta(self, p: Any) -> Tensor:
        B, A = self.factors(p)
        return self.scale_now(p) * (B @ A)  # type: ignore[no-any-return]

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(p).to(W.dtype), b

    def quick_branch(self, p: Any, x: Tensor) -> Tensor:
        B, A = self.factors(p)
        return self.scale_now(p) * p.operator.low_rank(x, B.to(p.dtype), A.to(p.dtype))  # type: ignore[no-any-return]

    def paces(self, p: Any) -> dict[str, Tensor]:
        used = _first(p, p.count)
        pace = ((p.step - p.began + 1) / (self.warm + 1)).clamp(max=1)
        moves = torch.where(used, pace, _first(p, p.count + p.reserve).to(pace.dtype))
        return {"A": moves[:, None], "B": moves, "lam": torch.where(used, pace, 0)}

    def before_step(self, p: Any) -> None:
        Sensed.before_step(self, p)
        Paced.before_step(self, p)

    def after_step(self, p: Any, lr: float) -> None:
        super().after_step(p, lr)
        p.step.add_(1)

    def lay_in(self, p: Any, ranks: int) -> None:
        """Make the next ranks the reserve, as many as there is room for; 0: none."""
        R = int(p.count)
        p.reserve.fill_(min(ranks, len(p.lam) - R))
        p.lam[R : R + ranks] = FAINT

    def rounds(self, step: int, steps: int, whole: int) -> int:
        """How many of the ``whole`` rounds are due after a step: evenly from ``warmup`` to ``until`` of the run."""
        share, length = step / steps - self.warmup, self.until - self.warmup
        return 0 if share < 0 else min(whole, 1 + math.floor(share / length * (whole - 1) + 1e-9) if length else whole)

    def reallocate(self, states: Mapping[str, Any], step: int, steps: int) -> dict[str, int]:
        goal = self.target * len(states)
        whole = -(-(goal - len(states)) // (self.top * self.added))
        if step == 1:
            for p in states.values():
                p.weight.fill_(1 / len(states))
                self.lay_in(p, self.added)
        due = self.rounds(step, steps, whole)
        new = due - (self.rounds(step - 1, steps, whole) if step > 1 else 0)
        if not (new or step in (1, steps)):
            return {}
        counts, done = {site: int(p.count) for site, p in states.items()}, 0
        while (done < new or due == whole or step == steps) and self._round(states, counts, goal):
            done += 1
        if due == whole or step == steps:
            for p in states.values():
                self.lay_in(p, 0)
        return counts

    def _round(self, states: Mapping[str, Any], counts: dict[str, int], goal: int) -> bool:
        """Take the reserve of the weights with the highest scores into use, as far as the goal and their room go."""
        before = sum(counts.values())
        open_ = [site for site, p in states.items() if counts[site] < len(p.lam)]
        for site in sorted(open_, key=lambda site: -self.score(states[site]))[: self.top]:
            p = states[site]
            R, more = counts[site], min(self.added, len(p.lam) - counts[site], goal - sum(counts.values()))
            p.began[R : R + more] = p.step
            p.count.add_(more)
            counts[site] += more
            self.lay_in(p, self.added)
        return sum(counts.values()) > before

    def off_orthogonal(self, p: Any) -> Tensor:
        """||A A^T - 1|| + ||B^T B - 1||, of the ranks in use and the reserve."""
        acts = _first(p, p.count + p.reserve).to(p.A.dtype)
        A, B = acts[:, None] * p.A, acts * p.B
        off: Tensor = (A @ A.mT - acts.diag()).norm() + (B.mT @ B - acts.diag()).norm()
        return off

    def edit(self, p: Any) -> Edit:
        R = int(p.count)
        B, A = (p.B * p.lam).detach()[:, :R].contiguous(), p.A.detach()[:R].clone()
        return LowRank(p.shape, B, A, float(self.scale_at(R)))

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        R, most = len(edit.A) if isinstance(edit, LowRank) else 0, self.room(site.shape)
        if not isinstance(edit, LowRank) or not 1 <= R <= most or edit.scale != float(self.scale_at(R)):
            raise IntarsiaError(
                f"{site.name}: the file has a {edit.kind} edit that its own config does not make: {self}"
            )
        A, B = edit.A.new_zeros(most, site.shape[1]), edit.B.new_zeros(site.shape[0], most)
        lam = edit.A.new_zeros(most)
        A[:R], B[:, :R], lam[:R] = edit.A, edit.B, 1.0  # lam is in B
        return self.begin(site, {"A": A, "B": B, "lam": lam}, R)


def _first(p: Any, count: Tensor) -> Tensor:
    """Which of the ranks are the first ``count``. (c,)"""
    return torch.arange(len(p.lam), device=p.lam.device) < count
