"""Planted bugs: does a test notice? Run by hand or weekly, not with the tests:  python tests/mutations.py [WORD ...]

Each mutation replaces one piece of text in a copy of the package and runs the quick tests on it, first the file that is
most likely to notice. A mutation that no test notices is a missing test (exit 1); one whose text is not in the source
any more is to be brought up to date here (exit 2). Words choose the mutations whose file or description has them; ``--near`` runs
only the file that is most likely to notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = (
    "test_attach",
    "test_operators",
    "test_sites",
    "edits",
    "test_deck",
    "goldens",
    "test_store",
    "test_contract",
    "test_public",
    "test_disjoint",
)


@dataclass(frozen=True)
class Mutation:
    """One planted bug: ``old`` becomes ``new`` in a file of the package; ``near`` are the tests to run first."""

    what: str
    file: str
    old: str
    new: str
    near: str


MUTATIONS = [
    Mutation(
        "a score takes what is to be avoided", "support/choose.py",
        "scores = scores.masked_fill(~free.to(scores.device), -torch.inf)", "pass", "test_disjoint",
    ),
    Mutation(
        "a unit with one entry to avoid is free", "support/choose.py",
        "granularity.reduce(taken.view(rows, columns)) == 0", "granularity.reduce(taken.view(rows, columns)) <= 1", "test_disjoint",
    ),
    Mutation(
        "a support moves to what is to be avoided", "schedule.py",
        "scores = scores.masked_fill(~free.to(scores.device), -torch.inf)", "pass", "test_disjoint",
    ),
    Mutation(
        "live gradient without the scale", "forms/sparse.py",
        "gv = gv.to(ctx.dtype) * ctx.scale", "gv = gv.to(ctx.dtype)", "goldens",
    ),
    Mutation(
        "no gradient to what is below the branch", "forms/sparse.py",
        "gx = ctx.operator.input_gradient(gy, delta, ctx.x_shape)", "gx = torch.zeros_like(kept)",
        "test_contract",
    ),
    Mutation(
        "backward over a packed base without the values", "forms/sparse.py",
        "gx = p.operator.input_gradient(gy, method.set_into(p, ctx.read()).to(gy.dtype), ctx.x_shape)",
        "gx = p.operator.input_gradient(gy, ctx.read().to(gy.dtype), ctx.x_shape)", "test_quantised",
    ),
    Mutation(
        "forward over a packed base without the values", "forms/sparse.py",
        "method.set_into(p, read()).to(x.dtype), b)", "read().to(x.dtype), b)", "test_quantised",
    ),
    Mutation(
        "the part beside is lost over a packed base", "forms/pair.py",
        "return self.sparse.over(p, x, read, stored, b) + self.beside.branch(p, x)", "return self.sparse.over(p, x, read, stored, b)",
        "test_quantised",
    ),
    Mutation(
        "what is read of a packed base is kept", "forms/sparse.py",
        "ctx.save_for_backward(kept, values, index, *plan)  # values", "ctx.save_for_backward(kept, values, index, read(), *plan)  # values",
        "test_quantised",
    ),
    Mutation(
        "a deck takes adapters of packed weights", "deck/deck.py",
        "self._check_plain(name, adapter)", "pass", "test_quantised",
    ),
    Mutation(
        "the padding token trains", "operators.py", "if self.padding is not None:", "if False:", "test_operators",
    ),
    Mutation(
        "a tied head does not teach", "operators.py",
        "return granularity.gradient(kept, granularity.keep(gy, index, plan), index, plan, shape)",
        "return 0 * granularity.gradient(kept, granularity.keep(gy, index, plan), index, plan, shape)", "test_operators",
    ),
    Mutation(
        "a weight stored as (I, O) written as (O, I)", "support/granularity.py",
        "(positions % columns) * rows + positions // columns", "positions", "test_operators",
    ),
    Mutation(
        "groups of a convolution forgotten in backward", "operators.py",
        "            self.groups,\n            (*wanted, False),", "            1,\n            (*wanted, False),", "test_operators",
    ),
    Mutation(
        "groups of B in the wrong order", "operators.py", "A.repeat(self.groups, 1)", "A.repeat_interleave(self.groups, 0)", "test_operators",
    ),
    Mutation(
        "layouts are not compared", "model.py", "else \"?\") != operator.layout:", "else \"?\") is None:", "test_operators",
    ),
    Mutation(
        "the dense gradient of a stack is scaled twice", "chain.py", "gv.to(ctx.dtype) * ctx.scale, None, None", "gv.to(ctx.dtype) * ctx.scale**2, None, None", "test_operators",
    ),
    Mutation(
        "a partner keeps its class", "chain.py", "            partner.__class__ = partner.base_class\n", "", "test_operators",
    ),
    Mutation(
        "columns keep all of x", "support/granularity.py",
        "        return x.index_select(-1, plan[0] if plan else index)", "        return x", "goldens",
    ),
    Mutation(
        "columns by their sum", "support/granularity.py", "_norms(scores[:, : units * self.width].reshape(len(scores), units, self.width), (0, 2))", "scores.sum(0)", "goldens"
    ),
    Mutation(
        "lines grouped under their order", "support/granularity.py", "within[order] = ", "within = ", "goldens/test_granularity",
    ),
    Mutation(
        "tiles counted down, not across", "support/granularity.py", "(index % across).unique", "(index // across).unique", "goldens/test_granularity",
    ),
    Mutation(
        "blocks in use are the first ones", "support/granularity.py", "        return _pick(kept, used, width)", "        return _pick(kept, torch.arange(len(used)), width)", "goldens/test_granularity",
    ),
    Mutation(
        "marked twice is drawn once", "support/permutation.py", "taken[found] = True", "taken[found[1:]] = True", "goldens/test_permutation",
    ),
    Mutation(
        "show takes weights as they are stored", "cli/show.py", '.weight.detach() for name', '.stored.detach() for name', "cli/test_show",
    ),
    Mutation(
        "diagonals the other way", "support/granularity.py", "(rows + index[:, None])", "(rows - index[:, None])", "goldens/test_granularity",
    ),
    Mutation(
        "a unit of columns is its first column", "support/granularity.py", "if width == 1:\n        return index", "if width:\n        return index", "goldens/test_granularity",
    ),
    Mutation(
        "few entries of the transposed product", "support/granularity.py", "index_select(0, positions // columns)", "index_select(0, positions % columns)", "goldens/test_granularity",
    ),
    Mutation(
        "columns start at the rounded weight", "forms/sparse.py", "start = scale * _values(start, scale)", "pass", "goldens"
    ),
    Mutation("values found but not searched for", "forms/sparse.py", "for _ in range(4):", "for _ in range(0):", "test_store"),
    Mutation("a second derivative without a word", "forms/sparse.py", "import once_differentiable", "import Function as _\nonce_differentiable = lambda f: f  # ", "goldens"),
    Mutation(
        "written weight rounded twice", "chain.py",
        "(layer.kept.to(change.dtype) + change).to(layer.weight.dtype)", "layer.kept + change.to(layer.weight.dtype)", "test_contract",
    ),
    Mutation(
        "taken out by subtraction", "chain.py",
        "_put(layer, state, layer.kept)",
        "state.granularity().put(layer.weight, state.index, state.granularity().gather("
        "layer.weight, state.index) - state.method.change(state.raw()).to(layer.weight.dtype))",
        "test_contract",
    ),
    Mutation(
        "no error for a weight out of date", "chain.py",
        "not up_to_date(layer):", "False:", "test_attach",
    ),
    Mutation("only seen steps are written", "chain.py", "in stepped or versions", "in () or versions", "test_attach"),
    Mutation("masters lose bits in a cast", "chain.py", "moved.dtype.itemsize < 4", "moved.dtype.itemsize < 0", "test_contract"),
    Mutation(
        "a failure leaves other adapters active", "chain.py",
        "        give_back(before)\n        raise", "        raise", "test_attach",
    ),
    Mutation("a copy that is not written", "chain.py", "write(self)  # a copy counts versions anew", "pass", "test_contract"),
    Mutation(
        "rows of the wrong number", "chain.py", "if x.shape[0] != leading.row_count:", "if False:", "test_attach"
    ),
    Mutation("a plan takes what is set in for the base", "deck/deck.py", "plans.put_part(copy, where, n)", "pass", "test_deck"),
    Mutation(
        "a failed switch leaves half of it", "deck/deck.py",
        "            plans.restore((new, old.plan), matrix)\n            plans.renew(old.plan, matrix, before)\n", "", "test_deck",
    ),
    Mutation("a torn switch is not mended", "deck/deck.py", "if self._inside.torn:", "if False:", "test_deck"),
    Mutation("two decks write at once", "deck/deck.py", "        attached.check_unoccupied(self.model, self)\n", "", "test_deck"),
    Mutation("taken out only in part", "deck/plan.py", "        if left:\n", "        if False:\n", "test_deck"),
    Mutation("the copy of a weight does not go back", "deck/deck.py", "for name in prepared.copies:", "for name in ():", "test_deck"),
    Mutation("what goes out wins where runs differ", "deck/plan.py", "    if short_wins:", "    if not short_wins:", "test_deck"),
    Mutation("what goes out wins in a union", "deck/writer.py", "alone = ~torch.isin(old, new, assume_unique=True)", "alone = torch.ones_like(old, dtype=torch.bool)", "test_deck"),
    Mutation("what goes out wins in machine code", "deck/native.py", "b_bits[j] if take_b else a_bits[i]", "b_bits[j] if b < a else a_bits[i]", "test_deck"),
    Mutation("a line is written twice", "deck/native.py", "if i < i_end and a_index[i] == b_index[j]:", "if False:", "test_deck"),
    Mutation("whole lines are written twice", "deck/native.py", "i += 1 if b_index[j] == a_index[i] else 0", "i += 0", "test_deck"),
    Mutation("a deck takes a moved weight for known", "deck/weights.py", "            one.version = one.weight._version", "            one.look()", "test_deck"),
    Mutation("old plans after somebody else wrote", "deck/deck.py", "if not self._weights.changed():", "if True:", "test_deck"),
    Mutation("a weight that was replaced", "deck/weights.py", "if one.owner._parameters.get(one.attribute) is not weight:", "if False:", "test_deck"),
    Mutation("plans without end", "deck/shelf.py", "if self.bytes <= self.memory:", "if True:", "test_deck"),
    Mutation("autograd is not told", "deck/writer.py", "        torch.autograd.graph.increment_version([weights[name] for name in written])", "        pass", "test_deck"),
    Mutation(
        "fusion rounded twice", "edits/placement.py",
        "(base + change.values).to(W.dtype)", "base.to(W.dtype) + change.values.to(W.dtype)", "test_deck",
    ),
    Mutation("overlap overwritten", "edits/placement.py", "total.index_add_(", "total.index_copy_(", "test_deck"),
    Mutation("overflow set in", "edits/placement.py", "if not bool(bits.isfinite().all()):", "if False:", "test_deck"),
    Mutation("the factors of Kronecker's product change places", "edits/dense.py", "torch.kron(self.A.to(W.dtype), self.B.to(W.dtype))", "torch.kron(self.B.to(W.dtype), self.A.to(W.dtype))", "edits"),
    Mutation("a sum's factors are forgotten", "edits/sum.py", "else replace(one, values=factor * one.values)", "else one", "edits"),
    Mutation("a tile's values keep their order", "edits/placement.py", "values[order]", "values", "edits"),
    Mutation("places of a weight stored transposed", "edits/placement.py", "(positions % columns) * rows + positions // columns", "positions", "edits"),
    Mutation("the norm is not detached", "methods/dora.py", "V.detach() if self.detach_norm else V", "V", "goldens"),
    Mutation("lengths in half precision", "forms/rescale.py", '| {"magnitude"}', "", "test_contract"),
    Mutation("ratio rounded before the difference", "forms/rescale.py", "(ratio - 1).to(y.dtype)", "(ratio.to(y.dtype) - 1)", "goldens"),
    Mutation("bias scaled with the rows", "forms/rescale.py", "product = y if b is None else y - spread(b.to(y.dtype))", "product = y", "goldens"),
    Mutation("rslora scaled as lora", "methods/lora.py", '"rslora": math.sqrt', '"rslora": lambda r: r', "goldens"),
    Mutation("the global generator", "methods/lora.py", ", generator=start.generator()", "", "test_contract"),
    Mutation("one support for all layers", "method.py", 'f"{seed}:{site}"', 'f"{seed}"', "test_contract"),
    Mutation("another permutation", "support/permutation.py", "x = multiply(x, 0xC2B2AE35)", "x = multiply(x, 0xC2B2AE37)", "goldens"),
    Mutation("ties as they come", "support/choose.py", "return torch.cat([above, level]).sort().values", "return scores.topk(count).indices.sort().values", "goldens"),
    Mutation("snip with a sign", "support/scorers.py", '(_wide(site.weight) * start.given("gradient")).abs()', '_wide(site.weight) * start.given("gradient")', "goldens/test_scorers"),
    Mutation("wanda without the inputs", "support/scorers.py", '_wide(site.weight).abs() * start.given("inputs")', "_wide(site.weight).abs()", "goldens/test_scorers"),
    Mutation("too few power iterations", "support/scorers.py", "for _ in range(4):", "for _ in range(0):", "goldens/test_scorers"),
    Mutation("a threshold of the upper digit", "support/budgets.py", "for shift in range(bits - DIGIT, -1, -DIGIT):", "for shift in range(bits - DIGIT, DIGIT - 1, -DIGIT):", "goldens/test_budgets"),
    Mutation("negative scores in reverse", "support/budgets.py", "pattern ^ torch.iinfo(whole).max", "pattern", "goldens/test_budgets"),
    Mutation("zero below zero", "support/budgets.py", "(scores.to(wide) + 0.0).view", "scores.to(wide).view", "goldens/test_budgets"),
    Mutation("what is over is lost", "support/budgets.py", "counts[name] += 1", "pass", "goldens/test_budgets"),
    Mutation("one permutation for all rows", "support/permutation.py", "_mix(number ^ each, _wrapped)", "_mix(0 * number ^ each, _wrapped)", "goldens/test_budgets"),
    Mutation("larger units are better", "forms/chosen.py", " / math.sqrt(unit.size(site.shape))", "", "goldens/test_budgets"),
    Mutation("moments left behind", "schedule.py", "    for tensor in carried:\n", "    for tensor in ():\n", "test_contract"),
    Mutation("the least is the most negative", "schedule.py", "state.method.change(state.raw()).abs()", "state.method.change(state.raw())", "test_schedule"),
    Mutation("what is dropped comes again", "schedule.py", "scores.index_fill(0, index, -torch.inf)", "scores", "test_schedule"),
    Mutation("a move half made", "schedule.py", "                    tensor.copy_(bits)\n", "                    pass\n", "test_schedule"),
    Mutation("not rewound", "ticket.py", "                    weight.copy_(base[site])\n", "                    pass\n", "test_lottery"),
    Mutation("what was learned is not ahead", "ticket.py", "2 * most", "0", "test_lottery"),
    Mutation("what was learned is lost", "ticket.py", "            _give(model, name, learned)\n", "", "test_lottery"),
    Mutation("fisher of the sum", "calibrate.py", 'G.square() if need == "fisher" else G', 'G.abs() if need == "fisher" else G', "goldens/test_scorers"),
    Mutation("padding counts", "calibrate.py", "x = x[self.mask.to(x.device).bool()]", "pass", "goldens/test_scorers"),
    Mutation("norms added up", "calibrate.py", "sums[name] + more if", "sums[name].maximum(more) if", "goldens/test_scorers"),
    Mutation("a file chooses what is imported", "forms/chosen.py", "or is_scorer(self.scorer)", "or needs_of(self.scorer) is not None", "goldens/test_scorers"),
    Mutation("fused parts in one place", "forms/coupled.py", "yield name, own - low + role.first", "yield name, own - low", "families/test_families"),
    Mutation("groups of heads torn apart", "forms/coupled.py", "return order[mean[group[order]].argsort(descending=True, stable=True)]", "return order", "goldens/test_s2ft"),
    Mutation("a part's last units", "forms/coupled.py", '"amin"', '"amax"', "goldens/test_s2ft"),
    Mutation("every block draws alike", "forms/coupled.py", "name = pool[0].name if", 'name = "x" if', "goldens/test_s2ft"),
    Mutation("a head by its best channel", "methods/s2ft.py", ".mean(1) *", ".amax(1) *", "goldens/test_s2ft"),
    Mutation("steps as if counts were shares", "forms/joint.py", "max(1, self.usual(shape, unit)) * unit", "count * unit", "goldens/test_s2ft"),
    Mutation("biases stay behind", "families/permute.py", "if axis == 0 and getattr", "if False and getattr", "families/test_families"),
    Mutation("query heads leave their group", "families/permute.py", "if bool((by_group != by_group[:, :1]).any()):", "if False:", "families/test_families"),
    Mutation("tiles by their magnitudes alone", "methods/smt.py", "G.mean((1, 3)).abs()", "G.abs().mean((1, 3))", "goldens/test_smt"),
    Mutation("magnitudes for norms", "calibrate.py", "(self.magnitudes, 1)", "(self.magnitudes, 2)", "goldens/test_s2ft"),
    Mutation("struct without its spacing", "support/choose.py", "spacing = max(1, rows // wanted)", "spacing = 1", "goldens"),
    Mutation("gradients pile up", "calibrate.py", "G, parameter.grad = parameter.grad, None", "G = parameter.grad", "test_attach"),
    Mutation("calibration with dropout", "calibrate.py", "        model.eval()\n", "", "test_attach"),
    Mutation("calibration under what is active", "model.py", "if layer.active\n", "if layer.live\n", "test_attach"),
    Mutation("gradients not given back", "calibrate.py", "            parameter.grad = grad\n", "", "test_attach"),
    Mutation("only the last batch", "calibrate.py", "_place(name, tensor).add_(tensor.to", "_place(name, tensor).copy_(tensor.to", "test_attach"),
    Mutation("NaN read from a file", "edits/edit.py", "if not bool(tensor.isfinite().all()):", "if False:", "test_store"),
    Mutation("indices in any order", "edits/edit.py", "bool((index.diff() > 0).all())", "True", "test_store"),
    Mutation("indices out of range", "edits/edit.py", "int(index[-1]) < units", "True", "test_store"),
    Mutation("tensor digests unread", "store/reading.py", "if tensor_digest(tensors[part]) != digests[name]", "if False", "test_store"),
    Mutation("head digest unread", "store/reading.py", 'return bool(whole == head["digest"] and checksum(head) == head["checksum"])', "return True", "test_store"),
    Mutation("the file is mapped", "store/tensorfile.py", "        entry = self.entries[name]\n        if span", "        entry = self.entries[name]\n        from safetensors.torch import load_file\n        return load_file(self.path)[name]\n        if span", "test_store_lazy"),
    Mutation("the old adapter is not put back", "store/writing.py", "            old.rename(folder)\n", "", "test_store"),
    Mutation("two renames instead of one exchange", "store/writing.py", "if not folder.is_symlink() and _exchange(aside, folder):", "if False:", "test_store"),
    Mutation("a support is taken for drawn", "support/choose.py", "if torch.equal(drawn.index(units, count), index)", "if True", "test_store_codings"),
    Mutation("a coding's count is believed", "store/coding.py", "count > shape[0] * shape[1]", "False", "test_store_codings"),
    Mutation("decoded indices are not compared with their digest", "store/reading.py", "if found != self.digests[name]", "if False", "test_store_codings"),
    Mutation("a file of few bytes may claim any number of indices", "store/reading.py", "indices * INDEX_BYTES > MOST_INDICES * file.size", "False", "test_store_codings"),
    Mutation("a tensor that ends early is used", "store/tensorfile.py", "if found != len(data):", "if False:", "test_store_lazy"),
    Mutation("a newer format is read", "store/head.py", 'if head["format"] > FORMAT:', "if False:", "test_store"),
    Mutation("any base will do", "model.py", "None if any_base else digest(model)", "None", "test_store"),
    Mutation("everything trains after detaching", "model.py", "parameter.requires_grad_(flags.get(name, True))", "parameter.requires_grad_(True)", "test_attach"),
    Mutation("rows do not end", "model.py", "            layer.rows, layer.row_count = None, 0\n", "            pass\n", "test_attach"),
    Mutation("the order of a stack", "model.py", "    record(model).active = names\n", "    record(model).active = tuple(sorted(names))\n", "test_attach"),
    Mutation("checkpoints unchecked", "model.py", "    _check_numbers(model, name, saved)\n", "", "test_attach"),
    Mutation("tied weights written", "site.py", "    if alone:", "    if False:", "test_sites"),
    Mutation("parts of names match", "site.py", 'name.endswith(f".{pattern}")', "name.endswith(pattern)", "test_sites"),
    Mutation("the head is among all-linear", "site.py", "if layer is not head and", "if", "test_sites"),
    Mutation("the threshold survives", "edits/kernel.py", "alive = size > t", "alive = size >= t", "goldens/test_snell"),
    Mutation("the factor beside an entry is differentiated", "edits/kernel.py", "size = D.detach().abs()", "size = D.abs()", "goldens/test_snell"),
    Mutation("a softmax over the inputs", "edits/kernel.py", "torch.softmax(D / gamma, dim=0)", "torch.softmax(D / gamma, dim=1)", "goldens/test_snell"),
    Mutation("a product that keeps the dense matrix", "forms/kernel.py", "if not torch.is_grad_enabled():", "if True:", "goldens/test_snell"),
    Mutation("half a sum", "edits/sum.py", "for part, factor in zip(self.parts[1:], self.factors[1:], strict=True):", "for part, factor in zip(self.parts[2:], self.factors[2:], strict=True):", "goldens/test_rosa"),
    Mutation("nothing beside the live part", "forms/pair.py", "return self.sparse.live(p, x, W, b) + self.beside.branch(p, x)", "return self.sparse.live(p, x, W, b)", "goldens/test_rosa"),
    Mutation("experts are added, not averaged", "forms/split.py", "P0 + (P - P0) / self.experts", "P0 + (P - P0)", "goldens/test_mosa"),
    Mutation("all experts but the drawn one", "forms/split.py", "== p.drawn[number]", "!= p.drawn[number]", "goldens/test_mosa"),
    Mutation("always the same expert", "forms/split.py", "        p.step.add_(1)\n", "        pass\n", "goldens/test_mosa"),
    Mutation("a square, not a cube", "allocators/competition.py", "(1 - t) ** 3", "(1 - t) ** 2", "goldens/test_competition"),
    Mutation("uncertainty of the mean before", "methods/snella.py", "(now - importance).abs()", "now", "goldens/test_competition"),
    Mutation("importance without the weight", "methods/snella.py", "(P * P.grad).abs()", "P.grad.abs()", "goldens/test_competition"),
    Mutation("an insert forgets its scale", "edits/insert.py", "return added if self.scale == 1 else self.scale * added", "return added", "edits/test_insert"),
    Mutation("an insert at another strength", "edits/insert.py", ".times(factor * self.scale)", ".times(self.scale)", "edits/test_insert"),
    Mutation("an insert is rounded before its factors", "edits/insert.py", "self.inserted.mapped(lambda tensor: tensor.to(wide))", "self.inserted.mapped(lambda tensor: tensor.to(dtype).to(wide))", "edits/test_insert"),
    Mutation("the gain of an insert is rounded", "edits/insert.py", "tensor.to(dtype) if tensor.ndim else tensor", "tensor.to(dtype)", "edits/test_insert"),
    Mutation("an insert without its gain", "edits/bottleneck.py", "return found if self.gain is None else self.gain * found", "return found", "edits/test_insert"),
    Mutation("an insert of any width is read", "edits/bottleneck.py", "if not fits or (down.shape[1], up.shape[0]) != (inputs, outputs):", "if not fits:", "edits/test_insert"),
    Mutation("NaN in an insert is read", "edits/bottleneck.py", "            want_numbers(name, tensor)\n", "            pass\n", "edits/test_insert"),
    Mutation("a sum forgets the factor of an insert", "edits/sum.py", "[(factor * inner, insert) for", "[(inner, insert) for", "edits/test_insert"),
    Mutation("a sum with an insert forgets its factors", "edits/sum.py", "tuple(c for _, c in kept)) if kept", "()) if kept", "edits/test_insert"),
    Mutation("lengths around an insert", "edits/edit.py", "        if edit.inserts():\n", "        if False:\n", "edits/test_insert"),
    Mutation("an insert touches every entry", "edits/algebra.py", "    if within is None:\n", "    if within is edit and False:\n", "edits/test_insert"),
    Mutation("an insert before the layer is subtracted", "forms/insert.py", "below(x + self._added(p, x))", "below(x - self._added(p, x))", "goldens/test_bottleneck"),
    Mutation("an insert after the layer loses y", "forms/insert.py", "return y + self._added(p, y if", "return 2 * y + self._added(p, y if", "goldens/test_bottleneck"),
    Mutation("an insert's form forgets its scale", "forms/insert.py", "return added if self.scale == 1 else self.scale * added", "return added", "goldens/test_bottleneck"),
    Mutation("an insert of another config is restored", "forms/insert.py", "(edit.kind, edit.facts(), _shapes(edit)) != (fresh.kind, fresh.facts(), _shapes(fresh))", "edit.kind != fresh.kind", "goldens/test_bottleneck"),
    Mutation("an insert starts small, not at 0", "methods/bottleneck.py", "if self.start == \"mam\":\n            nn", "if False:\n            nn", "goldens/test_bottleneck"),
    Mutation("inserts read what others have added", "deck/inserts.py", "insert.change(x, y).to(y.dtype)", "insert.change(x, total).to(y.dtype)", "test_deck"),
    Mutation("an insert stays beside its layer", "deck/inserts.py", "            take_away(layer_of(weight))\n", "            pass\n", "test_deck"),
    Mutation("an insert leaves its attribute behind", "deck/inserts.py", "    layer.__dict__.pop(HELD, None)\n", "", "test_deck"),
    Mutation("an insert that is not finite is set in", "deck/inserts.py", "        if not all(bool(tensor", "        if False and not all(bool(tensor", "test_deck"),
    Mutation("an insert beside an adapter", "deck/inserts.py", "if isinstance(layer, chain.OnChain):", "if False:", "test_deck"),
    Mutation("a copy with an insert is taken", "deck/deck.py", "        inserts.check_none(model)\n", "", "test_deck"),
    Mutation("a failed switch leaves the new inserts", "deck/deck.py", "            inserts.exchange(new.inserts, old.plan.inserts, self._weights.layer)\n", "", "test_deck"),
    Mutation("mending leaves the inserts", "deck/deck.py", "                inserts.exchange(plan.inserts, {}, self._weights.layer)\n", "                pass\n", "test_deck"),
    Mutation("a deck forgets the factor of an insert", "deck/deck.py", ".append((weight * factor, insert))", ".append((weight, insert))", "test_deck"),
    Mutation("a model that moves loses its inserts", "deck/plan.py", "tuple(bits), whole, self.inserts)", "tuple(bits), whole)", "test_deck"),
    Mutation("an insert beside an embedding", "model.py", "elif edit.inserts() and operator.kind not in SITS_AT:", "elif False:", "test_deck"),
    Mutation("a method that reads weights above an insert", "model.py", "if methods[name].reads_weights_below and together:", "if False:", "test_contract"),
    Mutation("a format of weights takes an insert", "interop/peft_folder.py", "    if inserts:\n", "    if False:\n", "cli/test_inserts"),
    Mutation("the bridge merges an insert", "interop/bridge.py", "if beside := [name for name in names if not self[name].method.mergeable]:", "if beside := []:", "interop/test_bridge"),
    Mutation("a packed base takes no insert", "deck/deck.py", "for w, e in adapter.outlines.items() if e.in_weight() is not None}", "for w, e in adapter.outlines.items()}", "test_quantised"),
    Mutation("the benchmark trains the base it shares", "bench/train.py", "lr=0.0, weight_decay", "lr=1e-3, weight_decay", "bench"),
    Mutation("what the model holds counts as kept", "bench/memory.py", "if storage.data_ptr() not in resident:", "if True:", "bench"),
    Mutation(
        "ratios across rounds", "bench/costs.py",
        "found = [what(self.times[n]) / what(other.times[n]) for n in sorted(shared)]",
        "found = [statistics.median(map(what, self.times.values())) / statistics.median(map(what, other.times.values()))][: len(shared)]",
        "bench",
    ),
    Mutation("numbers are packed from the highest bit", "store/packing.py", 'return np.packbits(spread.reshape(-1), bitorder="little")', "return np.packbits(spread.reshape(-1))", "test_store_values"),
    Mutation("Rice's code is two bits off the best", "store/packing.py", "return min(near, key=lambda bits: len(numbers) * bits + int((numbers >> bits).sum()))", "return guess + 2", "test_store_values"),
    Mutation("signs of a ternary vector are turned round", "store/values.py", "minus = words[kept] < 0", "minus = words[kept] > 0", "test_store_values"),
    Mutation("mean and deviation in the other order", "store/values.py", 'np.array([code.mu, code.sd], dtype="<f4")', 'np.array([code.mu, code.sd], dtype=">f4")', "test_store_values"),
    Mutation("plain tensors in the machine's order", "store/order.py", 'if sys.byteorder == "little" or itemsize == 1:', "if True:", "test_store_values"),
    Mutation("numbers that fill the memory are decoded", "store/reading.py", "coded > MOST_NUMBERS * file.size", "False", "test_store_values"),
    Mutation("a bundled head may grow as it likes", "store/bundle.py", "MOST * sizes[HEAD] + 1)", "0)", "test_store_values"),
    Mutation("every file says format 3", "store/writing.py", "for entry in codings.values()) else FORMAT - 1", "for entry in codings.values()) else FORMAT", "test_store_values"),
    Mutation("the levels are not the medians", "store/normal.py", "= 2 * _cdf(q) - bounds[:-1] - bounds[1:]", "= 2 * _cdf(q) - 0.98 * bounds[:-1] - 1.02 * bounds[1:] + 0.02", "test_store_values"),
    Mutation("standard deviation of what is kept", "compress/sparsify.py", "float(alpha * tau.std())", "float(alpha * tau[_largest(tau.abs(), density)].std())", "compress"),
    Mutation("the authors' one number too many", "compress/sparsify.py", "max(1, round(density * len(sizes)))", "min(len(sizes), round(density * len(sizes)) + 1)", "compress"),
    Mutation("pruned numbers times False", "compress/sparsify.py", "torch.where(_spread(edit, tensor, alive), tensor, 0)", "tensor * _spread(edit, tensor, alive)", "compress"),
    Mutation("lengths are compressed too", "compress/numbers.py", "return learned(edit.inner)", 'return (*learned(edit.inner), "magnitude")', "compress"),
    Mutation("opposite signs are added in a product", "compress/bitmasks.py", "(same - opposite)", "(same + opposite)", "compress"),
    Mutation("a matrix' deviation with the authors' 1e-5", "store/normal.py", "/ (self.sd or 1.0)", "/ (self.sd + 1e-5)", "test_store_values"),
    Mutation("the error without what was dropped", "compress/rank.py", "if weight in after.edits else edit)", "if weight in after.edits else add(edit, scale(edit, -1)))", "compress"),
]  # fmt: skip


def notices(source: Path, mutation: Mutation, near: bool) -> str:
    """Which tests fail on the mutated copy, or nothing."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HYPOTHESIS_SEED": "0"}
    for tests in dict.fromkeys((mutation.near, *(() if near else QUICK))):
        path = source / "tests" / tests
        target = path if path.is_dir() else path.with_suffix(".py")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            str(target),
        ]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1, 2):  # no test failed: none was run
            raise SystemExit(f"{mutation.what}: pytest cannot run {target}:\n{done.stdout}{done.stderr}")
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return (failed or done.stdout.splitlines()[-1:] or ["?"])[0].partition(" - ")[0]
    return ""


def main(words: list[str]) -> int:
    """Run the mutations that have one of the words, or all. -> the exit status."""
    near = "--near" in words
    words = [word for word in words if word != "--near"]
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.file} {m.what}" for word in words)]
    missed, stale = [], []
    for mutation in chosen:
        with tempfile.TemporaryDirectory(prefix="intarsia-mutation-") as folder:
            source, begun = Path(folder), time.monotonic()
            for part in ("src", "tests"):
                shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", source)
            file = source / "src" / "intarsia" / mutation.file
            text = file.read_text()
            if text.count(mutation.old) != 1:
                stale.append(mutation.what)
                print(f"STALE   {mutation.file}: {mutation.what}", flush=True)
                continue
            file.write_text(text.replace(mutation.old, mutation.new))
            caught = notices(source, mutation, near)
        if not caught:
            missed.append(mutation.what)
        verdict = f"caught  {mutation.what}: {caught}" if caught else f"MISSED  {mutation.file}: {mutation.what}"
        print(f"{verdict} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen) - len(missed) - len(stale)} of {len(chosen)} caught, {len(missed)} missed, {len(stale)} stale")
    return 1 if missed else 2 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
