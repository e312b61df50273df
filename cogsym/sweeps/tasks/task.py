"""A task: what is asked of the model about each document of a data set, and what the answers measure.

How a task is written is told in `cogsym.sweeps.tasks.settings`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogsym.data import Document as Text
from cogsym.data import content_digest, separator_id, tokenize
from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generate, Generated, Outcome, Request, Score, Scored, TaskDocument
from cogsym.sweeps.tasks.metrics import (
    METRICS,
    Statistics,
    bleu_statistics,
    chrf_statistics,
    ends_in_loop,
    identify,
    known_languages,
)
from cogsym.sweeps.tasks.settings import (
    GENERATION_METRICS,
    OPTION,
    Settings,
    fill,
    load_settings,
    pieces,
    read_rows,
)

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


@dataclass(frozen=True)
class _Item:
    """A document before it is tokenised.

    Attributes:
        texts: each option's whole text, or the one text, with the character from which it is scored.
        right: number of the right option.
        reference: the translation.
    """

    texts: tuple[Text, ...]
    right: int = 0
    reference: str = ""

    @property
    def num_bytes(self) -> list[int]:
        """UTF-8 bytes of what is scored, of each text."""
        return [len(text.text[text.target_start :].encode()) for text in self.texts]


class Task:
    """The documents of a task, and how answers about them are measured; made by `load_task`.

    Attributes:
        settings: as the user wrote them, checked.
        name, side, language: as in results.
        metrics: names of what is measured.
        num_documents: how many there are.
        digest: SHA-256 in hexadecimal of the data and of each setting that a result depends on; not of name or place.
    """

    def __init__(self, settings: Settings, items: Mapping[str, _Item], notes: Sequence[str]) -> None:
        self.settings = settings
        self.name, self.side, self.language = settings.name, settings.side, settings.language
        self.metrics = settings.metrics
        self.num_documents = len(items)
        self.digest = _digest(settings)
        self._items = items
        self._notes = list(notes)
        self._length_note: str | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences that a user should be told: what was left out or cut, and what is not measured."""
        return [*self._notes, *([self._length_note] if self._length_note else [])]

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
        separator = separator_id(tokenizer, self.settings.separator)
        items = list(self._items.values())
        rows, firsts = _tokenized([text for item in items for text in item.texts], tokenizer, separator)
        prompts: list[_Tokens] = []
        if self._generates:
            prompts, _ = _tokenized([Text(_prompt(item)) for item in items], tokenizer, separator)
        asked: list[list[Request]] = []
        at = 0
        for i, item in enumerate(items):
            options = slice(at, at + len(item.texts))
            at = options.stop
            requests: list[Request] = []
            if self._scores:
                first = min(*firsts[options], _shared(rows[options]))
                if first >= min(map(len, rows[options])):
                    key = list(self._items)[i]
                    raise CogsymError(f"The tokenizer makes no token of the text of {key} of the task {self.name}.")
                requests += [Score(row, first) for row in rows[options]]
            if self._generates:
                requests.append(Generate(prompts[i], self.settings.max_new_tokens, self.settings.stops))
            asked.append(requests)
        lengths = [max(map(_length, requests)) for requests in asked]
        self._length_note = self._too_long(lengths, context_length, truncate)
        return [
            TaskDocument(key, tuple(self._cut(requests, context_length, key) if length > context_length else requests))
            for key, requests, length in zip(self._items, asked, lengths, strict=True)
        ]

    def measure(self, document: TaskDocument, outcomes: Sequence[Outcome]) -> list[Measure]:
        """What the answers to a document's requests, in their order, say of it; one entry a metric."""
        item = self._items[document.key]
        scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
        generated = [outcome for outcome in outcomes if isinstance(outcome, Generated)]
        measured: dict[str, Statistics] = {}
        if self.settings.kind == "choice":
            measured |= _choice([outcome.log_likelihood for outcome in scored], item)
        elif scored:
            log_likelihood = sum(outcome.log_likelihood for outcome in scored)
            measured["log_likelihood"] = (log_likelihood, float(sum(outcome.num_tokens for outcome in scored)))
            measured["bits_per_byte"] = (-log_likelihood, float(item.num_bytes[0]))
        if generated:
            measured |= self._judge(generated[0], item.reference)
        text_with = next((metric for metric in self.metrics if metric in GENERATION_METRICS), None)
        return [
            Measure(
                metric,
                float(METRICS[metric].combine(np.array(measured[metric]))),
                measured[metric],
                generated[0].text if metric == text_with else None,
            )
            for metric in self.metrics
        ]

    @property
    def _generates(self) -> bool:
        return any(metric in GENERATION_METRICS for metric in self.metrics)

    @property
    def _scores(self) -> bool:
        return any(metric not in GENERATION_METRICS for metric in self.metrics)

    def _judge(self, generated: Generated, reference: str) -> dict[str, Statistics]:
        """Statistics of each metric that is wanted of a translation, without the blanks around it."""
        text = generated.text.strip()
        judges: dict[str, Callable[[], Statistics]] = {
            "chrf++": lambda: chrf_statistics(text, reference),
            "bleu": lambda: bleu_statistics(text, reference),
            "language": lambda: (float(identify(text) == _code(self.settings.output_language)), 1.0),
            "empty": lambda: (float(not text), 1.0),
            "repeated": lambda: (float(ends_in_loop(text)), 1.0),
            "cut": lambda: (float(generated.ended == "length"), 1.0),
        }
        return {metric: judge() for metric, judge in judges.items() if metric in self.metrics}

    def _too_long(self, lengths: Sequence[int], context_length: int, truncate: bool) -> str | None:
        """The sentence about documents that do not fit, if there are any."""
        number = sum(length > context_length for length in lengths)
        if not number:
            return None
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        told = (
            f"{number} of {len(lengths)} documents of the task {self.name} are longer than the context of "
            f"{context_length} tokens (the longest, {list(self._items)[longest]}, takes {lengths[longest]})"
        )
        if not truncate:
            raise CogsymError(f"{told}; have them truncated, or leave them out of the data.")
        way = "they are read in windows" if self.settings.kind == "text" else "their beginnings are cut off"
        return f"{told}; {way}."

    def _cut(self, requests: Sequence[Request], context_length: int, key: str) -> list[Request]:
        """The requests of a document that is too long, made to fit."""
        scores = [request for request in requests if isinstance(request, Score)]
        if self.settings.kind == "text":
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
    settings = load_settings(what, separator)
    notes = []
    language = _code(settings.output_language)
    if "language" in settings.metrics and language not in known_languages():
        notes.append(
            f"The share of outputs in the right language is not measured in the task {settings.name}: the identifier "
            f"does not know the language {settings.output_language!r}; its codes have two letters where ISO 639 does."
        )
        settings = replace(settings, metrics=tuple(metric for metric in settings.metrics if metric != "language"))
        if not settings.metrics:
            raise CogsymError(notes[0])
    rows, blank = read_rows(settings)
    if blank:
        notes.append(f"{blank} of {blank + len(rows)} rows of the task {settings.name} have a blank column; left out.")
    examples, questions = rows[: settings.shots], rows[settings.shots :][: settings.limit]
    if not questions:
        raise CogsymError(
            f"The task {settings.name} has {len(rows)} rows for {settings.shots} examples, expected at least one more."
        )
    header = "".join(_example(settings, where, record) + _BETWEEN for where, record in examples)
    items = {where: _item(settings, where, record, header) for where, record in questions}
    if "language" in settings.metrics:
        right = sum(identify(item.reference) == language for item in items.values())
        notes.append(
            f"{right / len(items):.1%} of the references of the task {settings.name} are identified as {language}; "
            "compare the share of outputs in the right language with that."
        )
    return Task(settings, items, notes)


def _digest(settings: Settings) -> str:
    told = asdict(settings) | {"name": None, "side": None}
    told["data"] = {column: (content_digest(source), source.field) for column, source in settings.data.items()}
    return hashlib.sha256(json.dumps([_FORMAT, told], sort_keys=True).encode()).hexdigest()


def _item(settings: Settings, where: str, record: Mapping[str, Any], header: str) -> _Item:
    if settings.kind == "text":
        return _Item((Text(fill(settings.template, record)),))
    if settings.kind == "translation":
        target = _last_column(settings)
        return _Item((_text(settings.template, record, target, header),), reference=record[target])
    options = [fill(option, record) for option in settings.options]
    place = f"{where} of the task {settings.name}"
    for option in options:
        if not option.strip() or options.count(option) > 1:
            raise CogsymError(f"{place} has the options {options}, expected different ones with text in them.")
    label = str(record[settings.label]).strip()
    if label not in settings.labels:
        raise CogsymError(f"{place} has the label {label!r}, expected one of {', '.join(settings.labels)}.")
    texts = [_text(settings.template, {**record, OPTION: option}, OPTION, header) for option in options]
    return _Item(tuple(texts), right=settings.labels.index(label))


def _example(settings: Settings, where: str, record: Mapping[str, Any]) -> str:
    """The row with its answer, as it stands before a question."""
    item = _item(settings, where, record, "")
    return item.texts[item.right].text


def _last_column(settings: Settings) -> str:
    return [column for _, column in pieces(settings.template) if column is not None][-1]


def _text(template: str, record: Mapping[str, str], target: str, header: str) -> Text:
    """The header and the template filled, scored from the last place of the target."""
    text, start = header, 0
    for literal, column in pieces(template):
        text += literal
        if column is not None:
            start = len(text) if column == target else start
            text += record[column]
    return Text(text, start)


def _prompt(item: _Item) -> str:
    """What the model goes on from: no blank at its end, as words begin with theirs."""
    (text,) = item.texts
    return text.text[: text.target_start].rstrip(" ")


def _tokenized(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, separator: int
) -> tuple[list[_Tokens], list[int]]:
    """(The tokens of each text after a separator, the first of each that is scored)."""
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


def _choice(log_likelihoods: Sequence[float], item: _Item) -> dict[str, Statistics]:
    """Statistics of the metrics of a choice; a tie is not right."""

    def margin(values: Sequence[float]) -> float:
        return values[item.right] - max(value for i, value in enumerate(values) if i != item.right)

    per_byte = [value / size for value, size in zip(log_likelihoods, item.num_bytes, strict=True)]
    guess = 1 / len(log_likelihoods)
    return {
        "accuracy": (float(margin(log_likelihoods) > 0), 1.0, guess),
        "accuracy_per_byte": (float(margin(per_byte) > 0), 1.0, guess),
        "margin": (margin(log_likelihoods), 1.0),
    }


def _code(language: str) -> str:
    """The language in a code that may name a script or country too, as sw_Latn and pt-BR do."""
    return language.replace("_", "-").partition("-")[0].lower()
