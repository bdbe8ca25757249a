"""PEFT's LoRA, with DoRA, aLoRA, rsLoRA, ranks and scales by pattern, on Linear, Conv1D, convolutions and embeddings.

    W' = W + s B A,  s = lora_alpha / r  (rsLoRA: / sqrt(r));  use_dora: W' = m V / ||V||, V = W + s B A

Rows, columns, low rank and sums of these are exactly such an adapter: of k rows, A are the rows and B is one-hot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import store
from intarsia.calibrate import Progress
from intarsia.edits import Edit, LowRank, Rescaled, row_norms, without_scale
from intarsia.errors import IntarsiaError
from intarsia.interop import peft_alora
from intarsia.interop.approximation import best, losses
from intarsia.interop.output import Written, check_output
from intarsia.interop.peft_folder import (
    CONFIG,
    Folder,
    base_name,
    check_model,
    field_faults,
    layer_names,
    module_faults,
    pattern_value,
    patterns,
    targets,
    task,
    wide,
    write_folder,
)
from intarsia.interop.views import as_low_rank
from intarsia.operators import STACK, Convolution, Embedding, Operator, operator_of
from intarsia.site import layer_at, partners, site_at, weight_name

KIND = "LORA"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDED_A, EMBEDDED_B = "lora_embedding_A", "lora_embedding_B"
BASE_WEIGHT = "base_layer.weight"
PARTS = (A, B, "lora_B.bias", f"{MAGNITUDE}.weight", MAGNITUDE, EMBEDDED_A, EMBEDDED_B, BASE_WEIGHT, "weight",
         "token_adapter.trainable_tokens_delta")  # fmt: skip
SHOWN = (8, 32, 128)  # ranks whose loss a refusal tells
MEASURED = 16  # of how many weights, evenly spread, it is measured

UNDERSTOOD = ("r", "lora_alpha", "alora_invocation_tokens", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "ensure_weight_tying", "init_lora_weights",
              "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
              "velora_config")  # fmt: skip
OFF = {"bias": "none"} | dict.fromkeys(
    ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_qalora",
     "lora_bias", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "megatron_config"), None
)  # fmt: skip
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # those that leave the base as it is


# ------------------------------------------------------------------ reading
def read(folder: Folder, model: nn.Module) -> tuple[dict[str, Edit], dict[str, Any], list[str]]:
    """Edits by weight, the method's config, and all that keeps the folder from being read."""
    config = folder.config
    faults = _config_faults(config)
    modules, more = _only_adapters(folder, model)
    faults += more + module_faults(model, modules)
    if faults:
        return {}, {}, faults
    edits: dict[str, Edit] = {}
    for name, parts in modules.items():
        try:
            edit = peft_alora.activated(_edit(model, name, parts, config), _operator(model, name), config)
            if isinstance(edit, str):
                raise IntarsiaError(edit)
            edits[weight_name(model, name)] = edit
        except IntarsiaError as error:
            faults.append(f"{name}: {error}")
    return edits, _method(config), faults


def _config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = field_faults(config, UNDERSTOOD, OFF)
    faults += [f"{CONFIG}: {fault}" for fault in peft_alora.faults(config)]
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        faults.append(
            f"{CONFIG}: init_lora_weights={start!r} moves part of the base into the adapter, so it does not belong to the base as "
            "it came. Save it in PEFT with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        )
    for name, usual in (("r", 8), ("lora_alpha", 8)):
        value = config.get(name, usual)
        if not _is_number(value) or (name == "r" and not _is_rank(value)):
            faults.append(f"{CONFIG}: {name} is {value!r}; expected a {'whole ' if name == 'r' else ''}number")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        found = config.get(name) or {}
        if not isinstance(found, dict) or not all(map(fits, found.values())):
            faults.append(f"{CONFIG}: {name} is {found!r}; expected numbers by the names of modules")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _only_adapters(folder: Folder, model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The modules that have factors. What else PEFT saves with them must be the base's own, or say the same once more."""
    found: dict[str, dict[str, Tensor]] = {}
    faults = []
    for name, parts in folder.modules.items():
        rest = dict(parts)
        for part in ("weight", BASE_WEIGHT):
            if (saved := rest.pop(part, None)) is not None and not _is_the_base(model, name, saved):
                faults.append(
                    f"{name}.{part}: it is no factor of an adapter, and the model has no such weight"
                    if not _has(model, name)
                    else f"{name}: a whole weight {tuple(saved.shape)} is saved with the adapter and is not the base's (trained by "
                    "modules_to_save, or a resized vocabulary); only changes by factors are read"
                )
        if "lora_B.bias" in rest:
            faults.append(f"{name}: it has a bias of its own (lora_bias); only weights are changed here")
        if "token_adapter.trainable_tokens_delta" in rest:
            faults.append(f"{name}: single tokens were trained (trainable_token_indices), which is not read")
        elif rest:
            found[name] = {MAGNITUDE if part.startswith(MAGNITUDE) else part: wide(t) for part, t in rest.items()}
    return _without_twins(found, model, faults, bool(folder.config.get("ensure_weight_tying"))), faults


def _is_the_base(model: nn.Module, name: str, saved: Tensor) -> bool:
    try:
        own = model.get_parameter(f"{name}.weight")
    except AttributeError:
        return False
    return own.shape == saved.shape and torch.equal(own.detach().cpu(), saved.to(own.dtype))


def _without_twins(
    found: dict[str, dict[str, Tensor]], model: nn.Module, faults: list[str], tied: bool
) -> dict[str, dict[str, Tensor]]:
    """Of an embedding and a head on one weight the embedding alone, whose edit is both's."""
    twins = {other: name for name in found if _has(model, name) for other in partners(model, name)}
    for name in set(twins.values()):
        others = [other for other, owner in twins.items() if owner == name]
        same = tied and all(
            torch.equal(found[other].get(A, _NONE), found[name].get(EMBEDDED_B, _NONE).mT)
            and torch.equal(found[other].get(B, _NONE), found[name].get(EMBEDDED_A, _NONE).mT)
            for other in others
            if other in found
        )
        if not same or not all(other in found for other in others):
            faults.append(
                f"{name}: it shares its weight with {', '.join(others)}, and PEFT trained the one without the other; as an edit of "
                "the weight it would change both"
            )
    return {name: parts for name, parts in found.items() if name not in twins}


_NONE = torch.empty(0, 0)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _edit(model: nn.Module, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Edit:
    operator = _operator(model, name)
    first, second = (EMBEDDED_A, EMBEDDED_B) if isinstance(operator, Embedding) else (A, B)
    dora = bool(config.get("use_dora"))
    expected = {first, second} | ({MAGNITUDE} if dora else set())
    if parts.keys() != expected:
        raise IntarsiaError(f"found {', '.join(sorted(parts))}; a {operator.kind} needs {', '.join(sorted(expected))}")
    rank = pattern_value(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    a, b = parts[first].flatten(1), parts[second].flatten(1)
    if parts[first].shape[0] != rank:
        raise IntarsiaError(f"{first} is {tuple(parts[first].shape)}; by {CONFIG} its rank is {rank}")
    if isinstance(operator, Convolution) and parts[second].numel() != b.shape[0] * rank:
        raise IntarsiaError(f"{second} is {tuple(parts[second].shape)}; expected kernels of one entry")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    shape = site_at(model, name).shape
    inner = LowRank.build(shape, {"A": a.contiguous(), "B": b.contiguous()}, {"scale": scale})
    if not dora:
        return inner
    magnitude = parts[MAGNITUDE].reshape(-1).contiguous()
    return Rescaled.build(
        shape, inner.tensors() | {"magnitude": magnitude}, {"inner": {"type": inner.kind} | inner.facts()}
    )


def _operator(model: nn.Module, name: str) -> Operator:
    operator = operator_of(layer_at(model, name))
    if fault := _unknown(operator):
        raise IntarsiaError(fault)
    assert isinstance(operator, Operator)
    return operator


def _unknown(operator: Operator | str | None) -> str | None:
    """Why PEFT's LoRA and an edit cannot be the same thing at a layer of this kind, or None."""
    if not isinstance(operator, Operator):
        return operator or "no kind of layer that can be adapted"
    if operator.kind == STACK:
        return "it is a bare parameter of experts, which PEFT wraps in a way of its own (target_parameters)"
    if isinstance(operator, Convolution) and operator.groups > 1:
        return "it is a grouped convolution, whose factors PEFT multiplies in another order"
    return None


def _method(config: Mapping[str, Any]) -> dict[str, Any]:
    alpha, scaling = float(config.get("lora_alpha", 8)), "rslora" if config.get("use_rslora") else "lora"
    if tokens := config.get(peft_alora.TOKENS):
        rank = config.get("r", 8)
        alpha = float(_alpha(alpha / math.sqrt(rank), rank)) if config.get("use_rslora") else alpha
        return {"name": "alora", "invocation": tokens, "rank": rank, "alpha": alpha}
    inner = {"name": "lora", "rank": config.get("r", 8), "alpha": alpha, "scaling": scaling}
    return {"name": "dora", "inner": inner, "detach_norm": True} if config.get("use_dora") else inner


# ------------------------------------------------------------------ writing
@dataclass(frozen=True)
class Factors:
    """What is written for one weight, and the squares of what is lost of its change and of the change."""

    low_rank: LowRank
    magnitude: Tensor | None = None
    lost: float = 0.0
    of: float = 0.0


def exact(edit: Edit) -> LowRank | str:
    """The low-rank edit, inside a rescaling or not, that PEFT can hold; or why there is none."""
    return as_low_rank(edit.inner if isinstance(edit, Rescaled) else edit)


def write(
    adapter: store.Adapter,
    model: nn.Module,
    folder: str | Path,
    *,
    rank: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a PEFT LoRA (DoRA where an edit is rescaled), which PEFT and every engine that reads its folders loads.

    Exact for rows, columns, low rank, sums of these and rescalings of them, and for low rank that is activated by tokens (aLoRA). With ``rank`` the rest is written as its best
    approximation of that rank, and what is lost is told.

    Raises:
        IntarsiaError: for an adapter of another base, a folder that exists, edits that are no low rank (with what they would
            lose at some ranks), layers that PEFT adapts otherwise. Nothing is written then.
    """
    path = Path(folder)
    if rank is not None and rank < 1:
        raise IntarsiaError(f"rank={rank!r} must be 1 or more")
    check_output(path, overwrite, "a PEFT adapter", marks=(CONFIG,))
    whole, (adapter, activation) = adapter, peft_alora.as_lora(adapter)
    check_model(model, adapter)
    names = layer_names(model, adapter)
    _check_layers(model, adapter, names)
    if rank is None:
        _check_exact(model, adapter, names, progress)
    rescaled = any(isinstance(edit, Rescaled) and not isinstance(exact(edit), str) for edit in adapter.edits.values())
    found: dict[str, Factors] = {}
    for done, (weight, name) in enumerate(names.items(), 1):
        found[name] = _factors(
            model, name, adapter.edits[weight].to(model.get_parameter(weight).device), rank, rescaled
        )
        if progress:
            progress(done, len(names), "converting")
    found, config = _settled(model, adapter, found)
    lost, of = sum(one.lost for one in found.values()), sum(one.of for one in found.values())
    tensors: dict[str, Tensor] = {}
    for name, one in found.items():
        tensors |= _tensors(model, name, one)
    ranks = [one.low_rank.A.shape[0] for one in found.values()]
    facts = {
        "dora": rescaled,
        "ranks": [min(ranks), max(ranks)],
        "approximated": sum(one.of > 0 for one in found.values()),
    }
    return write_folder(path, whole, KIND, config | activation, tensors, math.sqrt(lost / of) if of else 0.0, **facts)


def _check_layers(model: nn.Module, adapter: store.Adapter, names: Mapping[str, str]) -> None:
    faults = []
    for weight, name in names.items():
        if fault := _unknown(operator_of(layer_at(model, name))):
            faults.append(f"{weight}: {fault}")
        elif isinstance(adapter.edits[weight], Rescaled) and partners(model, name):
            faults.append(
                f"{weight}: PEFT has no DoRA on a weight that is shared with {', '.join(partners(model, name))}"
            )
    if faults:
        raise IntarsiaError("a PEFT LoRA cannot hold this adapter:\n  " + "\n  ".join(faults[:8]))


def _check_exact(model: nn.Module, adapter: store.Adapter, names: Mapping[str, str], progress: Progress | None) -> None:
    """Refuse edits that are of no low rank, with what they would lose as one."""
    reasons = {weight: why for weight, edit in adapter.edits.items() if isinstance(why := exact(edit), str)}
    if not reasons:
        return
    chosen = list(reasons)[:: math.ceil(len(reasons) / MEASURED)]

    def changes() -> Any:
        for done, weight in enumerate(chosen, 1):
            W = site_at(model, names[weight]).weight.detach()
            yield adapter.edits[weight].to(W.device).delta(W.to(torch.promote_types(W.dtype, torch.float32)))
            if progress:
                progress(done, len(chosen), "measuring the loss")

    largest = max(min(adapter.edits[weight].shape) for weight in chosen)
    found = losses(changes(), [rank for rank in SHOWN if rank < largest] or [1])
    told = ", ".join(f"{loss:.1%} at rank {rank}" for rank, loss in found.items())
    some = f" (measured on {len(chosen)} of them)" if len(chosen) < len(reasons) else ""
    why = " and ".join(f"{count} weights: {reason}" for reason, count in Counter(reasons.values()).most_common(3))
    raise IntarsiaError(
        f"{adapter.name} is not exactly a LoRA: {why}. As the nearest LoRA it would lose of its change{some}: {told}. "
        "Accept that: rank=R (--rank R); or lose nothing: convert it to peft-shira, weight-patch or full-model"
    )


def _factors(model: nn.Module, name: str, edit: Edit, rank: int | None, rescaled: bool) -> Factors:
    site = site_at(model, name)
    W = site.weight.detach().to(torch.promote_types(site.weight.dtype, torch.float32))
    found, lost, of = exact(edit), 0.0, 0.0
    magnitude = edit.magnitude if isinstance(edit, Rescaled) and not isinstance(found, str) else None
    if isinstance(found, str):
        assert rank is not None
        D = edit.delta(W)
        b, a, error = best(D, rank)
        found, lost, of = LowRank(edit.shape, b, a, 1.0), error**2, float(torch.linalg.matrix_norm(D)) ** 2
    if found.A.shape[0] == 0:  # an empty support; PEFT knows no rank 0
        found = LowRank(edit.shape, found.B.new_zeros(edit.shape[0], 1), found.A.new_zeros(1, edit.shape[1]), 1.0)
    if rescaled and magnitude is None:  # use_dora is for all: here with the lengths that the rows have anyway
        magnitude = row_norms(found.fold(W.double())).to(W.dtype)
    return Factors(found, magnitude, lost, of)


def _settled(
    model: nn.Module, adapter: store.Adapter, found: Mapping[str, Factors]
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """The factors with the scales that the config can say, and the config.

    One rank and scale: alpha = scale * rank. Else alpha = rank at every weight, so that readers that know no patterns
    compute the right scale too, and the scale goes into B; where that would cost a bit, into alpha_pattern.
    """
    kinds = {(one.low_rank.A.shape[0], one.low_rank.scale) for one in found.values()}
    if len(kinds) > 1:
        found = {name: replace(one, low_rank=_folded(one.low_rank)) for name, one in found.items()}
    settled, alphas = {}, {}
    for name, one in found.items():
        rank, scale = one.low_rank.A.shape[0], one.low_rank.scale
        alphas[name] = alpha = _alpha(scale, rank)
        # No double divides to this scale (one in a thousand): the last bit goes into B.
        settled[name] = one if alpha / rank == scale else replace(one, low_rank=without_scale(one.low_rank))
        if alpha / rank != scale:
            alphas[name] = rank
    ranks = {name: one.low_rank.A.shape[0] for name, one in settled.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0]
    twins = {other for name in found for other in partners(model, name)}
    config = {
        "peft_type": KIND,
        "task_type": task(model),
        "base_model_name_or_path": base_name(adapter),
        "inference_mode": True,
        "target_modules": targets(model, {*found, *twins}),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(_is_conv1d(model, name) for name in found),
        "use_rslora": False,
        "use_dora": any(one.magnitude is not None for one in found.values()),
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    return settled, config | ({"ensure_weight_tying": True} if twins else {})


def _folded(edit: LowRank) -> LowRank:
    """With the scale in B, if that loses nothing."""
    folded = without_scale(edit)
    return folded if torch.equal(folded.B.double(), edit.B.double() * edit.scale) else edit


def _alpha(scale: float, rank: int) -> float:
    """A number that divided by the rank is the scale; a whole one is written as such."""
    alpha = scale * rank
    near = [alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)]
    alpha = next((a for a in near if a / rank == scale), alpha)
    return int(alpha) if float(alpha).is_integer() else alpha


def _is_conv1d(model: nn.Module, name: str) -> bool:
    operator = operator_of(layer_at(model, name))
    return isinstance(operator, Operator) and operator.kind == "linear" and operator.transposed


def _tensors(model: nn.Module, name: str, one: Factors) -> dict[str, Tensor]:
    operator, (b, a) = _operator(model, name), (one.low_rank.B, one.low_rank.A)
    if isinstance(operator, Embedding):
        found = {f"{name}.{EMBEDDED_A}": a, f"{name}.{EMBEDDED_B}": b}
        for other in partners(model, name):
            found |= {f"{other}.{A}": b.mT, f"{other}.{B}": a.mT}
    else:
        if isinstance(operator, Convolution):
            ones = (1,) * len(operator.kernel)
            a, b = a.reshape(len(a), -1, *operator.kernel), b.reshape(*b.shape, *ones)
        found = {f"{name}.{A}": a, f"{name}.{B}": b}
    if one.magnitude is not None:
        m = one.magnitude
        shaped = m.reshape(1, -1, *(1,) * len(operator.kernel)) if isinstance(operator, Convolution) else m
        found[f"{name}.{MAGNITUDE}"] = shaped
    return found
