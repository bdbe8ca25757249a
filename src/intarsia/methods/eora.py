"""EoRA: the low-rank update that best repairs a compressed layer's output.    W' = W_c + B A,  min ||(W - W_c - B A) X^T||

Liu et al. 2024, "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
arXiv:2410.21271, section 3.  W is the weight before compression (``attach(original=...)``), W_c what stands in the layer, X
the layer's inputs on calibration data, H = X^T X / N.
Trained: r (O + I) numbers a weight, if it is trained on at all.  It does not start as the base: it repairs it.

With E = W - W_c and H = L L^T, E L = U S V^T, the update is the projection of the error on the first r columns of U:
B = U_r S_r^1/2,  A = S_r^-1/2 U_r^T E,  which is the paper's S_r^1/2 V_r^T L^-1 without an inverse; any L will do, here
Cholesky's instead of the paper's Q Lambda^1/2.  The error left is the sum of S_j^2 over j > r, the least of rank r.
Where inputs span fewer than I dimensions, a ridge of 1e-12 of H's trace takes the place of the paper's smallest
positive eigenvalue, so that what rank is left repairs the weight itself.

``weighting="diagonal"`` keeps H's diagonal only, as in ASVD; ``"none"`` is the plain SVD of the error and needs no data.
All layers are looked at in the compressed model, in one pass; the authors go block by block, with the blocks before
repaired already.  Learning rate: LoRA's, not measured here.
"""

from dataclasses import dataclass

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import principal

WEIGHTINGS = {"gram": {"gram"}, "diagonal": {"inputs"}, "none": set()}


@register
@dataclass(frozen=True)
class Eora(Factored):
    rank: int = option(128, "rank r of the repair")
    weighting: str = option("gram", "how inputs weigh the error: gram, diagonal, or none, the plain SVD")

    name, title, paper, role = "eora", "EoRA", "arXiv:2410.21271", "quantization"
    formula, trained = "W' = W_c + B A, nearest to W on X", "r (O + I)"
    default_lr = 4e-3
    starts_as_identity = False
    scale = 1.0
    small = ({"rank": 2}, {"rank": 3, "weighting": "diagonal"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.weighting in WEIGHTINGS, "weighting", "one of " + ", ".join(WEIGHTINGS))

    def needs(self):
        return frozenset({"original"} | WEIGHTINGS[self.weighting])

    def init(self, site, start):
        E = start.given("original").cpu().double() - site.weight.cpu().double()
        H = {"gram": start.gram, "diagonal": start.inputs, "none": None}[self.weighting]
        U, S = principal(E, H.square() if self.weighting == "diagonal" else H, self.rank)
        root = S.sqrt()
        A = U.T @ E / root.clamp_min(root.new_tensor(1e-150))[:, None]  # 0 where there is no error: so is U^T E
        return self.begin(site, {"A": A, "B": U * root})
