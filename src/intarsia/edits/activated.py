"""What acts from some tokens on: a low-rank function that is switched on by an invocation, and what tells it the tokens.

A layer sees rows of numbers and no tokens. :class:`Seen` stands before the forward of a whole model, notes its tokens, and is asked
by the functions beside its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.edits.edit import want_numbers, want_tensors
from intarsia.edits.insert import INSERTED, Inserted
from intarsia.errors import IntarsiaError

TOKENS = "_intarsia_tokens"  # attribute of a cache: the tokens whose keys and values it holds
UNKNOWN = -1


class Seen:
    """The tokens of a model's last forward, and those before them that lie in its cache. Dimensions: B rows, T tokens.

    The tokens are ``input_ids``, or the first argument. They stay until the next forward, so that gradient checkpointing, which computes
    layers again in backward, meets the same ones; with it, every forward needs its backward before the next forward. A cache is
    marked with its tokens and keeps them through a deepcopy. What another model, or the base alone, put into a cache is unknown
    and invokes nothing.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # (B, past + T)
        self.past = 0
        self.blind = False  # a forward was given no tokens where it might have been
        self._starts: dict[tuple[int, ...], Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, ()  # a copy of a model has seen nothing

    def watch(self, model: nn.Module) -> None:
        """Stand before the model's forward, if not there already."""
        if self.before not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(self.before, with_kwargs=True)
        if self.after not in model._forward_hooks.values():
            model.register_forward_hook(self.after, with_kwargs=True)

    def leave(self, model: nn.Module) -> None:
        """Stand there no more."""
        before, after = model._forward_pre_hooks, model._forward_hooks
        for hooks, flags, mine in (
            (before, model._forward_pre_hooks_with_kwargs, self.before),
            (after, model._forward_hooks_with_kwargs, self.after),
        ):
            for key in [key for key, hook in hooks.items() if hook == mine]:
                del hooks[key]
                flags.pop(key, None)
        self.tokens, self.past, self.blind = None, 0, False
        self._starts.clear()

    def before(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The hook before a forward."""
        tokens = named.get("input_ids", given[0] if given else None)
        self.blind = tokens is None
        self.past, self._starts = 0, {}
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            self.tokens = None
            return
        cache = _cache_in(given, named)
        self.past = _length(cache)
        self.tokens = tokens if not self.past else torch.cat([_known(cache, len(tokens), self.past, tokens), tokens], 1)

    def after(self, model: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """The hook after it: its cache is marked."""
        if self.tokens is None:
            return
        for cache in (getattr(output, "past_key_values", None), _cache_in(given, named)):
            if hasattr(cache, "get_seq_length"):
                setattr(cache, TOKENS, self.tokens)

    def of_rows(self, index: Tensor) -> Seen:
        """The same of some rows of the batch."""
        found = Seen()
        found.tokens = None if self.tokens is None else self.tokens.index_select(0, index.to(self.tokens.device))
        found.past, found.blind = self.past, self.blind
        return found

    def active(self, invocation: tuple[int, ...], start_offset: int, v: Tensor) -> Tensor | None:
        """Which tokens of v (B, T, ...) stand at or after the first token of the last invocation in their row, plus an offset.

        -> (B, T), or None where the model works on no tokens at all: everything acts there.
        """
        if self.blind:
            raise IntarsiaError(
                "an adapter that is activated by tokens needs the model's input_ids, and this forward was given none "
                "(inputs_embeds alone do not say where the invocation is); pass input_ids"
            )
        if self.tokens is None:
            return None
        B, T = self.tokens.shape
        if tuple(v.shape[:-1]) != (B, T - self.past):
            raise IntarsiaError(
                f"an adapter that is activated by tokens meets {tuple(v.shape[:-1])} rows of numbers where the model was given "
                f"{B} x {T - self.past} tokens; it sits in layers that see every token of the batch, such as q_proj, k_proj, v_proj"
            )
        if invocation not in self._starts:
            self._starts[invocation] = last_start(self.tokens, invocation)
        start = self._starts[invocation] + start_offset
        return (torch.arange(self.past, T, device=start.device) >= start[:, None]).to(v.device)


def last_start(tokens: Tensor, sought: tuple[int, ...]) -> Tensor:
    """Where the last occurrence of a sequence begins in each row; behind the end of all rows where there is none. (B, T) -> (B,)."""
    B, T = tokens.shape
    nowhere = torch.iinfo(torch.int32).max
    if len(sought) > T:
        return torch.full((B,), nowhere, device=tokens.device)
    hits = (tokens.unfold(1, len(sought), 1) == tokens.new_tensor(sought)).all(2)
    last = torch.where(hits, torch.arange(hits.shape[1], device=tokens.device), -1).amax(1)
    return torch.where(last < 0, nowhere, last)


def _cache_in(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    cache = named.get("past_key_values")
    return next((one for one in given if hasattr(one, "get_seq_length")), None) if cache is None else cache


def _length(cache: Any) -> int:
    """How many tokens a cache holds."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache else 0


def _known(cache: Any, rows: int, past: int, like: Tensor) -> Tensor:
    """The tokens in a cache, as far as they are known. (rows, past)."""
    found: Tensor | None = getattr(cache, TOKENS, None)
    if found is None or found.shape[1] < past or rows % len(found):
        return like.new_full((rows, past), UNKNOWN)
    return found[:, :past].to(like).repeat_interleave(rows // len(found), 0)


@dataclass(frozen=True, eq=False)
class Activated(Inserted):
    """g(v) = B A v at tokens from the invocation on, 0 before it and in rows without one.

    ``seen`` says where that is; without it, and in a model that works on no tokens, g acts everywhere.
    """

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    invocation: tuple[int, ...]
    start_offset: int = 0  # tokens after the first one of the invocation
    seen: Seen | None = None

    what, watches = "low rank activated by tokens", True

    def __call__(self, v: Tensor) -> Tensor:
        on = None if self.seen is None else self.seen.active(self.invocation, self.start_offset, v)
        found = F.linear(F.linear(v, self.A.to(v)), self.B.to(v))
        return found if on is None else torch.where(on[..., None], found, 0.0)

    def watching(self, seen: Any) -> Self:
        return replace(self, seen=seen)

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def facts(self) -> dict[str, Any]:
        return {"invocation": list(self.invocation), "start_offset": self.start_offset}

    @classmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"})
        A, B = tensors["A"], tensors["B"]
        fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] >= 1
        if not fits or (A.shape[1], B.shape[0]) != (inputs, outputs):
            raise IntarsiaError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to {(outputs, inputs)}")
        for name, tensor in tensors.items():
            want_numbers(name, tensor)
        invocation, start = facts.get("invocation"), facts.get("start_offset")
        if not isinstance(invocation, list | tuple) or not is_tokens(invocation):
            raise IntarsiaError(f"invocation is {invocation!r}; expected one or more numbers of tokens")
        if type(start) is not int or start < 0:
            raise IntarsiaError(f"start_offset is {start!r}; expected a whole number of tokens, 0 or more")
        return cls(A, B, tuple(invocation), start)

    def times(self, factor: float) -> Self:
        return replace(self, B=factor * self.B)

    def through(self, W: Tensor) -> Self:
        return replace(self, B=W @ self.B)

    @property
    def multiplications(self) -> int:
        return self.A.numel() + self.B.numel()


def is_tokens(given: Any) -> bool:
    """Whether these are one or more numbers of tokens."""
    return len(given) > 0 and all(type(token) is int and token >= 0 for token in given)


INSERTED[Activated.what] = Activated
