"""What differs by model, as data: the names of q, k, v, o and gate, up, down, the heads, and which of them are coupled."""

from intarsia.families.blocks import FAMILY, Block, blocks, by_hand, roles, shape, turned
from intarsia.families.known import FAMILIES, Coupling, Family
from intarsia.families.permute import permute

__all__ = [
    "FAMILIES",
    "FAMILY",
    "Block",
    "Coupling",
    "Family",
    "blocks",
    "by_hand",
    "permute",
    "roles",
    "shape",
    "turned",
]
