"""The bridge to HF PEFT: every method of ours as a PEFT tuner, for whatever asks for a ``PeftModel``.

    from intarsia.interop.bridge import IntarsiaConfig
    model = peft.get_peft_model(base, IntarsiaConfig(method={"name": "shira", "density": 0.01}))

Importing this module makes the type ``INTARSIA`` known to PEFT, so a process that only loads such an adapter imports it too.
A layer is adapted as always, by swapping its class; what PEFT takes for its tuner layer is the container of the layer's
adapters, ``<layer>.adapters``: all that lies in it belongs to adapters, and the layer keeps its name, weight and keys.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

try:
    from peft import PeftConfig
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils.integrations import init_empty_weights
    from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
except ImportError as error:
    raise ImportError(
        f"the bridge needs PEFT ({error}); install it: pip install 'intarsia[peft]'", name=error.name
    ) from error

from intarsia import chain, registry
from intarsia import model as attached
from intarsia.calibrate import OF_FORWARD, shape_of
from intarsia.edits import Placement, place
from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Method
from intarsia.operators import Operator
from intarsia.site import (
    ALL_LINEAR,
    adaptable_layers,
    every_layer,
    find_sites,
    layer_at,
    partners,
    site_at,
    weight_name,
)

if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError("the bridge needs PEFT 0.21 or newer; upgrade it: pip install -U peft", name="peft")


class IntarsiaType(str, enum.Enum):  # noqa: UP042  # a StrEnum prints otherwise, and PEFT reads what is printed
    """Our entry among PEFT's types. An enumeration cannot be extended from outside (huggingface/peft#2273), and need not be:
    PEFT compares types, and looks them up, as texts."""

    INTARSIA = "INTARSIA"


@dataclasses.dataclass
class IntarsiaConfig(PeftConfig):
    """One adapter, as PEFT is told of it.

    Args:
        method: a method of intarsia, its name, or ``{"name": ..., field: value}``.
        target_modules: names, last parts of names or globs, each of which must match; one text is ``"all-linear"`` or a regular
            expression, as PEFT has it. None: all linear layers.
        exclude_modules: layers that are left out, written likewise.
        seed: with the layer's name, all that random choices depend on.
        modules_to_save: layers trained whole beside the adapter, such as a new classifier.
        data: calibration batches, for methods that choose by them; see :func:`intarsia.attach`. Not saved.
        loss: what ``data`` is scored by, where the model does not say. Not saved.
        trained: whether it comes from a file, so that nothing has to be chosen. Set by saving.

    Raises:
        IntarsiaError: for an unknown method or field, or a value out of range.
    """

    method: Any = "shira"
    target_modules: Any = None
    exclude_modules: Any = None
    seed: int = 0
    modules_to_save: list[str] | None = None
    trained: bool = False
    data: Any = dataclasses.field(default=None, repr=False)
    loss: Any = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = IntarsiaType.INTARSIA
        if not isinstance(self.method, Method):
            self.method = registry.build(self.method)
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            given = getattr(self, field)
            if given is not None and not isinstance(given, str):
                setattr(self, field, sorted(given) if isinstance(given, set) else list(given))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: plain JSON values."""
        kept = [f.name for f in dataclasses.fields(self) if f.name not in ("data", "loss")]
        return {name: getattr(self, name) for name in kept} | {"method": self.method.config(), "trained": True}


class LayerAdapters(nn.ModuleDict, BaseTunerLayer):
    """The adapters of one layer, as PEFT's tuner layer: what it is asked there is done on the layer's chain."""

    adapter_layer_names = ("states",)
    takes_out_to_load = True  # see _before_loading

    def __init__(self, layer: Any):
        super().__init__(dict(layer.adapters))
        self.of = (layer,)  # in a tuple, or the layer would be registered as a part of its own part
        self.merged_adapters: list[str] = []
        self.kept: list[Placement] = []  # the base's bits under each merged adapter, in the same order
        self.before: tuple[list[str], list[tuple[nn.Parameter, bool]]] | None = None  # what disabling has to give back
        self._active_adapter: list[str] = []
        self.handles = [
            layer.register_load_state_dict_pre_hook(_before_loading),
            layer.register_load_state_dict_post_hook(_after_loading),
        ]
        self.loading: tuple[list[str], Tensor | None] | None = None  # merged adapters; the base where it is loaded too
        layer.adapters = self

    @property
    def states(self) -> LayerAdapters:
        """Itself, as the attribute that holds trained tensors."""
        return self

    @property
    def in_features(self) -> int:
        """I of the weight (O, I)."""
        return int(next(iter(self.values())).shape[1])  # type: ignore[index]

    @property
    def out_features(self) -> int:
        """O of the weight (O, I)."""
        return int(next(iter(self.values())).shape[0])  # type: ignore[index]

    def get_base_layer(self) -> nn.Module:
        """The adapted layer: there is none inside of it."""
        layer: nn.Module = self.of[0]
        return layer

    def get_base_weight(self) -> Tensor:
        """The base's own weight as it is stored, whatever is set in: the layer's, or a copy."""
        layer = self.of[0]
        stored: Tensor = layer.weight.detach()
        if layer.live is None and not self.kept:
            return stored
        stored = stored.clone()
        matrix = layer.operator.matrix(stored)
        if layer.live is not None:
            state: Any = self[layer.live]
            state.granularity().put(matrix, state.index, layer.kept)
        for kept in reversed(self.kept):
            kept.write(matrix)
        return stored

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Refused: the base belongs to its owner."""
        raise IntarsiaError("the base's weight cannot be replaced under its adapters; unload() them first")

    # ------------------------------------------------------------------ which adapters act
    def act(self) -> None:
        """Make the chain do what PEFT was told: the active adapters, or none of them while disabled or merged."""
        idle = self._disable_adapters or bool(self.merged_adapters)
        chain.set_active(self.of[0], () if idle else self._active_adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.act()

    def enable_adapters(self, enabled: bool) -> None:
        """Disabled, the layer is the base to the bit; enabled again, it is what it was: merged adapters and flags too."""
        if enabled and self.disable_adapters:
            merged, flags = self.before or ([], [])
            self._disable_adapters, self.before = False, None
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self._set_in(merged)
        elif not enabled and not self.disable_adapters:
            merged = list(self.merged_adapters)
            self._take_out()
            self._disable_adapters = True
            self.before = merged, [(p, p.requires_grad) for p in self.parameters()]
            self.requires_grad_(False)
        self.act()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the layer; with the last one the layer is of its own class again."""
        if adapter_name not in self:
            return
        active = [name for name in self._active_adapter if name != adapter_name]
        rest = [name for name in self.keys() if name != adapter_name]  # torch's type says less than its class
        if adapter_name in self._active_adapter and not active and rest:
            active = rest[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
        chain.set_active(self.of[0], ())
        chain.take_off(self.of[0], adapter_name)
        if rest:
            self.set_adapter(active)
        else:
            self._active_adapter = []
            self.leave()

    def leave(self) -> None:
        """Remove what this container has put on its layer."""
        for handle in self.handles:
            handle.remove()

    # ------------------------------------------------------------------ merging
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Set adapters into the weight and keep the base's bits. Never with numbers that are not finite, safe or not.

        Raises:
            IntarsiaError: where the weight is packed or sharded, or would not be finite; nothing is changed then.
        """
        if isinstance(adapter_names, list):  # a method may leave a layer out; PEFT would warn of what is not here
            adapter_names = [name for name in adapter_names if name in self]
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self]
        try:
            self._set_in(names)
        finally:
            self.act()

    def unmerge(self) -> None:
        """Put the kept bits back: the base, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._take_out()
        self.act()

    def keep_merged(self) -> None:
        """Make what is merged the base: the bits before are given up."""
        self.merged_adapters, self.kept = [], []

    def _set_in(self, names: Sequence[str]) -> None:
        layer = self.of[0]
        if not names:
            return
        if not layer.packing.in_place or layer.shard is not None:
            what = "is sharded over processes" if layer.packing.in_place else "is packed"
            raise IntarsiaError(f"{', '.join(names)} cannot be merged: a weight that {what} cannot be set into")
        if beside := [name for name in names if not self[name].method.mergeable]:  # type: ignore[union-attr]
            raise IntarsiaError(
                f"{', '.join(beside)} cannot be merged: it is computed beside the layer for every token and folds into no weight"
            )
        chain.set_active(layer, ())
        matrix, before = chain.matrix(layer).detach(), len(self.kept)
        try:
            for name in names:
                state: Any = self[name]
                try:
                    placement = place(name, matrix, [(1.0, state.method.edit(state.raw()))])
                except IntarsiaError as error:
                    raise IntarsiaError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {error}"
                    ) from error
                self.kept.append(placement.read(matrix))
                placement.write(matrix)
        except BaseException:
            self._put_back(before)
            raise
        self.merged_adapters += names

    def _take_out(self, left: int = 0) -> None:
        """Unmerge all but the first ``left`` adapters, the last merged first."""
        self._put_back(left)
        del self.merged_adapters[left:]

    def _put_back(self, left: int) -> None:
        while len(self.kept) > left:
            self.kept[-1].write(chain.matrix(self.of[0]).detach())
            self.kept.pop()  # only when the bits are back

    # ------------------------------------------------------------------ moving
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self:
            self[adapter_name].to(self.of[0].weight.device if device is None else device)
            self.act()

    def _apply(self, fn: Any, recurse: bool = True) -> LayerAdapters:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for number, kept in enumerate(self.kept):
            bits = fn(kept.bits)
            index = None if kept.index is None else kept.index.to(bits.device)
            self.kept[number] = Placement(kept.run, index, bits)
        return self


def _before_loading(layer: Any, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """A state dict is about to be loaded: the base's own bits and no others may stand in a weight whose support may change."""
    adapters = getattr(layer, "adapters", None)
    if not isinstance(adapters, LayerAdapters):
        return
    base = f"{prefix}weight" in state_dict
    own = any(key.startswith(f"{prefix}adapters.") for key in state_dict)
    if not base and not own:
        return
    merged = list(adapters.merged_adapters)
    chain.set_active(layer, ())
    adapters._take_out()
    adapters.loading = merged, layer.weight.detach().clone() if base and own and not layer.weight.is_meta else None


def _after_loading(layer: Any, _: Any) -> None:
    adapters = getattr(layer, "adapters", None)
    if not isinstance(adapters, LayerAdapters) or adapters.loading is None:
        return
    merged, base = adapters.loading
    adapters.loading = None
    for state in adapters.values():
        state.replan()  # type: ignore[operator]
    if base is None or torch.equal(layer.weight, base):
        adapters._set_in(merged)
        adapters.act()
        return
    # A dict of the whole model, saved while an adapter was set in: its weight is the base with what the adapter has learned.
    loaded = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(base)
    adapters._set_in(merged)
    adapters.act()
    if not torch.equal(layer.weight, loaded):
        raise IntarsiaError(
            "this state dict is of another base, or was saved with other adapters set in, so what is the base's in it is not "
            "known. Load the base first; save under `with model.disable_adapter():`, or save adapters alone: save_pretrained"
        )


def _base_state(model: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Asked of the base model itself, a state dict holds the base's own bits; asked of the ``PeftModel``, the weights as they
    stand, so that saving adapters copies no weight."""
    if prefix:
        return
    for name, layer in chain.adapted_layers(model).items():
        weight = weight_name(model, name)
        if isinstance(layer.adapters, LayerAdapters) and weight in state_dict:
            state_dict[weight] = layer.adapters.get_base_weight()


class IntarsiaModel(BaseTuner):
    """The tuner: a model with our adapters, each change of it made by intarsia."""

    prefix = "adapters."
    tuner_layer_cls = LayerAdapters
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  # as PEFT declares it; without targets: all linear layers

    def _create_and_replace(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("adapters are attached to all layers at once: inject_adapter")

    def _containers(self) -> list[LayerAdapters]:
        return _containers_of(self.model)

    # ------------------------------------------------------------------ adding and deleting
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, as :func:`intarsia.attach` does; the first one is active and trained, others neither.

        Raises:
            IntarsiaError: for targets that match nothing, a method that does not fit, a name that cannot be.
        """
        config = self.peft_config[adapter_name]
        self._check_name(model, adapter_name)
        if any(adapters.merged for adapters in self._containers()):
            warnings.warn("An adapter is added while another is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        first = not attached.attached_names(model)
        flags = [] if first else [(p, p.requires_grad) for p in model.parameters()]
        targets, exclude = _patterns(model, config)
        if state_dict is not None:
            targets = sorted({key.rpartition(".")[0].rpartition(".adapters")[0] for key in state_dict})
            targets = [name.removeprefix("base_model.model.") for name in targets if name]
        placeholder = config.data is None and (config.trained or config.inference_mode)
        # What has to be loaded lies on the meta device until it is: used before, it fails instead of computing with a wrong choice.
        awaited = low_cpu_mem_usage or (placeholder and config.method.needs())
        with init_empty_weights() if awaited else nullcontext():
            attached.attach(
                model,
                config.method,
                targets,
                name=adapter_name,
                exclude=exclude,
                data=config.data,
                loss=config.loss,
                seed=config.seed,
                gathered=_any_scores(model, config.method, targets, exclude) if placeholder else None,
            )
        try:
            if first:
                model._intarsia_peft = model.register_state_dict_post_hook(_base_state)
            for layer in chain.adapted_layers(model).values():
                if not isinstance(layer.adapters, LayerAdapters):
                    LayerAdapters(layer)._active_adapter = list(self.active_adapters)
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=BaseTuner.get_model_config(self),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in self.active_adapters,
            )
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        except BaseException:
            self._detach(model, adapter_name)
            raise
        for name, layer in chain.adapted_layers(model).items():
            if adapter_name in layer.adapters and name not in self.targeted_module_names:
                self.targeted_module_names.append(name)

    def _check_name(self, model: nn.Module, name: str) -> None:
        if hasattr(LayerAdapters, name):
            raise IntarsiaError(f"an adapter cannot be named {name!r}: PEFT needs that word for itself; take another")
        if any(not isinstance(layer.adapters, LayerAdapters) for layer in chain.adapted_layers(model).values()):
            raise IntarsiaError("this model has adapters of intarsia.attach; detach them before PEFT takes it over")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter without a trace. With the last one, classes and ``requires_grad`` are the base's again.

        Raises:
            ValueError: for an unknown adapter, or one that is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if any(adapter_name in adapters.merged_adapters for adapters in self._containers()):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        active = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        flags = [(p, p.requires_grad) for adapters in self._containers() for p in adapters.parameters()]
        if adapter_name in self.active_adapters and len(self.active_adapters) == 1 and active:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
            flags = []
        self._detach(self.model, adapter_name)
        for module in list(self.model.modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=active or None)
        for adapters in self._containers():
            adapters._active_adapter = active
        self._settle(active)
        for adapters in self._containers():
            if not flags:
                BaseTunerLayer.set_adapter(adapters, active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.active_adapter = active

    def _detach(self, model: nn.Module, name: str) -> None:
        attached.occupy(model, None, self)
        before = self._containers()
        attached.detach(model, name)
        for adapters in before:
            if not len(adapters):
                adapters.leave()
        for adapters in self._containers():
            adapters.act()
        if not attached.attached_names(model) and (handle := vars(model).pop("_intarsia_peft", None)):
            handle.remove()

    def _settle(self, active: Sequence[str]) -> None:
        """Make all layers do what they were told, and tell the model's record and the others who use it."""
        layers = self._containers()
        with chain.transaction([adapters.of[0] for adapters in layers]):
            for adapters in layers:
                adapters.act()
        self._note(active)

    def _note(self, active: Sequence[str] | None = None) -> None:
        active = self.active_adapters if active is None else active
        layers = self._containers()
        idle = any(adapters.merged or adapters.disable_adapters for adapters in layers)
        if layers:
            attached.record(self.model).active = () if idle else tuple(active)
        merged = sorted({name for adapters in layers for name in adapters.merged_adapters})
        how = "by merge_adapter; call unmerge_adapter() first"
        attached.occupy(self.model, " + ".join(merged) or None, self, how)

    # ------------------------------------------------------------------ which adapters act
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters act, in this order from the base upwards, and train them unless ``inference_mode``.

        Raises:
            IntarsiaError: for an unknown adapter; nothing is changed then.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, self.peft_config)}")
        with chain.transaction([adapters.of[0] for adapters in self._containers()]):
            super().set_adapter(adapter_name, inference_mode)
        self._note()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._note()

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **given: Any) -> Iterator[None]:
        """PEFT's ``adapter_names=[...]``: each row of the batch with its own adapter, ``__base__`` for none."""
        names = given.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if any(adapters.merged for adapters in self._containers()):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters; call `unmerge_adapter` first."
            )
        beams = given.get("num_beams")
        each = beams if isinstance(beams, int) and beams > 1 else 1
        flags = [(p, p.requires_grad) for adapters in self._containers() for p in adapters.parameters()]
        try:
            with attached.rows(self.model, [None if n == "__base__" else n for n in names for _ in range(each)]):
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    # ------------------------------------------------------------------ merging
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Set adapters into the weights; ``unmerge_adapter`` gives the base back to the bit. All layers or none.

        Raises:
            IntarsiaError: for an unknown adapter, a packed weight, or numbers that would not be finite.
        """
        for name in [] if isinstance(adapter_names, str) else adapter_names or []:
            if name not in self.peft_config:
                raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, self.peft_config)}")
        before = [(adapters, len(adapters.merged_adapters)) for adapters in self._containers()]
        try:
            for adapters, _ in before:
                adapters.merge(safe_merge, adapter_names)
        except BaseException:
            for adapters, left in before:
                adapters._take_out(left)
                adapters.act()
            raise
        finally:
            self._note()

    def unmerge_adapter(self) -> None:
        """Take out what was merged: the base's own bits."""
        containers = self._containers()
        for adapters in [each for each in containers if each.merged] or containers:
            adapters.unmerge()
        self._note()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The model without adapters: with what they learned set in for good, or the base to the bit."""
        if merge:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "A.* adapters (are|were) already merged|Already following adapters")
                self.merge_adapter(adapter_names, safe_merge)
        for adapters in self._containers():
            adapters.keep_merged() if merge else adapters._take_out()
            adapters._active_adapter = []
            adapters.act()
        attached.occupy(self.model, None, self)
        attached.activate(self.model)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                above, _, last = name.rpartition(".")
                own = module.original_module
                if merge:
                    own = module.unload_and_optionally_merge_module(
                        merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                    )
                setattr(self.model.get_submodule(above), last, own)
        for name in attached.attached_names(self.model):
            self._detach(self.model, name)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ files
    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file by their names in the model, checked whole; where a support is of another size than the
        adapter's, the state there is made anew.

        Raises:
            IntarsiaError: for missing and unknown tensors, wrong shapes, indices out of range, numbers that are not finite; all
                at once. The model is untouched then.
        """
        base = _base_of(model)
        above = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
        given, rest = _by_site(base, state_dict, adapter_name)
        layers, holding = chain.adapted_layers(base), attached.states(base, adapter_name)
        together = config.method.chooses_together()
        faults = [f"missing {n}.adapters.*" for n in holding if n not in given and not together]
        there = every_layer(base)
        made: dict[str, chain.State] = {}
        for name, tensors in given.items():
            if name not in there or (name not in holding and not together):
                faults.append(
                    f"unexpected {name}.adapters.*: this adapter does not sit there; {nearest(name, holding)}"
                )
                continue
            try:
                fresh = _state(config.method, base, name, tensors, holding.get(name))
            except IntarsiaError as error:
                faults.append(f"{name}: {error}")
                continue
            if fresh is not None:
                made[name] = fresh
        known = model.state_dict().keys()
        # Biases and embeddings that PEFT may save beside an adapter have names of the model.
        stray = [k for k in rest if k not in known and k.removeprefix("base_model.model.") not in known]
        faults += [f"unexpected {key}" for key in stray]
        if faults:
            shown = faults[:8] + ([f"... and {len(faults) - 8} more"] if len(faults) > 8 else [])
            raise IntarsiaError(f"this file does not fit the adapter {adapter_name!r}:\n  " + "\n  ".join(shown))
        for name in holding.keys() - given.keys():
            layers[name].adapters.delete_adapter(adapter_name)
        for name, state in made.items():
            _put_in_place(base, name, adapter_name, state, holding.get(name))
        _restore_all(base)
        return rest | {
            f"{above}{name}.adapters.{adapter_name}.{key}": tensor
            for name, tensors in given.items()
            for key, tensor in tensors.items()
        }

    # ------------------------------------------------------------------ others
    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel is to leave alone, by the names that a ``PeftModel`` gives."""
        return [f"base_model.model.{n}" for n in getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())]


def _base_of(model: nn.Module) -> nn.Module:
    """The module that carries the record of attached adapters."""
    return next(module for module in model.modules() if "_intarsia" in vars(module))


def _containers_of(model: nn.Module) -> list[LayerAdapters]:
    return [module for module in model.modules() if isinstance(module, LayerAdapters)]


def _restore_all(model: nn.Module) -> None:
    for adapters in _containers_of(model):
        adapters.act()


def _patterns(model: nn.Module, config: IntarsiaConfig) -> tuple[list[str], list[str]]:
    """PEFT's way of naming layers in ours: (targets, exclusions)."""

    def ours(given: Any) -> list[str]:
        if isinstance(given, str):
            return [ALL_LINEAR] if given.lower() == ALL_LINEAR else [f"re:{given}"]
        return list(given or ())

    whole = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.modules_to_save or ()]
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    apart = [
        name
        for name in adaptable_layers(model)
        if (inside and name.startswith(inside)) or any(pattern.match(name) for pattern in whole)
    ]
    targets = [ALL_LINEAR] if config.target_modules is None else ours(config.target_modules)
    return targets, ours(config.exclude_modules) + apart


def _any_scores(
    model: nn.Module, method: Method, targets: Iterable[str], exclude: Iterable[str]
) -> dict[str, dict[str, Tensor]] | None:
    """Something to choose by where the choice will come from a file; of no memory."""
    if not method.needs():
        return None
    one = torch.ones(())
    return {
        name: {
            need: one.expand(shape_of(need, site.shape) if need in OF_FORWARD else site.stored.shape)
            for need in method.needs()
        }
        for name, site in find_sites(model, list(targets), list(exclude)).items()
    }


def _by_site(
    base: nn.Module, state_dict: Mapping[str, Tensor], adapter: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({layer: {tensor's name: tensor}}, what is not of an adapter)."""
    given: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        layer, found, last = key.rpartition(".adapters.")
        if found and "." not in last:
            given.setdefault(layer.removeprefix("base_model.model."), {})[last] = tensor
        else:
            rest[key] = tensor
    return given, rest


def _state(
    method: Method, base: nn.Module, name: str, tensors: Mapping[str, Tensor], present: chain.State | None
) -> chain.State | None:
    """A new state of these tensors, or None where the present one can take them. Raises IntarsiaError where they make none."""
    site = site_at(base, name)
    operator: Operator = site.operator
    if present is not None:
        expected = present.tensors()
        if tensors.keys() != expected.keys():
            found = ", ".join(sorted(tensors)) or "none"
            raise IntarsiaError(f"found the tensors {found}; expected {', '.join(sorted(expected))}")
        if wrong := [k for k, t in tensors.items() if t.is_floating_point() != expected[k].is_floating_point()]:
            raise IntarsiaError(f"{wrong[0]} is {tensors[wrong[0]].dtype}; expected {expected[wrong[0]].dtype}")
    same = present is not None and all(tensors[k].shape == t.shape for k, t in present.tensors().items())
    fits = same and not any(t.is_meta for t in present.tensors().values())  # type: ignore[union-attr]
    p = chain.Tensors(dict(tensors), site.shape, operator=operator)
    try:
        edit = method.edit(p)
        here = present.method if same and present is not None else method.at(edit, site)
        whole = here.edit(p)
        whole.made_of(whole.tensors())
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in sorted(tensors.items()))
        raise IntarsiaError(f"{shapes} make no {method.name} adapter of a {site.shape} weight ({error})") from error
    if fits:
        return None
    if present is not None and not same and not method.chooses_together():
        wrong = [k for k, t in present.tensors().items() if tensors[k].shape != t.shape]
        raise IntarsiaError(
            f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}; expected {tuple(present.tensors()[wrong[0]].shape)}"
        )
    trained = {k for k, _ in present.named_parameters()} if present is not None else {"values"}
    device = site.stored.device
    own = {k: nn.Parameter(t.to(device)) if k in trained else t.to(device) for k, t in tensors.items()}
    return chain.State(here, site, own)


def _put_in_place(base: nn.Module, name: str, adapter: str, state: chain.State, present: chain.State | None) -> None:
    layer = layer_at(base, name)
    active = [a for other in _containers_of(base)[:1] for a in other._active_adapter]
    if present is not None:
        chain.set_active(layer, ())
        state.requires_grad_(any(p.requires_grad for p in present.parameters()))
    else:
        state.requires_grad_(False)
    shared = [(base.get_submodule(other), operator) for other, operator in partners(base, name).items()]
    chain.put_on(layer, adapter, state, shared)
    if not isinstance(layer.adapters, LayerAdapters):
        LayerAdapters(layer)._active_adapter = active


PEFT_TYPE_TO_CONFIG_MAPPING[IntarsiaType.INTARSIA] = IntarsiaConfig
PEFT_TYPE_TO_TUNER_MAPPING[IntarsiaType.INTARSIA] = IntarsiaModel
PEFT_TYPE_TO_PREFIX_MAPPING[IntarsiaType.INTARSIA] = IntarsiaModel.prefix
