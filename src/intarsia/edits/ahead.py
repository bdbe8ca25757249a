"""What stands before the tokens of a decoder: embeddings (a prompt), or keys and values in its cache (a prefix).

A decoder (LlamaModel, GPT2Model) turns embeddings (B, T, O) into hidden states. It is given more than it is asked about: the states of
what stands before are cut off again, so that states, logits and labels belong to the caller's tokens, one for one.

Shapes: B batch, T tokens, n before them, O width of an embedding, L layers, h heads of keys and values, d width of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from intarsia.edits.edit import want_numbers, want_tensors
from intarsia.edits.insert import AHEAD, INSERTED, Inserted
from intarsia.errors import IntarsiaError
from intarsia.operators import Decoder


@dataclass(frozen=True, eq=False)
class Ahead(Inserted):
    """What one adapter puts before the tokens. It is there or not: there is no half of it."""

    places = (AHEAD,)

    @property
    @abstractmethod
    def count(self) -> int:
        """n, how many positions it takes."""

    def __call__(self, v: Any) -> Any:
        """The call of a decoder with this before all that stands before its tokens so far."""
        return v.behind(self)

    def times(self, factor: float) -> Self:
        if factor != 1:
            raise IntarsiaError(
                f"a {self.what} stands before the tokens or does not, so it cannot be given the weight {factor:g}; use it at strength "
                "1, and fuse several with 1 each: they stand behind one another"
            )
        return self

    def through(self, W: Tensor) -> Self:
        raise AssertionError("nothing stands before a decoder but tokens")


@dataclass(frozen=True, eq=False)
class Prompt(Ahead):
    """n embeddings, which the decoder reads as if they were those of tokens."""

    P: Tensor  # (n, O)

    what = "prompt"

    @property
    def count(self) -> int:
        return len(self.P)

    def tensors(self) -> dict[str, Tensor]:
        return {"P": self.P}

    def facts(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"P"})
        P = tensors["P"]
        if P.ndim != 2 or not len(P) or P.shape[1] != outputs:
            raise IntarsiaError(f"P is {tuple(P.shape)}; expected (n, {outputs}), one embedding for each token")
        want_numbers("P", P)
        return cls(P)

    @property
    def multiplications(self) -> int:
        return 0  # a token's own products are the same; it looks at n more keys


@dataclass(frozen=True, eq=False)
class Prefix(Ahead):
    """n keys and values in every layer, as if n tokens had gone through it."""

    K: Tensor  # (L, h, n, d)
    V: Tensor

    what = "prefix"

    @property
    def count(self) -> int:
        return self.K.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        return {"K": self.K, "V": self.V}

    def facts(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"K", "V"})
        K, V = tensors["K"], tensors["V"]
        if K.ndim != 4 or K.shape != V.shape or not K.shape[2] or 2 * K.shape[0] * K.shape[1] * K.shape[3] != inputs:
            raise IntarsiaError(
                f"K {tuple(K.shape)} and V {tuple(V.shape)} are no prefix: expected both (layers, heads, n, width), of {inputs} "
                "numbers for each position together"
            )
        want_numbers("K", K)
        want_numbers("V", V)
        return cls(K, V)

    @property
    def multiplications(self) -> int:
        return 0


for _kind in (Prompt, Prefix):
    INSERTED[_kind.what] = _kind


# ------------------------------------------------------------------ the decoder's forward
@dataclass(frozen=True)
class Call:
    """What stands before the tokens of one call of a decoder, the first one first."""

    ahead: tuple[Ahead, ...] = ()

    def behind(self, one: Ahead) -> Call:
        """The same with one more before it all."""
        return Call((one, *self.ahead))


Rows = Sequence[tuple[tuple[Ahead, ...], Tensor | None]]  # what stands before which rows of the batch; None: before all


def run(module: nn.Module, operator: Decoder, forward: Callable[..., Any], given: Mapping[str, Any], rows: Rows) -> Any:
    """The decoder's forward with something before its tokens: positions and mask made longer, states cut to the tokens again.

    Keys and values come before all embeddings. Where rows have different numbers of them, the shorter ones are filled up in front and
    masked; tokens count on from what stands before their own row. With a warm cache, that was begun so, nothing is put in again.

    Raises:
        IntarsiaError: for a mask or cache that cannot be made longer, and a cache that was begun with something else before it.
    """
    if not any(ahead for ahead, _ in rows):
        return forward(module, **given)
    named = dict(given)
    tuples = named.pop("return_dict", None) is False
    named.pop("cache_position", None)  # the decoder counts anew
    x = named.pop("inputs_embeds", None)
    ids = named.pop("input_ids", None)
    if x is None:
        x = module.get_input_embeddings()(ids)  # type: ignore[operator]  # Dynamo asks no module what it is
    B, T = x.shape[:2]
    past, mask = named.get("past_key_values"), named.get("attention_mask")
    parts = [_Part.of(ahead, index) for ahead, index in rows]
    keys, prompts = max(part.keys for part in parts), max(part.prompts for part in parts)
    n = keys + prompts
    seen = _seen(past, mask, n, T)
    alike = all((part.keys, part.prompts) == (keys, prompts) for part in parts)
    if mask is None and not alike:
        mask = x.new_ones(B, T + max(seen - n, 0), dtype=torch.int64)
    if mask is not None:
        front = _of_rows(parts, B, lambda part: part.mask(keys, prompts, mask))
        named["attention_mask"] = torch.cat([front, mask], 1)
    counted = operator.counted  # else they may begin elsewhere than at 0, as in an encoder
    positions = _positions(named.get("position_ids"), mask if counted else None, T, max(seen - n, 0), x.device)
    if positions is not None:
        own = _of_rows(parts, B, lambda part: torch.full((1, 1), part.keys + part.prompts, device=x.device))
        found = positions + own
        if prompts and not seen:
            before = _of_rows(parts, B, lambda part: part.positions(prompts, x.device))
            found = torch.cat([before, found.expand(B, -1)], 1)
        named["position_ids"] = found
    if prompts and not seen:
        before = _of_rows(parts, B, lambda part: part.embeddings(prompts, x))
        x = torch.cat([before.expand(B, -1, -1), x], 1)
        if (kinds := named.get("token_type_ids")) is not None:
            named["token_type_ids"] = torch.cat([kinds[:, :1].expand(-1, prompts), kinds], 1)
    if keys and not seen:
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise IntarsiaError(
                "with gradient checkpointing transformers gives its layers no cache, so that a prefix would be left out; switch it off "
                "(gradient_checkpointing: false), or train a prompt"
            )
        named["past_key_values"] = _warmed(module, past, parts, B, keys, x)
    y = forward(module, **named, inputs_embeds=x, return_dict=True)
    wanted = named.get("use_cache")
    keep = past is not None or bool(getattr(module.config, "use_cache", False) if wanted is None else wanted)
    y = _cut(module, y, 0 if seen else prompts, keep or not keys)
    return y.to_tuple() if tuples else y


@dataclass(frozen=True)
class _Part:
    """What stands before some rows: embeddings (n, O) and keys and values (L, h, n, d), all behind one another."""

    index: Tensor | None
    P: Tensor | None
    KV: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, ahead: tuple[Ahead, ...], index: Tensor | None) -> _Part:
        P = [one.P for one in ahead if isinstance(one, Prompt)]
        KV = [one for one in ahead if isinstance(one, Prefix)]
        both = (torch.cat([one.K for one in KV], 2), torch.cat([one.V for one in KV], 2)) if KV else None
        return cls(index, torch.cat(P) if P else None, both)

    @property
    def keys(self) -> int:
        return 0 if self.KV is None else self.KV[0].shape[2]

    @property
    def prompts(self) -> int:
        return 0 if self.P is None else len(self.P)

    def mask(self, keys: int, prompts: int, like: Tensor) -> Tensor:
        """1 for what stands there, 0 for what fills up. -> (1, n)."""
        zeros, ones = like.new_zeros, like.new_ones
        pieces = (zeros(keys - self.keys), ones(self.keys), zeros(prompts - self.prompts), ones(self.prompts))
        return torch.cat(pieces)[None]

    def positions(self, prompts: int, device: torch.device) -> Tensor:
        """(1, prompts): they count on from the keys."""
        return (torch.arange(prompts, device=device) - (prompts - self.prompts)).clamp_min(0)[None] + self.keys

    def embeddings(self, prompts: int, x: Tensor) -> Tensor:
        """(1, prompts, O)."""
        fill = x.new_zeros(prompts - self.prompts, x.shape[-1])
        return torch.cat([fill, *([] if self.P is None else [self.P.to(x)])])[None]

    def cached(self, which: int, layer: int, keys: int, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """The keys (0) or values (1) of one layer. -> (1, h, keys, d)."""
        h, d = shape
        fill = x.new_zeros(h, keys - self.keys, d)
        return torch.cat([fill, *([] if self.KV is None else [self.KV[which][layer].to(x)])], 1)[None]


def _of_rows(parts: Sequence[_Part], B: int, make: Callable[[_Part], Tensor]) -> Tensor:
    """One tensor for the batch of what ``make`` gives for each part, (1, ...). -> (B, ...)."""
    if len(parts) == 1 and parts[0].index is None:
        only = make(parts[0])
        return only.expand(B, *only.shape[1:])
    whole: Tensor | None = None
    for part in parts:
        assert part.index is not None
        one = make(part)
        whole = one.new_empty(B, *one.shape[1:]) if whole is None else whole
        whole = whole.index_copy(0, part.index, one.expand(len(part.index), *one.shape[1:]))
    assert whole is not None
    return whole


def _seen(past: Any, mask: Any, n: int, T: int) -> int:
    """How many positions the cache holds, what stands before the tokens among them. Raises where they do not fit."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise IntarsiaError(
            "a prompt or prefix lengthens the attention mask, which it can where it is (batch, tokens); this one is made for every pair "
            "of tokens: give the plain mask, and generate with a cache that grows (cache_implementation='dynamic')"
        )
    if past is None:
        seen = 0
    elif getattr(past, "is_compileable", False) or not hasattr(past, "get_seq_length"):
        raise IntarsiaError(
            f"a prompt or prefix needs a cache that grows, and a {type(past).__name__} does not: generate with "
            "cache_implementation='dynamic'"
        )
    else:
        seen = int(past.get_seq_length())
    if seen and (seen < n or (mask is not None and mask.shape[1] != seen - n + T)):
        length = f", the mask {mask.shape[1]}" if mask is not None else ""
        raise IntarsiaError(
            f"the cache holds {seen} positions{length}, {T} tokens are given, and {n} stand before them: the cache was begun with something "
            "else before the tokens, or went through generate, which counts what stands before them as tokens; begin with an empty cache"
        )
    if not seen and mask is not None and mask.shape[1] != T:
        raise IntarsiaError(
            f"the mask is {tuple(mask.shape)} for {T} tokens and an empty cache; expected one number for each token"
        )
    return seen


def _positions(given: Any, mask: Tensor | None, T: int, before: int, device: torch.device) -> Tensor | None:
    """The tokens' positions as if nothing stood before them, so that padding on the left counts for nothing. -> (1 or B, T).

    None: the decoder counts from the cache by itself, and is right.
    """
    if given is not None:
        if given.ndim != 2:
            raise IntarsiaError(f"position_ids are {tuple(given.shape)}; a prompt or prefix takes (batch, tokens)")
        if mask is None and not before and not torch.compiler.is_compiling() and bool((given.diff(dim=1) != 1).any()):
            raise IntarsiaError(
                "position_ids begin anew within a row: several texts in one row cannot each have a prompt or prefix; give each a row"
            )
        return given  # type: ignore[no-any-return]
    if mask is None:
        return None
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(before, before + T, device=device) - padding).clamp_min(0)


def _warmed(module: nn.Module, past: Any, parts: Sequence[_Part], B: int, keys: int, x: Tensor) -> Any:
    """The cache with the keys and values in it, before anything else."""
    if past is None:
        from transformers import DynamicCache  # a decoder is one of theirs, and importing it takes long

        past = DynamicCache(config=module.config)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    shaped = next(part.KV[0] for part in parts if part.KV is not None)
    layers, shape = shaped.shape[0], (shaped.shape[1], shaped.shape[3])
    for layer in range(layers):
        both = (
            _of_rows(parts, B, lambda part, which=which, layer=layer: part.cached(which, layer, keys, x, shape))  # type: ignore[misc]
            for which in (0, 1)
        )
        past.update(*both, layer)
    return past


def _cut(module: nn.Module, y: Any, n: int, keep: bool) -> Any:
    """The output without the first n states. ``keep``: whether the caller wants the cache."""
    found = {}
    for name, value in y.items():
        if name == "past_key_values" and not keep:
            continue
        if n and name == "last_hidden_state":
            value = value[:, n:]
        elif n and name in ("hidden_states", "attentions"):
            value = tuple(one if one is None else one[:, n:] if one.ndim == 3 else one[:, :, n:] for one in value)
        elif n and name == "pooler_output":
            value = module.pooler(y["last_hidden_state"][:, n:])  # type: ignore[operator]  # of the caller's first token
        found[name] = value
    return type(y)(**found)
