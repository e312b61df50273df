"""Kinds of tasks: what is asked of the model about a row of data, and how its answers are judged.

A kind is a class, and its fields are the settings of a task of that kind. Another package adds one with
`register_task_kind`, or with an entry point of the group "cogsym.task_kinds" (see `cogsym.registry`); the smallest is

    @dataclass(frozen=True, kw_only=True)
    class Ending(TaskKind):
        known_metrics = default_metrics = ("log_likelihood",)

        def ask(self, where, row, header):
            return Question((scored_text(self.template, row, "ending", header),))

        def judge(self, question, scored, generated):
            return likelihood(question, scored)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

from cogsym.data import Document, Source
from cogsym.errors import CogsymError
from cogsym.registry import Registry
from cogsym.sweeps.engine.requests import Generated, Scored
from cogsym.sweeps.tasks.metrics import Statistics
from cogsym.sweeps.tasks.rows import columns_of

Side = Literal["perception", "production"]


class Prompt(NamedTuple):
    """What the model is to go on from.

    Attributes:
        text: without a blank at its end, as words begin with theirs.
        max_new_tokens: an answer is cut after so many.
        stops: an answer ends before the first of these.
    """

    text: str
    max_new_tokens: int
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What is asked about a row, before it is tokenised.

    Attributes:
        scored: whole texts, each with the character from which its likelihood is asked; they share their tokens before.
        prompt: what the model is to go on from; None asks it to write nothing.
        answer: what the judge wants to know of the row, such as the number of the right option.
    """

    scored: tuple[Document, ...] = ()
    prompt: Prompt | None = None
    answer: Any = None

    @property
    def num_bytes(self) -> list[int]:
        """UTF-8 bytes of what is scored, of each text."""
        return [len(document.text[document.target_start :].encode()) for document in self.scored]


@dataclass(frozen=True, kw_only=True)
class TaskKind(ABC):
    """The settings of a task, checked, and what follows from them; a kind's own settings are fields of its class.

    The type of a field says what a user may write: str, int (its metadata may hold the "least"), a tuple of str (its
    metadata may hold "any": entries of other types are made texts).

    Attributes:
        name: of the task, as in results.
        kind: the name of its kind.
        data: column -> the file and column it is read from, or "" -> a file of all columns.
        template: how a row becomes a text, columns in braces.
        side: what the task asks for, what the model understands or what it says.
        language: what the task is about, ISO 639.
        write: how a column is written.
        metrics: names of what is measured.
        limit: so many documents, the first ones; None is all.
        separator: the token before each document; None leaves it to the tokenizer.
        known_metrics: those that answers to this kind are judged by.
        default_metrics: those of them that are measured unless told.
        default_side: unless told; "" must be told.
        windows: a document that is too long is read in windows; else its beginning is cut off.
    """

    name: str
    kind: str
    data: Mapping[str, Source]
    template: str
    side: str
    metrics: tuple[str, ...]
    language: str = "und"  # ISO 639: undetermined
    write: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = field(default=None, metadata={"least": 1})
    separator: str | None = None

    known_metrics: ClassVar[tuple[str, ...]]
    default_metrics: ClassVar[tuple[str, ...]]
    default_side: ClassVar[str] = ""
    windows: ClassVar[bool] = False

    @classmethod
    def default_template(cls, column: str | None) -> str:
        """The template of data of which this column is named, or none; "" where the template names the columns."""
        return ""

    def checked(self) -> tuple[Self, list[str]]:
        """(The settings with what was left out, sentences that the user should be told).

        Raises:
            CogsymError: they do not fit together.
        """
        return self, []

    def columns(self) -> tuple[list[str], list[str]]:
        """(The columns that are read as text, those that may hold anything)."""
        return columns_of(self.template), []

    @abstractmethod
    def ask(self, where: str, row: Mapping[str, Any], header: str) -> Question:
        """The question about a row.

        Args:
            where: the row stands, for messages, such as "line 7 of the task xcopa".
            row: its columns.
            header: what stands before the question, or "".

        Raises:
            CogsymError: the row cannot be asked about.
        """

    @abstractmethod
    def judge(
        self, question: Question, scored: Sequence[Scored], generated: Sequence[Generated]
    ) -> Mapping[str, Statistics]:
        """Statistics of each of `metrics`, and perhaps of others, from the answers to a question.

        Args:
            question: as `ask` made it.
            scored: of its texts in their order, or of the windows of a text.
            generated: of its prompt, if there is one.
        """

    def notes(self, questions: Mapping[str, Question]) -> list[str]:
        """Sentences about the data that the user should be told."""
        return []


@dataclass(frozen=True, kw_only=True)
class FewShotKind(TaskKind):
    """A kind whose questions may have examples before them.

    Attributes:
        shots: so many first rows are the examples, and are not asked.
    """

    shots: int = 0

    @abstractmethod
    def example(self, where: str, row: Mapping[str, Any]) -> str:
        """The row with its answer, as it stands before a question."""


def likelihood(question: Question, scored: Sequence[Scored]) -> dict[str, Statistics]:
    """Statistics of "log_likelihood" and "bits_per_byte" of one text, in one piece or in windows."""
    nats = sum(outcome.log_likelihood for outcome in scored)
    tokens = float(sum(outcome.num_tokens for outcome in scored))
    return {"log_likelihood": (nats, tokens), "bits_per_byte": (-nats, float(question.num_bytes[0]))}


def _check(name: str, kind: type[TaskKind]) -> None:
    if not (isinstance(kind, type) and issubclass(kind, TaskKind)):
        raise CogsymError(f"The kind {name} is {kind!r}, expected a subclass of cogsym.sweeps.tasks.kinds.TaskKind.")


TASK_KINDS = Registry[type[TaskKind]]("kind", "cogsym.task_kinds", _check)


def register_task_kind(name: str, kind: type[TaskKind]) -> None:
    """Make a kind known under a name, with which tasks name it.

    Raises:
        CogsymError: the name is another kind's.
    """
    TASK_KINDS.register(name, kind)
