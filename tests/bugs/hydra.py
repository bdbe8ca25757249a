"""Planted bugs in what stands behind a layer: Hydra, the sequential edit, and edits of biases."""

from bug import Mutation

BUGS = [
    Mutation(
        "the branch behind the layer reads its input", "methods/hydra_par_seq.py",
        "p.operator.low_rank(h, p.U_s, p.D_s)", "p.operator.low_rank(below(x) * 0 + h.detach(), p.U_s, p.D_s)", "goldens/test_hydra",
    ),
    Mutation("Hydra leaves the bias alone", "methods/hydra_par_seq.py", "None if b is None else b + behind @ b", "b", "goldens/test_hydra"),
    Mutation("the edit of a bias is not exported", "model.py", "edits[f\"{site}.bias\"] = edit", "pass", "goldens/test_hydra"),
    Mutation("a sequential edit from the other side", "edits/sequential.py", "(self.U.to(W.dtype) @ (self.D.to(W.dtype) @ W))", "(self.D.mT.to(W.dtype) @ (self.U.mT.to(W.dtype) @ W))", "goldens/test_hydra"),
]  # fmt: skip
