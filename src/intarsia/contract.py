"""The contract: the laws that every method keeps, each written once and run over every registered method.

For a method of one's own, in its tests or with ``intarsia check my_module:MyMethod``:

    from intarsia import contract
    for result in contract.check(MyMethod):
        print(result)

A law is a function of a method that raises :class:`Broken` where the promise in its docstring does not hold. It uses a
net of three small layers (24 x 16, 16 x 24, 24 x 16) on the CPU, or of three small decoders for what stands before tokens, and the state is stirred before anything is compared,
because at the start, where nothing has been learned, most mistakes cannot be seen. What is finished, an edit or a file, is
what an adapter does in eval mode. A method that declares in
``expected`` that a law does not hold is taken at its word: it is an error when that law does hold.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia import chain, registry, store
from intarsia import model as models
from intarsia.deck import Deck
from intarsia.edits import Edit, Insert, Prefix, Prompt, Sum, place, positions
from intarsia.edits import Sparse as SparseEdit
from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse
from intarsia.method import Method
from intarsia.operators import DECODER, decoder_of
from intarsia.schedule import regrow
from intarsia.site import Site, adaptable_layers, site_at, weight_name, weight_of

Law = Callable[[Method], None]

LAWS: dict[str, Law] = {}
WAYS = ("bottleneck", "dora", "lora", "shira")  # a method of each way to act at a layer
LAYERS = ("up", "down", "again")  # 24 x 16, 16 x 24, and 24 x 16 once more: two layers of one shape
EXACT = 1e-10  # float64: the order of summation may differ, the mathematics may not
CLOSE = 2e-5  # float32, values of about 1 through three layers
SHAPES: tuple[tuple[int, ...], ...] = ((16,), (5, 16), (2, 3, 16), (2, 1, 3, 16))  # of inputs
STEP = 1e-5  # of a difference that stands for a derivative; in float64 its error is about the square of it


class Broken(AssertionError):
    """A law does not hold. The message says what was found."""


@dataclass(frozen=True)
class Result:
    """What one law found in one setting of a method.

    Attributes:
        state: ``holds``, ``broken``, or ``expected`` where the method declares that the law does not hold.
        note: what was found, or the declared reason.
    """

    law: str
    method: dict[str, Any]
    state: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.state:8}  {self.law}  {json.dumps(self.method)}" + (
            f"\n          {self.note}" if self.note else ""
        )


def check(subject: str | Method | type[Method], laws: Sequence[str] | None = None) -> list[Result]:
    """Every law for a method: an instance, a class (all of its ``small`` settings), or ``"module:Class"``.

    Raises:
        IntarsiaError: for a subject that cannot be found or is no method, and for an unknown law.
    """
    wanted = list(LAWS) if laws is None else list(laws)
    if unknown := [law for law in wanted if law not in LAWS]:
        raise IntarsiaError(f"unknown law {unknown[0]!r}; known: {', '.join(LAWS)}")
    return [judge(law, method) for method in settings(subject) for law in wanted]


def settings(subject: str | Method | type[Method]) -> list[Method]:
    """The settings that the contract runs. See :func:`check`."""
    found = _find(subject) if isinstance(subject, str) else subject
    if isinstance(found, Method):
        return [found]
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise IntarsiaError(
            f"{subject} is {found!r}; expected a method: a frozen dataclass that derives from intarsia.Method"
        )
    return [found(**small) for small in found.small]


def judge(law: str, method: Method) -> Result:
    """One law for one method, with the method's own ``expected`` honoured strictly."""
    reason = method.expected.get(law)
    try:
        LAWS[law](method)
    except Exception as error:
        if reason is not None:
            return Result(law, method.config(), "expected", reason)
        what = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        return Result(law, method.config(), "broken", what)
    if reason is not None:
        return Result(law, method.config(), "broken", f"it holds, but expected says {reason!r}; remove that entry")
    return Result(law, method.config(), "holds")


def _find(spec: str) -> Any:
    if spec in registry.methods():
        return registry.find(spec)
    module, colon, name = spec.partition(":")
    if not colon:
        raise IntarsiaError(
            f"{spec!r} is no registered method; give module:Class, for example my_package.my_module:MyMethod"
        )
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise IntarsiaError(f"{spec}: {error}") from error


def law(function: Law) -> Law:
    """Decorator: make a function of a method a law, under its name with spaces for underscores."""
    LAWS[function.__name__.replace("_", " ")] = function
    return function


# ------------------------------------------------------------------ what the laws share
def _net(method: Method, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """Where the method can sit: three linear layers, or three small decoders."""
    if _ahead(method):
        return _Decoders().to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 24, bias), nn.Linear(24, 16, bias), nn.Linear(16, 24, bias)]
    net = nn.Sequential()
    for name, layer in zip(LAYERS, layers, strict=True):
        net.add_module(name, layer)
        net.add_module(f"tanh_{name}", nn.Tanh())
    return net.to(dtype)


class _Decoders(nn.Module):
    """up, down, again: decoders of one layer, each of which is given embeddings of width 16."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model  # for methods of this kind alone: importing it takes long

        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(vocab_size=8, n_positions=24, n_embd=16, n_layer=1, n_head=2, **off)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in LAYERS:
                self.add_module(name, GPT2Model(config))

    def forward(self, x: Tensor) -> Tensor:
        for name in LAYERS:
            x = self.get_submodule(name)(inputs_embeds=x, use_cache=False).last_hidden_state.tanh()
        return x


def _out(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer of a net makes of x."""
    y: Tensor = layer(x) if decoder_of(layer) is None else layer(inputs_embeds=x, use_cache=False).last_hidden_state
    return y


def _ahead(method: Method | type[Method]) -> bool:
    """Whether it sits at decoders, and puts something before their tokens."""
    return DECODER in method.kinds


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer, of a decoder that of its embedding, as it stands there."""
    return weight_of(model.get_submodule(name)).detach()


def _others(method: Method) -> list[type[Method]]:
    """Every registered method that sits where this one does; beside the first of its settings all, beside the others one of each
    way to act: what is live, what is beside, what reads the weight, what is no change of it."""
    all_of_them = [cls for _, cls in sorted(registry.methods().items()) if _ahead(cls) == _ahead(method)]
    small = type(method).small
    if _ahead(method) or type(method)(**small[0]) == method:
        return all_of_them
    return [cls for cls in all_of_them if cls.name in WAYS]


def _with_ahead(plain: Any, inserts: Sequence[Insert], x: Tensor) -> Tensor:
    """A bare decoder's output with inserts before the tokens, by hand: a cache that is full already, and more embeddings."""
    from transformers import DynamicCache

    functions: list[Any] = [insert.inserted for insert in inserts]
    keys = [one for one in functions if isinstance(one, Prefix)]
    prompts = [one.P for one in functions if isinstance(one, Prompt)]
    cache, B = DynamicCache(), len(x)
    for layer in range(len(keys[0].K) if keys else 0):
        both = (torch.cat([t[layer] for t in each], 1) for each in ([k.K for k in keys], [k.V for k in keys]))
        cache.update(*(t.to(x).expand(B, *t.shape) for t in both), layer)
    n = sum(map(len, prompts))
    full = torch.cat([*(P.to(x).expand(B, *P.shape) for P in prompts), x], 1)
    found: Tensor = plain(inputs_embeds=full, past_key_values=cache).last_hidden_state[:, n:]
    return found


def _input(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (4, 3, 16), seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    y: Tensor = model(batch)
    return (y.double() - 0.3).square().mean()


def _attach(model: nn.Module, method: Method, name: str = "default", seed: int = 0, **more: Any) -> None:
    dtype = next(p.dtype for p in model.parameters())
    given: dict[str, Any] = {"data": [_input(dtype)], "loss": _loss} | _original(model, method) | more
    models.attach(model, method, name=name, seed=seed, **given)


def _original(model: nn.Module, method: Method) -> dict[str, Any]:
    """What the base was before it was compressed, for a method that asks: its weights, and something besides."""
    if "original" not in method.needs():
        return {}
    found = {}
    for number, (name, layer) in enumerate(adaptable_layers(model).items()):
        W = chain.base_weight(layer).detach()
        found[name] = W + 0.1 * _input(W.dtype, tuple(W.shape), seed=number).to(W.device)
    return {"original": found}


def _stir(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Move every trained number of an adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for state in models.states(model, name).values():
            for parameter in state.learned().values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    models.sync(model)


def _adapted(method: Method, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """A net with a stirred adapter of the method on all of its layers."""
    model = _net(method, dtype, bias)
    _attach(model, method)
    _stir(model)
    return model


def _bits(tensors: dict[str, Tensor]) -> str:
    return store.weights_digest(tensors.items())


def _promise(holds: bool, broken: str) -> None:
    if not holds:
        raise Broken(broken)


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    _promise(found.dtype == expected.dtype, f"{what}: found {found.dtype}, expected {expected.dtype}")
    _promise(
        torch.equal(found, expected), f"{what}: differs by up to {_worst(found, expected):.3g}, expected the same bits"
    )


def _near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    _promise(found.shape == expected.shape, f"{what}: found {tuple(found.shape)}, expected {tuple(expected.shape)}")
    worst = _worst(found, expected)
    bound = tolerance * max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
    _promise(worst <= bound, f"{what}: differs by up to {worst:.3g}, expected at most {bound:.3g}")


def _gradient(parameter: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    if parameter.grad is None:
        raise Broken(f"{what}: there is none")
    _near(parameter.grad, expected, tolerance, what)


def _worst(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not found.numel():
        return 0.0 if found.shape == expected.shape else float("inf")
    worst = float((found.detach().double() - expected.detach().double()).abs().max())
    return float("inf") if worst != worst else worst  # NaN is as far off as can be


def _refused(call: Callable[[], object], what: str, *words: str) -> None:
    """The call is an IntarsiaError that says these words."""
    try:
        call()
    except IntarsiaError as error:
        missing = [word for word in words if word not in str(error)]
        _promise(not missing, f"{what}: the error does not name {', '.join(missing)}: {error}")
        return
    raise Broken(f"{what}: accepted, expected an IntarsiaError")


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failure must leave as it was."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "bits": _bits(model.state_dict()),
        "active": models.active_names(model),
    }


def _unchanged(model: nn.Module, before: dict[str, Any], what: str) -> None:
    after = _snapshot(model)
    for part in before.keys() - {"gradients"}:
        _promise(after[part] == before[part], f"{what}: {part} changed from {before[part]} to {after[part]}")
    for name, gradient in before["gradients"].items():
        found = after["gradients"][name]
        same = found is gradient if gradient is None or found is None else torch.equal(found, gradient)
        _promise(same, f"{what}: the gradient of {name} changed")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="intarsia-") as folder:
        yield Path(folder)


def _sparse(method: Method) -> bool:
    return isinstance(method, Sparse)


def _set_live(model: nn.Module, live: bool) -> None:
    """Compute the active adapters with or without live weights."""
    for layer in chain.adapted_layers(model).values():
        chain.set_active(layer, layer.active, live)


def _init(method: Method, name: str, seed: int) -> dict[str, Tensor]:
    model = _net(method)
    up, again = _weight(model, "up"), _weight(model, "again")
    with torch.no_grad():
        again.copy_(up)  # so that two layers of one shape differ by chance or not at all
    _attach(model, method, seed=seed, targets=name)
    return {key: tensor.detach() for key, tensor in models.states(model, "default")[name].tensors().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# ------------------------------------------------------------------ the laws
@law
def starts_as_the_base(method: Method) -> None:
    """A fresh adapter changes no bit of the output, in fp32, fp64, bf16 and fp16, whichever way it is computed."""
    if not method.starts_as_identity:
        return
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        model, x = _net(method, dtype), _input(dtype)
        weights = {name: _weight(model, name).clone() for name in LAYERS}
        before = model(x)
        _attach(model, method)
        for live in (True, False):
            _set_live(model, live)
            _same(model(x), before, f"output at the start in {dtype}, live={live}")
        for name, weight in weights.items():
            _same(
                _weight(model, name),
                weight.detach(),
                f"{name}.weight at the start in {dtype}",
            )


@law
def only_the_adapter_trains(method: Method) -> None:
    """The base gets no gradient, an optimizer step moves every trained tensor, and the base stays equal to the bit:
    all of it underneath, and outside the support in memory too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _net(method, dtype)
        start = models.digest(model)
        weights = {name: _weight(model, name).clone() for name in LAYERS}
        _attach(model, method)
        _stir(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        outside = [name for name in trained if ".adapters." not in name]
        _promise(not outside, f"{', '.join(outside)} train besides the adapter")
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
        _loss(model, _input(dtype)).backward()
        wrong = [n for n, p in model.named_parameters() if p.grad is not None and ".adapters." not in n]
        _promise(not wrong, f"{', '.join(wrong)} got a gradient besides the adapter")
        optimizer.step()
        notes = {f".{note}" for note in method.carriers()}  # which a method may write or not
        moved = {name: p for name, p in trained.items() if not name.endswith(tuple(notes))}
        still = [name for name, parameter in moved.items() if torch.equal(parameter, before[name])]
        _promise(not still, f"{', '.join(still)} did not move in an optimizer step")
        for name, state in models.states(model, "default").items():
            layer: Any = model.get_submodule(name)
            now = _weight(model, name)
            may = torch.zeros(now.shape, dtype=torch.bool)
            if layer.live is not None:
                index: Any = state.index
                state.granularity().put(may, index, torch.ones_like(layer.kept, dtype=torch.bool))
            _same(now[~may], weights[name][~may], f"{name}.weight outside the support after a step in {dtype}")
        _promise(models.digest(model) == start, f"the digest of the base changed in a step in {dtype}")


@law
def forward_is_the_fold(method: Method) -> None:
    """The forward is F.linear(x, *fold(W, b)): values and every gradient in float64, with and without bias, for 1-D to 4-D
    inputs, live and beside the base. Where nothing folds: the base's output and what the edit's inserts add to it, and gradients
    are what small steps show."""
    if not method.mergeable:
        return _forward_is_the_insert(method)
    for bias in (True, False):
        model = _adapted(method, torch.float64, bias)
        layer: Any = model.get_submodule("up")
        state = layer.adapters["default"]
        W, b = chain.base_weight(layer).clone(), layer.bias
        for shape in SHAPES:
            x = _input(torch.float64, shape).requires_grad_()
            gy = _input(torch.float64, (*shape[:-1], 24), seed=2)
            wanted = [x, *state.learned().values()]
            y = F.linear(x, *state.method.fold(state.cast(torch.float64), W, b))
            expected = torch.autograd.grad(y, wanted, gy)
            for live in (True, False) if _sparse(method) else (True,):
                _set_live(model, live)
                where = f"x {tuple(shape)}, bias={bias}, live={live}"
                found = layer(x)
                _near(found, y, EXACT, f"forward against fold, {where}")
                gradients = torch.autograd.grad(found, wanted, gy)
                names = ["x", *state.learned()]
                for name, gradient, reference in zip(names, gradients, expected, strict=True):
                    _near(gradient, reference, EXACT, f"gradient of {name}, {where}")


def _forward_is_the_insert(method: Method) -> None:
    for bias in (True, False):
        model = _adapted(method, torch.float64, bias).eval()
        layer: Any = model.get_submodule("up")
        plain = _net(method, torch.float64, bias).eval().get_submodule("up")
        state = layer.adapters["default"]
        edit = state.method.edit(state.raw())
        for shape in ((1, 5, 16), (3, 1, 16)) if _ahead(method) else SHAPES:
            x = _input(torch.float64, shape).requires_grad_()
            where = f"x {tuple(shape)}, bias={bias}"
            found = _out(layer, x)
            gy = _input(torch.float64, tuple(found.shape), seed=2)
            _near(found, _with_inserts(plain, [(1.0, edit)], x), EXACT, f"forward against the edit, {where}")
            wanted = {"x": x, **state.learned()}
            gradients = torch.autograd.grad(found, list(wanted.values()), gy)
            for number, (name, gradient) in enumerate(zip(wanted, gradients, strict=True)):
                v = _input(torch.float64, tuple(gradient.shape), seed=number)
                slope = _slope(partial(_weighted, layer, x, gy), wanted[name], v)
                _near((gradient * v).sum(), slope, 1e-6, f"gradient of {name}, {where}")


def _weighted(layer: Any, x: Tensor, gy: Tensor) -> Tensor:
    total: Tensor = (_out(layer, x) * gy).sum()
    return total


def _slope(value: Callable[[], Tensor], tensor: Tensor, v: Tensor) -> Tensor:
    """How the value changes along v, by two small steps of the tensor."""
    there = tensor.detach()  # shares its memory
    before, ends = there.clone(), []
    with torch.no_grad():
        for step in (STEP, -STEP):
            there.copy_(before + step * v)
            ends.append(value())
        there.copy_(before)
    return (ends[0] - ends[1]) / (2 * STEP)


def _with_inserts(plain: Any, terms: Sequence[tuple[float, Edit]], x: Tensor) -> Tensor:
    """The bare layer's output, and what each edit inserts beside it, by its factor; of a decoder, before its tokens."""
    inserts = [(weight * factor, insert) for weight, edit in terms for factor, insert in edit.inserts()]
    _promise(bool(inserts), "the method is not mergeable, and its edit has no insert")
    if decoder_of(plain) is not None:
        return _with_ahead(plain, [insert for _, insert in inserts], x)
    W, b = plain.weight.detach(), plain.bias
    own = F.linear(x, W, b)
    return own + sum(factor * insert.change(x, own, W) for factor, insert in inserts)


@law
def forward_writes_nothing(method: Method) -> None:
    """Forward and backward leave every tensor of the model as it was, gradients apart."""
    model = _adapted(method)
    before = _bits(model.state_dict())
    _loss(model, _input()).backward()
    model.eval()
    with torch.no_grad():
        model(_input())
    _promise(_bits(model.state_dict()) == before, "a forward or backward pass changed a tensor")


@law
def edit_is_the_fold(method: Method) -> None:
    """The finished edit, which knows no method, does to the weight what the fold does, or both say that nothing folds; its
    restored state is the same edit to the bit and shares no memory with it."""
    model = _adapted(method).eval()
    for name, state in models.states(model, "default").items():
        layer: Any = model.get_submodule(name)
        W = chain.base_weight(layer).detach()
        here = state.method
        edit = here.edit(state.raw())
        if method.mergeable:
            folded, _ = here.fold(state.cast(torch.float64), W.double(), None)
            _near(edit.fold(W.double()), folded, EXACT, f"{name}: edit against fold")
        else:
            _refused(partial(edit.fold, W), f"{name}: folding an insert", "folds into no weight")
            _refused(partial(here.fold, state.raw(), W, None), f"{name}: the method's fold", "folds into no weight")
        kept = {key: tensor.clone() for key, tensor in edit.tensors().items()}
        site = site_at(model, name) if _ahead(method) else Site(name, W, None)
        restored = chain.State(here, site, here.restore(edit, site))
        for key, tensor in here.edit(restored.raw()).tensors().items():
            _same(tensor, kept[key], f"{name}: {key} of the restored edit")
        shapes = {k: tuple(p.shape) for k, p in restored.named_parameters()}
        _promise(shapes == {k: tuple(p.shape) for k, p in state.named_parameters()}, f"{name}: restored as {shapes}")
        with torch.no_grad():
            for parameter in restored.parameters():
                parameter.add_(1.0)
        _promise(_equal(edit.tensors(), kept), f"{name}: training the restored state changes the edit it came from")


@law
def setting_in_agrees(method: Method) -> None:
    """A deck gives the weight of the fold, rounded once, and with it the output of the unfused forward; a live weight holds
    the same bits. Taking out gives back the very bits, in fp32, bf16 and fp16, after use, fusion and use again. What folds into no
    weight acts beside the layer with the same output, and leaves no class and no attribute behind."""
    if not method.mergeable:
        return _inserting_agrees(method)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = _adapted(method, dtype).eval()
        fused = _net(method, dtype)
        start = models.digest(fused)
        deck = Deck(fused)
        deck.add(models.export(model, called="a"))
        deck.add(other=models.export(model, called="b"))
        deck.use("a")
        for name, state in models.states(model, "default").items():
            layer: Any = model.get_submodule(name)
            W = state.method.fold(state.raw(), chain.base_weight(layer).double(), None)[0].detach()
            # Half a unit in the last place for the one rounding, and float32's own error before it.
            bound = torch.finfo(dtype).eps / 2 * W.abs() + 1e-5 * W.abs().max()
            found = _weight(fused, name).double()
            off = float(((found - W).abs() - bound).max())
            _promise(off <= 0, f"{name}.weight set in is {off:.3g} outside of one rounding of the fold in {dtype}")
            if layer.live is not None:
                alone = state.method.edit(state.raw())
                part = (
                    alone.parts[0] if isinstance(alone, Sum) else alone
                )  # what stands in the weight; the rest is beside it
                standing = chain.base_weight(layer).detach().clone()
                place(name, standing, [(1.0, part)]).write(standing)
                _same(layer.weight.detach(), standing, f"live {name}.weight in {dtype}")
        if dtype == torch.float32:
            _near(fused(_input()), model(_input()), CLOSE * 10, "output set in against the unfused forward")
        deck.fuse(a=0.6, other=-0.3)
        deck.use("other", strength=0.5)
        deck.off()
        _promise(models.digest(fused) == start, f"taking out did not give the bits back in {dtype}")


def _inserting_agrees(method: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, other, x = _adapted(method, dtype).eval(), _net(method, dtype).eval(), _input(dtype)
        both, half = ({"a": 1.0, "b": 1.0}, 1.0) if _ahead(method) else ({"a": 0.6, "b": -0.3}, 0.5)
        before, y = _snapshot(other), other(x)
        deck = Deck(other)
        deck.add(a=models.export(model), b=models.export(model))
        deck.use("a")
        bound = CLOSE if dtype == torch.float32 else 8 * float(torch.finfo(dtype).eps)
        _near(other(x), model(x), bound, f"output with the insert against the forward in training, {dtype}")
        _promise(not torch.equal(other(x), y), f"the insert does nothing in {dtype}")
        _promise(_bits(other.state_dict()) == before["bits"], f"an insert changed a weight in {dtype}")
        deck.fuse(both)
        if _ahead(method):
            held = other(x)
            _refused(lambda: deck.use("b", strength=0.5), "half of what stands before the tokens", "0.5", "strength 1")  # noqa: B023
            _same(other(x), held, f"output after a refused strength in {dtype}")
        deck.use("b", strength=half)
        deck.off()
        _unchanged(other, before, f"set in and taken out in {dtype}")
        _same(other(x), y, f"output of the base afterwards in {dtype}")


@law
def sums_are_exact(method: Method) -> None:
    """The fusion of adapters is W + sum of w_i (edit_i(W) - W); for sparse edits exactly, on the union of the supports. Of inserts
    each adds to the layer's own output what it adds alone; before the tokens of a decoder they stand behind one another."""
    model, plain = _net(method, torch.float64), _net(method, torch.float64)
    for number, name in enumerate(("a", "b")):
        _attach(model, method, name, seed=number)
        _stir(model, name, seed=number)
    adapters = {name: models.export(model, name) for name in ("a", "b")}
    weights = {"a": 1.0, "b": 1.0} if _ahead(method) else {"a": 0.6, "b": -0.3}
    deck, bare = Deck(plain), _net(method, torch.float64)
    for name, adapter in adapters.items():
        deck.add(**{name: adapter})  # type: ignore[arg-type]  # mypy takes the name for any_base
    before = {name: _weight(plain, name).clone() for name in LAYERS}
    deck.fuse(weights)
    for name, W in before.items():
        if not method.mergeable:
            layer: Any = plain.get_submodule(name)
            x = _input(torch.float64) if _ahead(method) else _input(torch.float64, (4, layer.in_features))
            terms = [(weights[key], adapter.edits[weight_name(plain, name)]) for key, adapter in adapters.items()]
            expected = _with_inserts(bare.get_submodule(name), terms, x)
            _near(_out(layer, x), expected, EXACT, f"output of {name} with two inserts")
            continue
        edits = {key: adapter.edits[f"{name}.weight"] for key, adapter in adapters.items()}
        total = torch.zeros_like(W)
        for key, edit in edits.items():
            total += weights[key] * edit.delta(W)
        found = _weight(plain, name)
        if all(isinstance(edit, SparseEdit) for edit in edits.values()):
            _same(found, W + total, f"{name}.weight fused from sparse edits")
        else:
            _near(found, W + total, EXACT, f"{name}.weight fused")


@law
def avoids_what_it_is_told_to(method: Method) -> None:
    """With ``avoid`` no entry of an earlier adapter may change, and both fused give the values of each to the bit. A method that
    cannot do that refuses and changes nothing."""
    model = _net(method, torch.bfloat16)
    _attach(model, method)
    _stir(model)
    first = dataclasses.replace(models.export(model), name="first")
    models.detach(model, "default")
    before = _snapshot(model)
    if not method.avoids:
        _refused(lambda: _attach(model, method, avoid=first), "an adapter to avoid", "cannot leave out", method.name)
        return _unchanged(model, before, "a refused attach")
    _attach(model, method, avoid=first)
    _stir(model, seed=1)
    second = dataclasses.replace(models.export(model), name="second")
    models.detach(model, "default")
    deck = Deck(model)
    deck.add(first)
    deck.add(second)
    deck.fuse(first=1, second=1)
    fused = {name: _weight(model, name).flatten().clone() for name in LAYERS}
    for adapter in (first, second):
        deck.use(adapter.name)
        for name, W in fused.items():
            edit = adapter.edits.get(f"{name}.weight")
            here = torch.empty(0, dtype=torch.int64) if edit is None else positions(edit)
            assert here is not None  # require_disjoint has looked
            alone = _weight(model, name).flatten()
            _same(W[here], alone[here], f"{name}.weight fused, where {adapter.name} changes it")
    deck.off()


@law
def failures_leave_no_trace(method: Method) -> None:
    """An attach, load, activation or switch that fails at any layer leaves the model as it was, to the bit."""
    model = _net(method)
    (model.get_submodule("down")).requires_grad_(False)
    model.get_submodule("up").eval()
    _loss(model, _input()).backward()
    for already in (False, True):
        if already:
            _attach(model, method, "first")
            _stir(model, "first")
            _loss(model, _input()).backward()
        before = _snapshot(model)
        _refused(lambda: _attach(model, method, "second", targets=["up", "dwon"]), "a misspelt target", "dwon", "down")
        _refused(lambda: _attach(model, method, "a/b"), "a name with a slash", "a/b")
        _unchanged(model, before, "a refused attach")
        for owner, step in ((type(method), "init"), (chain, "put_on"), (chain, "write"), (chain, "set_active")):
            for at in (1, 2, 5):
                if _fails(owner, step, at, lambda: _attach(model, method, "second")):
                    _unchanged(model, before, f"an attach that failed in call {at} of {step}")
                else:
                    models.detach(model, "second")
                    models.activate(model, *before["active"])
    with _folder() as folder:
        models.save(model, folder / "saved", "first")
        other = _net(method)
        before = _snapshot(other)
        if _fails(type(method), "restore", 2, lambda: models.load(other, folder / "saved")):
            _unchanged(other, before, "a load that failed at the second layer")
        narrow = nn.Sequential(nn.Linear(8, 8))
        before = _snapshot(narrow)
        _refused(
            lambda: models.load(narrow, folder / "saved"), "a load on a model of other shapes", weight_name(model, "up")
        )
        _unchanged(narrow, before, "a refused load")


def _fails(owner: Any, step: str, at: int, call: Callable[[], object]) -> bool:
    """Run the call with an error planted in the ``at``-th call of owner.step. -> whether it came so far.

    The planted error must come through as it is.
    """
    real = getattr(owner, step)
    calls = 0

    def fail_once(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise ZeroDivisionError(f"planted in {step}")
        return real(*args, **named)

    with mock.patch.object(owner, step, fail_once):
        try:
            call()
        except ZeroDivisionError:
            return True
    _promise(calls < at, f"an error in call {at} of {step} was swallowed")
    return False


@law
def saves_and_loads_exactly(method: Method) -> None:
    """What is loaded is what was saved, to the bit: the edits, the output, and what trains. Saved again it is the same
    file. A file with a tensor missing, added, of another shape, a bit flipped or an end cut off is refused."""
    model = _adapted(method).eval()
    with _folder() as folder:
        models.save(model, folder / "one", note={"why": "law"})
        other = _net(method).eval()
        _promise(models.load(other, folder / "one", "x") == "x", "load does not give the name back")
        _same(other(_input()), model(_input()), "output after loading")
        trains = {n.replace("adapters.x.", ""): p.numel() for n, p in other.named_parameters() if p.requires_grad}
        expected = {
            n.replace("adapters.default.", ""): p.numel() for n, p in model.named_parameters() if p.requires_grad
        }
        _promise(trains == expected, f"after loading {trains} train; before saving {expected}")
        models.save(other, folder / "two")
        one, two = store.read(folder / "one"), store.read(folder / "two")
        _promise(one.digest == two.digest, "saved, loaded and saved again, the digest is another")
        _promise(registry.build(one.method) == method, f"the file says {one.method}, the method is {method.config()}")
        _strict(folder / "one")


def _strict(folder: Path) -> None:
    file = folder / store.TENSORS
    whole, tensors = file.read_bytes(), load_file(file)
    first = sorted(tensors)[0]
    cases = {
        "a tensor missing": {k: t for k, t in tensors.items() if k != first},
        "a tensor too many": tensors | {"up.weight.more": torch.zeros(1)},
        "a tensor of another shape": tensors | {first: tensors[first].reshape(-1)[1:].clone()},
    }
    for what, broken in cases.items():
        save_file(broken, file)
        _refused(lambda: store.read(folder), what)
    for what, data in (
        ("a file cut off", whole[:-7]),
        ("a bit flipped", whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:]),
    ):
        file.write_bytes(data)
        _refused(lambda: store.read(folder), what)
    file.write_bytes(whole)


@law
def checkpoints_exactly(method: Method) -> None:
    """The state for training checkpoints goes into another model of the same making to the bit, and is strict: a missing,
    added or misshapen tensor is refused and changes nothing."""
    model, other = _adapted(method), _net(method)
    _attach(other, method)
    saved = {key: tensor.clone() for key, tensor in models.adapter_state(model, "default").items()}
    before = _snapshot(other)
    first = sorted(saved)[0]
    for broken in (
        {k: t for k, t in saved.items() if k != first},
        saved | {"up/more": torch.zeros(1)},
        saved | {first: torch.cat([saved[first].reshape(-1)] * 2)},
    ):
        _refused(lambda broken=broken: models.load_adapter_state(other, "default", broken), "a state that does not fit")  # type: ignore[misc]
    _unchanged(other, before, "a refused state")
    models.load_adapter_state(other, "default", saved)
    _same(other(_input()), model(_input()), "output after a checkpoint")
    _promise(_equal(models.adapter_state(other, "default"), saved), "the state after a checkpoint is another")


@law
def same_seed_same_adapter(method: Method) -> None:
    """The start depends on seed and layer and on nothing else: not on the global generator, which stays where it was, and
    not on the order or number of layers. Where there is chance, two layers of one shape get different numbers."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = _init(method, "up", seed=0)
    _promise(torch.equal(torch.get_rng_state(), state), "the start moves the global generator")
    torch.manual_seed(2)
    _promise(_equal(_init(method, "up", seed=0), one), "the start reads the global generator")
    own = [key for key in one if key not in method.shares()]
    other, beside = _init(method, "up", seed=1), _init(method, "again", seed=0)
    if any(not torch.equal(other[key], one[key]) for key in own):
        differ = any(not torch.equal(beside[key], one[key]) for key in own)
        _promise(differ, "two layers of one shape got the same random numbers")
    whole, part = _net(method), _net(method)
    _attach(whole, method)
    _attach(part, method, targets="again")
    found = models.states(part, "default")["again"].tensors()
    _promise(
        _equal(found, models.states(whole, "default")["again"].tensors()), "the start depends on the other targets"
    )


@law
def starts_alike_beside_others(method: Method) -> None:
    """An adapter attached while another one is active starts from the base, as if it were alone."""
    alone, beside = _net(method), _net(method)
    _attach(alone, method)
    for cls in _others(method):
        name = cls.name
        _attach(beside, cls(**cls.small[0]), f"first_{name}")
        _stir(beside, f"first_{name}")
        _attach(beside, method)
        for site, state in models.states(alone, "default").items():
            found = models.states(beside, "default")[site].tensors()
            _promise(_equal(found, state.tensors()), f"{site}: beside an active {name} it starts otherwise")
        models.detach(beside, "default")
        models.detach(beside, f"first_{name}")


@law
def rows_equal_rows_alone(method: Method) -> None:
    """In one batch whose rows use different adapters or the base, each row is that row alone: values and gradients."""
    model, x = _net(method, torch.float64), _input(torch.float64)
    for number, name in enumerate(("a", "b")):
        _attach(model, method, name, seed=number)
        _stir(model, name, seed=number)
    names: list[str | None] = ["a", None, "b", "a"]
    with models.rows(model, names):
        y = model(x)
        y.sin().sum().backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    _promise(models.active_names(model) == ["b"], f"after rows() {models.active_names(model)} is active, it was b")
    for row, each in enumerate(names):
        models.activate(model, *([each] if each else []))
        alone = model(x[row : row + 1])
        _near(y[row : row + 1], alone, EXACT, f"row {row} with {each}")
        if each:
            alone.sin().sum().backward()
    for key, parameter in model.named_parameters():
        single, found = parameter.grad, together.get(key)
        _promise((single is None) == (found is None), f"{key}: has a gradient only one way, together or row by row")
        if single is not None and found is not None:
            _near(found, single, EXACT, f"gradient of {key} over the rows")


@law
def counts_what_it_trains(method: Method) -> None:
    """``trained_count`` is the count of numbers that train, at every shape, ``shared_count`` of those that its sites share, and so is
    the plan made before attaching."""
    model = _net(method)
    planned = models.plan(model, method)
    _attach(model, method)
    shapes = set()
    for name, state in models.states(model, "default").items():
        shape, shared = state.shape, state.method.shares()
        counts = {k: p.numel() for k, p in state.learned().items() if p.requires_grad}
        found = sum(count for k, count in counts.items() if k not in shared)
        declared = state.method.trained_count(shape)
        _promise(found == declared, f"{name}: {found} numbers train, trained_count declares {declared}")
        together, declared = sum(counts.values()) - found, state.method.shared_count(shape)
        _promise(together == declared, f"{name}: {together} numbers are shared, shared_count declares {declared}")
        found += 0 if shape in shapes else together
        shapes.add(shape)
        if not method.chooses_together():  # whose plan knows the sum and not yet the parts
            _promise(found == planned[name], f"{name}: {found} numbers train, the plan says {planned[name]}")
    notes = tuple(f".{name}" for name in method.carriers())
    whole = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.endswith(notes))
    if method.chooses_together():  # units of the model, which need not be of one size
        return
    _promise(whole == sum(planned.values()), f"{whole} numbers train, the plan says {sum(planned.values())} in all")


@law
def keeps_what_it_declares(method: Method) -> None:
    """A live sparse adapter keeps of an input for the backward pass what its granularity says, x or x[..., index], and of
    its own nothing: the rest are references to the weight, the index and tensors that exist anyway."""
    if not isinstance(method, Sparse):
        return
    model = _adapted(method)
    layer: Any = model.get_submodule("up")
    state = layer.adapters["default"]
    x = _input().requires_grad_()
    there = {t.untyped_storage().data_ptr() for t in (layer.weight, layer.bias, *state.parameters(), *state.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    declared = state.granularity().keep(x, state.index, state.plan()).numel()
    _promise(
        sum(kept.values()) == declared, f"{sum(kept.values())} numbers are kept for backward, declared are {declared}"
    )


@law
def sits_where_it_says(method: Method) -> None:
    """At every kind of layer in ``kinds``: starts as the base, the forward is torch's own function of the folded weight,
    values and every gradient, live and beside the base; a deck sets in the same and takes out the very bits; a saved adapter
    is loaded the same. At any other kind attaching is refused."""
    for kind, (make, given, reference) in _kinds().items():
        model = make(torch.float64)
        if re.split("[ ,]", kind)[0] not in method.sits_at():
            before = _snapshot(model)
            _refused(lambda m=model, x=given: _attach_to(m, method, x), f"a layer of the kind {kind}", "up")  # type: ignore[misc]
            _unchanged(model, before, f"refused at the kind {kind}")
            continue
        if kind == DECODER:
            continue  # all other laws look at it there
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain, x = make(dtype).eval(), given(dtype)
            y, bits = plain(x), _bits(plain.state_dict())
            _attach_to(plain, method, given)
            if method.starts_as_identity:
                for live in (True, False):
                    _set_live(plain, live)
                    _same(plain(x), y, f"{kind}: output at the start in {dtype}, live={live}")
            _set_live(plain, True)
            _stir(plain)
            fused = make(dtype)
            deck = Deck(fused)
            deck.add(models.export(plain, called="a"))
            deck.use("a")
            _near(fused(x), plain(x), 4 * float(torch.finfo(dtype).eps), f"{kind}: a deck's output in {dtype}")
            deck.off()
            models.detach(plain, "default")
            _promise(_bits(plain.state_dict()) == bits, f"{kind}: detaching did not give the base back in {dtype}")
            _promise(_bits(fused.state_dict()) == bits, f"{kind}: deck.off() did not give the base back in {dtype}")
            _same(plain(x), y, f"{kind}: output of the base afterwards in {dtype}")
        _attach_to(model, method, given)
        _stir(model)
        layer = chain.adapted_layers(model)["up"]
        state = layer.adapters["default"]
        W, b = chain.base_weight(layer).clone(), chain.bias(layer)
        x = given(torch.float64)
        wanted = [*([x.requires_grad_()] if x.is_floating_point() else []), *state.learned().values()]
        y = reference(x, *method.fold(state.cast(torch.float64), W, b))
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = torch.autograd.grad(y, wanted, gy)
        for live in (True, False) if _sparse(method) else (True,):
            _set_live(model, live)
            _near(model(x), y, EXACT, f"{kind}: forward against fold, live={live}")
            for gradient, right in zip(torch.autograd.grad(model(x), wanted, gy), expected, strict=True):
                _near(gradient, right, EXACT, f"{kind}: gradient, live={live}")
        with _folder() as folder:
            loaded = make(torch.float64).eval()
            models.load(loaded, models.save(model, folder / "a"))
            _set_live(loaded, False)
            _same(loaded(x), model.eval()(x), f"{kind}: output of a saved and loaded adapter")


Kind = tuple[Callable[[torch.dtype], nn.Module], Callable[[torch.dtype], Tensor], Callable[..., Tensor]]


def _kinds() -> dict[str, Kind]:
    """Nets with one layer "up", of a 24 x 16 weight, by kind of layer; an input of each; what torch computes of x, W, b."""

    def make(layer: Callable[[], nn.Module], tied: bool = False) -> Callable[[torch.dtype], nn.Module]:
        def net(dtype: torch.dtype) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                whole = nn.Sequential()
                whole.add_module("up", layer())
            whole.add_module("tanh", nn.Tanh())
            if tied:
                head = nn.Linear(24, 16, bias=False)
                head.weight = whole.get_submodule("up").weight  # type: ignore[assignment]
                whole.add_module("head", head)
            return whole.to(dtype)

        return net

    def tokens(dtype: torch.dtype) -> Tensor:
        return torch.tensor([[1, 15, 1, 4], [0, 7, 4, 9]])

    def conv(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.conv1d(x, W.view(24, 4, 4), b, stride=2, padding=1, dilation=2).tanh()

    def grouped(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, W.view(24, 4, 2, 2), b, padding=(1, 0), groups=2).tanh()

    def embed(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.embedding(x, W.mT).tanh()

    def tied(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(F.embedding(x, W.mT).tanh(), W.mT)

    def stack(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return torch.stack([F.linear(x, each).tanh() for each in W.view(2, 12, 16)])

    def turned(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return torch.stack([F.linear(x, each).tanh() for each in (W[:, :8], W[:, 8:])])

    class Experts(nn.Module):
        def __init__(self, is_transposed: bool) -> None:
            super().__init__()
            self.is_transposed = is_transposed
            numbers = torch.randn(
                2, *((8, 24) if is_transposed else (12, 16)), generator=torch.Generator().manual_seed(0)
            )
            self.up = nn.Parameter(0.3 * numbers)

        def forward(self, x: Tensor) -> Tensor:
            each = [self.up[e].mT if self.is_transposed else self.up[e] for e in range(2)]
            return torch.stack([F.linear(x, W).tanh() for W in each])

    one, two = (lambda d: _input(d, (3, 4, 12))), (lambda d: _input(d, (2, 8, 4, 3)))
    return {
        "convolution 1d": (make(lambda: nn.Conv1d(4, 24, 4, stride=2, padding=1, dilation=2)), one, conv),
        "convolution 2d, grouped": (make(lambda: nn.Conv2d(8, 24, 2, padding=(1, 0), groups=2)), two, grouped),
        "embedding": (make(lambda: nn.Embedding(16, 24)), tokens, embed),
        "decoder": (lambda d: _Decoders().to(d), lambda d: _input(d), embed),
        "stack": (lambda d: Experts(False).to(d), lambda d: _input(d, (3, 16)), stack),
        "stack, transposed": (lambda d: Experts(True).to(d), lambda d: _input(d, (3, 8)), turned),
        "tied": (make(lambda: nn.Embedding(16, 24), tied=True), tokens, tied),
    }


def _attach_to(model: nn.Module, method: Method, given: Callable[[torch.dtype], Tensor]) -> None:
    """Attach to the layer "up" of a net of any kind."""
    dtype = next(p.dtype for p in model.parameters())
    models.attach(model, method, "up", data=[given(dtype)], loss=_loss, **_original(model, method))


@law
def supports_move_exactly(method: Method) -> None:
    """Where a support may move (``regrow``), its count stays; what is kept has its values, its bits and the optimizer's moments, what
    is grown starts as the base; what is dropped, and the whole after detaching, is the base again, to the bit."""
    if not isinstance(method, Sparse) or not method.moves_support:
        return
    for dtype in (torch.float32, torch.bfloat16):
        model = _net(method, dtype)
        start = models.digest(model)
        _attach(model, method)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(3):
            _loss(model, _input(dtype)).backward()
            optimizer.step()
            states: dict[str, Any] = dict(models.states(model, "default"))
            before = {name: _laid_out(state, optimizer) for name, state in states.items()}
            moved = regrow(model, "default", optimizer, data=[_input(dtype)], share=0.3, loss=_loss)
            _promise(bool(moved), "nothing moved")
            _promise(models.digest(model) == start, f"the base changed in {dtype}")
            for name, (there, *numbers) in before.items():
                now, *after = _laid_out(states[name], optimizer)
                gone, come = int((there & ~now).sum()), int((now & ~there).sum())
                _promise(
                    gone == come and (gone > 0) == (name in moved), f"{name}: {gone} entries dropped, {come} grown"
                )
                for what, old, new in zip(("changes", "first moments", "second moments"), numbers, after, strict=True):
                    _same(new, torch.where(there & now, old, 0), f"{name}: {what} after moving in {dtype}")
            live = model(_input(dtype))
            models.activate(model)
            models.activate(model, "default")
            _same(model(_input(dtype)), live, f"output after setting in again in {dtype}")
        optimizer.zero_grad()
        models.detach(model, "default")
        _promise(models.digest(model) == start, f"after moving, detaching does not give the base back in {dtype}")


def _laid_out(state: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Where the support is, and its changes and the optimizer's moments, as whole weights."""
    unit, moments = state.granularity(), optimizer.state[state.values]
    tensors = [
        torch.ones_like(state.values),
        state.method.change(state.raw()),
        moments["exp_avg"],
        moments["exp_avg_sq"],
    ]
    whole = [unit.scatter(state.shape, state.index, tensor.detach()) for tensor in tensors]
    return [whole[0] > 0, *whole[1:]]


@law
def config_goes_through_json(method: Method) -> None:
    """The config is plain JSON from which an equal method is built; the method is frozen and can be compared and hashed."""
    there = json.loads(json.dumps(method.config(), allow_nan=False))
    if registry.methods().get(method.name) is type(method):
        _promise(registry.build(there) == method, f"{there} builds {registry.build(there)!r}, expected {method!r}")
    hash(method)
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    try:
        setattr(method, fields[0].name if fields else "name", None)
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise Broken("the method is not frozen: use @dataclass(frozen=True)")
    for field in fields:
        _promise(
            bool(field.metadata.get("help")), f"the field {field.name} has no help: write option(default, 'one line')"
        )


@law
def switches_and_stacks_with_any(method: Method) -> None:
    """Beside any other method: switching gives each one's own output, stacking is the fold of one upon the other in the
    order asked for, and detaching both gives the base. An insert reads what lies below it; above it, a method that asks for the
    weight of all below is refused."""
    x = _input(torch.float64)
    for cls in _others(method):
        name = cls.name
        model = _net(method, torch.float64)
        start, base = _snapshot(model), model(x)
        _attach(model, method, "mine")
        _stir(model, "mine")
        mine = model(x)
        another = cls(**cls.small[0])
        _attach(model, another, "other", seed=1)
        _stir(model, "other", seed=1)
        other = model(x)
        for one, expected in (("mine", mine), ("other", other), (None, base), ("mine", mine)):
            models.activate(model, *([one] if one else []))
            _same(model(x), expected, f"output of {one or 'the base'} after switching, beside {name}")
        for names in (("mine", "other"), ("other", "mine")):
            both = {"mine": method, "other": another}
            low, high = (both[each] for each in names)
            what = f"{' then '.join(names)} stacked, other is {name}"
            if high.reads_weights_below and not low.mergeable:
                _refused(partial(models.activate, model, *names), what, "folds into no weight")
                continue
            models.activate(model, *names)
            layer: Any = model.get_submodule("up")
            _near(_out(layer, x), _stacked(layer, names, x), EXACT, what)
        models.detach(model, "mine")
        _same(model(x), other, f"output of {name} after this one is detached")
        models.detach(model, "other")
        _unchanged(model, start, f"attached and detached beside {name}")


def _stacked(layer: Any, names: Sequence[str], x: Tensor) -> Tensor:
    """What adapters one upon the other make of x: by their folds, as far up as these go, then one by one."""
    states = [layer.adapters[name] for name in names]
    if decoder_of(layer) is not None:
        inserts = [insert for state in states for _, insert in state.method.edit(state.raw()).inserts()]
        return _with_ahead(_Decoders().to(x.dtype).get_submodule("up"), inserts, x)
    W, b = chain.base_weight(layer).detach(), layer.bias
    while states and states[0].method.mergeable:
        W, b = states[0].method.fold(states[0].raw(), W, b)
        del states[0]

    def output(count: int, x: Tensor) -> Tensor:
        if not count:
            return F.linear(x, W, b)
        state = states[count - 1]
        if state.method.mergeable:  # y' = M y + D x, where its fold is W' = M W + D and b' = M b
            zero, raw = torch.zeros_like(W), state.raw()
            columns = [state.method.fold(raw, zero, one)[1] for one in torch.eye(len(W), dtype=W.dtype)]
            M = torch.stack([column for column in columns if column is not None], 1)
            return F.linear(output(count - 1, x), M) + F.linear(x, state.method.fold(raw, zero, None)[0])
        for factor, insert in state.method.edit(state.raw()).inserts():
            if insert.place == "before":
                return output(count - 1, x + factor * insert.scale * insert.inserted(x))
            y: Tensor = output(count - 1, x)
            return y + factor * insert.change(x, y)  # type: ignore[no-any-return]
        raise Broken("a method that is not mergeable has an edit without an insert")

    return output(len(states), x)


@law
def base_keys_and_types_survive(method: Method) -> None:
    """An adapted model has all keys of its base, its layers are still Linear, and after detaching nothing is left."""
    model = _net(method)
    model.get_submodule("down").requires_grad_(False)
    before, keys = _snapshot(model), set(model.state_dict())
    _attach(model, method)
    _promise(keys <= set(model.state_dict()), "keys of the base are gone")
    for name in LAYERS:
        _promise(isinstance(model.get_submodule(name), before["classes"][name]), f"{name} is of another class")
    _stir(model)
    models.detach(model, "default")
    _unchanged(model, before, "attached and detached")


@law
def copies_are_whole(method: Method) -> None:
    """deepcopy and pickle give a model with the same output that trains, switches off and is detached by itself."""
    copies: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))]
    for copied in copies:
        model, plain = _adapted(method), _net(method)
        other = copied(model)
        _same(other(_input()), model(_input()), "output of a copy")
        before = _bits(model.state_dict())
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
        _loss(other, _input()).backward()
        optimizer.step()
        _promise(not torch.equal(other(_input()), model(_input())), "a copy does not train")
        _promise(_bits(model.state_dict()) == before, "training a copy changes the model it came from")
        models.detach(other, "default")
        _same(other(_input()), plain(_input()), "output of a copy after detaching")


@law
def compiles_whole(method: Method) -> None:
    """torch.compile(fullgraph=True) captures the adapted model: same output, same gradients, also after a step."""
    with warnings.catch_warnings():
        # What torch 2.13 says of its own capture of an autograd Function; to go when it no longer does.
        warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
        _compile(_adapted(method))


def _compile(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        expected = torch.autograd.grad(_loss(model, _input()), trained)
        y = compiled(_input())
        _near(y, model(_input()), CLOSE, "compiled output")
        optimizer.zero_grad()
        (y.double() - 0.3).square().mean().backward()
        for parameter, gradient in zip(trained, expected, strict=True):
            _gradient(parameter, gradient, CLOSE, "gradient of a compiled model")
        optimizer.step()


@law
def autocast_computes_in_half(method: Method) -> None:
    """Under bf16 autocast an fp32 model gives the base layer's dtype, near the fp32 values, and float32 gradients."""
    model = _adapted(method)
    exact = _loss(model, _input())
    trained = [p for p in model.parameters() if p.requires_grad]
    reference = torch.autograd.grad(exact, trained)
    for live in (True, False) if _sparse(method) else (True,):
        _set_live(model, live)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(_input())
            loss = (y.double() - 0.3).square().mean()
            own = _net(method)(_input()).dtype
        _promise(y.dtype == own, f"autocast gives {y.dtype}, the base alone gives {own}")
        _near(loss, exact, 0.03, "loss under autocast")
        for parameter, gradient, wanted in zip(trained, torch.autograd.grad(loss, trained), reference, strict=True):
            _promise(gradient.dtype == parameter.dtype, f"autocast gives a {gradient.dtype} gradient")
            bound = 0.06 * float(wanted.abs().max()) + 1e-3
            _near(gradient, wanted, bound, "gradient under autocast")


@law
def checkpointing_changes_nothing(method: Method) -> None:
    """Gradient checkpointing, reentrant or not, gives the same gradients."""
    model = _adapted(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(_loss(model, _input()), trained)
    for reentrant in (True, False):
        x = _input().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        model.zero_grad()
        (y.double() - 0.3).square().mean().backward()
        for parameter, gradient in zip(trained, expected, strict=True):
            _gradient(parameter, gradient, CLOSE, f"gradient with checkpointing, use_reentrant={reentrant}")


@law
def accumulation_adds_up(method: Method) -> None:
    """The gradients of two half batches add up to that of the whole one."""
    model, x = _adapted(method, torch.float64), _input(torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(_loss(model, x), trained)
    for half in x.chunk(2):
        (_loss(model, half) / 2).backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        _gradient(parameter, gradient, EXACT, "accumulated gradient")


@law
def numbers_stay_wide(method: Method) -> None:
    """Trained numbers are float32 on a bf16 base (float64 on a float64 one) and stay so when the model is cast; the base
    under a cast model is the cast base, to the bit."""
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = _net(method, dtype)
        _attach(model, method)
        found = {p.dtype for p in model.parameters() if p.requires_grad}
        _promise(found == {wide}, f"on a {dtype} base {found} train")
    model = _adapted(method)
    values = {k: t.clone() for k, t in models.adapter_state(model, "default").items()}
    model.to(torch.bfloat16)
    _promise(_equal(models.adapter_state(model, "default"), values), "model.to(bfloat16) changed the adapter's numbers")
    cast = model(_input(torch.bfloat16))
    _promise(cast.dtype == torch.bfloat16, f"a model cast to bfloat16 gives {cast.dtype}")
    models.detach(model, "default")
    _promise(
        models.digest(model) == models.digest(_net(method, torch.bfloat16)),
        "the base under a cast model is not the cast base",
    )


@law
def stale_weights_are_an_error(method: Method) -> None:
    """Where values live in the weight, a forward after they were written by hand is an error, and sync() cures it."""
    model = _adapted(method)
    if not any(layer.live for layer in chain.adapted_layers(model).values()):
        return
    before = model(_input())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    _refused(lambda: model(_input()), "a forward with an out-of-date weight", "sync")
    models.sync(model)
    synced = model(_input())
    _promise(not torch.equal(synced, before), "sync() wrote nothing")
    _set_live(model, False)
    _near(synced, model(_input()), CLOSE * 10, "output after sync()")


@law
def explains_itself(method: Method) -> None:
    """The class says name, title, formula, paper and count; its module's docstring says the same in words, with the source
    and ``Trained:``. A method of ours is one file of at most 90 lines that imports what the layout allows."""
    cls = type(method)
    unknown = [name for name in method.expected if name not in LAWS]
    _promise(
        not unknown, f"{cls.__name__}.expected names {', '.join(unknown)}, which is no law; known: {', '.join(LAWS)}"
    )
    for attribute in ("name", "title", "formula", "paper", "trained"):
        value = getattr(cls, attribute, None)
        _promise(isinstance(value, str) and bool(value), f"{cls.__name__}.{attribute} is {value!r}, expected a text")
    _promise(getattr(cls, "default_lr", 0) > 0, f"{cls.__name__}.default_lr is not given")
    _promise(
        bool(re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:\S+|https://\S+", cls.paper)),
        f"paper is {cls.paper!r}; expected arXiv:...",
    )
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    _promise("Trained:" in text, f"the docstring of {cls.__module__} does not say what is trained (Trained: ...)")
    _promise(cls.paper in text, f"the docstring of {cls.__module__} does not name its source {cls.paper}")
    _promise(
        cls.title in text.partition(":")[0], f"the docstring of {cls.__module__} does not begin with {cls.title!r}"
    )
    if not cls.__module__.startswith("intarsia."):
        return
    source = inspect.getsource(inspect.getmodule(cls))  # type: ignore[arg-type]
    lines = len(source.splitlines())
    _promise(lines <= 90, f"{cls.__module__} has {lines} lines, at most 90 are allowed")
    rooms = ("edits", "errors", "forms", "inits", "method", "methods", "registry", "site", "support")
    for module in _imports(source):
        ours = module.split(".")[1:2] if module.startswith("intarsia") else None
        allowed = (
            ours[0] in rooms
            if ours
            else module.split(".")[0] in ("torch", "math", "dataclasses", "typing", "collections")
        )
        _promise(allowed, f"{cls.__module__} imports {module}; a method imports {', '.join(rooms)} and torch")


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
