"""LoRA+ against HF PEFT's optimizer on the same adapter, and what its ratio means in one step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import intarsia as ia
from intarsia import optim
from small import small_net, some_input, some_loss, state_of, stir, trained

RATIO, LR, DECAY = 6.0, 1e-3, 0.1


class Net(nn.Module):
    """An embedding, two layers and a norm, as PEFT can adapt them."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed, self.norm, self.up, self.down = (
            nn.Embedding(20, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 16),
            nn.Linear(16, 12),
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(self.norm(self.embed(ids)))))
        return y


def theirs() -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["embed", "up", "down"], lora_dropout=0.0)
    net: nn.Module = get_peft_model(Net(), config).double()
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name or "norm" in name or name.endswith("up.base_layer.bias"))
    return net


def ours(like: nn.Module) -> nn.Module:
    """The same factors on the same net; PEFT keeps an embedding's A and B transposed beside ours."""
    net = Net()
    ia.attach(net, ia.Lora(rank=3, alpha=6.0), "*")
    tensors = dict(like.named_parameters())
    with torch.no_grad():
        for site in ("up", "down", "embed"):
            state = state_of(net, site)
            kind = "lora_embedding_{}.default" if site == "embed" else "lora_{}.default.weight"
            for key in "AB":
                found: torch.Tensor = tensors[f"base_model.model.{site}.{kind.format(key)}"]
                mine = getattr(state, key)
                mine.data = mine.data.double()
                twin = "B" if key == "A" else "A"
                if site == "embed" and mine.shape != found.shape:
                    found = tensors[f"base_model.model.{site}.{kind.format(twin)}"].mT
                mine.copy_(found)
    for p in (*net.norm.parameters(), net.up.bias):
        p.requires_grad_(True)
    return net


@pytest.fixture
def both() -> tuple[nn.Module, nn.Module]:
    peft = theirs()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return peft, ours(peft)


def rates(optimizer: torch.optim.Optimizer) -> list[tuple[float, float, int]]:
    """(rate, decay, numbers) of each group that has something."""
    return sorted(
        (g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups if g["params"]
    )


def test_groups_and_steps_are_pefts(both):
    peft, mine = both
    given = {"lr": LR, "loraplus_lr_ratio": RATIO, "loraplus_weight_decay": DECAY, "loraplus_lr_embedding": 2e-4}
    theirs = create_loraplus_optimizer(peft, torch.optim.AdamW, **given)
    recipe = optim.build({"name": "lora-plus", "ratio": RATIO, "embedding_lr": 2e-4})
    optimizer = recipe.build(mine, LR, DECAY)
    assert rates(optimizer) == rates(theirs)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained(mine))
    for step in range(5):
        ids = torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(step))
        losses = []
        for net, each in ((peft, theirs), (mine, optimizer)):
            each.zero_grad()
            loss = net(ids).square().mean()
            loss.backward()
            each.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def run(recipe: optim.Recipe | None, lr: float, steps: int = 5) -> list[torch.Tensor]:
    net = small_net(torch.float64)
    ia.attach(net, ia.Lora(rank=2))
    stir(net)
    optimizer = recipe.build(net, lr) if recipe else torch.optim.AdamW(trained(net), lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        some_loss(net, some_input(torch.float64, seed=step)).backward()
        optimizer.step()
    return [p.detach().clone() for p in trained(net)]


def test_a_ratio_of_1_is_adamw():
    assert all(
        torch.equal(a, b) for a, b in zip(run(optim.LoraPlusRecipe(ratio=1.0), 1e-2), run(None, 1e-2), strict=True)
    )


@pytest.mark.parametrize(
    "method",
    [ia.Lora(rank=2), ia.Dora(ia.Lora(rank=2)), ia.registry.build({"name": "rosa", "rank": 2})],
    ids=lambda m: m.name,
)
def test_one_step_moves_a_by_the_rate_and_b_by_the_ratio(method):
    net = small_net(torch.float64)
    ia.attach(net, method, data=[some_input(torch.float64)], loss=some_loss)
    stir(net, size=0.3)
    optimizer = optim.LoraPlusRecipe(ratio=RATIO, eps=0.0).build(net, LR)
    before = copy.deepcopy({site: dict(state_of(net, site).named_parameters()) for site in ("up", "down", "again")})
    some_loss(net, some_input(torch.float64)).backward()
    optimizer.step()
    for site, tensors in before.items():
        for key, old in tensors.items():
            moved = (getattr(state_of(net, site), key) - old).abs()
            rate = RATIO * LR if key in ("B", "magnitude") else LR
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-6, atol=0)


def test_a_schedule_keeps_the_ratio():
    net = small_net()
    ia.attach(net, ia.Lora(rank=2))
    optimizer = optim.LoraPlusRecipe(ratio=RATIO).build(net, LR)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
        down, up = (group["lr"] for group in optimizer.param_groups)
        assert down < LR
        assert up == pytest.approx(RATIO * down, rel=1e-12)
