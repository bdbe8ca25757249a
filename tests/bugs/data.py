"""Planted bugs in what starts from data and what is compressed: EVA, EoRA, LoRD, observers."""

from bug import Mutation

BUGS = [
    Mutation(
        "the mean that has moved is not carried along", "inits/spectrum.py",
        "weight = math.sqrt(self.count * len(x) / (self.count + len(x)))", "weight = 0.0", "goldens/test_eva",
    ),
    Mutation(
        "EVA ranks directions by size and not by share", "inits/spectrum.py",
        "return self.s.double().square() / max(self.energy, torch.finfo(torch.float64).tiny)", "return self.s.double().square()",
        "goldens/test_eva",
    ),
    Mutation(
        "EVA does not scale alpha with the rank", "inits/eva.py",
        "None if method.alpha is None else method.alpha * rank / method.rank", "method.alpha", "goldens/test_eva",
    ),
    Mutation(
        "EVA sees tokens that nothing is trained on", "observe.py",
        'labels = _two_dimensional(batch, "labels") if self.labelled else None', "labels = None", "goldens/test_eva",
    ),
    Mutation(
        "a tensor that was written to counts as the same", "observe.py",
        "at = (id(x), -1 if x.is_inference() else x._version)", "at = (id(x), 0)", "goldens/test_eva",
    ),
    Mutation(
        "EoRA multiplies where it should divide", "methods/eora.py",
        "A = U.T @ E / root", "A = U.T @ E * root", "goldens/test_eora",
    ),
    Mutation(
        "EoRA's diagonal is the norm, not its square", "methods/eora.py",
        'H.square() if self.weighting == "diagonal" else H', "H", "goldens/test_eora",
    ),
    Mutation(
        "the error is weighed by the other side of the root", "support/principal.py",
        "weighted = W @ root(H)", "weighted = W @ root(H).T", "goldens/test_eora",
    ),
    Mutation(
        "two of four are the smallest", "bases/lossy.py",
        "groups.abs().topk(2, dim=2)", "groups.abs().topk(2, dim=2, largest=False)", "goldens/test_eora",
    ),
    Mutation(
        "LoRD leaves the mean of what is lost out", "shrink/factors.py",
        "b2 = W @ self.mean - Q @ (W1 @ self.mean)", "b2 = 0 * (W @ self.mean)", "test_shrink",
    ),
    Mutation(
        "LoRD takes the second moment for the covariance", "shrink/factors.py",
        'gathered["gram"] - mean[:, None] * mean', 'gathered["gram"]', "test_shrink",
    ),
    Mutation(
        "the cut that is tried stays in the model", "shrink/ranks.py",
        "                put(model, whole)", "                pass", "test_shrink",
    ),
]  # fmt: skip
