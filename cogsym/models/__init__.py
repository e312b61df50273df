"""Decoder blocks: Hugging Face layers described once, run on our operations."""

from cogsym.models.block import Block
from cogsym.models.families import FAMILIES, UnknownLayerError, read_block

__all__ = ["FAMILIES", "Block", "UnknownLayerError", "read_block"]
