"""Tasks of lm-evaluation-harness in a sweep.

What a task asks is recorded once. The engine answers it for every configuration, and the harness's own filters, metrics
and aggregations judge the answers of each. Neither its request cache nor its cache of responses is used, as their keys
know nothing of configurations.

The command line names a task, a tag or a group of the harness, or a task file of its sort, and settings:

    lm_eval:xcopa_sw,limit=100,num_fewshot=2,language=sw
    lm_eval:tasks/proverbs.yaml
    lm_eval:my_group,include_path=tasks         # names that the files of a folder have too

    limit, num_fewshot, include_path    as the harness has them
    name, language, side                in results; the task's name, "und", and perception unless the model writes or
                                        running text is scored
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from cogsym.errors import CogsymError
from cogsym.registry import unknown
from cogsym.sweeps.engine.requests import Generated, Outcome, Request, Scored, TaskDocument
from cogsym.sweeps.tasks.aggregations import AGGREGATIONS, metric_of
from cogsym.sweeps.tasks.kinds import Side
from cogsym.sweeps.tasks.metrics import Metric, Statistics
from cogsym.sweeps.tasks.rows import digest
from cogsym.sweeps.tasks.task import Measure

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance

PREFIX = "lm_eval:"
_SETTINGS = ("limit", "num_fewshot", "include_path", "name", "language", "side")
_FORMAT = 1  # part of the digest: raise it when the same task asks or measures something else


@dataclass(frozen=True)
class _Settings:
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    name: str = ""
    language: str = "und"  # ISO 639: undetermined
    side: str = ""


@dataclass(frozen=True)
class _Asked:
    """A document of the harness.

    Attributes:
        doc: as the harness has it.
        instances: its requests.
        fingerprints: of each, by which responses are stored.
    """

    doc: Any
    instances: list[Instance]
    fingerprints: list[str]


class HarnessTask:
    """A task of the harness, in the place of a `Task`; made by `load_harness`.

    Attributes:
        name, side, language: as in results.
        metrics: names of what is measured and has statistics, as the harness writes them: "acc,none".
        num_documents: how many there are.
        task: the harness's own.
        groups: of the harness, that its result is a part of.
    """

    def __init__(self, task: Any, groups: Sequence[Group], settings: _Settings) -> None:
        self.task, self.groups = task, groups
        self.name, self.language = settings.name, settings.language
        self._asked = _record(task, settings)
        self.num_documents = len(self._asked)
        sorts = {instance.request_type for asked in self._asked.values() for instance in asked.instances}
        self.side = settings.side or ("perception" if sorts == {"loglikelihood"} else "production")
        self._known = _known_metrics(task)
        self.metrics = tuple(self._known) or (_carrier(sorts == {"generate_until"}),)
        self._pieces: dict[str, list[int]] = {}
        self._cut = 0
        self._memoise()

    @property
    def notes(self) -> list[str]:
        """Sentences that a user should be told."""
        unsummed = [name for name in self.task.aggregation() if not any(n.startswith(f"{name},") for n in self._known)]
        notes = [
            f"{name} of the task {self.name} is no sum over documents: lm_eval.json has it, without an interval."
            for name in unsummed
        ]
        if self._cut:
            notes.append(
                f"{self._cut} requests of the task {self.name} are longer than the context; their beginnings are cut "
                "off, as the harness does."
            )
        return notes

    def metric(self, name: str) -> Metric:
        """See `Task`."""
        return metric_of(self._described, name)

    def digest(self, number: int | None = None) -> str:
        """See `Task`."""
        documents = [[asked.doc, asked.fingerprints] for asked in islice(self._asked.values(), number)]
        return digest(_FORMAT, str(self.task.VERSION), *documents)

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        return {"data": self.digest(), "documents": self.num_documents} | self._described

    def documents(self, tokenizer: Any, context_length: int, truncate: bool = False) -> list[TaskDocument]:
        """What is asked of the model; `truncate` changes nothing, as the harness always cuts.

        Raises:
            CogsymError: the harness asks for what a sweep cannot do.
        """
        from cogsym.sweeps.tasks.harness_requests import Encoder

        encoder = Encoder(tokenizer, context_length)
        documents = []
        for key, asked in self._asked.items():
            requests: list[Request] = []
            self._pieces[key] = []
            for instance in asked.instances:
                of_instance = encoder.requests(instance)
                self._pieces[key].append(len(of_instance))
                requests += of_instance
            if not requests:
                raise CogsymError(f"The {key} of the task {self.name} asks for nothing; leave it out of the data.")
            documents.append(TaskDocument(key, tuple(requests)))
        self._cut = encoder.cut
        return documents

    def measure(self, document: TaskDocument, outcomes: Sequence[Outcome]) -> list[Measure]:
        """What the answers to a document's requests say of it; the first measure's text has the responses as JSON."""
        from cogsym.sweeps.tasks.harness_requests import response

        asked, answers = self._asked[document.key], iter(outcomes)
        responses = {
            name: response(instance, list(islice(answers, number)))
            for name, instance, number in zip(
                asked.fingerprints, asked.instances, self._pieces[document.key], strict=True
            )
        }
        measured: dict[str, Statistics] = {}
        for name, item in self.items(document.key, responses).items():
            known = self._known.get(
                name, ("mean", True) if name.partition(",")[0] not in self.task.aggregation() else None
            )
            if known:
                measured[name] = AGGREGATIONS[known[0]].statistics(item)
        if not measured:  # something has to hold the responses
            measured = _carried(outcomes)
        said = json.dumps(responses, ensure_ascii=False)
        return [
            Measure(name, float(self.metric(name).combine(np.array(sums))), sums, None if i else said)
            for i, (name, sums) in enumerate(measured.items())
        ]

    def items(self, key: str, responses: Mapping[str, Any]) -> dict[str, Any]:
        """What the harness's filters and metrics make of the responses to a document's requests.

        Args:
            key: of the document.
            responses: by fingerprint; see `cogsym.sweeps.tasks.harness_requests.response`.

        Returns:
            metric,filter -> an item of the list that is aggregated.
        """
        asked = self._asked[key]
        for name, instance in zip(asked.fingerprints, asked.instances, strict=True):
            found = responses[name]
            instance.resps = [tuple(found) if isinstance(found, list) else found] * (instance.repeats or 1)
            instance.filtered_resps = {}
        self.task._instances = asked.instances
        self.task.apply_filters()
        return {
            f"{metric},{filtered}": item
            for filtered in asked.instances[0].filtered_resps
            for metric, item in self.task.process_results(
                asked.doc, [instance.filtered_resps[filtered] for instance in asked.instances]
            ).items()
        }

    @property
    def keys(self) -> list[str]:
        """Of the documents, in order."""
        return list(self._asked)

    def aggregate(self, name: str, items: list[Any]) -> float:
        """The harness's aggregation of a metric's items; the mean where the task has none, as there."""
        found = self.task.aggregation().get(name.partition(",")[0])
        return float(found(items) if found else sum(items) / len(items))

    @property
    def _described(self) -> dict[str, Any]:
        return {"metrics": {name: list(known) for name, known in self._known.items()}}

    def _memoise(self) -> None:
        """Let the harness fill its templates once a document, not once a configuration: it compiles them anew."""
        filled: dict[tuple[str, int], Any] = {}
        docs = {id(asked.doc) for asked in self._asked.values()}

        def once(name: str, make: Any) -> Any:
            def of(doc: Any, *more: Any) -> Any:
                if more or id(doc) not in docs:
                    return make(doc, *more)
                if (name, id(doc)) not in filled:
                    filled[name, id(doc)] = make(doc)
                found = filled[name, id(doc)]
                return [*found] if isinstance(found, list) else found

            return of

        for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            if hasattr(self.task, name):
                setattr(self.task, name, once(name, getattr(self.task, name)))


def load_harness(what: str) -> list[HarnessTask]:
    """The tasks that "lm_eval:NAME,limit=100" and the like stand for, their data read and their requests recorded.

    Raises:
        CogsymError: lm_eval is not installed, there is no such task, or a setting or the task cannot be.
    """
    spec, settings = _named(what.removeprefix(PREFIX))
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CogsymError(
            f"The task {what} is one of lm-evaluation-harness, which is not installed; pip install 'cogsym[lm_eval]'."
        ) from error
    of_file = Path(spec).suffix in (".yaml", ".yml")
    if of_file and not Path(spec).is_file():
        raise CogsymError(f"{spec} does not exist, expected a task file of lm-evaluation-harness.")
    with _quiet_and_seeded():
        try:
            manager = TaskManager(include_path=settings.include_path, include_defaults=not of_file)
            if not of_file and spec not in manager.all_tasks:
                close = difflib.get_close_matches(spec, manager.all_tasks, n=1)
                suggestion = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them."
                raise CogsymError(f"lm-evaluation-harness has no task {spec!r}; {suggestion}")
            loaded = manager.load([spec])
        except CogsymError:
            raise
        except Exception as error:
            raise CogsymError(
                f"The task {spec} of lm-evaluation-harness does not load ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); see that its data are there, on disk or on the hub."
            ) from error
        tasks, groups = loaded["tasks"], list(loaded["groups"].values())
        if settings.name and len(tasks) > 1:
            raise CogsymError(f"The name {settings.name!r} is for one task and {what} stands for {len(tasks)}.")
        return [
            HarnessTask(task, groups, replace(settings, name=settings.name or name)) for name, task in tasks.items()
        ]


def _named(text: str) -> tuple[str, _Settings]:
    spec, *changes = re.split(r",(?=\w+=)", text)
    given: dict[str, Any] = {}
    for name, _, word in (change.partition("=") for change in changes):
        if name not in _SETTINGS:
            raise unknown("setting", name, _SETTINGS, f" of the task {PREFIX}{spec}")
        least = {"limit": 1, "num_fewshot": 0}.get(name)
        if least is not None and not (word.isdecimal() and int(word) >= least):
            raise CogsymError(
                f"The setting {name} of the task {PREFIX}{spec} is {word!r}, expected a whole number from {least}."
            )
        given[name] = word if least is None else int(word)
    if given.get("side", "perception") not in get_args(Side):
        raise CogsymError(
            f"The side {given['side']!r} of the task {PREFIX}{spec} is unknown, expected {' or '.join(get_args(Side))}."
        )
    return spec, _Settings(**given)


def _record(task: Any, settings: _Settings) -> dict[str, _Asked]:
    """What the task asks, by document, built as the harness's `simple_evaluate` builds it."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from cogsym.sweeps.tasks.harness_requests import fingerprint

    for flag, word in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows the model pictures")):
        if getattr(task, flag, False):
            raise CogsymError(f"The task {settings.name} {word}, which a sweep does not do; leave it out.")
    fewshot = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and fewshot != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    task.build_all_requests(limit=settings.limit, rank=0, world_size=1)
    asked: dict[str, _Asked] = {}
    for instance in task.instances:
        of = asked.setdefault(f"document {instance.doc_id}", _Asked(instance.doc, [], []))
        of.instances.append(instance)
        of.fingerprints.append(fingerprint(instance))
    for of in asked.values():
        of.instances.sort(key=lambda instance: instance.idx)
        of.fingerprints[:] = map(fingerprint, of.instances)
    return asked


def _known_metrics(task: Any) -> dict[str, tuple[str, bool]]:
    """metric,filter -> (its aggregation, whether higher is better), of those that are functions of sums."""
    from lm_eval.api.registry import get_aggregation

    names = {get_aggregation(name): name for name in AGGREGATIONS}
    better = task.higher_is_better()
    return {
        f"{metric},{filtered.name}": (names[aggregation], bool(better.get(metric, True)))
        for filtered in task._filters
        for metric, aggregation in task.aggregation().items()
        if aggregation in names
    }


def _carrier(writes: bool) -> str:
    return "empty" if writes else "log_likelihood"


def _carried(outcomes: Sequence[Outcome]) -> dict[str, Statistics]:
    """A metric of our own of a document of which the harness has none that sums."""
    scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
    written = [outcome for outcome in outcomes if isinstance(outcome, Generated)]
    if not scored:
        return {_carrier(True): (float(sum(not w.text.strip() for w in written)), float(len(written)))}
    nats, tokens = sum(s.log_likelihood for s in scored), sum(s.num_tokens for s in scored)
    return {_carrier(False): (nats, float(tokens))}


@contextlib.contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """No bars, and what tasks draw while they are built drawn as ever; chance goes on afterwards where it was."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
