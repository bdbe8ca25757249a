"""GGUF: the base's own GGUF file with the weights of the merged model in place of its own. Llama architecture.

All that llama.cpp needs besides the weights (sizes, tokenizer, chat template) is copied from the file that the base was
converted from. Matrices are written in the chosen dtype, vectors in float32 as llama.cpp has them; quantise the file with
llama.cpp's own tool afterwards.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia import pretrained as models
from intarsia import store
from intarsia.calibrate import Progress
from intarsia.errors import IntarsiaError
from intarsia.interop import full_model
from intarsia.interop.output import Written, check_output, made_aside, measured
from intarsia.pretrained import Pretrained

SUFFIX = ".gguf"
ARCHITECTURES = ("llama",)
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # general.file_type: what most tensors are


def write(
    adapter: store.Adapter,
    pretrained: Pretrained,
    file: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the merged model as one GGUF file, without quantising it.

    Args:
        dtype: of the matrices: float32, float16 or bfloat16; by default the base's, which loses nothing.

    Raises:
        IntarsiaError: where the base did not come from a GGUF file, or from one of another architecture; and as
            :func:`intarsia.interop.full_model.write`.
    """
    path = Path(file)
    check_output(path, overwrite, "a GGUF model", SUFFIX)
    full_model.check_dtype(dtype)
    source = models.gguf_file(pretrained.name)
    if source is None:
        raise IntarsiaError(
            f"{pretrained.name} is no GGUF file, and its tokenizer and settings are copied from one: name the base's .gguf file as the "
            "base; or write full-model and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    if importlib.util.find_spec("gguf") is None:
        raise IntarsiaError("writing GGUF files needs a package; pip install 'intarsia[gguf]'")
    import gguf

    reader = gguf.GGUFReader(source)
    places = _places(gguf, reader, source, pretrained)
    state = full_model.folded(adapter, pretrained, dtype, progress)
    chosen = dtype or adapter.base.dtype
    if chosen not in FILE_TYPES:
        raise IntarsiaError(
            f"a base in {chosen} has no GGUF dtype of its own; choose one: dtype='float32' (--dtype float32)"
        )
    with made_aside(path, SUFFIX) as work:
        writer = gguf.GGUFWriter(work, str(_field(reader, "general.architecture")), endianess=reader.endianess)
        _copy_fields(gguf, reader, writer, FILE_TYPES[chosen], adapter)
        kinds = {}
        for tensor in reader.tensors:
            weight = state[places[tensor.name]]
            kinds[tensor.name] = kind = _kind(gguf, weight, chosen)
            size = weight.numel() * (4 if kind == gguf.GGMLQuantizationType.F32 else 2)
            raw = _raw_dtype(gguf, kind)
            writer.add_tensor_info(tensor.name, tuple(weight.shape), np.dtype(raw), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(reader.tensors, 1):
            weight = _permuted(tensor.name, state[places[tensor.name]], pretrained)
            writer.write_tensor_data(_bits(gguf, weight, kinds[tensor.name]))
            if progress:
                progress(done, len(reader.tensors), "writing")
        writer.close()
    return measured(path, dtype=chosen, source=str(source))


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field is not None else None


def _places(gguf: Any, reader: Any, source: Path, pretrained: Pretrained) -> dict[str, str]:
    """The model's weight for each tensor of the file. Raises IntarsiaError unless the two are one to one."""
    found, kind = _field(reader, "general.architecture"), getattr(pretrained.model.config, "model_type", None)
    if found not in ARCHITECTURES or kind != "llama":
        raise IntarsiaError(
            f"{source.name} has the architecture {found!r}; merged files are written for {', '.join(ARCHITECTURES)}. "
            "Write full-model and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, pretrained.model.config.num_hidden_layers)
    state = pretrained.model.state_dict()
    places: dict[str, str] = {}
    for name in state:
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is not None:
            places[target] = name
    faults = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.name not in places:
            faults.append(f"{tensor.name}: the model has no such weight")
        elif tuple(state[places[tensor.name]].shape) != shape:
            faults.append(f"{tensor.name}: {shape} in the file, {tuple(state[places[tensor.name]].shape)} in the model")
    written = {places[tensor.name] for tensor in reader.tensors if tensor.name in places}
    held = {state[name].data_ptr() for name in written}
    faults += [f"{name}: the file has no such tensor" for name, t in state.items() if t.data_ptr() not in held]
    if faults:
        raise IntarsiaError(f"{source} is not the file that this model came from:\n  " + "\n  ".join(faults[:8]))
    return places


def _copy_fields(gguf: Any, reader: Any, writer: Any, file_type: int, adapter: store.Adapter) -> None:
    for field in reader.fields.values():
        # The writer makes these itself; a file without quantised tensors has no version of their layout.
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.quantization_version"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = file_type if field.name == "general.file_type" else field.contents()
        if value is not None:
            writer.add_key_value(field.name, value, kind, sub_type=inner)
    if reader.get_field("general.file_type") is None:
        writer.add_file_type(file_type)
    writer.add_string("intarsia.adapter", adapter.digest)
    writer.add_string("intarsia.base", adapter.base.digest)


def _kind(gguf: Any, weight: Tensor, chosen: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    if weight.ndim < 2:
        return kinds.F32
    return {"float32": kinds.F32, "float16": kinds.F16, "bfloat16": kinds.BF16}[chosen]


def _raw_dtype(gguf: Any, kind: Any) -> type:
    return np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16


def _bits(gguf: Any, weight: Tensor, kind: Any) -> Any:
    kinds = gguf.GGMLQuantizationType
    weight = weight.detach().cpu().contiguous()
    if kind == kinds.BF16:
        return weight.to(torch.bfloat16).view(torch.int16).numpy()
    return weight.to(torch.float16 if kind == kinds.F16 else torch.float32).numpy()


def _permuted(name: str, weight: Tensor, pretrained: Pretrained) -> Tensor:
    """Rows of q and k in llama.cpp's order, which keeps the two halves of a rotary pair side by side."""
    config = pretrained.model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
