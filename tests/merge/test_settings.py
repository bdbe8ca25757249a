"""Parameters by layer and by name, as mergekit's users write them."""

from __future__ import annotations

import pytest

from intarsia.errors import IntarsiaError
from intarsia.merge.settings import between, layers_of, setting

WEIGHTS = [
    f"model.layers.{layer}.{module}.weight" for layer in range(5) for module in ("self_attn.q_proj", "mlp.up_proj")
]


def _at(value, weight, layers=range(5)):
    return setting("parameters.weight", value).at(weight, layers)


@pytest.mark.parametrize("value", [0.5, 3, True, "total", None])
def test_a_value_is_the_same_everywhere(value):
    assert all(_at(value, weight) == value for weight in [*WEIGHTS, "lm_head.weight"])


def test_a_gradient_is_interpolated_over_the_layers():
    found = [_at([0, 1, 0.5], f"model.layers.{layer}.up.weight") for layer in range(5)]
    assert found == pytest.approx([0, 0.5, 1, 0.75, 0.5])
    assert [_at([0.2], weight) for weight in WEIGHTS] == [0.2] * 10


def test_layers_count_from_the_first_to_the_last_that_is_edited():
    layers = layers_of(["h.4.up.weight", "h.7.up.weight", "h.6.down.weight", "wte.weight"])
    assert layers == range(4, 8)
    assert [_at([0, 3], f"h.{layer}.up.weight", layers) for layer in (4, 5, 7)] == pytest.approx([0, 1, 3])
    assert _at([0.1, 0.9], "h.3.up.weight", layers_of(["h.3.up.weight"])) == 0.1


@pytest.mark.parametrize(("t", "expected"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 2.0), (1.0, 1.0)])
def test_the_curve_goes_through_its_values(t, expected):
    """mergekit's formula: t (n - 1) is the place among the values, and the rest of it the share of the next."""
    assert between((1.0, 3.0, 1.0), t) == pytest.approx(expected)


def test_the_first_filter_that_fits_counts():
    value = [{"filter": "q_proj", "value": 0.1}, {"filter": "self_attn", "value": [0, 1]}, {"value": 0.7}]
    assert _at(value, "model.layers.1.self_attn.q_proj.weight") == 0.1
    assert _at(value, "model.layers.1.self_attn.o_proj.weight") == 0.25
    assert _at(value, "model.layers.1.mlp.up_proj.weight") == 0.7
    assert _at([{"filter": "*", "value": 2}], "anything") == 2
    assert _at({"filter": "mlp", "value": 2}, "a.mlp.b") == 2
    assert _at({"filter": "mlp", "value": 2}, "a.attn.b") is None


@pytest.mark.parametrize("value", [0.5, [0.0, 1.0], [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}], None])
def test_it_is_remembered_as_it_was_written(value):
    assert setting("weight", value).plain == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"filtr": "mlp", "value": 1}], "parameters.weight.0: unknown key 'filtr'; did you mean 'filter'"),
        ([{"filter": "mlp"}], "parameters.weight.0: it has no value"),
        ([{"filter": 3, "value": 1}], "filter is 3; expected a part of a weight's name"),
        ([{"value": {"a": 1}}], "expected a value, a list of numbers over the layers, or a list of"),
        ([1, "two"], r"expected a value, a list of numbers over the layers, .*found \[1, 'two'\]"),
        ([], r"found \[\]"),
        ([True, False], r"found \[True, False\]"),
        ([1, {"value": 2}], "expected a value"),
    ],
)
def test_what_is_none_of_the_three_forms(value, said):
    with pytest.raises(IntarsiaError, match=said):
        setting("parameters.weight", value)


def test_a_gradient_where_there_are_no_layers():
    with pytest.raises(
        IntarsiaError, match=r"parameters.weight: lm_head.weight is in no numbered layer.*filter: lm_head, value"
    ):
        _at([0, 1], "lm_head.weight")
