"""Adapters in other people's formats: PEFT folders, weight patches, whole models, GGUF. One file a format;
the bridge makes our methods tuners of PEFT."""

from intarsia.interop.convert import TARGETS, convert
from intarsia.interop.full_model import write as write_full_model
from intarsia.interop.gguf import write as write_gguf
from intarsia.interop.output import Written
from intarsia.interop.patch import Patch, apply_patch
from intarsia.interop.patch import read as read_patch
from intarsia.interop.patch import write as write_patch
from intarsia.interop.peft import read_peft
from intarsia.interop.peft_lora import write as write_peft_lora
from intarsia.interop.peft_shira import write as write_peft_shira

__all__ = [
    "TARGETS", "Patch", "Written", "apply_patch", "convert", "read_patch", "read_peft", "write_full_model", "write_gguf",
    "write_patch", "write_peft_lora", "write_peft_shira",
]  # fmt: skip
