"""The pages on optimizers run: their blocks, and the optimizer of the guide under the same laws as ours."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from intarsia.optim.recipe import OPTIMIZERS

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_page_of_optimizers_runs():
    names: dict[str, Any] = {}
    for block in blocks("optimizers.md"):
        exec(compile(block, "optimizers.md", "exec"), names)
    assert {group["lr"] for group in names["optimizer"].param_groups} == {1e-3, 8e-3}
    make, given = names["arguments"]["optimizer_cls_and_kwargs"]
    assert given == {"lr": 1e-2, "weight_decay": 0.0}
    assert callable(make())


def test_the_optimizer_of_the_guide_runs_and_is_the_papers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OPTIMIZERS, "classes", dict(OPTIMIZERS.known()))
    module = ModuleType("apollo")
    monkeypatch.setitem(sys.modules, "apollo", module)
    first, second = blocks("add-an-optimizer.md")
    exec(compile(first, "add-an-optimizer.md", "exec"), module.__dict__)
    exec(compile(second, "add-an-optimizer.md", "exec"), module.__dict__)
    W = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = module.Apollo([W], lr=0.1, scale=2.0, eps=0.0)
    W.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer.step()
    R = optimizer.state[W]["P"].mT @ W.grad
    torch.testing.assert_close(
        W.detach(), -0.2 * 6**0.5 / R.norm() * W.grad, rtol=0, atol=1e-7
    )  # Adam's first step has entries of 1
