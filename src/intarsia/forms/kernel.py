"""The kernel form: a dense matrix made of two thin factors by a kernel, and made sparse.    W' = W + sparsify(D),  D_ij = k(B_i, A_j)"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, Sum, merge, sparsify
from intarsia.edits import Kernel as KernelEdit
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Remade
from intarsia.method import Start
from intarsia.site import Site
from intarsia.support import Shape


class Kernel(Remade):
    """State: ``A`` (2, I, r / 2), ``B`` (2, O, r / 2); ``mix`` (3,) where the kernel has one; ``A0``, ``B0``, the factors at the
    start, where the first change is subtracted; ``zeros`` (), how many entries are 0, where that changes in training.
    """

    rank: int
    kernel: str
    rule: str
    zero_start: bool

    @abstractmethod
    def zeros_at(self, shape: Shape) -> int:
        """How many entries of the change are 0 at the start."""

    def mix_at_start(self) -> tuple[float, float, float] | None:
        """alpha, gamma, beta of the mixed kernel, or None for the plain one."""
        return None

    def moves_zeros(self) -> bool:
        """Whether the number of zeros is part of the state, for a schedule to change."""
        return False

    def stays_wide(self) -> frozenset[str]:
        # The change is the difference of two distances, of which bfloat16 would keep no digit.
        return frozenset({"A", "B", "A0", "B0", "mix"})

    def check(self, site: Site) -> str | None:
        rows, columns = site.shape
        if self.zeros_at(site.shape) >= rows * columns:
            return f"{site.name}: none of the {rows * columns} entries would be left; lower the sparsity"
        return None

    def trained_count(self, shape: Shape) -> int:
        return self.rank * (shape[0] + shape[1]) + (3 if self.mix_at_start() else 0)

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        (O, I), generator = site.shape, start.generator()
        A, B = torch.empty(2, I, self.rank // 2), torch.empty(2, O, self.rank // 2)
        for factor in (A, B):
            # On three dimensions the fan-in is rows times width, so this is U(-1, 1) / sqrt(I r / 2), as in the authors' code.
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        return self._state(site, A, B, self._mix(), self.zeros_at(site.shape), (A, B) if self.zero_start else None)

    def _mix(self) -> Tensor | None:
        mix = self.mix_at_start()
        return None if mix is None else torch.tensor(mix)

    def _state(
        self, site: Site, A: Tensor, B: Tensor, mix: Tensor | None, zeros: int, start: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        wide, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        trained = {"A": A, "B": B} | ({} if mix is None else {"mix": mix})
        state: dict[str, Tensor] = {k: nn.Parameter(t.to(device, wide, copy=True)) for k, t in trained.items()}
        if start is not None:
            state |= {k: t.to(device, wide, copy=True) for k, t in zip(("A0", "B0"), start, strict=True)}
        return state | ({"zeros": torch.tensor(zeros, device=device)} if self.moves_zeros() else {})

    def zeros(self, p: Any) -> int | Tensor:
        """How many entries of the change are 0 now."""
        return p.zeros if self.moves_zeros() else self.zeros_at(p.shape)

    def delta(self, p: Any) -> Tensor:
        mix = p.mix if self.mix_at_start() else None
        change = sparsify(merge(p.A, p.B, self.kernel, mix), self.zeros(p), self._rule(p.shape))
        if not self.zero_start:
            return change
        at_start = self._mix()
        at_start = None if at_start is None else at_start.to(p.A0)
        first = sparsify(merge(p.A0, p.B0, self.kernel, at_start), self.zeros_at(p.shape), self._rule(p.shape))
        return change - first

    def _rule(self, shape: Shape) -> str:
        # Where nothing is to be 0 there is no competition, and no factor of its own size beside an entry.
        return self.rule if self.moves_zeros() or self.zeros_at(shape) else "none"

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(p).to(W.dtype), b

    def edit(self, p: Any) -> Edit:
        mix = p.mix.detach().clone() if self.mix_at_start() else None
        rule = self._rule(p.shape)
        A, B = p.A.detach().clone(), p.B.detach().clone()
        change = KernelEdit(p.shape, A, B, mix, int(self.zeros(p)), rule, self.kernel)
        if not self.zero_start:
            return change
        at_start = self._mix()
        at_start = None if at_start is None else at_start.to(p.A0)
        first = KernelEdit(
            p.shape, p.A0.clone(), p.B0.clone(), at_start, self.zeros_at(p.shape), rule, self.kernel, -1.0
        )
        return Sum(p.shape, (change, first))

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        parts = edit.parts if isinstance(edit, Sum) else (edit,)
        change, rule = parts[0], self._rule(site.shape)
        fits = (
            len(parts) == 1 + self.zero_start
            and all(isinstance(part, KernelEdit) for part in parts)
            and isinstance(change, KernelEdit)
            and (2 * change.A.shape[2], change.rule, change.kernel) == (self.rank, rule, self.kernel)
            and (change.mix is None) == (self.mix_at_start() is None)
            and (self.moves_zeros() or change.zeros == self.zeros_at(site.shape))
        )
        if not fits:
            raise IntarsiaError(
                f"{site.name}: the file has a {edit.kind} edit that its own config does not make: {self}"
            )
        start = (parts[1].A, parts[1].B) if self.zero_start else None  # type: ignore[attr-defined]
        return self._state(site, change.A, change.B, change.mix, change.zeros, start)  # type: ignore[attr-defined]
