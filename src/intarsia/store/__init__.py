"""The store: the adapter's file format, digests, reading and writing; the registry of adapters."""

from intarsia.store.adapter import CARD, FORMAT, HEAD, MERGE, TENSORS, Adapter, Base, LazyEdits, dtype_name
from intarsia.store.digest import edit_digest, json_digest, tensor_digest, weights_digest
from intarsia.store.index import Version
from intarsia.store.normal import BITS, Code
from intarsia.store.reading import open, read
from intarsia.store.registry import Registry, folder_of
from intarsia.store.writing import write

__all__ = [
    "BITS", "CARD", "FORMAT", "HEAD", "MERGE", "TENSORS", "Adapter", "Base", "Code", "LazyEdits", "Registry", "Version",
    "dtype_name", "edit_digest", "folder_of", "json_digest", "open", "read", "tensor_digest", "weights_digest", "write",
]  # fmt: skip
