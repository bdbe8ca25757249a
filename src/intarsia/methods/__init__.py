"""Importing this package registers every method of ours: one file, one method."""

from intarsia.methods.alora import Alora
from intarsia.methods.bone import Bone
from intarsia.methods.bottleneck import Bottleneck
from intarsia.methods.diffusekrona import DiffuseKronA
from intarsia.methods.dora import Dora
from intarsia.methods.dylora import Dylora
from intarsia.methods.eora import Eora
from intarsia.methods.eva import Eva
from intarsia.methods.full import Full
from intarsia.methods.hut import Hut
from intarsia.methods.hydra_par_seq import Hydra
from intarsia.methods.increlora import Increlora
from intarsia.methods.loldu import Loldu
from intarsia.methods.lora import Lora
from intarsia.methods.lora_sb import LoraSb
from intarsia.methods.melora import Melora
from intarsia.methods.mosa import Mosa
from intarsia.methods.nlora import Nlora
from intarsia.methods.nola import Nola
from intarsia.methods.paca import Paca
from intarsia.methods.prefix import Prefix
from intarsia.methods.prompt import Prompt
from intarsia.methods.qwha import Qwha
from intarsia.methods.randlora import Randlora
from intarsia.methods.rosa import Rosa
from intarsia.methods.s2_lora import S2Lora
from intarsia.methods.s2ft import S2ft
from intarsia.methods.shira import Shira
from intarsia.methods.smora import Smora
from intarsia.methods.smt import Smt
from intarsia.methods.snell import Snell
from intarsia.methods.snella import Snella
from intarsia.methods.sora import Sora
from intarsia.methods.svfit import Svfit
from intarsia.methods.tokens import Tokens
from intarsia.methods.wara import Wara

__all__ = [
    "Alora", "Bone", "Bottleneck", "DiffuseKronA", "Dora", "Dylora", "Eora", "Eva", "Full", "Hut", "Hydra",
    "Increlora", "Loldu", "Lora", "LoraSb", "Melora", "Mosa", "Nlora", "Nola", "Paca", "Prefix", "Prompt", "Qwha",
    "Randlora", "Rosa", "S2Lora", "S2ft", "Shira", "Smora", "Smt", "Snell", "Snella", "Sora", "Svfit", "Tokens",
    "Wara",
]  # fmt: skip
