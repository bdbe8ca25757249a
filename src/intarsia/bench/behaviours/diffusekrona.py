"""DiffuseKronA: a change of full rank in few numbers, where it is a product of Kronecker; noise alone is none, and hardly fitted."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.diffusekrona import DiffuseKronA


@behaviour("diffusekrona", "fits a Kronecker product of full rank, at a count where the best LoRA has rank 1")
def kronecker() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(8, 8, generator=generator) / 8**0.5 for _ in range(2))
    noise = torch.randn(64, 64, generator=generator) / 8
    product, method = torch.kron(A, B), DiffuseKronA(a1=8, a2=8)  # 128 numbers, as LoRA of rank 1
    noisy = product + 0.05 * product.norm() / noise.norm() * noise
    return [
        Seen("relative error, a noisy product", "krona 8 x 8", fit(method, noisy), "the SVD of rank 1", _svd(noisy), "lower"),
        Seen("relative error, noise alone", "krona 8 x 8", fit(method, noise), "the SVD of rank 1", _svd(noise), "lower"),
    ]  # fmt: skip


def _svd(target: torch.Tensor) -> float:
    values = torch.linalg.svdvals(target)
    return float(values[1:].norm() / values.norm())
