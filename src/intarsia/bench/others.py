"""HF PEFT's methods as contenders. PEFT is an extra: where it is missing, or lacks a method, the benchmark says so."""

from __future__ import annotations

import copy
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from intarsia.bench.contenders import RANK, Base, Contender, Subject, Unavailable
from intarsia.bench.models import twin


def contenders() -> list[Contender]:
    """LoRA, DoRA, SHiRA, Super-Tuning and MiSS of HF PEFT, at the count of LoRA of rank 16 where they can be."""
    low_rank = {"r": RANK, "lora_alpha": 2 * RANK}
    return [
        _contender("peft-lora@r16", "HF PEFT: LoRA of rank 16", "LoraConfig", lambda base: low_rank),
        _contender(
            "peft-dora@r16", "HF PEFT: DoRA of rank 16", "LoraConfig", lambda base: low_rank | {"use_dora": True}
        ),
        _contender(
            "peft-shira@r16",
            "HF PEFT: SHiRA, as many as LoRA of rank 16",
            "ShiraConfig",
            lambda base: {"r": RANK, "random_seed": 0},
        ),
        _contender(
            "peft-supertuning@equal",
            "HF PEFT: Super-Tuning, as many as LoRA of rank 16",
            "SupertuningConfig",
            _supertuning,
        ),
        _contender("peft-miss@equal", "HF PEFT: MiSS, about as many as LoRA of rank 16", "MissConfig", _miss),
    ]


def _supertuning(base: Base) -> dict[str, Any]:
    return {"sparsity": 1 - base.count / sum(rows * columns for rows, columns in base.sites.values())}


def _miss(base: Base) -> dict[str, Any]:
    """Its block is (r, O), and an input that r does not divide is padded: the nearest even r that divides them all."""
    wanted = base.count / sum(rows for rows, _ in base.sites.values())
    widths = {columns for _, columns in base.sites.values()}
    even = [r for r in range(2, min(widths) + 1, 2) if all(width % r == 0 for width in widths)]
    return {"r": min(even or [2], key=lambda r: abs(r - wanted))}


def _contender(name: str, title: str, kind: str, settings: Callable[[Base], Mapping[str, Any]]) -> Contender:
    def make(base: Base) -> Subject:
        try:
            import peft
        except ImportError:
            raise Unavailable("peft is not installed: pip install 'intarsia[peft]'") from None
        make_config = getattr(peft, kind, None)
        if make_config is None:
            raise Unavailable(f"peft {importlib.metadata.version('peft')} has no {kind}")
        chosen = dict(settings(base))
        model = twin(base.model)
        shared = {id(t) for t in [*model.parameters(), *model.buffers()]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            wrapped = peft.get_peft_model(model, make_config(target_modules=_targets(base), **chosen))
            seconds = time.perf_counter() - start
        own = [t for t in [*wrapped.parameters(), *wrapped.buffers()] if id(t) not in shared]
        trained = [p for p in wrapped.parameters() if id(p) not in shared and p.requires_grad]
        return Subject(
            wrapped,
            trained,
            own,
            lambda: wrapped(**base.batch).loss,
            attach_s=seconds,
            setting={"peft": kind} | chosen,
        )

    return Contender(name, title, make)


def _targets(base: Base) -> list[str]:
    """The last parts of the names where they mean the same layers, as people write them; else whole names."""
    parts = sorted({name.rpartition(".")[2] for name in base.sites})
    meant = {n for n, _ in base.model.named_modules() if n.rpartition(".")[2] in parts}
    return parts if meant == set(base.sites) else list(base.sites)


# ------------------------------------------------------------------ switching
def peft_switch(model: Any, weights: Iterable[str], rank: int) -> Callable[[int], None]:
    """HF PEFT's switch in merged mode between two LoRAs, on a copy of the model: ``switch(0)``, ``switch(1)``.

    Raises:
        Unavailable: without PEFT.
    """
    try:
        import peft
    except ImportError:
        raise Unavailable("peft is not installed: pip install 'intarsia[peft]'") from None
    targets = [name.removesuffix(".weight") for name in weights]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    names = ("one", "two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
        wrapped.add_adapter(names[1], config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1e-3)  # its own start would change the weights more with every round
    wrapped.set_adapter(names[0])
    wrapped.merge_adapter()

    def switch(to: int) -> None:
        wrapped.unmerge_adapter()
        wrapped.set_adapter(names[to])
        wrapped.merge_adapter()

    return switch
