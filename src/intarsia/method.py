"""What a method is: its hyperparameters (the fields of a frozen dataclass) and its math (functions of the state)."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.edits import Edit
    from intarsia.site import Site


# What a method may ask for to start with: see Start. All but the last is gathered of calibration data.
NEEDS = ("gradient", "fisher", "inputs", "magnitudes", "gram", "mean", "movement", "original")


def option(default: Any, help: str) -> Any:
    """A hyperparameter: its default and one line for the command line, the docs and the config schema."""
    return field(default=default, metadata={"help": help})


class Below(Protocol):
    """What an adapter sees under it: the base layer, or the base layer with the adapters below already on it."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I) and bias (O,) of all that lies below, folded in ``dtype``."""


@dataclass(frozen=True)
class Start:
    """What a method may use to start at one site.

    Attributes:
        key: 63 random bits that depend on the seed and on the site's name, and on nothing else.
        gradient: (O, I) float32 or wider, the loss gradient of the base summed over the calibration data.
        fisher: (O, I), the squares of the batches' gradients, summed.
        inputs: (I,), the norm of each input of the layer over all tokens of the calibration data.
        magnitudes: (I,), the sum of each input's magnitude over them.
        gram: (I, I) float64 on the CPU, the mean of x x^T over them.
        mean: (I,) float64 on the CPU, the mean of x over them.
        movement: (O, I), how far a first, dense training moved the weight.
        original: (O, I), the weight before the base was compressed, in the dtype that it has there.
        index: the support itself, where it is known already.

    Those between are there when :meth:`Method.needs` names them.
    """

    key: int
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    inputs: Tensor | None = None
    magnitudes: Tensor | None = None
    gram: Tensor | None = None
    mean: Tensor | None = None
    movement: Tensor | None = None
    original: Tensor | None = None
    index: Tensor | None = None

    @classmethod
    def at(cls, site: str, seed: int, **given: Any) -> Self:
        """The start for one site: two sites of one shape get different keys, whatever the order of the sites."""
        digest = hashlib.blake2b(f"{seed}:{site}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little") >> 1, **given)

    def given(self, need: str) -> Tensor:
        """What was gathered of the data, by its name. A method or scorer that did not declare the need gets an error."""
        found: Tensor | None = getattr(self, need)
        if found is None:
            raise IntarsiaError(f"{need} is used and was not asked for; declare it: needs(), or @scorer({need!r})")
        return found

    def generator(self) -> torch.Generator:
        """A CPU generator of its own; the global one is neither read nor moved."""
        return torch.Generator().manual_seed(self.key)


class Method(ABC):
    """How an adapter is trained. Subclasses are frozen dataclasses; their fields are the hyperparameters.

    ``p`` below is the state at one site: its tensors as attributes (``p.A``, ``p.values``) in one floating dtype, which is
    ``p.dtype``, ``p.operator``, what the layer does with the weight, ``p.training``, whether the layer is in training mode,
    and ``p.shape``, the (O, I) of the weight.
    """

    name: ClassVar[str]  # as in configs and on the command line
    title: ClassVar[str]  # as in the paper
    formula: ClassVar[str]  # one line
    paper: ClassVar[str]  # "arXiv:...."
    trained: ClassVar[str]  # trained numbers a weight, as a formula
    kind: ClassVar[str] = "method"
    role: ClassVar[str] = "adapter"
    mergeable: ClassVar[bool] = True  # whether it changes the weight; else fold raises, and the edit is an insert
    reads_weights_below: ClassVar[bool] = False  # whether its forward asks for the weight of all that lies below
    starts_as_identity: ClassVar[bool] = True
    default_lr: ClassVar[float]  # with Adam; measured, see docs/learning-rate.md
    avoids: ClassVar[bool] = False  # whether its support can leave out what other adapters change (Site.avoid)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})  # of layers where it can sit: intarsia.operators.KINDS
    default_targets: ClassVar[str] = "all-linear"  # the target that the default stands for: see intarsia.site
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()  # names of trained tensors (up, down) whose product acts: B, A
    small: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)  # quick settings that the contract runs
    expected: ClassVar[Mapping[str, str]] = {}  # law that does not hold -> the reason

    @abstractmethod
    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        """The state at a site: trained tensors as nn.Parameter, constants as plain tensors, all float32 or wider."""

    @abstractmethod
    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        """(..., I) -> (..., O); pure: writes nothing."""

    @abstractmethod
    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias after the adapter as functions of those before it.

        Raises:
            IntarsiaError: where the method is not mergeable.
        """

    @abstractmethod
    def edit(self, p: Any) -> Edit:
        """What the trained state does to the weight, or beside it, in eval mode, as an edit that knows no method."""

    @abstractmethod
    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        """The state whose :meth:`edit` is this one, to the bit."""

    @abstractmethod
    def trained_count(self, shape: tuple[int, int]) -> int:
        """Trained numbers at a weight of this (O, I)."""

    def stays_wide(self) -> frozenset[str]:
        """Tensors of the state that ``p`` keeps as they are stored, because x's dtype would lose what was trained."""
        return frozenset()

    def carriers(self) -> frozenset[str]:
        """Parameters of the state whose gradients are notes from the forward (``forms.carry``), which no optimizer moves."""
        return frozenset()

    def plan(self, p: Any) -> tuple[Tensor, ...]:
        """Constants that follow from the state and are not saved with it; made once, met again as ``p.plan``."""
        return ()

    def traits(self, shape: tuple[int, int]) -> Any:
        """What follows from the method and the weight's shape alone; asked once, met again as ``p.traits`` (else None)."""
        return None

    def before_step(self, p: Any) -> None:  # noqa: B027
        """Called before every optimizer step that this state takes part in, with the gradients there (``p.A.grad``)."""

    def after_step(self, p: Any) -> None:  # noqa: B027  # most methods have nothing to do here
        """Called after every optimizer step that this state took part in; may write constants of the state, in place."""

    def check(self, site: Site) -> str | None:
        """Why this method cannot sit at the site, or None."""
        return None

    def needs(self) -> frozenset[str]:
        """What :meth:`init` needs of calibration data, of :data:`NEEDS`: the fields of ``start`` that are filled."""
        return frozenset()

    def roles_from(self) -> str | None:
        """Where the roles of the sites come from: ``"family"``, a layout by hand (``families.blocks``), or None: not needed."""
        return None

    def takes(self, sites: Mapping[str, Site]) -> Mapping[str, Site]:
        """Those of the targeted sites that this method adapts. Raises IntarsiaError where it takes none."""
        return sites

    def chooses_together(self) -> bool:
        """Whether something is chosen for all sites together: each is surveyed, then all are settled."""
        return False

    def survey(self, site: Site, start: Start) -> Tensor:
        """What :meth:`settle` has to know of one site: one row of numbers. They lie in files mapped into memory."""
        raise NotImplementedError

    def settle(
        self, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> Mapping[str, tuple[Method, Mapping[str, Any]]]:
        """The method as it is at each site, and what its start there is given besides. A site that is left out gets nothing.

        ``surveys`` is None before anything is known of the sites but their shapes and roles: the counts are then a plan.
        """
        return {name: (self, {}) for name in sites}

    def at(self, edit: Edit, site: Site) -> Method:
        """The method as it was at a site, from the edit that it made there."""
        return self

    def sits_at(self) -> frozenset[str]:
        """The kinds of layers where it can sit as it is set: norms of inputs, and roles, are known for linear layers only."""
        return (
            self.kinds & {"linear"}
            if self.needs() & {"inputs", "magnitudes", "gram", "mean"} or self.roles_from()
            else self.kinds
        )

    def moves(self, step: int, steps: int) -> float:
        """The share of the support that moves after an optimizer step: number ``step`` of ``steps``, the first is 1."""
        return 0.0

    def grows_by(self) -> str:
        """The scorer by which a support that moves grows."""
        return "gradient"

    def config(self) -> dict[str, Any]:
        """Name and fields as plain JSON values; ``registry.build`` makes an equal method of it."""
        return {"name": self.name} | {
            f.name: value.config() if isinstance(value := getattr(self, f.name), Method) else value
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    def require(self, holds: bool, field: str, expected: str) -> None:
        """For ``__post_init__``: one readable error for a field out of its range."""
        if not holds:
            raise IntarsiaError(f"{self.name}: {field}={getattr(self, field)!r} must be {expected}")
