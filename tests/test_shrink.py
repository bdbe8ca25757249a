"""LoRD: what a layer loses as two thin ones, ranks by type, and a shrunk model in a folder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia import bases, pretrained, shrink
from intarsia import model as models
from intarsia.bases import Thin
from intarsia.bases.thin import RANKS
from intarsia.errors import IntarsiaError
from small import SITES, small_net, some_input

RANK = 5


def data():
    """Correlated inputs with a mean, float64."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    return [some_input(torch.float64, 40, 16, seed=seed) @ mixing / 4 + 0.7 for seed in (1, 2)]


def run(model, batch):
    return model(batch).sum()


def rows(model, name):
    """What the layer was given and what it made of it, over all of the data."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, given, y: seen.append((given[0], y)))
    with torch.no_grad():
        for batch in data():
            model(batch)
    hook.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


def covariance(y):
    return (y - y.mean(0)).T @ (y - y.mean(0)) / len(y)


def thin_alone(name, rank, by="outputs", net=None):
    """(inputs, whole outputs, thin outputs) of one layer."""
    model = small_net(torch.float64) if net is None else net
    x, y = rows(model, name)
    found = shrink.survey(model, data(), by=by, loss=run)
    shrink.factorize(model, found, {name: rank}, always=True)
    with torch.no_grad():
        return x, y, model.get_submodule(name)(x)


@pytest.mark.parametrize("name", SITES)
def test_at_the_full_rank_the_layer_is_the_same(name):
    layer: Any = small_net().get_submodule(name)
    _, y, thin = thin_alone(name, min(layer.weight.shape))
    torch.testing.assert_close(thin, y, atol=2e-6, rtol=0)  # Q is kept in float32


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("rank", [1, RANK])
def test_the_mean_output_stays(name, rank):
    _, y, thin = thin_alone(name, rank)
    torch.testing.assert_close(thin.mean(0), y.mean(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", SITES)
def test_what_is_lost_is_the_sum_of_the_eigenvalues_left_out(name):
    _, y, thin = thin_alone(name, RANK)
    left_out = torch.linalg.eigvalsh(covariance(y)).flip(0)[RANK:].sum()
    lost = (thin - y).square().sum(1).mean()
    torch.testing.assert_close(lost, left_out, rtol=1e-5, atol=1e-9)
    _, _, by_weight = thin_alone(name, RANK, by="weight")
    assert lost < (by_weight - y).square().sum(1).mean()


def test_the_bias_is_that_of_the_formula():
    model = small_net(torch.float64)
    layer: Any = model.get_submodule("up")
    _x, y = rows(model, "up")
    one = shrink.survey(model, data(), "up", loss=run)["up"]
    _W1, Q, b2 = one.factors(layer.weight, layer.bias, RANK)
    values, vectors = torch.linalg.eigh(covariance(y))
    first, mu = vectors[:, values.argsort(descending=True)[:RANK]], y.mean(0)
    torch.testing.assert_close(Q @ Q.T, first @ first.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(b2, mu - Q @ (Q.T @ mu) + Q @ (Q.T @ layer.bias.detach()), atol=1e-6, rtol=0)


def test_outputs_of_few_dimensions_need_no_more():
    model = small_net(torch.float64)
    few = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = some_input(torch.float64, 50, 3) @ few
    with torch.no_grad():
        y = model.get_submodule("up")(x)
    assert torch.linalg.matrix_rank(model.get_submodule("up").weight) == 16
    shrink.factorize(model, shrink.survey(model, [x], "up", loss=run), 3, always=True)
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule("up")(x), y, atol=1e-5, rtol=0)


def test_layers_that_would_not_be_smaller_stay():
    model = small_net()
    done = shrink.factorize(model, shrink.survey(model, [some_input()], loss=run), 0.9)
    assert all(layer.rank is None for layer in done.layers)
    assert done.after == done.before
    assert not any(isinstance(module, Thin) for module in model.modules())
    again = shrink.factorize(model, shrink.survey(model, [some_input()], loss=run), 0.3, multiple=4)
    assert {layer.rank for layer in again.layers} == {8}  # 4.8, to 8
    found = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(".bias"))
    assert again.after == found + sum(layer.shape[0] for layer in again.layers)


def test_adapters_sit_on_both_thin_layers_and_fold():
    model = small_net()
    shrink.factorize(model, shrink.survey(model, [some_input()], loss=run), 3, always=True)
    ia.attach(model, ia.Lora(rank=2))
    assert len(models.states(model, "default")) == 2 * len(SITES)


def test_mistakes_are_told_before_anything_changes():
    model = small_net()
    with pytest.raises(IntarsiaError, match="by='columns': expected outputs or weight"):
        shrink.survey(model, [some_input()], by="columns", loss=run)
    found = shrink.survey(model, [some_input()], loss=run)
    with pytest.raises(IntarsiaError, match="up: rank -1; expected a share between 0 and 1, or a whole number"):
        shrink.factorize(model, found, -1)
    with pytest.raises(IntarsiaError, match="rank: 'upp' fits none of the 3 layers"):
        shrink.factorize(model, found, {"upp": 2})
    assert not any(isinstance(module, Thin) for module in model.modules())
    ia.attach(model, ia.Lora(rank=2))
    with pytest.raises(IntarsiaError, match="the model has adapters; detach them"):
        shrink.survey(model, [some_input()], loss=run)


def test_shares_are_chosen_by_type_within_the_threshold():
    model = small_net(torch.float64)
    whole = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in data()])

    def measure(model):
        with torch.no_grad():
            return 1 + float((torch.cat([model(batch) for batch in data()]) - expected).square().mean())

    found = shrink.survey(model, data(), loss=run)
    shares, trials = shrink.choose_shares(model, found, measure, shares=(0.9, 0.6, 0.3), threshold=0.01)
    assert {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)} == whole
    for kind in SITES:
        mine = {trial.share: trial.worse for trial in trials if trial.kind == kind}
        fitting = [share for share, worse in mine.items() if worse <= 0.01]
        assert shares.get(kind) == (min(fitting) if fitting else None)
        assert list(mine) == sorted(mine, reverse=True)


def test_a_shrunk_model_is_written_and_read_again(tiny_llama, tmp_path):
    model = tiny_llama()
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    done = shrink.factorize(model, shrink.survey(model, [batch]), {"up_proj": 0.4, "q_proj": 0.4})
    assert sum(layer.rank is not None for layer in done.layers) == 4
    shrink.save(model, Tokenizer(), tmp_path / "thin")
    ranks = bases.read_ranks(tmp_path / "thin")
    assert ranks is not None
    again, report = pretrained._read_thin(tmp_path / "thin", "auto", ranks)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert ia.digest(again) == ia.digest(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    (tmp_path / "thin" / RANKS).write_text('{"format": 9}')
    with pytest.raises(IntarsiaError, match="is of format 9; this version reads 1"):
        bases.read_ranks(tmp_path / "thin")
    with pytest.raises(IntarsiaError, match="no layer of this LlamaForCausalLM is thin"):
        shrink.save(tiny_llama(), Tokenizer(), tmp_path / "none")


class Tokenizer:
    """Writes nothing."""

    def save_pretrained(self, folder):
        pass
