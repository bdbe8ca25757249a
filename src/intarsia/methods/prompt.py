"""Prompt tuning: a few embeddings before the tokens, and nothing else.    y = decoder([P; E(x)]) without the first n

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.
Trained: n O numbers, n embeddings of width O.  P = embeddings of random tokens of the vocabulary, or of the tokens that ``ids`` names,
repeated until there are n (the paper's "sampled vocabulary" and, with words of the task, its "class label" start).

The attention mask and the positions are made longer, and the states of the prompt are cut off, so that logits and labels belong to the
tokens alone. Padding on the left stands between prompt and text in memory, and does not count in the positions: a padded row is that
row alone, which it is not in HF PEFT (that drops position ids, and has the first token predicted by the last of the prompt). Deviations:
random tokens are of the whole vocabulary, as in HF PEFT; the paper samples of the 5000 most common. Adam instead of Adafactor with a rate
of 0.3. The rate was looked for on a small decoder alone (``intarsia bench methods --behaviour prompt``; n = 4, 150 steps, one seed: held-out
loss of a known task 0.053 at 3e-3, 0.021 at 1e-2, 0.013 at 3e-2, 0.043 at 1e-1, from 3.35), not on a language model.
"""

from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import Prompt as Embeddings
from intarsia.forms import Ahead
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Prompt(Ahead):
    tokens: int = option(20, "embeddings before the tokens, n")
    ids: list | tuple = option((), "numbers of the tokens that it starts from, repeated to n; none: random ones")  # type: ignore[type-arg]

    name, title, paper = "prompt", "Prompt tuning", "arXiv:2104.08691"
    formula, trained = "y = decoder([P; E(x)])", "n O"
    default_lr = 3e-2
    cost = "n I"
    small = ({"tokens": 3}, {"tokens": 4, "ids": [5, 0, 2]})

    def __post_init__(self):
        self.require(self.tokens >= 1, "tokens", "1 or more")
        plain = isinstance(self.ids, list | tuple) and all(type(t) is int and t >= 0 for t in self.ids)
        self.require(plain, "ids", "a list of token numbers")
        object.__setattr__(self, "ids", tuple(self.ids))

    def check(self, site):
        there = len(site.stored)
        wrong = [t for t in self.ids if t >= there]
        return (
            f"{site.name}: there is no token {wrong[0]} among its {there}; ids are numbers of tokens" if wrong else None
        )

    def trained_count(self, shape):
        return self.tokens * shape[0]

    def init(self, site, start):
        W = site.weight  # (O, tokens of the vocabulary)
        if self.ids:
            ids = torch.tensor(self.ids).repeat(-(-self.tokens // len(self.ids)))[: self.tokens]
        else:
            ids = torch.randint(W.shape[1], (self.tokens,), generator=start.generator())
        P = site.operator.embed_scale * W[:, ids.to(W.device)].mT
        return {"P": nn.Parameter(P.to(torch.promote_types(W.dtype, torch.float32), copy=True))}

    def inserted(self, p):
        return Embeddings(p.P)
