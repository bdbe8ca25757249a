"""EoRA: the error of the outputs after a repair, where inputs are uneven as those of real layers are."""

from __future__ import annotations

import torch
from torch import nn

from intarsia import model as models
from intarsia.bases import two_of_four
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.methods.eora import Eora


@behaviour(
    "eora",
    "repairs the outputs of a pruned layer better than the plain SVD of the error, on inputs that it has not seen",
)
def repair() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 96)
    mixing = torch.randn(96, 96, generator=generator)
    look, held = ((torch.randn(2048, 96, generator=generator) * scales) @ mixing for _ in range(2))
    W = torch.randn(128, 96, generator=generator)
    errors, before = {}, 0.0
    for weighting in ("gram", "diagonal", "none"):
        net = nn.Sequential(nn.Linear(96, 128, bias=False))
        net.get_parameter("0.weight").data.copy_(two_of_four(W))
        before = float((net(held) - held @ W.T).norm() / (held @ W.T).norm())
        models.attach(
            net, Eora(rank=16, weighting=weighting), data=[look], loss=lambda m, x: m(x).sum(), original={"0": W}
        )
        errors[weighting] = float((net(held) - held @ W.T).norm() / (held @ W.T).norm())
    error = "relative error of held-out outputs, 2:4, r=16"
    return [
        Seen(error, "eora", errors["gram"], "plain SVD", errors["none"], "lower"),
        Seen(error, "eora", errors["gram"], "eora, the diagonal only", errors["diagonal"], "lower"),
        Seen(error, "plain SVD", errors["none"], "no repair", before, "lower"),
    ]
