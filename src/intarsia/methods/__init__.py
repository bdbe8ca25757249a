"""Importing this package registers every method of ours: one file, one method."""

from intarsia.methods.bottleneck import Bottleneck
from intarsia.methods.dora import Dora
from intarsia.methods.lora import Lora
from intarsia.methods.mosa import Mosa
from intarsia.methods.paca import Paca
from intarsia.methods.prefix import Prefix
from intarsia.methods.prompt import Prompt
from intarsia.methods.rosa import Rosa
from intarsia.methods.s2ft import S2ft
from intarsia.methods.shira import Shira
from intarsia.methods.smt import Smt
from intarsia.methods.snell import Snell
from intarsia.methods.snella import Snella
from intarsia.methods.tokens import Tokens

__all__ = [
    "Bottleneck",
    "Dora",
    "Lora",
    "Mosa",
    "Paca",
    "Prefix",
    "Prompt",
    "Rosa",
    "S2ft",
    "Shira",
    "Smt",
    "Snell",
    "Snella",
    "Tokens",
]
