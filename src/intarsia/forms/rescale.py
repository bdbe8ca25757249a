"""The rescale form: a learned length for every row of what another form makes.    W' = m * V / ||V||,  V = W + delta(p)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, Rescaled, row_norms
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.method import Below, Method, Start
from intarsia.operators import KINDS
from intarsia.site import Site


class Rescale(Method):
    """State: that of the inner method, and ``magnitude`` (O,), the row norms of W at the start, so that W' = W."""

    # Not where the weight is used both ways round: the rows of the one use are no rows of the other.
    kinds = frozenset(KINDS) - {"tied"}
    reads_weights_below = True

    @abstractmethod
    def inside(self) -> Delta:
        """The method whose delta is rescaled."""

    @abstractmethod
    def length(self, V: Tensor) -> Tensor:
        """||V|| by rows, as the backward pass is to see it. (O, I) -> (O,)."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return self.inside().pairs

    def check(self, site: Site) -> str | None:
        return self.inside().check(site)

    def needs(self) -> frozenset[str]:
        return self.inside().needs()

    # --- where the inner method chooses for all sites together, or looks at the inputs: as it does by itself

    @abstractmethod
    def around(self, inner: Method) -> Method:
        """The same with another method inside."""

    def roles_from(self) -> str | None:
        return self.inside().roles_from()

    def takes(self, sites: Mapping[str, Site]) -> Mapping[str, Site]:
        return self.inside().takes(sites)

    @property
    def expected(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.inside().expected

    def chooses_together(self) -> bool:
        return self.inside().chooses_together()

    def survey(self, site: Site, start: Start) -> Tensor:
        return self.inside().survey(site, start)

    def settle(
        self, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> Mapping[str, tuple[Method, Mapping[str, Any]]]:
        settled = self.inside().settle(sites, surveys, seed)
        return {name: (self.around(inner), found) for name, (inner, found) in settled.items()}

    def at(self, edit: Edit, site: Site) -> Method:
        return self.around(self.inside().at(edit.inner, site)) if isinstance(edit, Rescaled) else self

    def observer(self, site: Site) -> Any:
        return self.inside().observer(site)

    def confer(self, observers: Mapping[str, Any]) -> None:
        self.inside().confer(observers)

    def plan(self, p: Any) -> tuple[Tensor, ...]:
        return self.inside().plan(p)

    def traits(self, shape: tuple[int, int]) -> Any:
        return self.inside().traits(shape)

    def stays_wide(self) -> frozenset[str]:
        # In bfloat16 a length could not change by less than 1/256, and m/c would not be 1 at the start.
        return self.inside().stays_wide() | {"magnitude"}

    def carriers(self) -> frozenset[str]:
        return self.inside().carriers()

    def before_step(self, p: Any) -> None:
        self.inside().before_step(p)

    def after_step(self, p: Any, lr: float) -> None:
        self.inside().after_step(p, lr)

    def penalty(self, p: Any) -> Tensor | None:
        return self.inside().penalty(p)

    def reallocate(self, states: Mapping[str, Any], step: int, steps: int) -> Mapping[str, int]:
        return self.inside().reallocate(states, step, steps)

    def wants_callback(self) -> bool:
        return self.inside().wants_callback()

    def trained_count(self, shape: tuple[int, int]) -> int:
        return self.inside().trained_count(shape) + shape[0]

    def shares(self) -> frozenset[str]:
        return self.inside().shares()

    def shared_count(self, shape: tuple[int, int]) -> int:
        return self.inside().shared_count(shape)

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        W = site.weight.detach()
        norms = row_norms(W.to(torch.promote_types(W.dtype, torch.float32)))
        return self.inside().init(site, start) | {"magnitude": nn.Parameter(norms)}

    def _ratio(self, p: Any, W: Tensor) -> Tensor:
        magnitude: Tensor = p.magnitude.to(W.dtype)
        return magnitude / self.length(W + self.inside().delta(p).to(W.dtype))  # (O,)

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        # y = m/c (x V^T) + b without building m/c V: the base's own product, the branch, and the ratio by rows.
        W, b = below.weights(torch.promote_types(p.dtype, torch.float32))
        y = below(x)
        ratio = self._ratio(p, W)
        spread: Callable[[Tensor], Tensor] = p.operator.spread
        product = y if b is None else y - spread(b.to(y.dtype))
        # The difference from 1 before rounding to y's dtype: in bfloat16 there is nothing between 1 and 1.0078.
        return y + spread((ratio - 1).to(y.dtype)) * product + spread(ratio.to(y.dtype)) * self.inside().branch(p, x)

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._ratio(p, W)[:, None] * (W + self.inside().delta(p).to(W.dtype)), b

    def edit(self, p: Any) -> Edit:
        return Rescaled(p.shape, self.inside().edit(p), p.magnitude.detach().clone())

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        if not isinstance(edit, Rescaled):
            raise IntarsiaError(f"{site.name}: the file has a {edit.kind} edit; {self.name} needs a rescaled one")
        wide = torch.promote_types(site.weight.dtype, torch.float32)
        return self.inside().restore(edit.inner, site) | {"magnitude": nn.Parameter(edit.magnitude.to(wide, copy=True))}
