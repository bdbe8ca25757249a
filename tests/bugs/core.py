"""Planted bugs in the initialisers, the core edit, and the methods with a core or shared tensors."""

from bug import Mutation

BUGS = [
    Mutation(
        "PiSSA's factors without the scale", "inits/pissa.py",
        "(S[:r] / method.scale).sqrt()", "S[:r].sqrt()", "goldens/test_inits",
    ),
    Mutation("PiSSA takes the smallest part", "inits/pissa.py", "V[:r]", "V[-r:]", "goldens/test_inits"),
    Mutation(
        "a start is not subtracted", "methods/lora.py",
        "made if find(self.start).subtracted else None", "None", "goldens/test_inits",
    ),
    Mutation(
        "products are subtracted, not factors, in bfloat16", "forms/factored.py",
        'return frozenset({"A", "B", "C", "A0", "B0", "C0"})', "return frozenset()", "goldens/test_inits",
    ),
    Mutation("a moved factor over the core at the start", "edits/core.py", "times(B - B0, C)", "times(B - B0, C0)", "edits/test_algebra"),
    Mutation("a moved core over the factor now", "edits/core.py", "[times(B0, C - C0)]", "[times(B, C - C0)]", "edits/test_algebra"),
    Mutation(
        "rounding takes a change with it", "edits/core.py",
        "return self if self.start else replace(", "return replace(", "edits/test_core",
    ),
    Mutation("a core from the wrong side", "edits/core.py", "return B, C @ A", "return B, C.mT @ A", "edits/test_core"),
    Mutation(
        "signs are lost where low ranks are joined", "edits/edit.py",
        "if part.scale == first else -part.B.to(dtype)", "if True else -part.B.to(dtype)", "edits/test_core",
    ),
    Mutation(
        "LoRA-SB follows the gradient uphill", "methods/lora_sb.py",
        "step = -self.first_step", "step = self.first_step", "goldens/test_cores",
    ),
    Mutation("LoRA-SB without the sign", "methods/lora_sb.py", '.given("gradient").sign()', '.given("gradient")', "goldens/test_cores"),
    Mutation("LoRA-SB's core of roots", "methods/lora_sb.py", "torch.diag(S[:r])", "torch.diag(S[:r].sqrt())", "goldens/test_cores"),
    Mutation("NLoRA's core turned", "methods/nlora.py", "else W[:r, :r]", "else W[:r, :r].mT", "goldens/test_cores"),
    Mutation("paper and residual exchanged", "methods/nlora.py", 'made if self.start != "paper"', 'made if self.start == "paper"', "goldens/test_cores"),
    Mutation("IntTune trains all", "methods/nlora.py", 'return "ABC" if self.trains == "all" else "C"', 'return "ABC"', "goldens/test_cores"),
    Mutation("SVFit's smallest values", "methods/svfit.py", '"B": U[:, :r]', '"B": U[:, -r:]', "goldens/test_cores"),
    Mutation("LoLDU without the permutation", "methods/loldu.py", "P @ (L * some)[:, :r]", "(L * some)[:, :r]", "goldens/test_cores"),
    Mutation("LoLDU divides by nothing", "methods/loldu.py", "torch.where(some, D, 1.0)", "D", "goldens/test_cores"),
    Mutation("a penalty counts at every site that shares", "chain.py", "seen.update(map(id, wanted))", "pass", "goldens/test_s2_lora"),
    Mutation("a penalty is forgotten", "chain.py", "parameter.grad.add_(gradient)", "pass", "goldens/test_s2_lora"),
    Mutation("the rate of another group", "chain.py", "float(rates[id(moved[0])])", "float(max(rates.values()))", "goldens/test_inits"),
    Mutation("the threshold without the rate", "methods/s2_lora.py", "lr * self.sparse)", "self.sparse)", "goldens/test_s2_lora"),
    Mutation("each site its own factors", "model.py", "            setattr(state, name, one)", "            pass", "goldens/test_s2_lora"),
    Mutation("loaded sites share nothing", "model.py", "        _tie(made)\n", "", "goldens/test_s2_lora"),
    Mutation(
        "the plan counts what is shared at every layer", "model.py",
        "(0 if shape in shared else here.shared_count(shape))", "here.shared_count(shape)", "goldens/test_s2_lora",
    ),
]  # fmt: skip
