"""Optimizers: what is kept of a gradient between steps, and how fast each part of an adapter moves. Each is around another one.

optimizer = optim.GaLore(model.parameters(), rank=8, lr=1e-2)        # any parameters
optimizer = optim.build({"name": "lora-plus"}).build(model, lr=2e-4)  # a model, whose tensors it tells apart
"""

from intarsia.optim.adam import PaperAdamW
from intarsia.optim.fira import Fira, FiraRecipe
from intarsia.optim.frugal import Frugal, FrugalRecipe
from intarsia.optim.galore import GaLore, GaloreRecipe, InSubspace, Subspaced
from intarsia.optim.lora_plus import LoraPlusRecipe
from intarsia.optim.parts import Part, pairs, parts
from intarsia.optim.projection import Projection
from intarsia.optim.recipe import INNERS, Projecting, Recipe, build, optimizers, register, systems
from intarsia.optim.rite import LoraRite, RiteRecipe
from intarsia.optim.trainer import for_trainer
from intarsia.optim.wrapped import Wrapped, state_bytes

__all__ = [
    "INNERS", "Fira", "FiraRecipe", "Frugal", "FrugalRecipe", "GaLore", "GaloreRecipe", "InSubspace", "LoraPlusRecipe", "LoraRite", "PaperAdamW",
    "Part", "Projecting", "Projection", "Recipe", "RiteRecipe", "Subspaced", "Wrapped", "build", "for_trainer", "optimizers", "pairs", "parts",
    "register", "state_bytes", "systems",
]  # fmt: skip
