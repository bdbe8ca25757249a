"""The dense training that a lottery begins with: plain AdamW on the targeted weights, over the same data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from intarsia.calibrate import Mapped, model_loss
from intarsia.model import plan
from intarsia.site import site_at
from intarsia.train.data import collator
from intarsia.train.plan import Plan
from intarsia.train.progress import Progress


def train_densely(ready: Plan, model: nn.Module, progress: Progress) -> Mapping[str, Tensor]:
    """``train.first.steps`` steps on whatever has ``requires_grad``. -> the trained weights by the name of their layer.

    They are trained as float32 masters, as adapters are: a bfloat16 weight does not show a small step.
    """
    config, first = ready.config.train, ready.config.train.first
    steps = first.steps or ready.estimate.steps
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.requires_grad}
    masters = {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in weights.items()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=first.lr, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(_batches(ready, steps), 1):
        model_loss(model, batch).backward()
        for name, p in weights.items():
            if p.grad is not None:  # an expert that no token reached
                masters[name].grad, p.grad = p.grad.to(masters[name].dtype), None
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(masters.values(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = first.lr * (1 - (step - 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(masters[name])
        progress.work(step, steps, "training densely")
    return masters


def _batches(ready: Plan, steps: int) -> Iterator[dict[str, Tensor]]:
    """In an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(ready.config.seed)
    collate, size = collator(ready.pretrained.tokenizer), ready.config.train.batch_size
    device = next(ready.pretrained.model.parameters()).device
    rows: list[int] = []
    for _ in range(steps):
        while len(rows) < size:
            rows += torch.randperm(len(ready.train), generator=generator).tolist()
        batch, rows = rows[:size], rows[size:]
        yield {key: t.to(device) for key, t in collate([ready.train[row] for row in batch]).items()}


@contextlib.contextmanager
def marked(ready: Plan, checkpoint: Path) -> Iterator[Mapping[str, Mapping[str, Tensor]]]:
    """A movement of 1 where a checkpoint's support is and of 0 elsewhere, so that the support chosen by it is that one."""
    saved = load_file(checkpoint / "adapter.safetensors")
    sites = list(plan(ready.pretrained.model, ready.method, ready.config.targets, ready.config.exclude))
    with Mapped() as marks:
        for site in sites:
            layer_site = site_at(ready.pretrained.model, site)
            mark = torch.zeros_like(
                ready.pretrained.model.get_parameter(f"{site}.weight"), dtype=torch.float32, device="cpu"
            )
            if f"{site}/index" in saved:
                unit, index = ready.method.granularity_at(layer_site.shape), saved[f"{site}/index"]  # type: ignore[attr-defined]
                ones = torch.ones(unit.values_shape(layer_site.shape, len(index)))
                unit.put(layer_site.operator.matrix(mark), index, ones)
            marks.set(site, mark)
        yield {site: {"movement": marks[site]} for site in sites}
