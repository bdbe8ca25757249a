"""LoRA-FA: LoRA with A frozen, so that a layer keeps x A^T and not x for backward.    W' = W + s B A, only B trained

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv:2308.03303, section 3.
Trained: r O numbers a weight.  B = 0 at the start, as LoRA.
"""

from dataclasses import dataclass

import intarsia as ia


@dataclass(frozen=True)
class LoraFa(ia.Lora):
    name, title, paper = "lora-fa", "LoRA-FA", "arXiv:2308.03303"
    formula, trained = "W' = W + s B A, A frozen", "r O"
    pairs = ()  # B alone is trained
    small = ({"rank": 2}, {"rank": 3, "scaling": "rslora"})

    def trained_count(self, shape):
        return self.rank * shape[0]

    def init(self, site, start):
        p = super().init(site, start)
        return p | {"A": p["A"].detach()}  # a plain tensor is a constant, an nn.Parameter is trained

    def restore(self, edit, site):
        p = super().restore(edit, site)
        return p | {"A": p["A"].detach()}
