"""S2FT: train some heads and channels.    W'[:, S] = W[:, S] + s * values  (o, down);  W'[S, :] likewise (v, up)

Yang et al. 2024, "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", arXiv:2412.06289,
section 3.
Trained: heads * head_dim * O of o, channels * O of down (rows: times I).  values = 0 at the start; of o and down only
x[..., S] is kept for the backward pass.

Parts: q, k, v, o of attention, gate, up, down of the MLP, each with its share; by default o and down, the paper's choice.
Chosen once for a block: rows and columns of one head or channel go together.  Grouped queries: see ``forms.coupled``.
Selection: random; by weight, gradient, activation or product (weight * activation), a head's score the mean over its
channels, parts added up; an activation is the mean of |x_j| where o or down reads it, and ``take="small"`` is the paper's
finding for it and for product.  ``scope="model"`` chooses from all blocks together, as the released code draws.
Deviations: nothing is permuted, columns are read by index, so any set of heads can be trained under grouped queries;
s follows from density and shape (``scale=1.0`` is the paper).
"""

from dataclasses import dataclass

import torch

from intarsia.forms import Coupled
from intarsia.method import option
from intarsia.registry import register

LOOKS = ("magnitudes",)
SELECT = {"random": (), "weight": (), "gradient": ("gradient",), "activation": LOOKS, "product": LOOKS}


@register
@dataclass(frozen=True)
class S2ft(Coupled):
    o: float = option(0.052, "share of the heads whose columns of the attention's output projection are trained")
    down: float = option(0.02, "share of the channels whose columns of the MLP's down projection are trained")
    v: float = option(0.0, "share of the heads whose rows of the value projection are trained")
    up: float = option(0.0, "share of the channels whose rows of the MLP's up projection are trained")
    q: float = option(0.0, "share of the heads whose rows of the query projection are trained")
    k: float = option(0.0, "share of the heads whose rows of the key projection are trained")
    gate: float = option(0.0, "share of the channels whose rows of the MLP's gate projection are trained")
    select: str = option("random", "what chooses them: " + ", ".join(SELECT))
    take: str = option("large", "which of them: those with large or with small scores")
    scope: str = option("model", "the shares are of all heads and channels of the model or of each block: model, block")
    scale: float | str = option("auto", "factor before the values; 'auto' fits density and shape, 1.0 is the paper")
    layout: str = option("family", "names of the blocks: 'family', or by hand, 'gate, up > down; q, k, v > o / 64'")

    name, title, paper = "s2ft", "S2FT", "arXiv:2412.06289"
    formula, trained = "W'[:, S] = W[:, S] + s * values", "heads * head_dim * O, channels * O"
    default_lr, kinds = 4e-3, frozenset({"linear"})
    small = tuple({"layout": "up > down; again", "o": 0.0, "down": 0.25, "up": 0.2} | more for more in (
        {"scope": "block"}, {"scope": "block", "select": "weight", "layout": "up > down / 8; again", "v": 0.4, "o": 0.7},
        {"select": "gradient", "take": "small"}, {"scope": "block", "select": "product"}))  # fmt: skip

    def __post_init__(self):
        for part, share in self.portions().items():
            self.require(0 <= share <= 1, part, "in [0, 1], a share of the heads or channels")
        self.require(bool(self.parts()), "down", "above 0, or another part's share: nothing would be trained")
        self.require(self.select in SELECT, "select", "one of " + ", ".join(SELECT))
        self.require(SELECT[self.select] != LOOKS or all(self.portions()[reads] > 0 or not self.parts() & made
                     for reads, made in (("o", {"q", "k", "v"}), ("down", {"up", "gate"}))), "select",
                     "another one: an activation is seen where it is read, so o (or down) needs a share too")  # fmt: skip
        self.require(self.take in ("large", "small"), "take", "large or small")
        self.require(self.scope in ("model", "block"), "scope", "model or block")
        self.require_scale()

    def portions(self):
        return {part: getattr(self, part) for part in ("q", "k", "v", "o", "gate", "up", "down")}

    def by_chance(self):
        return self.select == "random"

    def needs(self):
        return frozenset(SELECT[self.select])

    def rank(self, site, role, start):
        W = start.given("gradient") if self.select == "gradient" else site.weight.detach()
        channels = torch.linalg.vector_norm(W, dim=0 if role.side == "columns" else 1, dtype=torch.float64)
        channels = channels.narrow(0, role.first * role.width, role.units * role.width)
        if SELECT[self.select] == LOOKS:  # what flows through a channel is seen where it is read
            looks = start.given("magnitudes").double() if role.side == "columns" else torch.zeros_like(channels)
            channels = looks * (channels if self.select == "product" else 1.0)
        return channels.view(role.units, role.width).mean(1) * (1 if self.take == "large" else -1)
