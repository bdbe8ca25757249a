"""SMT: train the square tiles with the largest gradients.    W'[tile] = W[tile] + s * values

He et al. 2025, "SMT: Fine-Tuning Large Language Models with Sparse Matrices", arXiv:2405.15525, section 3.
Trained: density * tiles of the chosen parts * width^2 numbers, spread over their weights as the scores fall.  values = 0
at the start; of x only the columns of tiles in use are kept for the backward pass.

A tile's score, from the gradient G summed over the calibration data: ``mean_abs`` |mean G| (the authors' default),
``abs_mean`` mean |G|, ``norm`` ||G||.  By default the tiles of q, k and v compete in the whole model, tiles of 256, as in
the paper's best setting; ``of="gate, up, down"`` is its MLP budget, ``of="all"`` takes every targeted weight.
Deviations: G is that of the base, where the authors add it up over warm-up steps of full fine-tuning; s follows from
density and shape, an eighth of it as for all supports chosen by gradient (``scale=1.0`` is the paper); a tile is square
and whole, so what a width does not divide is never trained.
"""

from dataclasses import dataclass

from intarsia.forms import Competing, Part
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import Tile

SCORES = {"mean_abs": lambda G: G.mean((1, 3)).abs(), "abs_mean": lambda G: G.abs().mean((1, 3)),
          "norm": lambda G: G.square().sum((1, 3)).sqrt()}  # fmt: skip
PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@register
@dataclass(frozen=True)
class Smt(Competing):
    density: float = option(0.03, "share of the tiles that is trained, in (0, 1]")
    of: str = option("q, k, v", "parts of the blocks whose weights are cut into tiles, or 'all' targeted weights")
    width: int = option(256, "entries along a tile's side")
    score: str = option("mean_abs", "of a tile's gradient: " + ", ".join(SCORES))
    scope: str = option("model", "the tiles compete within the whole model or within each weight: model, weight")
    scale: float | str = option(
        "auto", "factor in front of the values; 'auto' fits density and shape, 1.0 is the paper"
    )
    layout: str = option("family", "names of the blocks: 'family', or by hand, 'gate, up > down; q, k, v > o / 64'")

    name, title, paper = "smt", "SMT", "arXiv:2405.15525"
    formula, trained = "W'[tile] = W[tile] + s * values", "density * O * I"
    default_lr = 4e-3
    small = ({"density": 0.3, "of": "all", "width": 4, "scope": "weight"},
             {"density": 0.4, "of": "up, down", "width": 4, "score": "abs_mean", "layout": "up > down; again"},
             {"density": 0.2, "of": "all", "width": 2, "score": "norm", "scale": 3.0, "scope": "weight"})  # fmt: skip

    def __post_init__(self):
        self.require(0 < self.density <= 1, "density", "in (0, 1], a share of the tiles")
        self.require(self.of == "all" or self.parts() <= set(PARTS), "of", "'all', or some of " + ", ".join(PARTS))
        self.require(self.score in SCORES, "score", "one of " + ", ".join(SCORES))
        self.require(self.scope in ("model", "weight"), "scope", "model or weight")
        self.require_scale()
        Tile(self.width)  # raises for a width that cannot be

    def parts(self):
        return frozenset() if self.of == "all" else frozenset(part.strip() for part in self.of.split(","))

    def granularity_at(self, shape):
        return Tile(self.width)

    def needs(self):
        return frozenset({"gradient"})

    def part(self, shape, unit, count):
        found = super().part(shape, unit, count)
        return Part(found.method, unit, count, found.scale / (8 if self.scale == "auto" else 1))

    def survey(self, site, start):
        (O, I), t = site.shape, self.width
        G = start.given("gradient")[: O // t * t, : I // t * t].reshape(O // t, t, I // t, t)
        return SCORES[self.score](G).reshape(-1).double().cpu()
