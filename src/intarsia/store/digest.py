"""Digests: SHA-256 of tensors and of whole models, over their very bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from intarsia import processes
from intarsia.edits import Edit
from intarsia.store.order import little_endian


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and little-endian bytes, as hex. Of a shard: of the whole; then every process must call this."""
    whole = processes.whole(tensor.detach()).cpu().contiguous()
    head = f"{str(whole.dtype).removeprefix('torch.')}{list(whole.shape)}".encode()
    state = hashlib.sha256(head)
    if whole.numel():
        raw = little_endian(whole.reshape(-1).view(torch.uint8), whole.dtype.itemsize)
        state.update(raw.numpy().data)
    return state.hexdigest()


def edit_digest(edit: Edit) -> str:
    """SHA-256 of one edit: its kind, shape, constants and numbers, as hex."""
    facts = {"type": edit.kind, "shape": list(edit.shape)} | edit.facts()
    return json_digest([facts, {name: tensor_digest(tensor) for name, tensor in edit.tensors().items()}])


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors, whatever their order, as hex. Hashing lets go of the interpreter, so threads share it."""
    names, tensors = zip(*named, strict=True) if (named := list(named)) else ((), ())
    if any(processes.is_shard(tensor) for tensor in tensors):  # processes must gather them in one order
        digests = [tensor_digest(tensor) for tensor in tensors]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            digests = list(threads.map(tensor_digest, tensors))
    return json_digest(sorted(zip(names, digests, strict=True)))


def json_digest(value: Any) -> str:
    """SHA-256 of a plain JSON value in its canonical spelling, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
