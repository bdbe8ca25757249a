"""The sparse form: a part of W itself is trained, W' = W + scale * values on a support.

Three ways to compute, equal by law:

* *live*: the base weight holds the trained values, so forward is the base's own product; backward keeps only what the
  support needs and computes the gradient of the support alone. ``chain`` writes the values after each optimizer step.
* *over*: the base is packed (NF4, int8) and cannot hold them. Forward reads it, sets the values into the copy and drops it;
  backward does so again. Kept are the packed weight and what *live* keeps.
* *branch*: beside an untouched base, for stacks, per-row adapters, and wrappers such as DoRA.

The values are float32 masters (float64 on a float64 base); the live weight is their sum with the base, rounded once.
The scale makes one learning rate serve all densities and widths; see :func:`auto_scale`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from intarsia.edits import Edit
from intarsia.edits import Sparse as SparseEdit
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.method import Start
from intarsia.operators import KINDS, STACK, Operator
from intarsia.site import Site
from intarsia.support import Column, Granularity, Plan, Row, Shape, free_count

Read = Callable[[torch.dtype], Tensor]  # of a packed weight: its numbers (O, I), a new tensor each time


class Sparse(Delta):
    """State: ``values`` (trained, zero at the start) and ``index``; with ``start`` where the columns themselves are trained."""

    kinds = frozenset((*KINDS, STACK))
    avoids = True
    moves_support: ClassVar[bool] = True  # whether any unit may be given up for any other (intarsia.regrow)

    @abstractmethod
    def granularity_at(self, shape: Shape) -> Granularity:
        """What the support is made of in a weight of this shape."""

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """How many units of a weight of this shape are trained."""

    @abstractmethod
    def scale_at(self, shape: Shape) -> float:
        """The factor in front of the values."""

    @abstractmethod
    def choose(self, site: Site, start: Start) -> Tensor:
        """The support: sorted unit indices."""

    def trains_weights(self) -> bool:
        """Whether the state holds the trained weights (divided by the scale) instead of their change."""
        return False

    def stays_wide(self) -> frozenset[str]:
        # The change is small beside the weights it may be the difference of.
        return frozenset({"values", "start"})

    def trained_count(self, shape: Shape) -> int:
        return self.units(shape) * self.granularity_at(shape).size(shape)

    def check(self, site: Site) -> str | None:
        unit, units = self.granularity_at(site.shape), self.units(site.shape)
        most = unit.units(site.shape)
        what = f"{unit.plural} of the {site.shape[0]} x {site.shape[1]} weight"
        if units < 1:
            return f"{site.name}: none of the {most} {what} would be trained; raise the density"
        if units > most:
            return f"{site.name}: {units} {what} are asked for, and there are {most}"
        if units > (left := free_count(unit, site)):
            return (
                f"{site.name}: {units} {what} are asked for, and {left} of its {most} are left beside the adapters to avoid; "
                "ask for fewer, or avoid fewer adapters"
            )
        return None

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        return self.at_rest(
            site, self.choose(site, start) if start.index is None else start.index.to(site.weight.device)
        )

    def at_rest(self, site: Site, index: Tensor) -> dict[str, Tensor]:
        """The state on a support where nothing has changed."""
        shape = self.granularity_at(site.shape).values_shape(site.shape, len(index))
        return self._state(site, index, torch.zeros(shape, dtype=_wide(site), device=site.weight.device))

    def _state(self, site: Site, index: Tensor, delta: Tensor) -> dict[str, Tensor]:
        scale = self.scale_at(site.shape)
        if not self.trains_weights():
            return {"values": nn.Parameter(_values(delta, scale)), "index": index}
        start = self.granularity_at(site.shape).gather(site.weight.detach(), index).to(_wide(site))
        # What the first values stand for, which differs from the weight in the last bit where no number times the scale is
        # the weight: so the change is zero at the start for any scale.
        start = scale * _values(start, scale)
        return {"values": nn.Parameter(_values(delta, scale, start)), "index": index, "start": start}

    def plan(self, p: Any) -> Plan:
        return self._unit_and_scale(p)[0].plan(p.shape, p.index)

    def traits(self, shape: Shape) -> tuple[Granularity, float]:
        return self.granularity_at(shape), self.scale_at(shape)

    def _unit_and_scale(self, p: Any) -> tuple[Granularity, float]:
        # A forward asks once a layer, and working them out takes as long as a small product.
        return p.traits or self.traits(p.shape)

    def change(self, p: Any) -> Tensor:
        """What is added to the support, in the granularity's shape of values."""
        grown: Tensor = self._unit_and_scale(p)[1] * p.values
        return grown.sub(p.start) if self.trains_weights() else grown

    def delta(self, p: Any) -> Tensor:
        return self._unit_and_scale(p)[0].scatter(p.shape, p.index, self.change(p))

    def branch(self, p: Any, x: Tensor) -> Tensor:
        x = x.to(_autocast_dtype(x) or x.dtype)
        change = self.change(p).to(x.dtype if x.is_floating_point() else p.dtype)
        return _Branch.apply(x, change, p.index, p.operator, self._unit_and_scale(p)[0], p.shape, *p.plan)  # type: ignore[no-any-return, no-untyped-call]

    def live(self, p: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Forward with a weight that holds the values already. W (O, I), (..., I) -> (..., O)."""
        cast = _autocast_dtype(x)
        if cast is not None:
            x, b = x.to(cast), None if b is None else b.to(cast)
        unit, scale = self._unit_and_scale(p)
        return _Live.apply(x, W, b, p.values, p.index, p.operator, unit, p.shape, scale, cast is not None, *p.plan)  # type: ignore[no-any-return, no-untyped-call]

    def over(self, p: Any, x: Tensor, read: Read, stored: torch.dtype, b: Tensor | None) -> Tensor:
        """Forward with a base that cannot hold the values: ``read`` gives its numbers, of the dtype ``stored``, anew."""
        x = x.to(_autocast_dtype(x) or x.dtype)
        b = None if b is None else b.to(x.dtype)
        read = partial(read, torch.promote_types(stored, x.dtype) if x.dtype == torch.float64 else stored)
        return _Over.apply(x, b, p.values, p.index, self, p, read, *p.plan)  # type: ignore[no-any-return, no-untyped-call]

    def set_into(self, p: Any, W: Tensor) -> Tensor:
        """W with the change added on the support, in float32 or wider, and rounded once. In place."""
        unit, change = self._unit_and_scale(p)[0], self.change(p)
        unit.put(W, p.index, (unit.gather(W, p.index).to(change.dtype) + change).to(W.dtype))
        return W

    def edit(self, p: Any) -> Edit:
        return SparseEdit(
            p.shape, self._unit_and_scale(p)[0], p.index.detach().clone(), self.change(p).detach().clone()
        )

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        unit, units = self.granularity_at(site.shape), self.units(site.shape)
        if not isinstance(edit, SparseEdit) or edit.granularity != unit or len(edit.index) != units:
            found = f"{len(edit.index)} {edit.granularity}" if isinstance(edit, SparseEdit) else f"a {edit.kind} edit"
            raise IntarsiaError(f"{site.name}: the file has {found}; its own config asks for {units} {unit}: {self}")
        return self._state(site, edit.index.clone(), edit.values.to(_wide(site)))


def auto_scale(shape: Shape, trained: int, unit: Granularity) -> float:
    """A factor for which one learning rate serves all densities, widths and granularities.    s = C / (p^a (sqrt(O) + sqrt(I)) / 2)

    One Adam step moves every trained value by the learning rate, up or down. Such a sign pattern of density p on an O x I
    weight has a spectral norm between sqrt(p) (sqrt(O) + sqrt(I)), where the signs are as of coins, and p sqrt(O I) where
    they agree as much as they can (whole rows or columns: sqrt(p O I)). Powers and constants are fitted,
    docs/learning-rate.md: a = 7/8 and C = 3; for rows and columns a = 3/4 and C = 4.28. At most 32, since the norm of a single
    entry is 1 already. Rounded to 2^e or 1.5 * 2^e, so that multiplying by it costs one bit at most.
    """
    rows, columns = shape
    power, constant = (3 / 4, 4.28) if isinstance(unit, Row | Column) else (7 / 8, 3.0)
    p = max(1, trained) / (rows * columns)
    exact = min(32.0, constant / (p**power * (math.sqrt(rows) + math.sqrt(columns)) / 2))
    near = 2.0 ** math.floor(math.log2(exact))
    return min((near, 1.5 * near, 2 * near), key=lambda s: abs(math.log(s / exact)))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes on x's device, or None outside of it."""
    if x.dtype == torch.float64 or not x.is_floating_point():  # which autocast leaves alone
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _wide(site: Site) -> torch.dtype:
    return torch.promote_types(site.weight.dtype, torch.float32)


def _values(delta: Tensor, scale: float, start: Tensor | None = None) -> Tensor:
    """The values with ``scale * values (- start) == delta`` to the bit, where there are such (always, for a saved adapter)."""

    def change(values: Tensor) -> Tensor:
        grown = scale * values
        return grown if start is None else grown - start

    found = (delta if start is None else start + delta) / scale
    above = below = found
    for _ in range(4):  # rounding twice is off by a few units in the last place at most
        if torch.equal(change(found), delta):
            break
        above, below = above.nextafter(above.new_tensor(torch.inf)), below.nextafter(below.new_tensor(-torch.inf))
        for nearby in (above, below):
            found = torch.where((change(found) != delta) & (change(nearby) == delta), nearby, found)
    return found


class _Live(torch.autograd.Function):
    """The layer's product with a W that holds the values. Keeps what the support needs of x, a reference to W, no more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        values: Tensor,
        index: Tensor,
        operator: Operator,
        granularity: Granularity,
        shape: Shape,
        scale: float,
        cast: bool,
        *plan: Tensor,
    ) -> Tensor:
        kept = operator.keep(x, granularity, index, plan) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, W, index, *plan)
        ctx.operator, ctx.granularity, ctx.shape = operator, granularity, shape
        ctx.x_shape, ctx.scale, ctx.dtype = x.shape, scale, values.dtype
        return operator.product(x, W.to(x.dtype) if cast else W, b)

    @staticmethod
    @once_differentiable  # what is kept has no graph, so a second derivative would be wrong without a word
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        kept, W, index, *plan = ctx.saved_tensors
        gx = ctx.operator.input_gradient(gy, W.to(gy.dtype), ctx.x_shape) if ctx.needs_input_grad[0] else None
        gv = None
        if ctx.needs_input_grad[3]:
            gv = ctx.operator.support_gradient(gy, kept, ctx.granularity, index, plan, ctx.shape)
            gv = gv.to(ctx.dtype) * ctx.scale
        gb = ctx.operator.bias_gradient(gy) if ctx.needs_input_grad[2] else None
        return gx, None, gb, gv, *(None for _ in range(6 + len(plan)))


class _Over(torch.autograd.Function):
    """The layer's product with W = the base's numbers with the values set in. Made in forward and again in backward, never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b: Tensor | None,
        values: Tensor,
        index: Tensor,
        method: Sparse,
        p: Any,
        read: Callable[[], Tensor],
        *plan: Tensor,
    ) -> Tensor:
        unit, _ = method._unit_and_scale(p)
        kept = p.operator.keep(x, unit, index, plan) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, values, index, *plan)  # values: to notice when they are written before backward
        ctx.method, ctx.p, ctx.read, ctx.x_shape = method, p, read, x.shape
        y: Tensor = p.operator.product(x, method.set_into(p, read()).to(x.dtype), b)
        return y

    @staticmethod
    @once_differentiable  # what is kept has no graph, so a second derivative would be wrong without a word
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, index, *plan = ctx.saved_tensors
        method, p = ctx.method, ctx.p
        gx = gv = None
        if ctx.needs_input_grad[0]:
            gx = p.operator.input_gradient(gy, method.set_into(p, ctx.read()).to(gy.dtype), ctx.x_shape)
        if ctx.needs_input_grad[2]:
            unit, scale = method._unit_and_scale(p)
            gv = p.operator.support_gradient(gy, kept, unit, index, plan, p.shape).to(values.dtype) * scale
        gb = p.operator.bias_gradient(gy) if ctx.needs_input_grad[1] else None
        return gx, gb, gv, *(None for _ in range(4 + len(plan)))


class _Branch(torch.autograd.Function):
    """The layer's product with S = scatter(change). S is built again in backward instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        change: Tensor,
        index: Tensor,
        operator: Operator,
        granularity: Granularity,
        shape: Shape,
        *plan: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(operator.keep(x, granularity, index, plan), change, index, *plan)
        ctx.operator, ctx.granularity, ctx.shape, ctx.x_shape = operator, granularity, shape, x.shape
        return operator.product(x, granularity.scatter(shape, index, change))

    @staticmethod
    @once_differentiable  # what is kept has no graph, so a second derivative would be wrong without a word
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        kept, change, index, *plan = ctx.saved_tensors
        gx = gv = None
        if ctx.needs_input_grad[0]:
            delta = ctx.granularity.scatter(ctx.shape, index, change)
            gx = ctx.operator.input_gradient(gy, delta, ctx.x_shape)
        if ctx.needs_input_grad[1]:
            gv = ctx.operator.support_gradient(gy, kept, ctx.granularity, index, plan, ctx.shape).to(change.dtype)
        return gx, gv, *(None for _ in range(4 + len(plan)))
