"""The ahead form: what stands before the tokens of a decoder, which changes no weight and no layer."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from intarsia.edits import AHEAD
from intarsia.errors import IntarsiaError
from intarsia.forms.insert import Insert
from intarsia.method import Below
from intarsia.operators import DECODER


class Ahead(Insert):
    """State: the tensors of a prompt or a prefix, or what they are made of. It costs no product of its own; every token looks back at it.

    It sits at the module that turns embeddings into hidden states, and the default target stands for that one. There x is the
    decoder's call, and what lies below it runs it.
    """

    kinds = frozenset({DECODER})
    default_targets = DECODER
    starts_as_identity = False
    place, scale = AHEAD, 1.0

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        return below(self.inserted(p)(x))

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> NoReturn:
        raise IntarsiaError(f"{self.name} stands before the tokens and folds into no weight")
