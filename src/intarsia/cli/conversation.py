"""A conversation with a model: what was said, and the next answer as a stream of text."""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from intarsia.errors import IntarsiaError
from intarsia.pretrained import Pretrained
from intarsia.train.data import encode

PARTIAL = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


@dataclass(frozen=True)
class Settings:
    """How to answer. ``temperature`` 0 always takes the likeliest token."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    system: str | None = None


@dataclass
class Answer:
    """One answer while it grows. ``end``: ``eos``, ``length``, ``context`` or, until the last token, ``interrupted``."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    end: str = "interrupted"


@dataclass
class Conversation:
    """What was said so far, and the model's cache of it. ``plain``: no template and no turns, each line is continued."""

    pretrained: Pretrained
    settings: Settings
    plain: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)
    answer: Answer = field(default_factory=Answer)

    def __post_init__(self) -> None:
        self.sampler = torch.Generator().manual_seed(self.settings.seed)
        self.forget_cache()
        self.set_plain(self.plain)

    def set_plain(self, plain: bool) -> None:
        """Continue each line as it stands from now on, or hold a conversation.

        Raises:
            IntarsiaError: for a conversation when the tokenizer has no chat template.
        """
        if not plain and not self.pretrained.tokenizer.chat_template:
            raise IntarsiaError(
                f"{self.pretrained.name}: its tokenizer has no chat template, so it cannot hold a conversation; "
                "--plain continues each line as it stands"
            )
        self.plain = plain

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []
        self.forget_cache()

    def forget_cache(self) -> None:
        """To be called whenever the weights change: keys and values of other weights are worth nothing."""
        self.cached: list[int] = []
        self.cache: Any = None

    def say(self, text: str) -> Generator[str, None, None]:
        """The model's answer, in pieces of whole characters, as they come. ``self.answer`` grows with them.

        However the stream ends, what came of the answer is part of the conversation.
        """
        ids = self._prompt(text)
        self.answer, begun = Answer(), time.perf_counter()
        given: list[int] = []
        try:
            for token in self._tokens(ids):
                given.append(token)
                self.answer.tokens, self.answer.seconds = len(given), time.perf_counter() - begun
                if piece := self._new_text(given):
                    self.answer.text += piece
                    yield piece
            if piece := self._new_text(given, last=True):
                self.answer.text += piece
                yield piece
        finally:
            if not self.plain:
                answer = {"role": "assistant", "content": self.answer.text}
                self.turns += [{"role": "user", "content": text}, answer]

    # --- text -> tokens

    def _prompt(self, text: str) -> list[int]:
        """The tokens of all that was said and of the new line; the oldest turns go where the context is too short."""
        tokenizer, most = self.pretrained.tokenizer, self._most_tokens()
        if self.plain:
            ids = encode([(text.replace("\\n", "\n"), False)], tokenizer, bos=True)[0]
        else:
            while True:
                ids = self._rendered([*self.turns, {"role": "user", "content": text}])
                if len(ids) <= most or not self.turns:
                    break
                self.turns = self.turns[2:]
        if len(ids) > most:
            raise IntarsiaError(f"this message has {len(ids)} tokens; at most {most} fit into the model's context")
        if not ids:
            raise IntarsiaError("an empty prompt; write something to go on from")
        return ids

    def _rendered(self, turns: list[dict[str, str]]) -> list[int]:
        tokenizer, system = self.pretrained.tokenizer, self.settings.system
        first = [] if system is None else [{"role": "system", "content": system}]
        try:
            text = tokenizer.apply_chat_template([*first, *turns], tokenize=False, add_generation_prompt=True)
        except (
            Exception
        ) as error:  # a template is a program of its own; "system role not supported" is one of its errors
            raise IntarsiaError(f"the model's chat template refuses this conversation: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _context(self) -> int | None:
        found = getattr(self.pretrained.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def _most_tokens(self) -> int:
        context = self._context()
        return 2**31 if context is None else context - min(self.settings.max_new_tokens, context // 4)

    # --- tokens -> tokens

    def _tokens(self, ids: list[int]) -> Iterator[int]:
        stops, context = self._stops(), self._context()
        for _ in range(self.settings.max_new_tokens):
            if context is not None and len(ids) >= context:
                self.answer.end = "context"
                return
            token = self._choose(self._logits(ids))
            if token in stops:
                self.answer.end = "eos"
                return
            ids = [*ids, token]
            yield token
        self.answer.end = "length"

    def _logits(self, ids: list[int]) -> Tensor:
        """(V,) for the token after ``ids``. What the cache holds already is not computed again."""
        model = self.pretrained.model
        if self.cache is None or self.cached != ids[: len(self.cached)] or len(self.cached) >= len(ids):
            self.cache, self.cached = DynamicCache(config=model.config), []
        fresh = torch.tensor([ids[len(self.cached) :]], device=model.device)
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        cache, self.cache = self.cache, None  # an interruption in the middle leaves a cache that is half written
        with torch.inference_mode():
            out = model(input_ids=fresh, past_key_values=cache, use_cache=True, **last_only)
        self.cache, self.cached = out.past_key_values, list(ids)
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits

    def _choose(self, logits: Tensor) -> int:
        if self.settings.temperature == 0:
            return int(logits.argmax())
        chance = torch.softmax(logits / self.settings.temperature, dim=-1)
        values, order = chance.sort(descending=True)
        beyond = values.cumsum(0) - values >= self.settings.top_p
        beyond[0] = False  # the likeliest token always stays
        values[beyond] = 0
        return int(order[torch.multinomial(values, 1, generator=self.sampler)])

    def _stops(self) -> set[int]:
        generation = self.pretrained.model.generation_config
        named = None if generation is None else generation.eos_token_id
        listed = named if isinstance(named, list) else [named]
        return {int(i) for i in [*listed, self.pretrained.tokenizer.eos_token_id] if i is not None}

    def _new_text(self, given: list[int], last: bool = False) -> str:
        """What the tokens add to the text so far; nothing while a character is not whole and may become so."""
        text = str(self.pretrained.tokenizer.decode(given, skip_special_tokens=True))
        return "" if text.endswith(PARTIAL) and not last else text[len(self.answer.text) :]
