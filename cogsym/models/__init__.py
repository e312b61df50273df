"""Decoder blocks: Hugging Face layers described once, run on our operations."""

from cogsym.models.block import Block
from cogsym.models.families import Family, Logits, UnknownLayerError, known_families, read_block, register_family
from cogsym.models.head import find_head

__all__ = [
    "Block",
    "Family",
    "Logits",
    "UnknownLayerError",
    "find_head",
    "known_families",
    "read_block",
    "register_family",
]
