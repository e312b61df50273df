"""The table of families in docs/families.md is that of the registry and of what `explain` says."""

from __future__ import annotations

from models.families_table import HEADER, committed, variants
from tiny_models import EVERY

from cogsym.models import FAMILIES


def test_every_family_has_a_tiny_model() -> None:
    names = {FAMILIES[path].causal_lm.rpartition(".")[2].removesuffix("ForCausalLM") for path in FAMILIES}
    assert names <= {model for model, _ in EVERY.values()}


def test_the_table_says_what_runs_how() -> None:
    """Write it anew by `python tests/models/families_table.py` where a family came or a half changed its path."""
    rows = committed()
    assert rows.keys() == variants().keys()
    assert all(len(errors) == len(HEADER) - 6 and max(errors) < 1e-12 for errors in rows.values())
