"""Importing this package registers every method of ours: one file, one method."""

from intarsia.methods.dora import Dora
from intarsia.methods.lora import Lora
from intarsia.methods.paca import Paca
from intarsia.methods.shira import Shira

__all__ = ["Dora", "Lora", "Paca", "Shira"]
