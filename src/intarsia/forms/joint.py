"""The joint form: a sparse method whose supports are chosen for many weights together.

Every targeted weight is surveyed by itself (``survey``: a few scores, so that a gradient need not be kept), then all supports
are settled at once (``settle``). What stands at a weight afterwards is a :class:`Part`: a support that was chosen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from intarsia.edits import Edit
from intarsia.edits import Sparse as SparseEdit
from intarsia.errors import IntarsiaError
from intarsia.forms.sparse import Sparse, auto_scale
from intarsia.method import Method, Start
from intarsia.role import Role
from intarsia.site import Site
from intarsia.support import Granularity, Shape


@dataclass(frozen=True)
class Part(Sparse):
    """A sparse method at one weight, its support chosen elsewhere: ``count`` units of a granularity, and their scale."""

    method: str
    granularity: Granularity
    count: int
    scale: float

    name, title = "part", "part"

    def granularity_at(self, shape: Shape) -> Granularity:
        return self.granularity

    def units(self, shape: Shape) -> int:
        return self.count

    def scale_at(self, shape: Shape) -> float:
        return self.scale

    def choose(self, site: Site, start: Start) -> Tensor:
        assert start.index is not None
        return start.index.to(site.weight.device)


class Joint(Sparse):
    """Subclasses say which parts of attention and MLP blocks they take, survey a weight, and settle all supports.

    They have the fields ``layout``, ``scale``, and ``scope``, whether shares are of the whole model. What the form declares of a single weight (``units``, ``trained_count``) is
    meant for the tables; at a weight of a model stands a :class:`Part`.
    """

    layout: str
    scale: float | str
    scope: str

    @property
    def expected(self) -> Mapping[str, str]:  # type: ignore[override]
        together = "the units are chosen among those of all targets"
        return {"same seed same adapter": together} if self.scope == "model" else {}

    @abstractmethod
    def parts(self) -> frozenset[str]:
        """The parts that are trained: q, k, v, o, gate, up, down; empty: every targeted weight, whatever it is."""

    @abstractmethod
    def survey(self, site: Site, start: Start) -> Tensor:
        """The scores of the units of a weight, or of its parts one after the other."""

    def require_scale(self) -> None:
        """For ``__post_init__``."""
        positive = isinstance(self.scale, float | int) and 0 < self.scale < math.inf
        self.require(self.scale == "auto" or positive, "scale", "'auto' or a positive number")

    def chooses_together(self) -> bool:
        return True

    def roles_from(self) -> str | None:
        return self.layout if self.parts() else None

    def mine(self, site: Site) -> list[Role]:
        """The roles of a weight that are trained."""
        return [role for role in site.roles if role.part in self.parts()]

    def takes(self, sites: Mapping[str, Site]) -> Mapping[str, Site]:
        if not self.parts():
            return sites
        found = {name: site for name, site in sites.items() if self.mine(site)}
        if not found:
            known = sorted({role.part for site in sites.values() for role in site.roles})
            raise IntarsiaError(
                f"{self.name} trains {', '.join(sorted(self.parts()))} of attention and MLP blocks, and none of the {len(sites)} "
                f"targeted weights is one ({'those are ' + ', '.join(known) if known else 'they belong to no known block'}); "
                f"target others, such as 'all-linear', or give other parts a share"
            )
        return found

    @abstractmethod
    def usual(self, shape: Shape, unit: Granularity) -> int:
        """How many units of such a weight are trained on the average of the model."""

    def part(self, shape: Shape, unit: Granularity, count: int) -> Part:
        """What stands at a weight with so many units."""
        # By the average, so that every trained number of a model takes equal steps, however many share its weight.
        usual = max(1, self.usual(shape, unit)) * unit.size(shape)
        scale = auto_scale(shape, usual, unit) if self.scale == "auto" else float(self.scale)
        return Part(self.name, unit, count, scale)

    def scale_at(self, shape: Shape) -> float:
        return self.part(shape, self.granularity_at(shape), self.units(shape)).scale

    def at(self, edit: Edit, site: Site) -> Method:
        if not isinstance(edit, SparseEdit):
            raise IntarsiaError(f"{site.name}: the file has a {edit.kind} edit; {self.name} makes sparse ones")
        return self.part(edit.shape, edit.granularity, len(edit.index))

    def check(self, site: Site) -> str | None:
        return f"{site.name}: {self.name} chooses for many weights together, so it cannot be inside of another method"

    def choose(self, site: Site, start: Start) -> Tensor:
        raise AssertionError("a joint method was asked about a single weight")  # check() refuses that
