"""Projections: the part of a gradient that a stateful optimizer sees, written once for GaLore, Fira and FRUGAL.

A projection is a value: kept in the optimizer's state are only the tensors that ``draw`` gives. For a gradient G (m, n):

    svd, random   on the left of a wide G, R = P^T G (r, n); on the right of a tall or square one, R = G Q (m, r); or as told
    columns, rows, entries   a part of G as it is
    whole         G itself
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError

Shape = tuple[int, int]
Kept = Mapping[str, Tensor]

SIDES = ("std", "reverse_std", "left", "right", "full")


def generator(seed: int, place: int, period: int) -> torch.Generator:
    """A CPU generator for one tensor in one period; the global one is neither read nor moved."""
    digest = hashlib.blake2b(f"{seed}:{place}:{period}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Projection(ABC):
    """down(G) is what the inner optimizer sees, up(R) what its update is to the weight."""

    @abstractmethod
    def draw(self, G: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        """The subspace: what has to be kept until the next one is drawn."""

    @abstractmethod
    def down(self, G: Tensor, kept: Kept) -> Tensor:
        """(m, n) -> R."""

    @abstractmethod
    def up(self, R: Tensor, kept: Kept, shape: Shape) -> Tensor:
        """R -> (m, n)."""

    @abstractmethod
    def seen(self, shape: Shape) -> tuple[int, ...]:
        """The shape of R."""

    @abstractmethod
    def kept(self, shape: Shape) -> int:
        """Numbers that draw gives."""

    def rest(self, G: Tensor, kept: Kept) -> Tensor:
        """What down does not see. (m, n) -> (m, n)."""
        return G - self.up(self.down(G, kept), kept, _shape(G))


@dataclass(frozen=True)
class Subspace(Projection):
    """Orthonormal columns P (m, r) on the left, Q (n, r) on the right, or both; r is never above the shorter side.

    ``basis``: svd, the leading singular vectors of G, or random.
    """

    rank: int
    side: str = "std"
    basis: str = "svd"

    def sides(self, shape: Shape) -> tuple[bool, bool]:
        """(left, right)."""
        if self.side == "full":
            return True, True
        wide = shape[0] < shape[1]
        left = {"std": wide, "reverse_std": not wide, "left": True, "right": False}[self.side]
        return left, not left

    def width(self, shape: Shape) -> int:
        """r at this shape."""
        return min(self.rank, *shape)

    def draw(self, G: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        left, right = self.sides(_shape(G))
        P, Q = BASES[self.basis](G, self.width(_shape(G)), g)
        return ({"P": P.to(G.dtype)} if left else {}) | ({"Q": Q.to(G.dtype)} if right else {})

    def down(self, G: Tensor, kept: Kept) -> Tensor:
        R = kept["P"].mT @ G if "P" in kept else G
        return R @ kept["Q"] if "Q" in kept else R

    def up(self, R: Tensor, kept: Kept, shape: Shape) -> Tensor:
        R = kept["P"] @ R if "P" in kept else R
        return R @ kept["Q"].mT if "Q" in kept else R

    def seen(self, shape: Shape) -> tuple[int, ...]:
        (m, n), r, (left, right) = shape, self.width(shape), self.sides(shape)
        return r if left else m, r if right else n

    def kept(self, shape: Shape) -> int:
        (m, n), (left, right) = shape, self.sides(shape)
        return self.width(shape) * (m * left + n * right)


def _svd(G: Tensor, r: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    if not bool(G.isfinite().all()):
        raise IntarsiaError(
            "a gradient has numbers that are not finite, so it has no leading singular vectors: the training diverged; lower the "
            "learning rate, or clip the gradient"
        )
    # In float32 at least: there is no decomposition in bfloat16.
    U, _, Vh = torch.linalg.svd(G.to(torch.promote_types(G.dtype, torch.float32)), full_matrices=False)
    return U[:, :r].contiguous(), Vh[:r].mT.contiguous()


def _random(G: Tensor, r: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    # Orthonormal columns of a normal matrix are uniform among all such.
    P, Q = (torch.linalg.qr(torch.randn(side, r, generator=g, dtype=torch.float64))[0] for side in G.shape)
    return P.to(G.device), Q.to(G.device)


Basis = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]
BASES: dict[str, Basis] = {"svd": _svd, "random": _random}


@dataclass(frozen=True)
class Lines(Projection):
    """``share`` of the columns (dim 1) or rows (dim 0), at random; rounded down, as in the authors' code of FRUGAL."""

    share: float
    dim: int

    def count(self, shape: Shape) -> int:
        return int(self.share * shape[self.dim])

    def draw(self, G: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        lines = torch.randperm(G.shape[self.dim], generator=g)[: self.count(_shape(G))]
        return {"index": lines.sort().values.to(G.device, torch.int32)}

    def down(self, G: Tensor, kept: Kept) -> Tensor:
        return G.index_select(self.dim, kept["index"])

    def up(self, R: Tensor, kept: Kept, shape: Shape) -> Tensor:
        return R.new_zeros(shape).index_copy_(self.dim, kept["index"].long(), R)

    def rest(self, G: Tensor, kept: Kept) -> Tensor:
        return G.index_fill(self.dim, kept["index"].long(), 0)

    def seen(self, shape: Shape) -> tuple[int, ...]:
        return (self.count(shape), shape[1]) if self.dim == 0 else (shape[0], self.count(shape))

    def kept(self, shape: Shape) -> int:
        return self.count(shape)


@dataclass(frozen=True)
class Entries(Projection):
    """``share`` of the entries, at random; rounded down."""

    share: float

    def draw(self, G: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        (count,) = self.seen(_shape(G))
        kind = torch.int32 if G.numel() < 2**31 else torch.int64
        return {"index": torch.randperm(G.numel(), generator=g)[:count].sort().values.to(G.device, kind)}

    def down(self, G: Tensor, kept: Kept) -> Tensor:
        return G.reshape(-1).index_select(0, kept["index"])

    def up(self, R: Tensor, kept: Kept, shape: Shape) -> Tensor:
        return R.new_zeros(shape[0] * shape[1]).index_copy_(0, kept["index"].long(), R).view(shape)

    def rest(self, G: Tensor, kept: Kept) -> Tensor:
        return G.reshape(-1).index_fill(0, kept["index"].long(), 0).view(G.shape)

    def seen(self, shape: Shape) -> tuple[int, ...]:
        return (int(self.share * shape[0] * shape[1]),)

    def kept(self, shape: Shape) -> int:
        return self.seen(shape)[0]


@dataclass(frozen=True)
class Whole(Projection):
    """All of G: for tensors that are active as a whole or not at all."""

    def draw(self, G: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        return {}

    def down(self, G: Tensor, kept: Kept) -> Tensor:
        return G

    def up(self, R: Tensor, kept: Kept, shape: Shape) -> Tensor:
        return R

    def rest(self, G: Tensor, kept: Kept) -> Tensor:
        return torch.zeros_like(G)

    def seen(self, shape: Shape) -> tuple[int, ...]:
        return shape

    def kept(self, shape: Shape) -> int:
        return 0


def _shape(G: Tensor) -> Shape:
    return G.shape[0], G.shape[1]
