"""What a method may ask for besides gradients: mean and gram of a layer's inputs, and the weight before compression."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import intarsia as ia

SEEN: dict[str, dict[str, torch.Tensor]] = {}


@dataclass(frozen=True)
class Asks(ia.Lora):
    wants: tuple[str, ...] = ()
    name = "asks"

    def needs(self):
        return frozenset(self.wants)

    def init(self, site, start):
        SEEN[site.name] = {need: start.given(need).clone() for need in self.wants}
        return super().init(site, start)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 8)]


def run(model, batch):
    return model(batch).sum()


def test_mean_and_gram_are_those_of_all_tokens():
    model, data = net(), batches()
    x = torch.cat(data)
    expected = {"0": x, "2": model[1](model[0](x)).detach()}
    ia.attach(model, Asks(1, wants=("gram", "mean", "inputs")), data=data, loss=run)
    for name, rows in expected.items():
        torch.testing.assert_close(SEEN[name]["gram"], rows.T @ rows / 13)
        torch.testing.assert_close(SEEN[name]["mean"], rows.mean(0))
        torch.testing.assert_close(SEEN[name]["inputs"], rows.norm(dim=0))


def test_the_original_needs_no_data():
    model, original = net(), net()
    with torch.no_grad():
        original[0].weight.add_(1)
    ia.attach(model, Asks(1, wants=("original",)), original=original)
    assert torch.equal(SEEN["0"]["original"], original[0].weight)
    assert torch.equal(SEEN["2"]["original"], original[2].weight)


def test_an_original_that_does_not_fit_is_refused_whole():
    model = net()
    with pytest.raises(ia.IntarsiaError, match="pass original=the model before it"):
        ia.attach(model, Asks(1, wants=("original",)))
    with pytest.raises(ia.IntarsiaError, match=r"0: original has \(2, 2\)(.|\n)*2: original has no such weight"):
        ia.attach(model, Asks(1, wants=("original",)), original={"0": torch.zeros(2, 2)})
    assert not hasattr(model, "_intarsia")
