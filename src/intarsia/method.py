"""What a method is: its hyperparameters (the fields of a frozen dataclass) and its math (functions of the state)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError
from intarsia.named import Named
from intarsia.named import option as option  # where methods look for it

if TYPE_CHECKING:
    from intarsia.edits import Edit
    from intarsia.site import Site


# What a method may ask for to start with: see Start. All but the last is gathered of calibration data.
NEEDS = ("gradient", "fisher", "inputs", "magnitudes", "gram", "mean", "observed", "movement", "original")


def as_parameters(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors for a site: copies, float32 or wider, where its weight is."""
    weight = site.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return {name: nn.Parameter(tensor.to(weight.device, wide, copy=True)) for name, tensor in tensors.items()}


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
        common: as many that depend on the seed and on the weight's shape: alike wherever tensors are shared.
        gradient: (O, I) float32 or wider, the loss gradient of the base summed over the calibration data.
        fisher: (O, I), the squares of the batches' gradients, summed.
        inputs: (I,), the norm of each input of the layer over all tokens of the calibration data.
        magnitudes: (I,), the sum of each input's magnitude over them.
        gram: (I, I) float64 on the CPU, the mean of x x^T over them.
        mean: (I,) float64 on the CPU, the mean of x over them.
        observed: what :meth:`Method.observer` gave for the site, or for another that is given the same inputs, after it has seen them.
        movement: (O, I), how far a first, dense training moved the weight.
        original: (O, I), the weight before the base was compressed, in the dtype that it has there.
        index: the support itself, where it is known already.

    Those between are there when :meth:`Method.needs` names them.
    """

    key: int
    common: int = 0
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    inputs: Tensor | None = None
    magnitudes: Tensor | None = None
    gram: Tensor | None = None
    mean: Tensor | None = None
    observed: Any = None
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


def _shapes(edit: Edit) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in edit.tensors().items()}


class Method(Named, ABC):
    """How an adapter is trained. Subclasses are frozen dataclasses; their fields are the hyperparameters.

    ``p`` below is the state at one site: its tensors as attributes (``p.A``, ``p.values``) in one floating dtype, which is
    ``p.dtype``, ``p.operator``, what the layer does with the weight, ``p.training``, whether the layer is in training mode,
    and ``p.shape``, the (O, I) of the weight.
    """

    trained: ClassVar[str]  # trained numbers a weight, as a formula
    cost: ClassVar[str] = (
        "none"  # multiplications a token beside its layer once it is trained; none: it is set into the weight
    )
    kind: ClassVar[str] = "method"
    role: ClassVar[str] = "adapter"
    mergeable: ClassVar[bool] = True  # whether it changes the weight; else fold raises, and the edit is an insert
    reads_weights_below: ClassVar[bool] = False  # whether its forward asks for the weight of all that lies below
    starts_as_identity: ClassVar[bool] = True
    default_lr: ClassVar[float]  # with Adam; measured, see docs/learning-rate.md
    watches: ClassVar[bool] = False  # whether it asks for the tokens of the model's forward: p.seen
    avoids: ClassVar[bool] = False  # whether its support can leave out what other adapters change (Site.avoid)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})  # of layers where it can sit: intarsia.operators.KINDS
    default_targets: ClassVar[str] = "all-linear"  # the target that the default stands for: see intarsia.site
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()  # names of trained tensors (up, down) whose product acts: B, A
    allots: ClassVar[str] = ""  # what ``reallocate`` deals out among the sites: entries, ranks
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

    def bias_edit(self, p: Any) -> Edit | None:
        """The same for the layer's bias, seen as a matrix (O, 1), where the layer has one; None: it stays."""
        return None

    @abstractmethod
    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        """The state whose :meth:`edit` is this one, to the bit."""

    @abstractmethod
    def trained_count(self, shape: tuple[int, int]) -> int:
        """Trained numbers at a weight of this (O, I), without those that it shares."""

    def stays_wide(self) -> frozenset[str]:
        """Tensors of the state that ``p`` keeps as they are stored, because x's dtype would lose what was trained."""
        return frozenset()

    def carriers(self) -> frozenset[str]:
        """Parameters of the state whose gradients are notes from the forward (``forms.carry``), which no optimizer moves."""
        return frozenset()

    def invoked_by(self) -> tuple[int, ...]:
        """Tokens that a row must have, one behind the other, for the method to do anything there; none: it acts in every row."""
        return ()

    def shares(self) -> frozenset[str]:
        """Trained tensors that are one for all sites of a shape. :meth:`init` makes them alike there, of ``start.common``."""
        return frozenset()

    def shared_count(self, shape: tuple[int, int]) -> int:
        """Trained numbers of the tensors that :meth:`shares` names, once for all weights of this (O, I)."""
        return 0

    def plan(self, p: Any) -> tuple[Tensor, ...]:
        """Constants that follow from the state and are not saved with it; made once, met again as ``p.plan``."""
        return ()

    def traits(self, shape: tuple[int, int]) -> Any:
        """What follows from the method and the weight's shape alone; asked once, met again as ``p.traits`` (else None)."""
        return None

    def before_step(self, p: Any) -> None:
        """Called before every optimizer step that this state takes part in, with the gradients there (``p.A.grad``)."""

    def penalty(self, p: Any) -> Tensor | None:
        """A number that is to be small besides the loss, a function of the state; None: nothing. Its gradient is added to those of
        the trained tensors before every optimizer step, and before :meth:`before_step`; for a shared tensor once."""
        return None

    def after_step(self, p: Any, lr: float) -> None:  # most methods have nothing to do here
        """Called after every optimizer step that this state took part in; may write tensors of the state, in place. ``lr`` is the
        learning rate that the optimizer has for the state's first trained tensor."""

    def reallocate(self, states: Mapping[str, Any], step: int, steps: int) -> Mapping[str, int]:
        """Give and take between the sites after optimizer step ``step`` (from 1) of ``steps``: may write constants of ``states``, p by
        site, in place, and depends on nothing else, so that a resumed run goes on alike. See :func:`intarsia.allocators.reallocate`.

        Returns:
            How much each site has now, of what :attr:`allots` names; empty where nothing was due.
        """
        return {}

    def check(self, site: Site) -> str | None:
        """Why this method cannot sit at the site, or None."""
        return None

    def needs(self) -> frozenset[str]:
        """What :meth:`init` needs of calibration data, of :data:`NEEDS`: the fields of ``start`` that are filled."""
        return frozenset()

    def observer(self, site: Site) -> Any:
        """Where :meth:`needs` names ``observed``: what is to look at the site's inputs, as in :mod:`intarsia.observe`."""
        raise NotImplementedError

    def confer(self, observers: Mapping[str, Any]) -> None:
        """Called with the observers of all sites after each batch, where what one of them needs depends on the others."""

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

    def prefix(self, edit: Edit, rank: int) -> Edit:
        """What the first ``rank`` ranks of an edit do alone. Raises IntarsiaError where they were not trained for that."""
        raise IntarsiaError(
            f"the first ranks of {self.name} are no adapter of their own (those of dylora are); the nearest change of a lower rank is "
            "another one: intarsia compress --to low-rank"
        )

    def at(self, edit: Edit, site: Site) -> Method:
        """The method as it was at a site, from the edit that it made there."""
        return self

    def own(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        """The tensors of an edit, by their names in it, where it is of the kind, the facts and the shapes that this method makes
        at the site. For :meth:`restore`. Raises IntarsiaError elsewhere."""
        fresh = self.edit(SimpleNamespace(shape=site.shape, **self.init(site, Start.at(site.name, 0))))
        if (edit.kind, edit.facts(), _shapes(edit)) != (fresh.kind, fresh.facts(), _shapes(fresh)):
            raise IntarsiaError(
                f"{site.name}: the file has a {edit.kind} edit that its own config does not make: {self}"
            )
        return edit.tensors()

    def sits_at(self) -> frozenset[str]:
        """The kinds of layers where it can sit as it is set: norms of inputs, and roles, are known for linear layers only."""
        return (
            self.kinds & {"linear"}
            if self.needs() & {"inputs", "magnitudes", "gram", "mean", "observed"} or self.roles_from()
            else self.kinds
        )

    def moves(self, step: int, steps: int) -> float:
        """The share of the support that moves after an optimizer step: number ``step`` of ``steps``, the first is 1."""
        return 0.0

    def wants_callback(self) -> bool:
        """Whether something is to be called between steps, besides the hooks that every optimizer calls by itself."""
        return type(self).reallocate is not Method.reallocate or any(self.moves(step, 1000) for step in range(1, 1001))

    def grows_by(self) -> str:
        """The scorer by which a support that moves grows."""
        return "gradient"
