"""Bottleneck adapters: few numbers between two thin matrices, beside a layer.    y' = y + s up phi(down v),  v = y or x

Hu et al. 2023, "LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models", arXiv:2304.01933, section 2;
adapters in series are those of Houlsby et al. 2019 (arXiv:1902.00751), in parallel those of He et al. 2022 (arXiv:2110.04366).
Trained: b (n + m) numbers a layer, n read and m made: after 2 b O, before 2 b I, parallel b (I + O); one more with ``train_scale``.

``place`` says where: after the layer, reading its y (the authors' output_adapter, for down_proj and o_proj: series); before it, y' = W (x + s
up phi(down x)) + b (their mh_adapter, for gate and up: series); or in parallel, reading x. AdapterH is ``after`` at o_proj and down_proj,
AdapterP at down_proj alone. ``start="mam"``: down ~ Kaiming uniform (a = sqrt 5), up = 0, the base itself at the start; ``"bert"``: both
~ N(0, 0.02^2), the authors' default, which does not start as the base. No biases, as in the authors' code. The width of the paper is 256.
Deviations: no dropout (theirs is 0); ``mam`` is our default, tanh is theirs. The learning rate is LoRA's, which this is while it bends
little; the paper's 3e-4 is for thousands of steps (SmolLM2-135M, words to phonemes, width 16, 20 steps of 8, one seed: held-out loss
6.50 at 3e-4, 2.88 at 2e-3, 2.73 at 6e-3, from 9.48).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import ACTIVATIONS, PLACES, sizes
from intarsia.edits import Bottleneck as Function
from intarsia.forms import Insert
from intarsia.method import as_parameters, option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Bottleneck(Insert):
    width: int = option(64, "numbers between the two matrices, b")
    place: str = option("parallel", "parallel: beside the layer, reads x; after: reads y; before: changes x")
    activation: str = option("tanh", "between the matrices: " + ", ".join(ACTIVATIONS))
    scale: float = option(1.0, "factor s in front of what is added")
    train_scale: bool = option(False, "train one more number for each layer that multiplies s, 1 at the start")
    start: str = option("mam", "mam: as the base; bert: both matrices random and small")

    name, title, paper = "bottleneck", "Bottleneck adapters", "arXiv:2304.01933"
    formula, trained = "y' = y + s up phi(down v), v = x or y", "b (n + m)"
    cost = "b (n + m)"
    default_lr = 4e-3
    small = ({"width": 3}, {"width": 2, "place": "after", "activation": "gelu", "scale": 2.0, "train_scale": True},
             {"width": 2, "place": "before", "activation": "silu", "start": "bert"})  # fmt: skip

    def __post_init__(self):
        self.require(self.width >= 1, "width", "1 or more")
        for field, known in (("place", PLACES), ("activation", ACTIVATIONS), ("start", ("mam", "bert"))):
            self.require(getattr(self, field) in known, field, "one of " + ", ".join(known))
        self.require(math.isfinite(self.scale) and self.scale != 0, "scale", "a finite number other than 0")
        object.__setattr__(self, "starts_as_identity", self.start == "mam")

    def trained_count(self, shape):
        return self.width * sum(sizes(self.place, shape)) + self.train_scale

    def init(self, site, start):
        (inputs, outputs), generator = sizes(self.place, site.shape), start.generator()
        down, up = torch.empty(self.width, inputs), torch.zeros(outputs, self.width)
        if self.start == "mam":
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        else:
            for matrix in (down, up):
                nn.init.normal_(matrix, std=0.02, generator=generator)
        state = {"down": down, "up": up} | ({"gain": torch.tensor(1.0)} if self.train_scale else {})
        return as_parameters(site, state)

    def stays_wide(self):
        return frozenset({"gain"})  # in bfloat16 it could not change by less than 1/256

    def inserted(self, p):
        return Function(p.down, p.up, self.activation, p.gain if self.train_scale else None)
