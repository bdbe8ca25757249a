"""The folder of an HF PEFT adapter: adapter_config.json and adapter_model.safetensors. Needs no PEFT.

base_model.model.<module>.<part>    one tensor; <module> as the base names it, <part> as the kind of adapter does
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from intarsia import store
from intarsia.errors import IntarsiaError, nearest
from intarsia.interop.output import Written, made_aside, measured
from intarsia.model import check_fits, digest
from intarsia.site import adaptable_layers, weight_name

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
BASE_DIGEST = "intarsia_base_digest"  # in the tensors' metadata of what is written here, and then checked on reading

# Fields of every kind of adapter that say nothing of what it does to the weights.
SILENT = frozenset(
    [
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "runtime_config",
    ]
)


@dataclass(frozen=True)
class Folder:
    """What stands in one, read and not yet understood."""

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Tensor]]  # module -> part -> tensor
    base_digest: str | None

    @property
    def kind(self) -> str:
        """LORA, SHIRA, ..."""
        return str(self.config["peft_type"])


def is_peft(path: Path) -> bool:
    """Whether this is the folder of a PEFT adapter, whole or not."""
    return (path / CONFIG).is_file()


def read_folder(path: Path, parts: Mapping[str, Iterable[str]]) -> Folder:
    """Config and tensors. ``parts``: by kind of adapter the names that its tensors have behind the module's.

    Raises:
        IntarsiaError: for missing or damaged files, a pickle, a kind that is not read here, tensors of unknown names.
    """
    config = _config(path)
    kind = str(config.get("peft_type"))
    if kind not in parts:
        raise IntarsiaError(f"{path} is a PEFT adapter of the kind {kind!r}; these can be read: {', '.join(parts)}")
    if not (path / TENSORS).is_file():
        raise IntarsiaError(_no_tensors(path))
    try:
        content = (path / TENSORS).read_bytes()
        tensors = load(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise IntarsiaError(
            f"{path / TENSORS} cannot be read: {error}; it is cut off or not a safetensors file. Fetch it again"
        ) from error
    modules: dict[str, dict[str, Tensor]] = {}
    faults = []
    known = sorted(parts[kind], key=len, reverse=True)
    for name, tensor in tensors.items():
        part = next((part for part in known if name.endswith(f".{part}")), None)
        if not name.startswith(PREFIX) or part is None:
            faults.append(
                f"tensor {name} is none of a {kind} adapter: expected {PREFIX}<module>.<{' or '.join(parts[kind])}>"
            )
        else:
            modules.setdefault(name.removeprefix(PREFIX).removesuffix(f".{part}"), {})[part] = tensor
    if not tensors:
        faults.append(f"{TENSORS} holds no tensors: saved by processes that each had a shard?")
    raise_all(path, faults)
    return Folder(path, config, modules, _metadata(content).get(BASE_DIGEST))


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise IntarsiaError(f"{path} {what}; a PEFT adapter is a folder with {CONFIG} and {TENSORS}")
    if not (path / CONFIG).is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise IntarsiaError(f"{path} is not a PEFT adapter: it has no {CONFIG} (found {found})")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise IntarsiaError(f"{path / CONFIG} cannot be read: {error}; it is cut off or damaged") from error
    if not isinstance(config, dict):
        raise IntarsiaError(f"{path / CONFIG} holds no JSON object; it is damaged")
    return config


def _no_tensors(path: Path) -> str:
    if (path / PICKLE).is_file():
        return (
            f"{path} keeps its weights in {PICKLE}, a pickle, which runs code when it is opened and is never read here. "
            "Where you trust it, load it in PEFT and save it again: PeftModel.from_pretrained(base, folder).save_pretrained(new)"
        )
    return f"{path} has no {TENSORS}; the adapter is not whole"


def _metadata(content: bytes) -> dict[str, str]:
    """The texts at the head of a safetensors file that was read without a fault."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return dict(found)


def raise_all(path: Path, faults: list[str]) -> None:
    """One IntarsiaError with all that was found, if anything was."""
    if faults:
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise IntarsiaError(f"{path} cannot be read:\n  " + "\n  ".join(faults[:10] + more))


def field_faults(config: Mapping[str, Any], understood: Iterable[str], off: Mapping[str, Any]) -> list[str]:
    """Fields that change what the adapter does and are not computed here.

    Args:
        understood: fields that are used or say nothing of the weights, beside those of every adapter.
        off: fields that must have this value; of fields not known at all, nothing but null, false, 0 and empty is let pass.
    """
    known = SILENT | set(understood)
    faults = []
    for name, value in config.items():
        if name in known or not value or (name in off and value == off[name]):
            continue
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        why = "is not computed here" if name in off else "is a field that this version does not know"
        faults.append(f"{CONFIG}: {name}={shown} {why}")
    return faults


def module_faults(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules that the model does not have."""
    layers = adaptable_layers(model)
    faults = []
    for name in names:
        if name not in layers:
            last = name.rpartition(".")[2]
            ends = {other for other in layers if other.endswith(f".{last}")} or layers
            faults.append(f"{name}: the model has no such layer; {nearest(name, ends)}")
    return faults


def check_base(model: nn.Module, folder: Folder) -> None:
    """Raise IntarsiaError where the folder says that it belongs to other weights. Only those written here say so."""
    found = digest(model)
    if folder.base_digest is not None and folder.base_digest != found:
        raise IntarsiaError(
            f"{folder.path} belongs to another base: it was written for weights with digest {folder.base_digest[:12]}, "
            f"this model has {found[:12]}. Name the base that it was made on"
        )


def wide(tensor: Tensor) -> Tensor:
    """Numbers in float32 or wider, as they are trained and computed with."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def pattern_value(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the name or, at a dot, the end of it: as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


# ------------------------------------------------------------------ writing
def check_model(model: nn.Module, adapter: store.Adapter) -> str:
    """Raise IntarsiaError where the adapter is not this model's, or is no change of weights. -> the digest of the base."""
    check_folds(adapter)
    found = digest(model)
    check_fits(model, adapter, adapter.name, found)
    return found


def check_folds(adapter: store.Adapter) -> None:
    """Raise IntarsiaError for an adapter with inserts."""
    inserts = adapter.inserts
    if inserts:
        first, (one, *_) = next(iter(inserts.items()))
        more = f" and {len(inserts) - 1} more weights" if len(inserts) > 1 else ""
        does = (
            f"before the tokens of {first} it puts a {one.inserted.what}, which"
            if one.count
            else f"beside {first}{more} it inserts a {one.inserted.what}, which is computed for every token and"
        )
        raise IntarsiaError(
            f"a format of weights cannot hold this adapter: {does} folds into no weight; a deck, chat and eval use it as it is"
        )


def layer_names(model: nn.Module, adapter: store.Adapter) -> dict[str, str]:
    """The layer of each weight that the adapter edits. Raises IntarsiaError where it edits a bias."""
    if biases := [name for name in adapter.edits if name.endswith(".bias")]:
        raise IntarsiaError(
            f"{adapter.name} changes {biases[0]}, and a PEFT folder holds changes of weights alone; convert it to full-model or, "
            "with dense=True (--dense), to weight-patch"
        )
    names = {weight_name(model, name): name for name in adaptable_layers(model)}
    return {weight: names[weight] for weight in adapter.edits}


def targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """``target_modules`` that mean these modules and no others: last parts of their names, whole names, or an expression."""
    wanted = set(names)
    everything = [name for name, _ in model.named_modules() if name]
    for chosen in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        meant = {n for n in everything if n in chosen or any(n.endswith(f".{c}") for c in chosen)}
        if meant == wanted:
            return chosen
    return "|".join(re.escape(name) for name in sorted(wanted))


def patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``: the values that are not the usual one, by names that mean one module each."""
    found = {}
    for name, value in values.items():
        if value == usual:
            continue
        alone = sum(pattern_value({name: True}, other, False) for other in values) == 1
        found[name if alone else f"^{re.escape(name)}"] = value
    return found


def write_folder(
    path: Path,
    adapter: store.Adapter,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    loss: float,
    **facts: Any,
) -> Written:
    """The folder, whole or not at all. ``tensors`` by module and part, without the prefix."""
    named = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with made_aside(path) as work:
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(named, work / TENSORS, {"format": "pt", BASE_DIGEST: adapter.base.digest})
        (work / TENSORS).chmod(0o644)  # safetensors keeps its file from all but the owner
        (work / "README.md").write_text(_card(path.name, adapter, kind, config, loss), encoding="utf-8")
        work.chmod(0o755)
    return measured(path, loss, **facts)


def base_name(adapter: store.Adapter) -> str | None:
    """What ``base_model_name_or_path`` should say."""
    from intarsia.pretrained import ALIASES

    source = adapter.base.source
    return ALIASES[source].hub if source in ALIASES else source or None


def task(model: nn.Module) -> str | None:
    """``task_type``, where the model's class tells it."""
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _card(name: str, adapter: store.Adapter, kind: str, config: Mapping[str, Any], loss: float) -> str:
    base = config["base_model_name_or_path"]
    front = f"base_model: {base}\n" if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    exact = "exactly what it was" if not loss else f"an approximation: {loss:.1%} of the change (in its norm) is lost"
    return f"""---
library_name: peft
tags: [intarsia, {kind.lower()}]
{front}---

# {name}

A PEFT {kind} adapter for `{base or "an unnamed base"}`, written by intarsia from the adapter `{adapter.name}` (method
`{adapter.method.get("name", "?")}`). It is {exact}.

| | |
|---|---|
| adapter's SHA-256 | `{adapter.digest}` |
| base's SHA-256 | `{adapter.base.digest}` ({adapter.base.dtype}) |
"""
