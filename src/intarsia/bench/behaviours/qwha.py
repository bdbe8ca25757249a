"""QWHA: how much of the output's error after rounding its start takes away, beside the best low rank of as many numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.methods.qwha import Qwha

RANK = 8


def rounded(W: Tensor, bits: int, group: int = 32) -> Tensor:
    """W rounded to the nearest of 2^bits even steps between the ends of each group of inputs. (O, I) -> (O, I)."""
    groups = W.unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    found: Tensor = (((groups - low) / step).round() * step + low).flatten(1)
    return found


@behaviour(
    "qwha",
    "its start leaves less error in the output of a rounded layer than the SVD of the error, and both less than nothing",
)
def start() -> list[Seen]:
    seen = []
    for bits in (2, 3, 4):
        W, x = layer()
        E = {"nothing": W - rounded(W, bits)}
        U, s, Vh = torch.linalg.svd(E["nothing"])
        E["svd"] = E["nothing"] - (U[:, :RANK] * s[:RANK]) @ Vh[:RANK]
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
        linear.weight.data.copy_(rounded(W, bits))
        net = nn.Sequential(linear)
        models.attach(net, Qwha(RANK), data=[x], loss=lambda model, batch: model(batch).sum(), original={"0": W})
        whole = (x @ W.T).norm()
        left = {name: float((x @ error.T).norm() / whole) for name, error in E.items()}
        with torch.no_grad():
            mine = float((net(x) - x @ W.T).norm() / whole)
        measure = f"relative error of the output, {bits} bits, as LoRA r={RANK}"
        seen += [
            Seen(measure, "qwha", mine, "the SVD of the error", left["svd"], "lower"),
            Seen(measure, "the SVD of the error", left["svd"], "no repair", left["nothing"], "lower"),
        ]
    return seen


def layer() -> tuple[Tensor, Tensor]:
    """A weight (192, 128) with heavy tails, and inputs of unlike sizes that go together, as those of a language model do."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(192, 128, generator=generator).double()
    W = W * (1 + 2 * (torch.rand(192, 128, generator=generator) > 0.98)) / 128**0.5
    mixing = torch.randn(128, 128, generator=generator).double() / 128**0.5 + torch.eye(128).double()
    sizes = torch.logspace(-1, 0.5, 128).double()[torch.randperm(128, generator=generator)]
    return W, torch.randn(1024, 128, generator=generator).double() @ (mixing * sizes)
