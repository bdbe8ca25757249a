"""An optimizer around another one: the inner steps on what the outer lets it see of each gradient.

Every parameter has a *proxy* in the inner optimizer. For a matrix that is projected the proxy is a zero of the projected
gradient's shape, so after the inner step it holds the inner's update at learning rate 1, and the outer moves the weight by
it. For any other parameter the proxy is the parameter's own memory. So any ``torch.optim`` class serves that computes an
update from the gradient alone.

Nothing but the state is kept between steps: a proxy is empty then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError

Inner = Callable[..., torch.optim.Optimizer]
Params = Iterable[Tensor] | Iterable[dict[str, Any]]

# Why these cannot be inside.
UNFIT = {
    "LBFGS": "it evaluates the loss several times a step",
    "Adafactor": "its step depends on the size of the parameter, and it is given a projected update to fill in",
    "SparseAdam": "it takes sparse gradients",
}


class Wrapped(torch.optim.Optimizer):
    """State of a parameter: what the inner keeps, under its names, and what this one keeps, under those of ``own``.

    Group options: those of the inner; ``lr``, and ``weight_decay``, which is decoupled for what is projected; ``project``:
    whether the group's matrices are projected (None: those that would be smaller so); the subclass's own.
    """

    own: ClassVar[frozenset[str]] = frozenset({"turn", "P", "Q", "index"})

    def __init__(
        self,
        params: Params,
        inner: Inner,
        lr: float,
        weight_decay: float,
        settings: Mapping[str, Any],
        **options: Any,
    ) -> None:
        self.make_inner, self.settings = inner, dict(settings)
        example = self._new_inner([{"params": [torch.zeros(1, 1)]}])
        defaults, name = example.defaults, type(example).__name__
        if name in UNFIT:
            raise IntarsiaError(
                f"{type(self).__name__} cannot have {name} inside: {UNFIT[name]}; take another, such as AdamW"
            )
        if defaults.get("maximize"):
            raise IntarsiaError(f"{type(self).__name__} goes down; leave maximize out and negate the loss")
        self.inner: torch.optim.Optimizer | None = None
        self.proxies: dict[Tensor, Tensor] = {}
        super().__init__(params, {**defaults, "project": None, **options, "lr": lr, "weight_decay": weight_decay})

    # --- what a subclass says

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise IntarsiaError for a group of parameters that cannot be."""

    def projects(self, group: Mapping[str, Any], shape: tuple[int, int]) -> bool:
        """Whether a matrix of this shape is projected where the group does not say."""
        raise NotImplementedError

    def proxy_shape(self, group: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, ...]:
        """Of what the inner optimizer sees of a matrix."""
        raise NotImplementedError

    def down(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor | None:
        """What the inner optimizer is to see of the gradient of a projected p in this step; may write ``state``."""
        raise NotImplementedError

    def move(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], q: Tensor | None) -> None:
        """Move p, where q is the inner's update at learning rate 1 (already with its sign), None where it saw nothing."""
        raise NotImplementedError

    # --- the machine

    def _new_inner(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self.make_inner(groups, lr=1.0, **self.settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        options = self.defaults | param_group
        for field in ("lr", "weight_decay"):
            if not 0 <= options[field] < float("inf"):
                raise IntarsiaError(f"{type(self).__name__}: {field}={options[field]!r} must be 0 or more")
        self.check(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        plain: list[Tensor] = []
        projected: list[Tensor] = []
        for p in group["params"]:
            selected = self.selects(group, p)
            self.proxies[p] = p.new_zeros(self.proxy_shape(group, (p.shape[0], p.shape[1]))) if selected else p.detach()
            (projected if selected else plain).append(self.proxies[p])
        groups = [{"params": plain}, {"params": projected}]
        if self.inner is None:
            self.inner = self._new_inner(groups)
        else:
            for each in groups:
                self.inner.add_param_group(each)
        for p in group["params"]:
            self._let_go(p)

    def selects(self, group: Mapping[str, Any], p: Tensor) -> bool:
        """Whether p is projected: a matrix, and the group says so, or leaves it to the shape."""
        if p.ndim != 2 or group["project"] is False:
            return False
        return bool(group["project"]) or self.projects(group, (p.shape[0], p.shape[1]))

    def places(self) -> dict[Tensor, int]:
        """The number of every projected parameter."""
        found = [p for group in self.param_groups for p in group["params"] if self.selects(group, p)]
        return {p: number for number, p in enumerate(found)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.inner is not None
        self._tell_inner()
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        try:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        seen.append((p, group))
                        self._show(p, group)
            self.inner.step()
            for p, group in seen:
                self._take(p, group)
        finally:
            for p, _ in seen:
                self._let_go(p)
        return loss

    def _tell_inner(self) -> None:
        """Options of the groups, as schedules have set them."""
        assert self.inner is not None
        for number, group in enumerate(self.param_groups):
            plain, projected = self.inner.param_groups[2 * number : 2 * number + 2]
            options = {key: group[key] for key in self.inner.defaults if key in group}
            plain.update(options)
            projected.update(options | {"lr": 1.0} | ({"weight_decay": 0.0} if "weight_decay" in options else {}))

    def _show(self, p: Tensor, group: Mapping[str, Any]) -> None:
        proxy, G = self.proxies[p], p.grad
        assert G is not None
        if not self.selects(group, p):
            proxy.data, proxy.grad = p.data, G
            return
        R = self.down(p, G, group, self.state[p])
        if R is not None:
            proxy.data, proxy.grad = torch.zeros_like(R), R

    def _take(self, p: Tensor, group: Mapping[str, Any]) -> None:
        proxy, state = self.proxies[p], self.state[p]
        assert self.inner is not None
        assert p.grad is not None
        if proxy.grad is not None:
            state.update(self.inner.state.get(proxy, {}))
        if self.selects(group, p):
            self.move(p, p.grad, group, state, None if proxy.grad is None else proxy.data)
        else:
            torch.autograd.graph.increment_version(p)  # it was written through memory that it shares

    def _let_go(self, p: Tensor) -> None:
        proxy = self.proxies[p]
        proxy.grad = None  # first: it has to have the shape of the data
        proxy.data = proxy.new_empty(0)

    def forget(self, p: Tensor) -> None:
        """Let the inner optimizer begin anew at p."""
        proxy, state = self.proxies[p], self.state[p]
        for key in state.keys() - self.own:
            del state[key]
        self._give(p, {})
        assert self.inner is not None
        state.update(self.inner.state.get(proxy, {}))

    def _give(self, p: Tensor, kept: dict[str, Any]) -> None:
        """Give the inner optimizer its state at p. Some begin with one when they are made, others at their first step."""
        assert self.inner is not None
        proxy = self.proxies[p]
        if not kept:
            group = next(g for g in self.param_groups if any(p is each for each in g["params"]))
            like = (
                p.new_zeros(self.proxy_shape(group, (p.shape[0], p.shape[1]))) if self.selects(group, p) else p.detach()
            )
            kept = dict(self._new_inner([{"params": [like]}]).state.get(like, {}))
        if kept:
            self.inner.state[proxy] = kept
        else:
            self.inner.state.pop(proxy, None)

    # --- copies and files

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        mine = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for p, number in zip(mine, numbers, strict=True):
            # As it was saved: torch casts what it loads to the parameter's type.
            self.state[p] = {
                k: v.to(v.device if v.ndim == 0 else p.device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state_dict["state"].get(number, {}).items()
            }
            self._give(p, {k: v for k, v in self.state[p].items() if k not in self.own})
            if not self.state[p]:
                del self.state[p]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("inner", "proxies", "make_inner", "settings")
        return super().__getstate__() | {key: getattr(self, key) for key in kept}


def one_of(optimizer: Wrapped, options: Mapping[str, Any], **known: Iterable[str]) -> None:
    """Raise IntarsiaError for an option that is none of the known words."""
    for field, words in known.items():
        if options[field] not in words:
            raise IntarsiaError(
                f"{type(optimizer).__name__}: {field}={options[field]!r} must be one of {', '.join(words)}"
            )


def whole(optimizer: Wrapped, options: Mapping[str, Any], *fields: str) -> None:
    """Raise IntarsiaError for an option that is no whole number from 1."""
    for field in fields:
        value = options[field]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise IntarsiaError(f"{type(optimizer).__name__}: {field}={value!r} must be a whole number, 1 or more")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps between steps, counters aside."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.ndim)
