"""A task: what is asked of the model about each document of a data set, and what the answers measure.

How a task is written is told in `cogsym.sweeps.tasks.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogsym.data import Document, separator_id, tokenize
from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generate, Generated, Outcome, Request, Score, Scored, TaskDocument
from cogsym.sweeps.tasks.kinds import FewShotKind, Question, TaskKind
from cogsym.sweeps.tasks.metrics import METRICS, Metric, Statistics
from cogsym.sweeps.tasks.rows import digest, read_rows
from cogsym.sweeps.tasks.settings import load_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # part of the digest: raise it when the same task asks or measures something else
_BETWEEN = "\n\n"  # stands after each example

_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """What one metric says of one document.

    Attributes:
        metric: a name in `METRICS`.
        value: of this document alone.
        statistics: [S], what this document adds to the sums that the metric combines.
        text: what the model wrote, with the first metric that judges it; None elsewhere.
    """

    metric: str
    value: float
    statistics: Statistics
    text: str | None = None


class Task:
    """The documents of a task, and how answers about them are measured; made by `load_task`.

    Attributes:
        kind: its settings, as the user wrote them, checked, and what its kind makes of them.
        name, side, language: as in results.
        metrics: names of what is measured.
        num_documents: how many there are.
    """

    def __init__(
        self, kind: TaskKind, questions: Mapping[str, Question], digests: Sequence[str], notes: Sequence[str]
    ) -> None:
        self.kind = kind
        self.name, self.side, self.language, self.metrics = kind.name, kind.side, kind.language, kind.metrics
        self.num_documents = len(questions)
        self._questions, self._digests = questions, digests
        self._notes = [*notes, *kind.notes(questions)]
        self._length_note: str | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences that a user should be told: what was left out or cut, and what is not measured."""
        return [*self._notes, *([self._length_note] if self._length_note else [])]

    def metric(self, name: str) -> Metric:
        """One of the task's metrics."""
        return METRICS[name]

    def digest(self, number: int | None = None) -> str:
        """Of so many first documents, or of all, and of each setting that a result depends on; not of name or place."""
        settings = asdict(self.kind) | {"name": None, "side": None, "limit": None}
        settings["data"] = {column: source.field for column, source in self.kind.data.items()}
        return digest(_FORMAT, settings, *self._digests[:number])

    def describe(self) -> dict[str, Any]:
        """What a result depends on, and what its metrics are where they are not in `METRICS`, as JSON has it."""
        return {"data": self.digest(), "documents": self.num_documents}

    def documents(
        self, tokenizer: PreTrainedTokenizerBase, context_length: int, truncate: bool = False
    ) -> list[TaskDocument]:
        """What is asked of the model, in the order of the data.

        What stands before the scored part is tokenised together with it, and a token counts when it covers a character
        of it; where that moves the boundary in one option of a question, it is moved in all, so that their
        log-probabilities compare.

        Args:
            tokenizer: a fast tokenizer of transformers.
            context_length: tokens that the model takes, the separator and what it writes among them.
            truncate: what to do with a document that is longer. False refuses it. True cuts a text into windows, each
                after the first beginning with the last token of the one before, as context; of a question or
                translation it cuts the beginning. `notes` then say how many.

        Raises:
            CogsymError: a document is too long, or the tokenizer has no separator.
        """
        separator = separator_id(tokenizer, self.kind.separator)
        questions = self._questions.values()
        rows, firsts = _tokenized([text for q in questions for text in q.scored], tokenizer, separator)
        written = [Document(q.prompt.text) for q in questions if q.prompt]
        prompts = iter(_tokenized(written, tokenizer, separator)[0])
        asked: list[list[Request]] = []
        at = 0
        for key, question in self._questions.items():
            texts = slice(at, at + len(question.scored))
            at = texts.stop
            requests: list[Request] = []
            if question.scored:
                first = min(*firsts[texts], _shared(rows[texts]))
                if first >= min(map(len, rows[texts])):
                    raise CogsymError(f"The tokenizer makes no token of the text of {key} of the task {self.name}.")
                requests += [Score(row, first) for row in rows[texts]]
            if question.prompt:
                requests.append(Generate(next(prompts), question.prompt.max_new_tokens, question.prompt.stops))
            asked.append(requests)
        lengths = [max(map(_length, requests)) for requests in asked]
        self._length_note = self._too_long(lengths, context_length, truncate)
        return [
            TaskDocument(key, tuple(self._cut(requests, context_length, key) if length > context_length else requests))
            for key, requests, length in zip(self._questions, asked, lengths, strict=True)
        ]

    def measure(self, document: TaskDocument, outcomes: Sequence[Outcome]) -> list[Measure]:
        """What the answers to a document's requests, in their order, say of it; one entry a metric."""
        scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
        generated = [outcome for outcome in outcomes if isinstance(outcome, Generated)]
        measured = self.kind.judge(self._questions[document.key], scored, generated)
        text_with = next((metric for metric in self.metrics if METRICS[metric].of_text), None)
        return [
            Measure(
                metric,
                float(METRICS[metric].combine(np.array(measured[metric]))),
                measured[metric],
                generated[0].text if metric == text_with else None,
            )
            for metric in self.metrics
        ]

    def _too_long(self, lengths: Sequence[int], context_length: int, truncate: bool) -> str | None:
        """The sentence about documents that do not fit, if there are any."""
        number = sum(length > context_length for length in lengths)
        if not number:
            return None
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        sentence = (
            f"{number} of {len(lengths)} documents of the task {self.name} are longer than the context of "
            f"{context_length} tokens (the longest, {list(self._questions)[longest]}, takes {lengths[longest]})"
        )
        if not truncate:
            raise CogsymError(f"{sentence}; have them truncated, or leave them out of the data.")
        way = "they are read in windows" if self.kind.windows else "their beginnings are cut off"
        return f"{sentence}; {way}."

    def _cut(self, requests: Sequence[Request], context_length: int, key: str) -> list[Request]:
        """The requests of a document that is too long, made to fit."""
        scores = [request for request in requests if isinstance(request, Score)]
        if self.kind.windows:
            return [window for score in scores for window in _windows(score, context_length)]
        # The same tokens leave every option, so that they still share what stands before them.
        excess = max((len(score.tokens) - context_length for score in scores), default=0)
        fitting: list[Request] = []
        for request in requests:
            surplus = excess if isinstance(request, Score) else _length(request) - context_length
            given = request.first if isinstance(request, Score) else len(request.tokens)
            if surplus >= given:
                raise CogsymError(
                    f"{key} of the task {self.name} does not fit into the context of {context_length} tokens even "
                    "without what stands before the answer; leave it out of the data."
                )
            tokens = request.tokens[:1] + request.tokens[1 + max(surplus, 0) :]
            if isinstance(request, Score):
                fitting.append(Score(tokens, request.first - max(surplus, 0)))
            else:
                fitting.append(replace(request, tokens=tokens))
        return fitting


def load_task(what: str | Path | Mapping[str, Any], separator: str | None = None) -> Task:
    """A task with its data read.

    Args:
        what: as `cogsym.sweeps.tasks.settings` tells: a built-in task or a file, such as "xcopa-sw:sw.test.jsonl", or
            the settings themselves, with paths relative to the working directory.
        separator: the token before each document, where the task does not name one; None leaves it to the tokenizer.

    Raises:
        CogsymError: the task or its data are not as they should be; the message names the file and line.
    """
    kind, notes = load_settings(what, separator)
    rows, blank = read_rows(kind.name, kind.data, *kind.columns(), kind.write)
    if blank:
        notes.append(f"{blank} of {blank + len(rows)} rows of the task {kind.name} have a blank column; left out.")
    shots, header = 0, ""
    if isinstance(kind, FewShotKind):
        shots = kind.shots
        header = "".join(kind.example(_place(kind, where), row) + _BETWEEN for where, row in rows[:shots])
    asked = rows[shots:][: kind.limit]
    questions = {where: kind.ask(_place(kind, where), row, header) for where, row in asked}
    if not questions:
        raise CogsymError(
            f"The task {kind.name} has {len(rows)} rows for {shots} examples, expected at least one more."
        )
    return Task(kind, questions, [digest(where, header, row) for where, row in asked], notes)


def _place(kind: TaskKind, where: str) -> str:
    return f"{where} of the task {kind.name}"


def _tokenized(
    texts: Sequence[Document], tokenizer: PreTrainedTokenizerBase, separator: int
) -> tuple[list[_Tokens], list[int]]:
    """(The tokens of each text after a separator, the first of each that is scored)."""
    if not texts:
        return [], []
    tokenized = tokenize(texts, tokenizer, "target", separator)
    offsets = tokenized.offsets.tolist()
    tokens = tokenized.tokens.tolist()
    rows = [(separator, *tokens[begin:end]) for begin, end in pairwise(offsets)]
    return rows, (tokenized.loss_starts + 1).tolist()


def _shared(rows: Sequence[_Tokens]) -> int:
    """How many first tokens all rows share."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _windows(score: Score, length: int) -> list[Score]:
    """A text cut so that every token is predicted once, as `cogsym.data.pack` cuts a document."""
    starts = range(0, len(score.tokens) - 1, length - 1)
    return [Score(score.tokens[start : start + length], 1) for start in starts]


def _length(request: Request) -> int:
    """Tokens of context that a request takes."""
    return len(request.tokens) + (request.max_new_tokens if isinstance(request, Generate) else 0)
