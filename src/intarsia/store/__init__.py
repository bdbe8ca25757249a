"""The store: the adapter's file format, digests, reading and writing."""

from intarsia.store.adapter import CARD, FORMAT, HEAD, TENSORS, Adapter, Base, dtype_name, read, write
from intarsia.store.digest import edit_digest, json_digest, tensor_digest, weights_digest

__all__ = [
    "CARD", "FORMAT", "HEAD", "TENSORS", "Adapter", "Base", "dtype_name", "edit_digest", "json_digest", "read",
    "tensor_digest", "weights_digest", "write",
]  # fmt: skip
