"""``intarsia methods``: every method and named variant, for people and for machines."""

from __future__ import annotations

import intarsia as ia


def test_every_method_is_a_row(intarsia):
    rows = {row["id"]: row for row in intarsia("methods", "--json").json}
    trained = {*ia.registry.methods(), *ia.registry.variants()}
    assert set(rows) == trained | set(ia.registry.systems())
    rows = {name: row for name, row in rows.items() if name in trained}
    assert {"dora", "lora", "paca", "rslora", "shira"} <= set(rows)
    assert all(row["kind"] == "method" for row in rows.values())
    beside = {name for name, row in rows.items() if not row["mergeable"]}
    assert "bottleneck" in beside
    assert beside == {name for name, row in rows.items() if row["cost_per_token"] != "none"}
    assert rows["smt"]["needs"] == ["gradient"]
    assert rows["lora"]["needs"] == []
    assert "(gradient)" in rows["shira"]["needs"]
    assert {name: rows[name]["needs_data"] for name in ("lora", "paca", "shira")} == {
        "lora": "no",
        "paca": "some settings",
        "shira": "some settings",
    }


def test_the_table_shows_what_the_rows_hold(intarsia):
    ended = intarsia("methods")
    for name, cls in ia.registry.methods().items():
        line = next(line for line in ended.out.splitlines() if line.startswith(f"{name} "))
        assert all(text in line for text in (cls.title, cls.formula, cls.trained, f"{cls.default_lr:g}", cls.paper))


def test_what_is_no_method_is_a_row_too(intarsia):
    rows = {row["id"]: row for row in intarsia("methods", "--json").json}
    ties = rows["ties"]
    assert (ties["kind"], ties["role"], ties["mergeable"], ties["rule"]) == ("merge rule", "merge", True, "ties")
    assert {"density", "normalize", "lambda"} <= {field["name"] for field in ties["fields"]}
    assert ties.keys() > rows["lora"].keys()
    assert intarsia("methods", "ties", "--json").json == ties
    said = intarsia("methods").out.splitlines()
    for name, system in ia.registry.systems().items():
        line = next(line for line in said if line.startswith(f"{name} "))
        assert all(text in line for text in (system.title, system.role, system.formula, system.paper))
    assert "Yadav et al. 2023" in intarsia("methods", "ties").out
    assert "did you mean 'ties'" in intarsia("methods", "tiess").err


def test_one_method_in_full(intarsia):
    said = intarsia("methods", "paca").out
    assert "Woo et al. 2025" in said
    assert "input columns that are trained in every weight" in said
    assert "random" in said
    assert f"{ia.Paca().trained_count((576, 576)):,} of a 576 x 576 weight" in said


def test_a_variant_is_its_method_with_fields_set(intarsia):
    row = intarsia("methods", "rslora", "--json").json
    assert (row["variant_of"], row["paper"]) == ("lora", "arXiv:2312.03732")
    assert [field["name"] for field in row["fields"]] == ["rank", "alpha", "start"]
    assert "rsLoRA: LoRA with scaling=rslora" in intarsia("methods", "rslora").out
    assert ia.registry.build({"name": "rslora", "rank": 4}) == ia.Lora(rank=4, scaling="rslora")
    assert ia.registry.build({"name": "dora", "inner": "rslora"}) == ia.Dora(ia.Lora(scaling="rslora"))


def test_a_field_that_a_variant_sets_cannot_be_given(intarsia, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("{model: m, data: d, output: o, method: {name: rslora, scaling: lora}}")
    ended = intarsia("train", config)
    assert ended.code == 2
    assert "rslora is lora with scaling='rslora', so scaling cannot be given" in ended.err


def test_fields_have_types_defaults_and_help(intarsia):
    for row in intarsia("methods", "--json").json:
        assert all(field["help"] and field["type"] for field in row["fields"]), row["id"]
    shira = intarsia("methods", "shira", "--json").json
    assert {"name": "density", "type": "float", "default": 0.01}.items() <= shira["fields"][0].items()
    dora = intarsia("methods", "dora", "--json").json
    assert dora["fields"][0]["default"]["name"] == "lora"
