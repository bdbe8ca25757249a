"""Targets: what they name, and what is said where they name nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia.site import adaptable_layers, find_sites
from small import small_net

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def llama(tiny_llama):
    return tiny_llama()


def _names(model, targets, exclude=()):
    return list(find_sites(model, targets, exclude))


def test_all_linear_is_every_linear_but_the_head(llama):
    names = _names(llama, "all-linear")
    assert len(names) == 14
    assert {name.rpartition(".")[2] for name in names} == set(PROJECTIONS)
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        ("*.q_proj", 2),
        ("model.layers.0.*", 7),
        ("model.layers.0.self_attn.q_proj", 1),
        ("self_attn.q_proj", 2),
        ("*.layers.[01].mlp.*_proj", 6),
        (r"re:.*\.layers\.1\..*(q|k)_proj", 2),
        ("lm_head", 1),
        (["all-linear", "lm_head"], 15),
        (("q_proj", "q_proj"), 2),
        ({"k_proj"}, 2),
    ],
    ids=str,
)
def test_targets(targets, count, llama):
    names = _names(llama, targets)
    assert len(names) == count
    order = [name for name, _ in llama.named_modules()]
    assert names == sorted(names, key=order.index)


def test_a_name_is_not_a_part_of_a_name(llama):
    for target in ("proj", "_proj", "q_pro", "re:q_proj", "re:.*q_pro"):
        with pytest.raises(ia.IntarsiaError, match="matches none of the 16 layers that can be adapted"):
            _names(llama, target)


def test_exclusions(llama):
    assert len(_names(llama, "all-linear", "down_proj")) == 12
    assert len(_names(llama, "all-linear", ["*.mlp.*", "re:.*[qk]_proj"])) == 4
    assert _names(llama, "q_proj", "model.layers.0.*") == ["model.layers.1.self_attn.q_proj"]


def test_all_faults_are_told_at_once_with_the_nearest_names(llama):
    with pytest.raises(ia.IntarsiaError) as caught:
        _names(llama, ["*.q_prj", "up_proj", "re:(", "gate"], ["dwon_proj"])
    text = str(caught.value)
    assert (
        "target '*.q_prj' matches none of the 16 layers that can be adapted; did you mean 'q_proj' (model.layers.0.self_attn.q_proj)"
        in text
    )
    assert "target 're:(' is not a regular expression" in text
    assert "target 'gate' matches none" in text
    assert "exclude 'dwon_proj' matches none of the 16 layers that can be adapted; did you mean 'down_proj'" in text
    assert "up_proj'" not in text.partition("matches")[0]


def test_no_targets_and_none_left(llama):
    with pytest.raises(ia.IntarsiaError, match="no targets were given; try 'all-linear'"):
        _names(llama, [])
    with pytest.raises(ia.IntarsiaError, match="the exclusions leave none of the 2 targeted layers"):
        _names(llama, "q_proj", "self_attn.*_proj".replace("self_attn", "*.self_attn"))


def test_what_cannot_be_adapted_is_named(llama):
    with pytest.raises(
        ia.IntarsiaError, match="'norm' matches model.norm, a LlamaRMSNorm; these can be adapted: Linear, Conv"
    ):
        _names(llama, "norm")
    with pytest.raises(ia.IntarsiaError, match="LayerNorm has no layer that can be adapted"):
        _names(nn.LayerNorm(3), "all-linear")


def test_a_tied_head_is_refused_and_not_among_all_linear(tiny_llama):
    tied = tiny_llama(tie_word_embeddings=True)
    assert len(_names(tied, "all-linear")) == 14
    with pytest.raises(
        ia.IntarsiaError, match=r"lm_head: .* tied to model.embed_tokens.weight; name 'model.embed_tokens'"
    ):
        ia.attach(tied, ia.Lora(2), ["q_proj", "lm_head"])
    assert ia.attached_names(tied) == []


def test_a_layer_used_under_two_names_is_refused():
    model = small_net()
    model.add_module("twice", model.get_submodule("up"))
    with pytest.raises(ia.IntarsiaError, match="up: its weight is tied to twice.weight"):
        _names(model, "up")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4).to("meta")), "meta device; load the base"),
        (lambda: nn.Sequential(_not_contiguous()), "not contiguous"),
        (lambda: nn.Sequential(_integers()), "torch.int8 is not a plain matrix of floats"),
        (lambda: nn.Linear(3, 4), "a single Linear; put it into a module"),
        (lambda: nn.MultiheadAttention(4, 2), "out_proj: nn.MultiheadAttention reads its weight without calling it"),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8), "exclude 'self_attn.out_proj'"),
        (lambda: nn.Sequential(_replaced()), "something replaced its forward"),
    ],
    ids=["meta", "not-contiguous", "integers", "single", "attention", "encoder", "forward"],
)
def test_layers_that_an_adapter_could_not_serve_are_refused(make, message):
    """Each of these would be skipped silently, or would change something else."""
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Lora(2))
    assert [type(module) for module in model.modules()] == classes
    assert ia.attached_names(model) == []


def _not_contiguous() -> nn.Linear:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.randn(3, 4).T)
    return layer


def _integers() -> nn.Linear:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    return layer


def _replaced() -> nn.Linear:
    layer = nn.Linear(3, 4)
    real = layer.forward
    layer.__dict__["forward"] = lambda x: real(x)  # as layer.forward = ... does
    return layer


def test_an_excluded_out_proj_lets_the_rest_be_adapted():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    ia.attach(model, ia.Lora(2), exclude="out_proj")
    assert set(ia.export(model).edits) == {"linear1.weight", "linear2.weight"}


class Quiet(nn.Linear):
    """Its own forward, and the same numbers."""

    def forward(self, input):
        return super().forward(input)


class Loud(nn.Linear):
    """What an adapter adds to its output is not what the edit, set into its weight, would."""

    def forward(self, input):
        return super().forward(input) * 2


class Picky(nn.Linear):
    def forward(self, input):
        raise ValueError("three dimensions, please")


@pytest.mark.parametrize("method", [ia.Lora(2), ia.Shira(density=0.2)], ids=str)
def test_subclasses_of_linear_are_adapted_and_stay_what_they_are(method):
    model = nn.Sequential(Quiet(4, 4))
    x = torch.randn(3, 4)
    before = model(x)
    ia.attach(model, method)
    assert isinstance(model[0], Quiet)
    assert torch.equal(model(x), before)
    ia.attach(model, ia.Lora(1), name="second")
    ia.detach(model, "default")
    ia.detach(model, "second")
    assert type(model[0]) is Quiet


@pytest.mark.parametrize(("kind", "message"), [(Loud, "is not that of its base class"), (Picky, "three dimensions")])
def test_a_forward_that_computes_something_else_is_refused(kind, message):
    model = nn.Sequential(kind(4, 4))
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Lora(2))
    assert type(model[0]) is kind


def test_a_base_may_have_modules_called_adapters():
    """Their weights are the base's: targeted, and part of its digest."""
    model = nn.ModuleDict({"adapters": nn.Sequential(nn.Linear(3, 3)), "body": nn.Linear(3, 3)})
    start = ia.digest(model)
    assert _names(model, "all-linear") == ["adapters.0", "body"]
    ia.attach(model, ia.Lora(1))
    assert ia.digest(model) == start
    with torch.no_grad():
        model.get_parameter("adapters.0.weight").add_(1.0)
    assert ia.digest(model) != start


def test_an_adapters_own_tensors_are_no_sites() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    before = list(adaptable_layers(net))
    ia.attach(
        net, ia.Shira(density=0.5, granularity="tile", width=4), targets="0"
    )  # values (k, 4, 4), as a stack of experts
    assert list(adaptable_layers(net)) == before
