"""Activated LoRA: a LoRA that acts from an invocation on.    y'_t = y_t + [t >= tau] s B A x_t,  s = alpha / r

Greenewald et al. 2025, "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv:2504.12397, section 3.
Trained: r (O + I) numbers a weight.  A ~ Kaiming uniform (a = sqrt 5), B = 0, as LoRA.

tau is where the last occurrence of the invocation begins in a row of tokens; a row without it is the base's. So all that comes before
keeps the base's keys and values, and a cache that the base filled serves every such adapter (docs/activated.md). Every layer that sees all
tokens of a causal model may be a target; the paper's are q_proj, k_proj and v_proj, rank 32, alpha 32, dropout 0.05.
Decisions: active from the first token of the invocation, as HF PEFT is (the authors' own package begins one token later:
``start_offset=1``); new tokens are active once their row is invoked; in a model that works on no tokens (a net of rows of numbers) it acts
everywhere; no dropout; alpha defaults to 2 r, as our LoRA's, whose learning rate this is: it was not measured by itself.
"""

from dataclasses import dataclass

from intarsia.edits import Activated, is_tokens
from intarsia.errors import IntarsiaError
from intarsia.forms import Insert
from intarsia.method import option
from intarsia.methods.lora import Lora
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Alora(Insert):
    invocation: list | tuple = option(  # type: ignore[type-arg]
        (), "numbers of the tokens that invoke it; in a training config also their text", tokens=True
    )
    rank: int = option(32, "rank r of the update")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    start_offset: int = option(0, "tokens after the first one of the invocation at which it begins to act")

    name, title, paper = "alora", "Activated LoRA", "arXiv:2504.12397"
    formula, trained = "y'_t = y_t + s B A x_t from the invocation on", "r (O + I)"
    role, cost = "serving", "r (O + I)"
    default_lr = 4e-3
    small = ({"rank": 2, "invocation": [3]}, {"rank": 3, "alpha": 4.0, "invocation": [5, 6], "start_offset": 1})
    place, watches = "parallel", True

    def __post_init__(self):
        self.lora()  # which looks at rank and alpha
        plain = isinstance(self.invocation, list | tuple) and (not self.invocation or is_tokens(self.invocation))
        self.require(plain, "invocation", "a list of token numbers (a training config may give the text)")
        object.__setattr__(self, "invocation", tuple(self.invocation))
        self.require(self.start_offset >= 0, "start_offset", "0 or more tokens")

    def invoked_by(self):
        return self.invocation

    def lora(self):
        return Lora(self.rank, self.alpha)

    @property
    def scale(self):  # type: ignore[override]
        return self.lora().scale

    def takes(self, sites):
        if not self.invocation:
            raise IntarsiaError(
                f"{self.name}: no invocation is given; say which tokens switch it on, such as invocation=[1, 520]"
            )
        return sites

    def check(self, site):
        return self.lora().check(site)

    def trained_count(self, shape):
        return self.lora().trained_count(shape)

    def init(self, site, start):
        return self.lora().init(site, start)

    def inserted(self, p):
        return Activated(p.A, p.B, tuple(self.invocation), self.start_offset, getattr(p, "seen", None))
