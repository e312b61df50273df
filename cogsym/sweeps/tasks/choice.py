"""Which option is the likeliest in its place, with all that follows?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generated, Scored
from cogsym.sweeps.tasks.kinds import FewShotKind, Question
from cogsym.sweeps.tasks.metrics import Statistics
from cogsym.sweeps.tasks.rows import columns_of, fill, pieces, scored_text

_OPTION = "option"  # stands in the template for each of the options


@dataclass(frozen=True, kw_only=True)
class Choice(FewShotKind):
    """The options are scored, each in the place of {option}.

    Attributes:
        options: their templates.
        label: the column of the right one.
        labels: what stands there for each option; 0, 1, ... unless told.
    """

    options: tuple[str, ...] = ()
    label: str = "label"
    labels: tuple[str, ...] = field(default=(), metadata={"any": True})

    known_metrics = ("accuracy", "accuracy_per_byte", "margin")
    default_metrics = ("accuracy", "margin")
    default_side = "perception"

    def checked(self) -> tuple[Self, list[str]]:
        """See `TaskKind`."""
        places = [column for _, column in pieces(self.template)]
        if places.count(_OPTION) != 1 or len(self.options) < 2:
            raise CogsymError(
                f"The task {self.name} is a choice, expected one {{option}} in its template and two options or more."
            )
        labels = self.labels or tuple(map(str, range(len(self.options))))
        if len(labels) != len(self.options):
            raise CogsymError(
                f"The task {self.name} has {len(labels)} labels for {len(self.options)} options, expected one each."
            )
        return replace(self, labels=labels), []

    def columns(self) -> tuple[list[str], list[str]]:
        """See `TaskKind`."""
        named = columns_of(self.template, *self.options)
        return [column for column in named if column != _OPTION], [self.label]

    def ask(self, where: str, row: Mapping[str, Any], header: str) -> Question:
        """See `TaskKind`."""
        options = [fill(option, row) for option in self.options]
        for option in options:
            if not option.strip() or options.count(option) > 1:
                raise CogsymError(f"{where} has the options {options}, expected different ones with text in them.")
        label = str(row[self.label]).strip()
        if label not in self.labels:
            raise CogsymError(f"{where} has the label {label!r}, expected one of {', '.join(self.labels)}.")
        texts = (scored_text(self.template, {**row, _OPTION: option}, _OPTION, header) for option in options)
        return Question(tuple(texts), answer=self.labels.index(label))

    def example(self, where: str, row: Mapping[str, Any]) -> str:
        """See `FewShotKind`."""
        question = self.ask(where, row, "")
        return question.scored[question.answer].text

    def judge(
        self, question: Question, scored: Sequence[Scored], generated: Sequence[Generated]
    ) -> Mapping[str, Statistics]:
        """See `TaskKind`. A tie is not right."""

        def margin(values: Sequence[float]) -> float:
            right = question.answer
            return values[right] - max(value for i, value in enumerate(values) if i != right)

        likelihoods = [outcome.log_likelihood for outcome in scored]
        per_byte = [value / size for value, size in zip(likelihoods, question.num_bytes, strict=True)]
        guess = 1 / len(likelihoods)
        return {
            "accuracy": (float(margin(likelihoods) > 0), 1.0, guess),
            "accuracy_per_byte": (float(margin(per_byte) > 0), 1.0, guess),
            "margin": (margin(likelihoods), 1.0),
        }
