"""The kernel edit: a sparse change of high rank, kept as two thin factors.    W' = W + sparsify(D),  D_ij = k(B_i, A_j)

Shapes: O out_features, I in_features, q numbers a row and piece; A (2, I, q) and B (2, O, q), two pieces each.
The factors' own dtype (float32 or wider) is that of the whole computation: a narrower one could not tell the two pieces apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, Sparse, elements, want_numbers, want_scale, want_tensors
from intarsia.errors import IntarsiaError
from intarsia.support import Shape

KERNELS = ("distance", "linear")
RULES = ("soft", "square", "hard", "none")
WEIGHT = 0.1  # of the first piece's distance; the second one's is -0.1, so that a change may have either sign


def merge(A: Tensor, B: Tensor, kernel: str = "distance", mix: Tensor | None = None) -> Tensor:
    """D, the dense matrix that two factors stand for. -> (O, I).

    distance: D_ij = 0.1 ||B1_i - A1_j|| - 0.1 ||B2_i - A2_j||, of full rank whatever q is; linear: D = B A^T, as in LoRA.
    ``mix`` (3,) alpha, gamma, beta makes it D + alpha softmax(D / gamma) + beta, the softmax over the outputs of each input.
    """
    if kernel == "linear":
        D = (B @ A.mT).sum(0)
    else:
        # Not the quicker |b|^2 - 2 ab + |a|^2, which loses the digits in which the two pieces differ.
        first, second = torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist").unbind()
        D = WEIGHT * (first - second)
    if mix is None:
        return D
    alpha, gamma, beta = mix.unbind()
    return D + alpha * torch.softmax(D / gamma, dim=0) + beta


def sparsify(D: Tensor, zeros: int | Tensor, rule: str) -> Tensor:
    """D with (at least) its ``zeros`` smallest entries at 0: t is the size of the largest of these, and an entry

    of size |d| > t becomes, by rule, soft: d (|d| - t), square: d |d|, hard: d, none: d, and nothing is zeroed.
    The factor beside d, and t, are constants in the backward pass; an entry at 0 gets no gradient. (O, I) -> (O, I).
    """
    if rule == "none":
        return D
    size = D.detach().abs()
    t = _smallest(size.flatten(), zeros)
    if rule == "soft":
        return D * (size - t).clamp_min(0)
    alive = size > t
    return D * (size * alive if rule == "square" else alive)


def _smallest(sizes: Tensor, count: int | Tensor) -> Tensor:
    """The count-th smallest number, 0 where the count is 0. (n,) -> ()."""
    if isinstance(count, Tensor) and torch.compiler.is_compiling():  # a number read out of a tensor breaks the graph
        ordered = torch.cat([sizes.new_zeros(1), sizes.sort().values])
        return ordered.index_select(0, count.reshape(1)).squeeze(0)
    return sizes.kthvalue(int(count)).values if int(count) else sizes.new_zeros(())


@dataclass(frozen=True, eq=False)
class Kernel(Edit):
    """W' = W + scale * sparsify(merge(A, B, kernel, mix), zeros, rule)."""

    A: Tensor  # (2, I, q)
    B: Tensor  # (2, O, q)
    mix: Tensor | None  # (3,)
    zeros: int
    rule: str
    kernel: str = "distance"
    scale: float = 1.0

    kind = "kernel"

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B} | ({} if self.mix is None else {"mix": self.mix})

    def facts(self) -> dict[str, Any]:
        return {"zeros": self.zeros, "rule": self.rule, "kernel": self.kernel, "scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"} | tensors.keys() & {"mix"})
        A, B, mix = tensors["A"], tensors["B"], tensors.get("mix")
        if A.ndim != 3 or tuple(A.shape) != (2, shape[1], A.shape[2]) or tuple(B.shape) != (2, shape[0], A.shape[2]):
            raise IntarsiaError(
                f"B {tuple(B.shape)} and A {tuple(A.shape)} do not merge to {tuple(shape)}: two pieces of one width"
            )
        if mix is not None and tuple(mix.shape) != (3,):
            raise IntarsiaError(f"mix is {tuple(mix.shape)}; expected (3,)")
        for name, tensor in tensors.items():
            want_numbers(name, tensor)
            if tensor.dtype != A.dtype or tensor.dtype.itemsize < 4:
                raise IntarsiaError(f"{name} is {tensor.dtype}; expected float32 or float64, the same for all")
        zeros, rule, kernel = (facts.get(key) for key in ("zeros", "rule", "kernel"))
        if not isinstance(zeros, int) or isinstance(zeros, bool) or not 0 <= zeros <= shape[0] * shape[1]:
            raise IntarsiaError(f"zeros is {zeros!r}; expected a whole number up to {shape[0] * shape[1]}")
        if not isinstance(rule, str) or rule not in RULES or not isinstance(kernel, str) or kernel not in KERNELS:
            raise IntarsiaError(
                f"rule {rule!r} and kernel {kernel!r}; expected one of {', '.join(RULES)} and of {', '.join(KERNELS)}"
            )
        return cls(shape, A, B, mix, zeros, rule, kernel, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        D = merge(self.A, self.B, self.kernel, self.mix)
        return (self.scale * sparsify(D, self.zeros, self.rule)).to(W.dtype)

    def sparse(self) -> Sparse:
        """The same change as elements, which are set in many times quicker; larger in a file where the factors are thin."""
        change = self.delta(self.A.new_empty(())).reshape(-1)
        index = change.nonzero().squeeze(1)
        return elements(self.shape, index, change[index])

    def sparse_parts(self) -> list[Sparse] | None:
        # Where few entries are at 0, a copy of the whole weight is less than the others' positions.
        return [self.sparse()] if 2 * self.zeros >= self.shape[0] * self.shape[1] and self.rule != "none" else None

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1] - (0 if self.rule == "none" else self.zeros)


KINDS[Kernel.kind] = Kernel
