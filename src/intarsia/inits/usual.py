"""LoRA's own start: A ~ Kaiming uniform (a = sqrt 5), B = 0, as in the authors' code. Hu et al. 2021, arXiv:2106.09685."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.inits.initialiser import initialiser
from intarsia.method import Start
from intarsia.site import Site


@initialiser("lora")
def lora(method: Any, site: Site, start: Start) -> dict[str, Tensor]:
    """A Kaiming uniform, B = 0."""
    (O, I), r = site.shape, method.rank
    A = nn.init.kaiming_uniform_(torch.empty(r, I), a=math.sqrt(5), generator=start.generator())
    return {"A": A, "B": torch.zeros(O, r)}
