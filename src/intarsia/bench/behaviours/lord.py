"""LoRD: what two layers of a net lose at half their rank, cut by their outputs and by their weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from intarsia import shrink
from intarsia.bench.behaviours import Seen, behaviour


@behaviour("lord", "loses less of held-out outputs than the SVD of the weights at the same ranks")
def cut() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    look, held = (torch.randn(2048, 64, generator=generator) @ mixing + 0.3 for _ in range(2))
    rows = []
    for share in (0.7, 0.4):
        lost = {}
        for by in ("outputs", "weight"):
            thin = copy.deepcopy(net)
            known = shrink.survey(thin, [look], by=by, loss=lambda m, x: m(x).sum())
            shrink.factorize(thin, known, share, always=True)
            with torch.no_grad():
                lost[by] = float((thin(held) - net(held)).norm() / net(held).norm())
        rows.append(
            Seen(
                f"relative error of held-out outputs at {share:.0%} rank",
                "lord",
                lost["outputs"],
                "SVD of the weights",
                lost["weight"],
                "lower",
            )
        )
    return rows
