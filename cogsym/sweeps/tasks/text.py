"""How likely is the text?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogsym.data import Document
from cogsym.sweeps.engine.requests import Generated, Scored
from cogsym.sweeps.tasks.kinds import Question, TaskKind, likelihood
from cogsym.sweeps.tasks.metrics import Statistics
from cogsym.sweeps.tasks.rows import fill


@dataclass(frozen=True, kw_only=True)
class RunningText(TaskKind):
    """All of a text is scored, in windows where it is longer than the context."""

    known_metrics = ("bits_per_byte", "log_likelihood")
    default_metrics = ("bits_per_byte",)
    default_side = "production"
    windows = True

    @classmethod
    def default_template(cls, column: str | None) -> str:
        """The column that the data name, or "text"."""
        return f"{{{column or 'text'}}}"

    def ask(self, where: str, row: Mapping[str, Any], header: str) -> Question:
        """See `TaskKind`."""
        return Question((Document(fill(self.template, row)),))

    def judge(
        self, question: Question, scored: Sequence[Scored], generated: Sequence[Generated]
    ) -> Mapping[str, Statistics]:
        """See `TaskKind`."""
        return likelihood(question, scored)
