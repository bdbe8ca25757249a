"""Operators: what a kind of layer does with its weight, seen as one matrix W (O, I).

Methods, forms and edits know only the matrix. All that differs between a Linear, a convolution and an embedding is here,
a few functions a kind, so that nothing else asks what kind a layer is:

    | kind        | layers                      | weight as stored | W                    | y                           |
    |-------------|-----------------------------|------------------|----------------------|-----------------------------|
    | linear      | nn.Linear                   | (O, I)           | as stored            | x W^T + b                   |
    | linear      | transformers' Conv1D        | (I, O)           | transposed           | x W^T + b                   |
    | convolution | nn.Conv1d, Conv2d, Conv3d   | (O, C/g, k...)   | flattened behind O   | x * W + b; I = C/g k...     |
    | embedding   | nn.Embedding                | (I tokens, O)    | transposed           | one-hot(x) W^T              |
    | tied        | a Linear head that shares   | (I tokens, O)    | transposed           | x W + b: the embedding's W  |
    |             | an embedding's weight       |                  |                      | the other way round         |
    | stack       | a bare parameter (E, O, I)  | (E, O, I)        | (E O, I)             | the module's own affair     |
    |             | or (E, I, O), as of experts | (E, I, O)        | (O, E I)             | the module's own affair     |
    | decoder     | a module that turns tokens' | its embedding's  | transposed, read and | the module's own affair     |
    |             | embeddings into states      |                  | never written        |                             |
    | bias        | the bias of any of these    | (O,)             | (O, 1)               | its layer's                 |

The matrix is a view: writing into it writes the stored weight. Of a decoder, as of LlamaModel, no weight is changed: something stands
before its tokens. Its (O, I) are the width of a token's embedding and the numbers that a token leaves in the cache.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.precision import product

if TYPE_CHECKING:
    from intarsia.support import Granularity, Plan

PLAIN = "out-in"  # the layout of most weights; a file names only others
KINDS = ("linear", "convolution", "embedding", "tied")
STACK = "stack"  # where no forward of ours runs: for what is set in alone
DECODER = "decoder"  # where no weight is changed: for what stands before the tokens
ADAPTABLE = "Linear, Conv1d, Conv2d, Conv3d, Embedding, transformers' Conv1D, and parameters (E, ., .) of a module"


@dataclass(frozen=True)
class Operator(ABC):
    """One way to compute y from x with a matrix. ``transposed``: the weight is stored as (I, O)."""

    kind: ClassVar[str]
    transposed: bool = False

    @property
    def layout(self) -> str:
        """How the matrix lies in the stored weight, as a file says it: ``out-in`` or ``in-out``."""
        return "in-out" if self.transposed else PLAIN

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight, or a gradient of its shape, as (O, I). A view."""
        flat = weight.flatten(1)
        return flat.mT if self.transposed else flat

    def spread(self, v: Tensor) -> Tensor:
        """One number for each output, shaped to multiply y. (O,) -> (O, 1...)."""
        return v

    def keep(self, x: Tensor, granularity: Granularity, index: Tensor, plan: Plan) -> Tensor:
        """What :meth:`support_gradient` needs of the input."""
        return granularity.keep(x, index, plan)

    def some_input(self, weight: Tensor) -> Tensor:
        """Two small inputs to try a layer with, the same every time."""
        numbers = torch.linspace(-1, 1, 2 * self.matrix(weight).shape[1], device=weight.device)
        return numbers.view(2, -1).to(weight.dtype)

    def size(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """The (O, I) of a site whose matrix has this shape."""
        return matrix

    @abstractmethod
    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """The layer's forward with this matrix: for the base's own, the same bits as the layer itself."""

    @abstractmethod
    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """``product(x, B A)`` without building B A. B (O, r), A (r, I)."""

    @abstractmethod
    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> Tensor | None:
        """dL/dx, x of this shape; None where x are token numbers."""

    @abstractmethod
    def bias_gradient(self, gy: Tensor) -> Tensor:
        """dL/db. -> (O,)."""

    @abstractmethod
    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        """dL/dW on the support alone, in the shape of its values. ``shape`` is (O, I)."""


@dataclass(frozen=True)
class Linear(Operator):
    """y = x W^T + b on the last axis. x (..., I), y (..., O)."""

    kind = "linear"

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, W, b)

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return x @ A.mT @ B.mT

    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> Tensor:
        return product(gy, W)

    def bias_gradient(self, gy: Tensor) -> Tensor:
        return gy.reshape(-1, gy.shape[-1]).sum(0)

    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        return granularity.gradient(gy, kept, index, plan, shape)


LINEAR = Linear()


@dataclass(frozen=True)
class Tied(Linear):
    """An output head on an embedding's weight. The matrix is the embedding's, so y = x W + b. x (..., O), y (..., I)."""

    kind = "tied"
    transposed: bool = True

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, W.mT, b)

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return x @ B @ A

    def keep(self, x: Tensor, granularity: Granularity, index: Tensor, plan: Plan) -> Tensor:
        return x  # all of it: the support's columns are outputs here

    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> Tensor:
        return product(gy, W.mT)

    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        # dW = x^T gy: input and output gradient have changed places.
        return granularity.gradient(kept, granularity.keep(gy, index, plan), index, plan, shape)


@dataclass(frozen=True)
class Embedding(Operator):
    """y = W[:, x], one column of W for each token number. x (...) of integers, y (..., O)."""

    kind = "embedding"
    transposed: bool = True
    padding: int | None = None  # this token gets no gradient, as nn.Embedding has it

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return F.embedding(x, W.mT, self.padding)

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.mT, self.padding) @ B.mT

    def some_input(self, weight: Tensor) -> Tensor:
        return torch.arange(min(2, len(weight)), device=weight.device)

    def keep(self, x: Tensor, granularity: Granularity, index: Tensor, plan: Plan) -> Tensor:
        return x

    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> None:
        return None

    def bias_gradient(self, gy: Tensor) -> Tensor:
        raise AssertionError("an embedding has no bias")

    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        outputs, tokens = shape
        if self.padding is not None:
            gy = gy.masked_fill((kept == self.padding).unsqueeze(-1), 0)
        wanted = granularity.keep(
            torch.arange(tokens, device=kept.device), index, plan
        )  # the tokens that the support reads
        if wanted.numel() < tokens and kept.numel() * wanted.numel() <= outputs * tokens:
            one_hot = kept.reshape(*kept.shape, *(1,) * wanted.ndim) == wanted
            return granularity.gradient(gy, one_hot.to(gy.dtype), index, plan, shape)
        # The dense gradient of this one layer, transient, in float32: a token may occur thousands of times.
        wide = torch.promote_types(gy.dtype, torch.float32)
        dense = torch.zeros(tokens, outputs, dtype=wide, device=gy.device)
        dense.index_add_(0, kept.reshape(-1), gy.reshape(-1, outputs).to(wide))
        return granularity.gather(dense.mT, index)


@dataclass(frozen=True)
class Convolution(Operator):
    """y = x * W + b. x (batch, C, size...) or (C, size...), y (batch, O, size...); W (O, C/groups * kernel)."""

    kind = "convolution"
    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1

    def spread(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * len(self.kernel))

    def some_input(self, weight: Tensor) -> Tensor:
        sizes = [d * (k - 1) + 2 for d, k in zip(self.dilation, self.kernel, strict=True)]
        count = weight.shape[1] * self.groups * math.prod(sizes)
        return torch.linspace(-1, 1, count, device=weight.device).view(1, -1, *sizes).to(weight.dtype)

    def keep(self, x: Tensor, granularity: Granularity, index: Tensor, plan: Plan) -> Tensor:
        return x  # unfolded, the support's part alone would often be larger

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return self._call(x, self._kernels(W), b, self.stride, self.padding, self.dilation, self.groups)

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        # Every group goes through all of A, then through its own rows of B: a convolution with kernels of one entry.
        inner = self.product(x, A.repeat(self.groups, 1))
        return self._call(inner, B.reshape(*B.shape, *(1,) * len(self.kernel)), None, 1, 0, 1, self.groups)

    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> Tensor:
        like = gy.new_empty(1).expand(tuple(shape))  # only its shape is read
        return self._backward(gy, like, W, (True, False))[0]

    def bias_gradient(self, gy: Tensor) -> Tensor:
        n = len(self.kernel)
        return gy.movedim(-n - 1, -1).reshape(-1, gy.shape[-n - 1]).sum(0)

    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        # The dense gradient of this one layer, transient: beside what a convolution keeps, its weight is small.
        dense = self._backward(gy, kept, gy.new_empty(1).expand(shape), (False, True))[1]
        return granularity.gather(dense.flatten(1), index)

    def _kernels(self, W: Tensor) -> Tensor:
        return W.reshape(W.shape[0], -1, *self.kernel)

    def _call(self, *given: Any) -> Tensor:
        # Not torch.convolution, which autocast does not know.
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1](*given)

    def _backward(self, gy: Tensor, x: Tensor, W: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        single = x.ndim == len(self.kernel) + 1
        gx, gW, _ = torch.ops.aten.convolution_backward(
            gy.unsqueeze(0) if single else gy,
            x.unsqueeze(0) if single else x,
            self._kernels(W),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0,) * len(self.kernel),
            self.groups,
            (*wanted, False),
        )
        return gx.squeeze(0) if single and gx is not None else gx, gW


@dataclass(frozen=True)
class _Addmm(Linear):
    """transformers' Conv1D: a Linear stored as (I, O), computed by the call that it makes itself, so that no bit differs."""

    transposed: bool = True

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        if b is None:
            return F.linear(x, W)
        return torch.addmm(b, x.reshape(-1, x.shape[-1]), W.mT).view(*x.shape[:-1], W.shape[0])


@dataclass(frozen=True)
class Written(Operator):
    """What is only ever set into: no forward of ours computes with it."""

    def product(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        raise AssertionError("its module computes with it, not we")

    def low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        raise AssertionError("its module computes with it, not we")

    def input_gradient(self, gy: Tensor, W: Tensor, shape: Sequence[int]) -> None:
        raise AssertionError("its module computes with it, not we")

    def bias_gradient(self, gy: Tensor) -> Tensor:
        raise AssertionError("a parameter has no bias")

    def support_gradient(
        self, gy: Tensor, kept: Tensor, granularity: Granularity, index: Tensor, plan: Plan, shape: tuple[int, int]
    ) -> Tensor:
        return granularity.gather(self.matrix(gy), index)  # gy is the dense gradient of the parameter


@dataclass(frozen=True)
class Stack(Written):
    """A parameter of E matrices that a module reads itself. It is seen as one matrix, and only setting in can train it."""

    kind = STACK

    @property
    def layout(self) -> str:
        return "expert-in-out" if self.transposed else "expert-out-in"

    def matrix(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(0, 1)
        return flat.mT if self.transposed else flat


@dataclass(frozen=True)
class Bias(Written):
    """A layer's bias (O,), seen as a matrix of one column, so that an edit of it is an edit like any other. Methods sit at weights."""

    kind = "bias"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight[:, None]


BIAS = Bias()


@dataclass(frozen=True)
class Decoder(Written):
    """A module from embeddings to hidden states. Its matrix is that of its own embedding, one column for each token."""

    kind = DECODER
    transposed: bool = True
    layers: int = 0  # that cache keys and values; 0: none does, as in an encoder
    heads: int = 0  # of keys and values
    width: int = 0  # of one head
    counted: bool = False  # whether it can be given the tokens' positions, the first of which is 0
    embed_scale: float = 1.0  # that the embedding itself multiplies its rows by

    @property
    def layout(self) -> str:
        return PLAIN  # a file says nothing of a weight that it does not change

    def size(self, matrix: tuple[int, int]) -> tuple[int, int]:
        return matrix[0], 2 * self.layers * self.heads * self.width


class Bare(nn.Module):
    """A parameter that its module reads by itself, seen as a layer: it stands in the module's tree under the same name."""

    bias = None

    def __init__(self, owner: nn.Module, name: str):
        super().__init__()
        self.__dict__["owner"] = (owner,)  # in a tuple, or it would be registered as a part of this one
        self.parameter_name = name

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        return self.__dict__["owner"][0]._parameters[self.parameter_name]  # type: ignore[no-any-return]


# ------------------------------------------------------------------ which layer is what
def operator_of(layer: nn.Module) -> Operator | str | None:
    """What the layer does with its weight; a text: why it cannot be adapted; None: no kind of layer that is known."""
    if isinstance(layer, nn.Linear):
        return LINEAR
    if isinstance(layer, Bare):
        # transformers says of its experts which way round they are; without a word it is (E, O, I), as F.linear has it.
        return Stack(transposed=bool(getattr(layer.__dict__["owner"][0], "is_transposed", False)))
    if isinstance(layer, nn.Embedding):
        return _embedding(layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(layer)
    if any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(layer).__mro__):
        return _Addmm()
    return None


def _embedding(layer: nn.Embedding) -> Operator | str:
    if layer.max_norm is not None:
        return "with max_norm its forward rewrites the weight; set max_norm=None first"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq=True is not computed here; set it to False first"
    return Embedding(padding=layer.padding_idx)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Operator | str:
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} is not computed here, only 'zeros'; exclude it"
    padding = layer.padding
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if padding == "same" and any(n % 2 for n in total):
            return "padding='same' with an even kernel pads the two sides differently, which is not computed here; exclude it"
        padding = tuple(n // 2 if padding == "same" else 0 for n in total)
    return Convolution(
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=tuple(padding),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
    )


# ------------------------------------------------------------------ decoders
@functools.cache
def takes(cls: Any) -> tuple[str, ...]:
    """The names of what the forward of a class of modules is given, in order."""
    try:
        return tuple(inspect.signature(cls.forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):  # a module of another kind, as of TorchScript
        return ()


def _own_class(module: nn.Module) -> Any:
    """What the module was made as, whatever is on top of it now."""
    return getattr(type(module), "base_class", type(module))


def embedding_of(module: nn.Module) -> nn.Embedding | None:
    """The embedding of tokens of a module that could as well be given embeddings; None: it is no such module."""
    if "inputs_embeds" not in takes(_own_class(module)):
        return None
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def decoder_of(module: nn.Module) -> Decoder | str | None:
    """How a module turns embeddings into hidden states; a text: why nothing can stand before its tokens; None: it does not.

    Of several such modules within one another, as a language model with its head, it is the innermost.
    """
    embedding = embedding_of(module)
    if embedding is None or any(inner is not module and embedding_of(inner) is not None for inner in module.modules()):
        return None
    config = getattr(module, "config", None)
    if config is None:
        return f"a {type(module).__name__} without a config, which says how many layers and heads it has"
    if getattr(config, "is_encoder_decoder", False):
        return "what stands before the tokens of an encoder with a decoder is not computed here"
    names = takes(_own_class(module))
    if "per_layer_inputs" in names:
        return "its layers read embeddings of their own, which a token that is no word does not have"
    scale = float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None) or 1.0))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    causal = any(
        getattr(inner, "is_causal", False) for inner in module.modules()
    )  # an encoder looks both ways, and caches nothing
    if not causal or not known:
        return Decoder(embed_scale=scale, counted=causal and "position_ids" in names)
    return Decoder(True, config.num_hidden_layers, heads, width, "position_ids" in names, scale)
