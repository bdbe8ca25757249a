"""Measuring on a live model: what a deck has set in, on the rows of every skill."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from intarsia.errors import IntarsiaError
from intarsia.evaluate import Progress, held_out_loss
from intarsia.merge.search.objective import Gains
from intarsia.train.data import Example, split

Use = Callable[[str | None], None]
Rows = Mapping[str, Sequence[Example]]  # skill -> encoded rows; a skill goes by the name of its adapter


@dataclass(frozen=True)
class Live:
    """A model, and rows to measure it on."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 16

    def losses(self, rows: Rows) -> dict[str, float]:
        """Skill -> mean loss (nats a token) of the model as it is now."""
        return {
            skill: held_out_loss(self.model, self.tokenizer, examples, self.batch_size)
            for skill, examples in rows.items()
        }

    def gains(self, rows: Rows, use: Use, progress: Progress | None = None) -> Gains:
        """The losses of the base, and of each adapter alone on its own skill. At the end the base is set in.

        Args:
            use: sets in the adapter of that name alone, or none.

        Raises:
            IntarsiaError: for an adapter that gains nothing.
        """
        wanted = [(adapter, skill) for adapter in (None, *rows) for skill in rows if adapter in (None, skill)]
        found: dict[bool, dict[str, float]] = {True: {}, False: {}}  # whether of the base
        try:
            for done, (adapter, skill) in enumerate(wanted, 1):
                use(adapter)
                found[adapter is None] |= self.losses({skill: rows[skill]})
                if progress:
                    progress(done, len(wanted), f"{adapter or 'base'} on {skill}")
        finally:
            use(None)
        return Gains(found[True], found[False])


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(rows to search on, rows to report on): of every skill about ``share`` of the rows is held out, drawn by a hash.

    Raises:
        IntarsiaError: for a skill with too few different rows to have both.
    """
    search, report = {}, {}
    for skill, examples in rows.items():
        search[skill], report[skill] = split(list(examples), share, seed, len(examples))
        if not report[skill]:
            raise IntarsiaError(
                f"{skill}: {len(examples)} rows are too few to search on some and report on others; give more rows"
            )
    return search, report


def check_apart(search: Rows, report: Rows) -> None:
    """Raises IntarsiaError where rows to report on are among those to search on: a report on them would flatter."""
    for skill, examples in report.items():
        seen = {_content(example) for example in search.get(skill, ())}
        if twice := [example for example in examples if _content(example) in seen]:
            raise IntarsiaError(
                f"{skill}: {len(twice)} of {len(examples)} held-out rows are among those that are searched on, row "
                f"{twice[0].number} first; give other rows, or leave held_out out and a share of data is held out"
            )


def _content(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(example.input_ids), tuple(example.labels)


def drawn(rows: Rows, most: int | None, seed: int) -> Rows:
    """At most so many rows of every skill, drawn by the seed; None: all of them."""
    if most is None:
        return rows
    return {
        skill: random.Random(f"{seed} {skill}").sample(list(examples), min(most, len(examples)))
        for skill, examples in rows.items()
    }
