"""The store: the adapter's file format, digests, reading and writing; the registry of adapters."""

from intarsia.store.adapter import CARD, FORMAT, HEAD, TENSORS, Adapter, Base, dtype_name, read, write
from intarsia.store.digest import json_digest, tensor_digest, weights_digest
from intarsia.store.index import Version
from intarsia.store.registry import Registry

__all__ = [
    "CARD", "FORMAT", "HEAD", "TENSORS", "Adapter", "Base", "Registry", "Version", "dtype_name", "json_digest", "read", "tensor_digest",
    "weights_digest", "write",
]  # fmt: skip
