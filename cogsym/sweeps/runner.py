"""A sweep from beginning to end: configurations and tasks in, rows of results out."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from cogsym.errors import CogsymError, RunStopped, SettingError
from cogsym.memory import free_bytes, out_of_memory
from cogsym.models.loading import load_tokenizer
from cogsym.models.paths import own_forwards
from cogsym.models.precision import stream_dtype
from cogsym.ranks import Ranks, join
from cogsym.signals import as_interrupts, exit_status
from cogsym.sweeps.engine.agreement import check_agreement
from cogsym.sweeps.engine.answers import Answers
from cogsym.sweeps.engine.budget import PassMemory, TokenBytes, largest
from cogsym.sweeps.engine.duration import DurationEstimate
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.load import load_layers, num_layers
from cogsym.sweeps.engine.requests import Generate, TaskDocument
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import LayerSource, ResidentLayers, StreamedLayers
from cogsym.sweeps.layers.actions import ACTIONS
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct
from cogsym.sweeps.layers.schedule import schedule
from cogsym.sweeps.layers.search import SEARCHES, Round, Search, SearchSettings
from cogsym.sweeps.layers.trie import Trie
from cogsym.sweeps.progress import SweepProgress, counted
from cogsym.sweeps.results.bootstrap import FEW
from cogsym.sweeps.results.harness import write_harness_results
from cogsym.sweeps.results.store import Results, Row, check_started, read_key, summary, values
from cogsym.sweeps.settings import SweepSettings
from cogsym.sweeps.tasks.kinds import Side
from cogsym.sweeps.tasks.loading import LoadedTask, load_tasks

if TYPE_CHECKING:
    import pandas as pd


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
        configs: as `cogsym.sweeps.layers.configurations.configurations` takes them, such as
            "input,output"; or a search for them, "greedy" or "beam", by the first metric of the first task.
        tasks: as `cogsym.sweeps.tasks.loading.load_tasks` takes them.
        out: folder of the results.
        tokenizer: of the model; needed where that is not a folder or id.
        base: a folder or id, or a model of the same shapes, whose layers `revert` puts in.
        settings: how it runs.
        resume: go on with what `out` holds.
        dry_run: say what it would cost, and stop.
        console: where plan and progress go; standard error by default.

    Returns:
        what `cogsym.sweeps.results.store.summary` says of the folder; None after a dry run.

    Raises:
        CogsymError: something the user can put right.
        RunStopped: it ended early; the results so far are kept.
    """
    settings, ranks = settings or SweepSettings(), join()
    console = console or Console(stderr=True) if ranks.first else Console(file=io.StringIO(), quiet=True)

    def prepared(stack: ExitStack) -> tuple[_Sweep, list[LoadedTask], list[Round], Search | None]:
        """Everything that is asked for, checked and loaded, before any rank writes."""
        if tokenizer is None and not isinstance(model, (str, Path)):
            raise CogsymError("The sweep was given a model without its tokenizer; pass tokenizer=.")
        read = tokenizer or load_tokenizer(model)
        loaded_tasks = load_tasks(tasks, settings.separator)
        rounds, merged, search = _chosen(configs, num_layers(model), settings)
        if not dry_run:
            check_started(out, resume)
        needs_base = any(ACTIONS[n].needs_base for asked in rounds for c in asked.configurations for n in c.actions)
        # A resumed sweep keeps the arithmetic that it began with, on whichever machine.
        before = read_key(out) if resume and not dry_run else {}
        widened = before.get("products") is not None if before else None
        weights = settings.weights or before.get("weights")
        say = partial(_say, console)
        layers = load_layers(model, base, read, settings.stream, settings.dtype, widened, weights, needs_base, say)
        if isinstance(layers, ResidentLayers):
            stack.callback(layers.close)
        running = _Sweep(layers, read, rounds, loaded_tasks, settings, console, ranks)
        running.check_memory()
        running.describe(merged)
        running.check_memory()
        if not dry_run:
            running.check_agreement()
        return running, loaded_tasks, rounds, search

    with ExitStack() as stack:
        running, loaded_tasks, rounds, search = ranks.agreed(lambda: prepared(stack))
        if dry_run:
            return None
        key = running.key(str(model) if isinstance(model, (str, Path)) else None)
        digests = {task.name: task.digest for task in loaded_tasks}
        opened = Results.open(out, key, resume=resume, ranks=ranks, digest=lambda name, n: digests[name](n))
        results = stack.enter_context(opened)
        with as_interrupts(), running.progress() as progress:
            try:
                if search:
                    running.search(search, results, progress, Path(out))
                else:
                    running.ask(rounds[0].configurations, results, progress)
            except KeyboardInterrupt as error:
                stopped = RunStopped(
                    f"The sweep was stopped; what {out} holds is whole, go on with --resume.", exit_status(error)
                )
                raise ranks.once(stopped) from error

    def ended() -> pd.DataFrame:
        write_harness_results(out, loaded_tasks)
        return summary(out)

    return ranks.on_first(ended)


def _chosen(
    configs: str | Path | Iterable[Any], layers: int, settings: SweepSettings
) -> tuple[list[Round], int, Search | None]:
    """(What is asked in each round, how many duplicates were merged, the search that chooses the rounds)."""
    ACTIONS[settings.action]
    if isinstance(configs, str) and configs in SEARCHES:
        search = SEARCHES[configs](SearchSettings(layers, settings.action, settings.remove, settings.width))
        return list(search.planned()), 0, search
    for name, value in (("remove", settings.remove), ("width", settings.width)):
        if value is not None:
            raise SettingError(
                name,
                f"is {value} and only a search takes it; name one in the place of the configurations: "
                f"{', '.join(SEARCHES)}.",
            )
    once, merged = distinct(configurations(configs, layers, settings.action))
    return [Round(once, 1)], merged, None


_PIECE_SECONDS = 30.0  # that a piece should take: results are there by then
_FIRST_PIECE, _GROWTH = 8, 4  # documents of the first, whose speed is not known, and how much more the next may have


class _Sweep:
    """What `sweep` does once everything is loaded."""

    def __init__(
        self,
        layers: LayerSource,
        tokenizer: Any,
        rounds: Sequence[Round],
        tasks: Sequence[LoadedTask],
        settings: SweepSettings,
        console: Console,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._layers, self._tokenizer, self._tasks, self._settings = layers, tokenizer, tasks, settings
        self._say, self._console = partial(_say, console), console
        self._streamed = isinstance(layers, StreamedLayers)
        # Documents that a piece of a task may have, by (its name, how many configurations); seconds that a document of
        # a task takes in all rounds, as far as they are estimated.
        self._at_once: dict[tuple[str, int], int] = {}
        self._seconds: dict[str, float] = {}
        self._check_actions({name for asked in rounds for c in asked.configurations for name in c.actions})
        self._engine, self._head = Engine(layers), SweepHead(layers.model)
        self._rounds = [(Trie(asked.configurations, self._engine.topology), asked.times) for asked in rounds]
        self._sizes = TokenBytes.of(layers)
        self._budget = settings.memory_budget or free_bytes(layers.device) // 2
        config = layers.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 1 << 30
        self._documents = [task.documents(tokenizer, context, settings.truncate) for task in tasks]
        self._check_tokens()
        memories = [PassMemory(self._sizes, trie) for trie, _ in self._rounds]
        self._most = largest({t.name: of for t, of in zip(tasks, self._documents, strict=True)}, memories)
        self._leave_room_for_packing()
        ends = getattr(layers.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        stops = Stops(tokenizer, [i for i in {*ends, tokenizer.eos_token_id} if i is not None])
        self._answers = Answers(layers, self._engine, self._head, stops, settings.sampling)

    def _check_actions(self, names: set[str]) -> None:
        if self._layers.reasons and not all(ACTIONS[name].whole for name in names):
            raise CogsymError(
                f"Half a layer cannot be skipped in this model, as its layers run their own forward "
                f"({self._layers.reasons[0]}); skip whole layers."
            )

    def _check_tokens(self) -> None:
        rows = self._layers.model.get_input_embeddings().weight.shape[0]
        last = max(max(r.tokens) for documents in self._documents for d in documents for r in d.requests)
        if last >= rows:
            raise CogsymError(
                f"The tokenizer gives the id {last} and the model's vocabulary has {rows:,} tokens; use the tokenizer "
                "that belongs to the model."
            )

    def _leave_room_for_packing(self) -> None:
        """Give a part of a budget that was named to a second copy of the weights, or make none."""
        if self._settings.memory_budget is None or not isinstance(self._layers, ResidentLayers):
            return
        writes = any(isinstance(r, Generate) for documents in self._documents for d in documents for r in d.requests)
        self._layers.packs &= writes and self._layers.packed_bytes() + self._most[0] <= self._budget
        if self._layers.packs:
            self._budget -= self._layers.packed_bytes()

    def check_memory(self) -> None:
        """Warn where a document takes more than the budget by itself; with `strict_memory` raise CogsymError."""
        needed, document = self._most
        if needed > self._budget:
            mib, most = (f"{number / 2**20:,.1f} MiB" for number in (self._budget, needed))
            sentence = f"The memory budget is {mib} and {document} takes up to {most} by itself"
            if self._settings.strict_memory:
                raise CogsymError(f"{sentence}; give at least that, or ask for fewer configurations at a time.")
            self._say(f"Warning: {sentence}, which will be used.")

    def check_agreement(self) -> None:
        """Raise CogsymError where the unablated configuration is not the model's own forward on the first document."""
        task, document = self._tasks[0], self._documents[0][0]
        tokens = max((request.tokens for request in document.requests), key=len)
        check_agreement(self._engine, self._head, tokens, f"{document.key} of {task.name}")

    def key(self, name: str | None) -> dict[str, Any]:
        """What a result depends on beside its configuration; a model has a name of its own."""
        revisions = self._layers.revisions()
        sampling = asdict(self._settings.sampling)
        return {
            "model": name or self._layers.model.config.name_or_path,
            "revision": revisions["model"],
            "base": revisions.get("base"),
            "tokenizer": hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "sampling": sampling if sampling["temperature"] else {"temperature": 0.0},
            "truncate": self._settings.truncate,
            "products": "float32" if self._layers.widened else None,  # None: of the weights' own type
            **({"weights": "int8"} if self._layers.int8 else {}),
            "tasks": {task.name: task.describe() for task in self._tasks},
        }

    def describe(self, merged: int) -> None:
        """Print the plan, and how many duplicates were merged."""
        counts = [(trie.counts(), times) for trie, times in self._rounds]
        at_most = "at most " if any(times > 1 for _, times in counts) else ""
        rounds = f" in {len(counts):,} rounds" if len(counts) > 1 else ""
        duplicates = f", {counted(merged, 'duplicate')} merged" if merged else ""
        number = counted(sum(c.configurations * times for c, times in counts), "configuration")
        self._say(f"{at_most}{number}{rounds}{duplicates}")
        for note in (note for task in self._tasks for note in task.notes):
            self._say(note)
        dtype = stream_dtype(self._layers.model)
        for line in own_forwards(self._layers.blocks, self._layers.reasons, self._layers.device, dtype):
            self._say(line)
        for task, documents in zip(self._tasks, self._documents, strict=True):
            if len(documents) < FEW:
                number = counted(len(documents), "document")
                self._say(f"Warning: the task {task.name} has {number}; intervals from fewer than {FEW} mean little.")
        self._say(
            f"layer-forwards: {at_most}{sum(c.layer_forwards * times for c, times in counts):,.0f}, where a loop over "
            f"the kept layers needs {sum(c.kept_layers * times for c, times in counts):,.0f} and one that computes and "
            f"discards {sum(c.all_layers * times for c, times in counts):,}; head-forwards: "
            f"{at_most}{sum(c.head_forwards * times for c, times in counts):,}"
        )
        first, _ = self._rounds[0]
        memory, slots = PassMemory(self._sizes, first), schedule(first, narrow=False).slots
        pieces = [p for of in self._documents for p in memory.pieces(of, self._budget, self._streamed)]
        largest = max(map(memory.of, pieces)) / 2**20
        self._say(
            f"{counted(sum(map(len, self._documents)), 'document')} in {counted(len(pieces), 'piece')}, at most "
            f"{counted(slots, 'live state')}, {largest:,.0f} MiB of {self._budget / 2**20:,.0f} MiB"
            f"{' in the first round' if len(counts) > 1 else ''}"
        )
        if self._ranks.size > 1:
            self._say(f"{self._ranks.size} ranks share the documents out; progress is that of one of them")
        if self._layers.reasons or self._streamed:
            return
        block = next(self._layers.walk([(0, {"model"})]))["model"].block
        assert block is not None
        estimate, total = DurationEstimate(block, self._head, self._layers), 0.0
        for task, documents in zip(self._tasks, self._documents, strict=True):
            seconds = sum(times * estimate.seconds(t, documents) for t, times in self._rounds)
            self._seconds[task.name] = seconds / len(documents)
            total += seconds
        self._say(f"about {total / self._ranks.size:,.0f} s")

    def progress(self) -> SweepProgress:
        """Of all rounds, this rank's share."""
        shares = {
            task.name: len(self._rounds) * len(documents[self._ranks.rank :: self._ranks.size])
            for task, documents in zip(self._tasks, self._documents, strict=True)
        }
        progress = SweepProgress(self._console, shares, self._seconds or dict.fromkeys(shares, 1.0))
        self._engine.on_forwards = progress.forwards
        return progress

    def search(self, search: Search, results: Results, progress: SweepProgress, out: Path) -> None:
        """Ask what a search wants to know of the first metric of the first task."""
        task, name = self._tasks[0].name, self._tasks[0].metrics[0]
        metric = self._tasks[0].metric(name)

        def ask(chosen: list[Configuration]) -> dict[str, float]:
            self.ask(chosen, results, progress)
            return self._ranks.on_first(lambda: values(out, task, name))

        def report(words: str, value: float) -> None:
            self._say(f"{words}: {metric.label} {value:.4g}")

        search.run(ask, metric.higher_is_better, report)

    def ask(self, chosen: Sequence[Configuration], results: Results, progress: SweepProgress) -> None:
        """Ask everything about some configurations that is not in `results` yet; of several ranks each its share."""
        found = self._ranks.on_first(lambda: {task.name: results.done(task.name) for task in self._tasks})
        for task, documents in zip(self._tasks, self._documents, strict=True):
            done, alike = found[task.name], dict[tuple[Configuration, ...], list[TaskDocument]]()
            for document in documents:
                missing = tuple(c for c in chosen if (c.code, document.key) not in done)
                alike.setdefault(missing, []).append(document)
            for some, share in self._shared(alike):
                if some:
                    self._ask(task, share, Trie(some, self._engine.topology), results, progress)
                else:
                    progress.documents(task.name, len(share), computed=False)
        self._ranks.wait()

    def _shared(
        self, groups: Mapping[tuple[Configuration, ...], list[TaskDocument]]
    ) -> Iterator[tuple[tuple[Configuration, ...], list[TaskDocument]]]:
        """Of groups of documents that this rank has, every so many-th, counted through them all."""
        before = 0
        for some, group in groups.items():
            if share := group[(self._ranks.rank - before) % self._ranks.size :: self._ranks.size]:
                yield some, share
            before += len(group)

    def _ask(
        self,
        task: LoadedTask,
        documents: list[TaskDocument],
        trie: Trie,
        results: Results,
        progress: SweepProgress,
    ) -> None:
        """Ask about documents a piece at a time; where one does not fit into memory, it and the others are halved."""
        memory, most = PassMemory(self._sizes, trie), len(documents)
        sort = task.name, len(trie.configurations)
        of_round = self._seconds.get(task.name, 0.0) / len(self._rounds)
        first = max(1, min(_FIRST_PIECE, int(_PIECE_SECONDS / max(of_round, 1e-3))))
        at_once = most if self._streamed else self._at_once.get(sort, first)
        while documents:
            piece = documents[: min(most, at_once, memory.piece(documents, self._budget, self._streamed))]
            began = time.monotonic()
            try:
                rows = list(self._rows(task, piece, trie))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                rows = []
            if rows:
                results.append(rows)
                if not self._streamed:  # where a piece takes a pass over the checkpoint
                    within = _PIECE_SECONDS / max(time.monotonic() - began, 1e-3) * len(piece)
                    at_once = max(1, min(int(within), _GROWTH * len(piece)))
                    self._at_once[sort] = at_once
                progress.documents(task.name, len(piece), computed=True)
                documents = documents[len(piece) :]
            elif len(piece) > 1:
                most = len(piece) // 2
                self._say(f"Out of memory with {len(piece)} documents; going on with {most} at a time.")
            else:
                raise RunStopped(
                    f"The document {piece[0].key} of the task {task.name} does not fit into memory under "
                    f"{counted(len(trie.configurations), 'configuration')}; what came before is kept, ask for fewer "
                    "configurations at a time and go on with --resume."
                )

    def _rows(self, task: LoadedTask, piece: Sequence[TaskDocument], trie: Trie) -> Iterator[Row]:
        requests = [request for document in piece for request in document.requests]
        for c, outcomes in enumerate(self._answers(requests, trie)):
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


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
