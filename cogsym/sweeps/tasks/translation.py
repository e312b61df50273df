"""How likely is the last column of the template after what stands before it, and what would the model write there?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generated, Scored
from cogsym.sweeps.tasks.kinds import FewShotKind, Prompt, Question, likelihood
from cogsym.sweeps.tasks.metrics import (
    METRICS,
    Statistics,
    bleu_statistics,
    chrf_statistics,
    ends_in_loop,
    in_language,
    known_languages,
)
from cogsym.sweeps.tasks.rows import columns_of, fill, pieces, scored_text

_WRITTEN = ("chrf++", "bleu", "language", "empty", "repeated", "cut")


@dataclass(frozen=True, kw_only=True)
class Translation(FewShotKind):
    """The translation is scored, written and judged, as the metrics need.

    Attributes:
        output_language: of the translation; the task's unless told.
        stops: the translation ends before the first of these.
        max_new_tokens: it is cut after so many.
    """

    output_language: str = ""
    stops: tuple[str, ...] = ("\n",)
    max_new_tokens: int = field(default=128, metadata={"least": 1})

    known_metrics = ("bits_per_byte", "log_likelihood", *_WRITTEN)
    default_metrics = ("bits_per_byte", *_WRITTEN)

    def checked(self) -> tuple[Self, list[str]]:
        """See `TaskKind`. A language that the identifier does not know is not measured."""
        if len(columns_of(self.template)) < 2:
            raise CogsymError(
                f"The template {self.template!r} of the task {self.name} needs two columns, such as "
                '"English: {en}\\nSwahili: {sw}".'
            )
        complete = replace(self, output_language=self.output_language or self.language)
        if "language" not in self.metrics or complete._output_code() in known_languages():
            return complete, []
        note = (
            f"The share of outputs in the right language is not measured in the task {self.name}: the identifier does "
            f"not know the language {complete.output_language!r}; its codes have two letters where ISO 639 does."
        )
        metrics = tuple(metric for metric in self.metrics if metric != "language")
        if not metrics:
            raise CogsymError(note)
        return replace(complete, metrics=metrics), [note]

    def ask(self, where: str, row: Mapping[str, Any], header: str) -> Question:
        """See `TaskKind`."""
        target = [column for _, column in pieces(self.template) if column is not None][-1]
        whole = scored_text(self.template, row, target, header)
        written = [METRICS[metric].of_text for metric in self.metrics]
        prompt = Prompt(whole.text[: whole.target_start].rstrip(" "), self.max_new_tokens, self.stops)
        return Question(() if all(written) else (whole,), prompt if any(written) else None, answer=row[target])

    def example(self, where: str, row: Mapping[str, Any]) -> str:
        """See `FewShotKind`."""
        return fill(self.template, row)

    def judge(
        self, question: Question, scored: Sequence[Scored], generated: Sequence[Generated]
    ) -> Mapping[str, Statistics]:
        """See `TaskKind`. Blanks around the translation do not count."""
        statistics = likelihood(question, scored) if scored else {}
        return statistics | (self._judge(generated[0], question.answer) if generated else {})

    def notes(self, questions: Mapping[str, Question]) -> list[str]:
        """See `TaskKind`."""
        if "language" not in self.metrics:
            return []
        language = self._output_code()
        right = sum(in_language(question.answer, language) for question in questions.values())
        return [
            f"{right / len(questions):.1%} of the references of the task {self.name} are identified as {language}; "
            "compare the share of outputs in the right language with that."
        ]

    def _judge(self, written: Generated, reference: str) -> dict[str, Statistics]:
        text = written.text.strip()
        judges: dict[str, Callable[[], Statistics]] = {
            "chrf++": lambda: chrf_statistics(text, reference),
            "bleu": lambda: bleu_statistics(text, reference),
            "language": lambda: (float(in_language(text, self._output_code())), 1.0),
            "empty": lambda: (float(not text), 1.0),
            "repeated": lambda: (float(ends_in_loop(text)), 1.0),
            "cut": lambda: (float(written.ended == "length"), 1.0),
        }
        return {metric: judge() for metric, judge in judges.items() if metric in self.metrics}

    def _output_code(self) -> str:
        """The language without the script or country that its code may name too, as sw_Latn and pt-BR do."""
        return self.output_language.replace("_", "-").partition("-")[0].lower()
