"""Planted bugs in the structured and transformed methods: Bone, BAT, DiffuseKronA, HUT, WaRA, QWHA, and their edits."""

from bug import Mutation

BUGS = [
    Mutation(
        "Bone: chunks of x are taken with a stride", "edits/structured.py",
        "F.pad(x, (0, -I % r)).unflatten(-1, (-1, r))", "F.pad(x, (0, -I % r)).unflatten(-1, (r, -1)).mT", "goldens/test_bone.py",
    ),
    Mutation(
        "Bone: the tile is transposed", "edits/structured.py",
        "tiles: Tensor = D.mT.repeat(-(-O // D.shape[1]), -(-I // D.shape[0]))[:O, :I]",
        "tiles: Tensor = D.reshape(D.mT.shape).repeat(-(-O // D.shape[1]), -(-I // D.shape[0]))[:O, :I]", "goldens/test_bone.py",
    ),
    Mutation(
        "BAT: W is multiplied from the other side", "edits/structured.py", "(blocks @ B + B)", "(B @ blocks + B)", "goldens/test_bone.py",
    ),
    Mutation("BAT: the block alone is not added", "edits/structured.py", "(blocks @ B + B)", "(blocks @ B)", "goldens/test_bone.py"),
    Mutation(
        "a guided change is rounded before it is added", "forms/guided.py",
        "W, b = below.weights(torch.promote_types(p.dtype, torch.float32))", "W, b = below.weights(p.dtype)", "goldens/test_bone.py",
    ),
    Mutation(
        "a guided weight is kept for backward", "forms/guided.py",
        "if not torch.is_grad_enabled():\n            return self._product(p, x, below)", "if True:\n            return self._product(p, x, below)",
        "goldens/test_hut.py",
    ),
    Mutation(
        "DiffuseKronA: the factors change places in the forward", "edits/dense.py",
        "(A @ (x.unflatten(-1, (A.shape[1], B.shape[1])) @ B.mT)).flatten(-2)",
        "(A @ (x.unflatten(-1, (A.shape[1], B.shape[1])) @ B.mT)).mT.flatten(-2)", "goldens/test_diffusekrona.py",
    ),
    Mutation(
        "DiffuseKronA: A starts at variance 1 / a1", "methods/diffusekrona.py",
        "generator=start.generator()) / self.a1", "generator=start.generator()) / self.a1**0.5", "goldens/test_diffusekrona.py",
    ),
    Mutation(
        "DiffuseKronA: singular values are those of the factors beside each other", "analyze/spectrum.py",
        "torch.outer(singular_values(edit.A), singular_values(edit.B)).flatten()",
        "torch.cat([singular_values(edit.A), singular_values(edit.B)])", "goldens/test_diffusekrona.py",
    ),
    Mutation("HUT: the weight is not multiplied", "edits/structured.py", "change = W * self.inner.delta(W)", "change = self.inner.delta(W)", "edits"),
    Mutation(
        "HUT: pure starts from LoRA's factors", "methods/hut.py", "A[0], B[:, 0] = 1, 1", "B[:, 0] = 1", "goldens/test_hut.py",
    ),
    Mutation(
        "HUT: s is left out", "methods/hut.py", "1.0 if self.alpha is None else self.alpha / self.rank", "1.0", "goldens/test_hut.py",
    ),
    Mutation(
        "WaRA: outputs and inputs change places in a band", "methods/wara.py",
        "(NAMES[out], NAMES[into]) for out, into", "(NAMES[into], NAMES[out]) for out, into", "goldens/test_wara.py",
    ),
    Mutation(
        "WaRA: the high band has the other sign", "edits/transforms.py", '"haar-high": Haar((-1.0,))', '"haar-high": Haar((1.0,))',
        "edits/test_transforms.py",
    ),
    Mutation("WaRA: one level is not orthonormal", "edits/transforms.py", "for sign in self.bands], dim=-1) * math.sqrt(0.5)", "for sign in self.bands], dim=-1) * 0.5", "edits/test_transforms.py"),
    Mutation(
        "QWHA: the transform goes back by itself, not by its transpose", "edits/transforms.py",
        "H = (H.mT if transposed else H).to(x)", "H = H.to(x)", "edits/test_transforms.py",
    ),
    Mutation(
        "QWHA: places are chosen without the inputs", "methods/qwha.py", "(K.diagonal() * F.square())", "(F.square())", "goldens/test_qwha.py",
    ),
    Mutation(
        "QWHA: values are not refined", "methods/qwha.py",
        "torch.cholesky_solve((K[S] @ f)[:, None], torch.linalg.cholesky(K[S][:, S]))[:, 0] if repairs else f[S] * 0",
        "f[S] if repairs else f[S] * 0", "goldens/test_qwha.py",
    ),
    Mutation(
        "QWHA: the rest of the budget goes to the first rows", "forms/structured.py",
        "order = torch.where(free, counts, most + 1).argsort(stable=True)", "order = torch.where(free, 0, 1).argsort(stable=True)",
        "goldens/test_qwha.py",
    ),
    Mutation(
        "QWHA: alpha is not absorbed", "methods/qwha.py", "* math.sqrt(O) / self.alpha", "* math.sqrt(O) / 3000 * 2", "goldens/test_qwha.py",
    ),
    Mutation(
        "a restored structured edit may have another scale", "forms/structured.py",
        "fits = found == trained and (again.kind, again.facts()) == (edit.kind, edit.facts())", "fits = found == trained",
        "goldens/test_diffusekrona.py",
    ),
]  # fmt: skip
