"""A sweep from beginning to end: configurations and tasks in, rows of results out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from cogsym.errors import CogsymError, RunStopped
from cogsym.models.loading import check_model_folder, load_model, load_tokenizer
from cogsym.sweeps.choose import Sampling, Stops
from cogsym.sweeps.configs import Action, Configuration, configurations, distinct
from cogsym.sweeps.costs import Clock, Costs, Sizes, free_memory
from cogsym.sweeps.engine import Engine
from cogsym.sweeps.generate import generate
from cogsym.sweeps.heads import SweepHead
from cogsym.sweeps.layers import Layers, ResidentLayers, StreamedLayers
from cogsym.sweeps.own import generate_own
from cogsym.sweeps.progress import SweepProgress
from cogsym.sweeps.requests import Document, Generate, Outcome, Score
from cogsym.sweeps.results import Results, Row, Side, summary
from cogsym.sweeps.score import score
from cogsym.sweeps.tasks import Task, load_task
from cogsym.sweeps.trie import Trie

if TYPE_CHECKING:
    import pandas as pd

_RECORD = "_cogsym"  # what `cogsym.prepare` leaves on a model


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep runs.

    Attributes:
        action: what "input", "output", "grid" ... do to the layers they choose.
        sampling: how tokens are chosen where the model writes.
        truncate: read documents that are longer than the context in windows, or cut their beginnings; else they are
            refused.
        separator: the token before each document; None leaves it to the task and the tokenizer.
        memory_budget: bytes for states, keys and values; None is half of what is free.
        stream: read the layers one at a time from the checkpoint; None does so where the model does not fit.
        dtype: of the weights; None takes the checkpoint's own.
    """

    action: Action = "skip"
    sampling: Sampling = field(default_factory=Sampling)
    truncate: bool = False
    separator: str | None = None
    memory_budget: int | None = None
    stream: bool | None = None
    dtype: torch.dtype | None = None


def sweep(
    model: Any,
    configs: str | Path | Iterable[Any],
    tasks: Sequence[str | Path | Mapping[str, Any]],
    out: str | Path,
    *,
    tokenizer: Any = None,
    base: Any = None,
    settings: SweepSettings | None = None,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> pd.DataFrame | None:
    """Run tasks under many layer configurations of one model in one pass.

    Configurations share every state they have in common. Rows go to OUT/results as they come, in parts that a kill
    leaves whole; the same call with `resume` goes on.

    Args:
        model: a folder or hub id, or a causal language model of transformers; peft's wrapper has its adapters merged,
            and `revert` takes them away.
        configs: as `cogsym.sweeps.configs.configurations` takes them, such as "input,output".
        tasks: as `cogsym.sweeps.tasks.load_task` takes each.
        out: folder of the results.
        tokenizer: of the model; needed where that is not a folder or id.
        base: a folder or id, or a model of the same shapes, whose layers `revert` puts in.
        settings: how it runs.
        resume: go on with what `out` holds.
        dry_run: say what it would cost, and stop.
        console: where plan and progress go; standard error by default.

    Returns:
        what `cogsym.sweeps.results.summary` says of the folder; None after a dry run.

    Raises:
        CogsymError: something the user can put right.
        RunStopped: it ended early; the results so far are kept.
    """
    settings = settings or SweepSettings()
    console = console or Console(stderr=True)
    if tokenizer is None:
        if not isinstance(model, (str, Path)):
            raise CogsymError("The sweep was given a model without its tokenizer; pass tokenizer=.")
        tokenizer = load_tokenizer(model)
    loaded_tasks = [load_task(task, settings.separator) for task in tasks]
    if not loaded_tasks:
        raise CogsymError("The sweep was given no task; name at least one, such as text:news.jsonl#sw.")
    names = [task.name for task in loaded_tasks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise CogsymError(f"Two tasks are named {repeated[0]}; give one of them another name=.")
    layers = _layers(model, base, settings, console)
    try:
        running = _Sweep(layers, tokenizer, configs, loaded_tasks, settings, console)
        running.describe()
        if dry_run:
            return None
        key = running.key(str(model) if isinstance(model, (str, Path)) else layers.model.config.name_or_path)
        with Results.open(out, key, resume=resume) as results:
            running.run(results)
    except KeyboardInterrupt as error:
        raise RunStopped(f"The sweep was stopped; what {out} holds is whole, go on with --resume.", 130) from error
    finally:
        if isinstance(layers, ResidentLayers):
            layers.close()
    return summary(out)


def _layers(model: Any, base: Any, settings: SweepSettings, console: Console) -> Layers:
    """The model in memory, or streamed where that is asked for or it does not fit."""
    if isinstance(model, (str, Path)):
        stream = settings.stream
        if stream is None:
            stream = _checkpoint_bytes(model) + (_checkpoint_bytes(base) if base else 0) > 2 * free_memory(
                torch.device("cpu")
            )
            if stream:
                console.print("The model does not fit into memory: its layers are read one at a time.")
        if stream:
            if base is not None and not isinstance(base, (str, Path)):
                raise CogsymError("A streamed sweep takes its base from a folder too; save it with save_pretrained.")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return StreamedLayers(model, base, settings.dtype, device)
        model = load_model(model, settings.dtype)
        if torch.cuda.is_available():
            model = model.to("cuda")
    elif settings.stream:
        raise CogsymError(
            "Layers are streamed from a folder, and the sweep was given a model in memory; name a folder."
        )
    if hasattr(model, "peft_config"):
        import copy

        base = copy.deepcopy(model).unload() if base is None else base
        model = copy.deepcopy(model).merge_and_unload()
    if hasattr(model, _RECORD):
        raise CogsymError("The model is prepared for training; call cogsym.restore(model) before a sweep.")
    if isinstance(base, (str, Path)):
        base = load_model(base, model.dtype).to(model.device)
    return ResidentLayers(model.eval(), base)


def _checkpoint_bytes(name: str | Path) -> int:
    folder = check_model_folder(name)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


class _Sweep:
    """What `sweep` does once everything is loaded."""

    def __init__(
        self,
        layers: Layers,
        tokenizer: Any,
        configs: str | Path | Iterable[Any],
        tasks: Sequence[Task],
        settings: SweepSettings,
        console: Console,
    ) -> None:
        self._layers, self._tokenizer, self._tasks, self._console = layers, tokenizer, tasks, console
        self._settings = settings
        config = layers.model.config.get_text_config()
        chosen = configurations(configs, config.num_hidden_layers, settings.action)
        self._configurations, self._merged = distinct(chosen)
        self._check_actions()
        self._engine, self._head = Engine(layers), SweepHead(layers.model)
        self._trie = Trie(self._configurations, self._engine.own_forward)
        context = getattr(config, "max_position_embeddings", None) or 1 << 30
        self._documents = [task.documents(tokenizer, context, settings.truncate) for task in tasks]
        self._budget = settings.memory_budget or free_memory(layers.device)
        costs = Costs(Sizes.of(layers), self._trie)
        streamed = isinstance(layers, StreamedLayers)
        self._pieces = [costs.pieces(documents, self._budget, streamed) for documents in self._documents]
        self._largest = max(costs.of(piece) for pieces in self._pieces for piece in pieces)
        ends = getattr(layers.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = [i for i in {*ends, tokenizer.eos_token_id} if i is not None]

    def _check_actions(self) -> None:
        actions = {action for configuration in self._configurations for action in configuration.actions}
        if "revert" in actions and not self._layers.has_base:
            raise CogsymError("A configuration reverts layers but there is no base checkpoint; name one with base.")
        if self._layers.reasons and actions & {"skip_attention", "skip_mlp"}:
            raise CogsymError(
                f"Half a layer cannot be skipped in this model, as its layers run their own forward "
                f"({self._layers.reasons[0]}); skip whole layers."
            )

    def key(self, name: str) -> dict[str, Any]:
        """What a result depends on beside its configuration."""
        revisions = self._layers.revisions()
        sampling = asdict(self._settings.sampling)
        return {
            "model": name,
            "revision": revisions["model"],
            "base": revisions.get("base"),
            "sampling": sampling if sampling["temperature"] else {"temperature": 0.0},
            "truncate": self._settings.truncate,
            "tasks": {task.name: {"data": task.digest} for task in self._tasks},
        }

    def describe(self) -> None:
        """Print the plan."""
        counts, say = self._trie.counts(), self._console.print
        merged = f", {self._merged} duplicates merged" if self._merged else ""
        say(f"{counts.configurations:,} configurations{merged}", highlight=False)
        for note in (note for task in self._tasks for note in task.notes):
            say(note, highlight=False)
        if self._layers.reasons:
            say(f"layers run their own forward, a state at a time: {'; '.join(self._layers.reasons)}", highlight=False)
        say(
            f"layer-forwards: {counts.layer_forwards:,.0f}, where a loop over the kept layers needs "
            f"{counts.kept_layers:,.0f} and one that computes and discards {counts.all_layers:,}; "
            f"head-forwards: {counts.head_forwards:,}",
            highlight=False,
        )
        slots = self._trie.schedule(narrow=False).slots
        pieces = sum(map(len, self._pieces))
        documents = sum(map(len, self._documents))
        say(
            f"{documents:,} documents in {pieces:,} pieces, at most {slots:,} live states, "
            f"{self._largest / 2**20:,.0f} MiB of {self._budget / 2**20:,.0f} MiB",
            highlight=False,
        )
        if self._layers.reasons or isinstance(self._layers, StreamedLayers):
            return
        first = next(self._layers.walk([(0, {"model"})]))["model"].block
        assert first is not None
        clock = Clock(first, self._head, self._layers)
        seconds = sum(clock.seconds(self._trie, documents) for documents in self._documents)
        say(f"about {seconds:,.0f} s", highlight=False)

    def run(self, results: Results) -> None:
        """Ask everything that is not in `results` yet."""
        total = sum(len(documents) for documents in self._documents)
        with SweepProgress(self._console, total) as progress:
            self._engine.on_forwards = progress.forwards
            for task, pieces in zip(self._tasks, self._pieces, strict=True):
                done = results.done(task.name)
                for piece in pieces:
                    missing = [c for c in self._configurations if any((c.code, d.key) not in done for d in piece)]
                    if missing:
                        rows = self._answer(task, piece, missing)
                        results.append([row for row in rows if (row.configuration.code, row.document) not in done])
                    progress.documents(task.name, len(piece), computed=bool(missing))

    def _answer(self, task: Task, piece: Sequence[Document], missing: Sequence[Configuration]) -> list[Row]:
        """The rows of a piece; one that does not fit into memory is halved."""
        everything = len(missing) == len(self._configurations)
        trie = self._trie if everything else Trie(missing, self._engine.own_forward)
        try:
            return list(self._rows(task, piece, trie))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        if len(piece) == 1:
            raise RunStopped(
                f"The document {piece[0].key} of the task {task.name} does not fit into memory under "
                f"{len(missing)} configurations; ask for fewer at a time and go on with --resume."
            )
        self._console.print(f"Out of memory with {len(piece)} documents; trying them in halves.")
        middle = len(piece) // 2
        return self._answer(task, piece[:middle], missing) + self._answer(task, piece[middle:], missing)

    def _rows(self, task: Task, piece: Sequence[Document], trie: Trie) -> Iterator[Row]:
        for c, outcomes in enumerate(self._outcomes(piece, trie)):
            answers = iter(outcomes)
            for document in piece:
                of_document = list(islice(answers, len(document.requests)))
                for measure in task.measure(document, of_document):
                    yield Row(
                        configuration=trie.configurations[c],
                        task=task.name,
                        language=task.language,
                        side=cast(Side, task.side),
                        document=document.key,
                        metric=measure.metric,
                        value=measure.value,
                        statistics=measure.statistics,
                        text=measure.text,
                    )

    def _outcomes(self, piece: Sequence[Document], trie: Trie) -> list[list[Outcome]]:
        """[configuration][request of the piece]."""
        requests = [request for document in piece for request in document.requests]
        outcomes: list[list[Any]] = [[None] * len(requests) for _ in trie.configurations]
        scores = [(i, request) for i, request in enumerate(requests) if isinstance(request, Score)]
        prompts = [(i, request) for i, request in enumerate(requests) if isinstance(request, Generate)]
        if scores:
            found = score(self._engine, self._head, trie, [request for _, request in scores])
            for row, answers in zip(outcomes, found, strict=True):
                for (i, _), answer in zip(scores, answers, strict=True):
                    row[i] = answer
        if prompts:
            written = self._generate(trie, [request for _, request in prompts])
            for row, texts in zip(outcomes, written, strict=True):
                for (i, _), text in zip(prompts, texts, strict=True):
                    row[i] = text
        return outcomes

    def _generate(self, trie: Trie, requests: list[Generate]) -> Any:
        stops, sampling = Stops(self._tokenizer, self._ends), self._settings.sampling
        if self._engine.own_forward:
            return generate_own(self._layers, trie.configurations, requests, stops, sampling)
        return generate(self._engine, self._head, trie, requests, stops, sampling)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
