"""What a search found: the weights before and after, each skill before and after, on rows the search saw and on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from intarsia.merge.search.objective import Gains, Losses
from intarsia.merge.search.search import Search
from intarsia.merge.search.trials import Trial


@dataclass(frozen=True)
class Compared:
    """The merge as it was given and as it was found, on the same rows."""

    gains: Gains
    given: Losses
    found: Losses
    rows: Mapping[str, int]  # skill -> how many

    def to_dict(self) -> dict[str, Any]:
        """Losses, and retained shares of the gains, as plain JSON values."""
        return {
            "rows": dict(self.rows),
            "loss": self.gains.to_dict() | {"given": dict(self.given), "found": dict(self.found)},
            "retained": {"given": self.gains.retained(self.given), "found": self.gains.retained(self.found)},
        }


@dataclass(frozen=True)
class Outcome:
    """A search, and its result on the rows of the search and on rows that it never saw."""

    search: Search
    searched: Compared
    held_out: Compared

    def to_dict(self) -> dict[str, Any]:
        """All of it, every trial included, as plain JSON values."""
        search = self.search
        return {
            "objective": search.objective.to_dict(),
            "space": search.space.to_dict(),
            "given": dict(search.start.point),
            "found": dict(search.best.point),
            "found_in_trial": search.best.number,
            "seconds": round(search.seconds, 3),
            "value": {
                name: {
                    "given": search.objective(compared.gains.retained(compared.given)),
                    "found": search.objective(compared.gains.retained(compared.found)),
                }
                for name, compared in (("search", self.searched), ("held_out", self.held_out))
            },
            "search": self.searched.to_dict(),
            "held_out": self.held_out.to_dict(),
            "trials": [_trial(search, trial) for trial in search.trials],
            "front": [trial.number for trial in search.front],
        }

    def weights_table(self) -> Table:
        """Each number that was searched: as it was given, as it was found."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("adapter", no_wrap=True)
        table.add_column("", no_wrap=True)
        for column in ("given", "found", "searched"):
            table.add_column(column, justify="right")
        before = ""
        for d in self.search.space:
            point = "" if d.point is None else f" [{d.point}]"
            given, found = self.search.start.point[d.name], self.search.best.point[d.name]
            adapter = "" if d.adapter == before else d.adapter
            table.add_row(adapter, d.parameter + point, f"{given:g}", f"[bold]{found:g}[/]", f"{d.low:g} to {d.high:g}")
            before = d.adapter
        return table

    def skills_table(self) -> Table:
        """Each skill: losses on held-out rows, and what is retained of its gain there and on the rows of the search."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("\nskill", no_wrap=True)
        groups = {"loss": ("base", "single", "given", "found"), "retained": ("given", "found")}
        for group, columns in (*groups.items(), ("on searched rows", ("given", "found"))):
            for place, column in enumerate(columns):
                table.add_column(f"{'' if place else group}\n{column}", justify="right", no_wrap=True)
        unseen, seen = self.held_out, self.searched
        shares = [c.gains.retained(losses) for c in (unseen, seen) for losses in (c.given, c.found)]
        for skill in unseen.gains.base:
            losses = (unseen.gains.base, unseen.gains.single, unseen.given, unseen.found)
            table.add_row(skill, *(f"{one[skill]:.3f}" for one in losses), *(f"{one[skill]:.1%}" for one in shares))
        values = [self.search.objective(one) for one in shares]
        table.add_section()
        table.add_row(self.search.objective.name, "", "", "", "", *(f"[bold]{value:.1%}[/]" for value in values))
        return table

    def sentence(self) -> str:
        """The result in words, and whether it holds on rows that the search never saw."""
        value = self.to_dict()["value"]
        seen, unseen = value["search"], value["held_out"]
        rows = sum(self.held_out.rows.values())
        found = (
            f"On {rows} rows that the search never saw, {self.search.objective.title} retained share is {unseen['found']:.1%}; "
            f"with the weights as given {unseen['given']:.1%}."
        )
        if self.search.best.number == 0:
            return f"No trial was better than the weights as given, which are kept. {found}"
        if unseen["found"] <= unseen["given"]:
            return (
                f"{found} The gain on the rows of the search ({seen['given']:.1%} to {seen['found']:.1%}) does not carry over: "
                "search on more rows, or keep the weights as given."
            )
        return f"{found} On the rows of the search: {seen['given']:.1%} to {seen['found']:.1%}."


def _trial(search: Search, trial: Trial) -> dict[str, Any]:
    retained = search.retained(trial) if trial.finite else dict.fromkeys(trial.losses)
    return trial.to_dict() | {"retained": retained, "value": search.value(trial) if trial.finite else None}
