"""Decoder blocks: Hugging Face layers described once, run on our operations."""

from cogsym.models.block import Block
from cogsym.models.families import FAMILIES, UnknownLayerError, read_block
from cogsym.models.heads import find_head

__all__ = ["FAMILIES", "Block", "UnknownLayerError", "find_head", "read_block"]
