"""Made-up text."""

from __future__ import annotations

import random

_WORDS = (
    "habari",
    "ya",
    "leo",
    "mtoto",
    "anasoma",
    "kitabu",
    "shuleni",
    "mama",
    "anapika",
    "chakula",
    "kizuri",
    "sana",
)


def sentences(number: int, seed: int = 0) -> list[str]:
    """Made-up sentences of two to eight words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(_WORDS, k=chance.randint(2, 8))) + "." for _ in range(number)]
