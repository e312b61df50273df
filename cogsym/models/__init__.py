"""Decoder blocks: Hugging Face layers described once, run on our operations."""

from cogsym.models.block import Block
from cogsym.models.families import FAMILIES, Family, Logits, UnknownLayerError, read_block, register_family
from cogsym.models.head import find_head

__all__ = [
    "FAMILIES",
    "Block",
    "Family",
    "Logits",
    "UnknownLayerError",
    "find_head",
    "read_block",
    "register_family",
]
