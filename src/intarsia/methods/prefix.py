"""Prefix tuning: keys and values before those of the tokens, in every layer.    K_l' = [K_l; x W_K],  V_l' = [V_l; x W_V]

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4; for decoders only.
Trained: n I numbers, I = 2 L h d the numbers that a token leaves in the cache (L layers, h heads of keys and values, d wide each); with
``hidden`` = m: n O + m (O + 1) + I (m + 1).  K, V ~ N(0, ``std``^2).

``hidden`` is the paper's reparameterisation (section 4.3): K and V are what an MLP, W2 tanh(W1 E + b1) + b2, makes of n trained vectors E
of width O. It is thrown away at the end: the edit holds K and V. A prefix that is loaded and trained on gets a new MLP, whose output is 0
at first, beside its K and V. The layout of W2's outputs (n, L, 2, h, d), the start of the MLP (E normal, the rest as nn.Linear) and the
positions (tokens count on from n) are those of HF PEFT. Deviations: without ``hidden`` the start is small and not N(0, 1). The rate was
looked for on a small decoder alone (as for prompts; n = 4, known task: 1.06 at 1e-2, 0.13 at 3e-2, 0.014 at 1e-1; with ``hidden`` 3e-2).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.edits import Prefix as KeysAndValues
from intarsia.forms import Ahead
from intarsia.method import Start, option
from intarsia.registry import register

MLP = ("E", "W1", "b1", "W2", "b2")


@register
@dataclass(frozen=True)
class Prefix(Ahead):
    tokens: int = option(10, "keys and values before the tokens in every layer, n")
    hidden: int = option(0, "width of an MLP that makes them while they train, m; 0: they train themselves")
    std: float = option(0.02, "standard deviation of K and V at the start, without an MLP")

    name, title, paper = "prefix", "Prefix tuning", "arXiv:2101.00190"
    formula, trained = "K_l' = [K_l; x W_K], V_l' = [V_l; x W_V]", "n I"
    default_lr = 1e-1
    cost = "n I"
    small = ({"tokens": 3, "std": 0.5}, {"tokens": 2, "hidden": 5})

    def __post_init__(self):
        self.require(self.tokens >= 1, "tokens", "1 or more")
        self.require(self.hidden >= 0, "hidden", "0 or more")
        self.require(0 < self.std < math.inf, "std", "a positive number")
        object.__setattr__(self, "default_lr", 3e-2 if self.hidden else 1e-1)

    def check(self, site):
        if site.operator.layers:
            return None
        return f"{site.name}: no cache of keys and values is known of all its layers, so it takes no prefix; train a prompt"

    def trained_count(self, shape):
        (O, I), m = shape, self.hidden
        return self.tokens * O + m * (O + 1) + I * (m + 1) if m else self.tokens * I

    def stays_wide(self):
        return frozenset({"K", "V", *MLP})  # what the MLP makes is rounded once, as the finished K and V are

    def init(self, site, start):
        (O, I), n, m, at, generator = site.shape, self.tokens, self.hidden, site.operator, start.generator()
        K, V = (self.std * torch.randn(at.layers, at.heads, n, at.width, generator=generator) for _ in range(2))
        if not m:
            return self._state(site, {"K": K, "V": V}, {})
        tensors = {"E": torch.randn(n, O, generator=generator)}
        for name, size, fan_in in (("W1", (m, O), O), ("b1", (m,), O), ("W2", (I, m), m), ("b2", (I,), m)):
            tensors[name] = torch.empty(size).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        return self._state(site, tensors, {"K": 0 * K, "V": 0 * V})

    def _state(self, site, trained, constant):
        wide, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        return {k: nn.Parameter(t.to(device, wide)) for k, t in trained.items()} | {
            k: t.to(device, wide, copy=True) for k, t in constant.items()
        }

    def restore(self, edit, site):
        found = super().restore(edit, site)
        if not self.hidden:
            return found
        fresh = self.init(site, Start.at(site.name, 0))
        nothing = {k: nn.Parameter(torch.zeros_like(fresh[k])) for k in ("W2", "b2")}
        return fresh | nothing | {k: tensor.detach() for k, tensor in found.items()}

    def inserted(self, p):
        if not self.hidden:
            return KeysAndValues(p.K, p.V)
        made = F.linear(torch.tanh(F.linear(p.E, p.W1, p.b1)), p.W2, p.b2)  # (n, I)
        L, h, n, d = p.K.shape
        K, V = made.view(n, L, 2, h, d).permute(2, 1, 3, 0, 4)
        return KeysAndValues(p.K + K, p.V + V)
