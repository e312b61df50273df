"""`cogsym demo`: adapt the base model to Tavosi by the CogSym recipe, without and with its embeddings, and in full."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cogsym.data import Document
from cogsym.demo.ablation import ablate
from cogsym.demo.language import RELATIVES, TAVOSI
from cogsym.demo.plots import plot
from cogsym.demo.tasks import OPTIONS, ROW, HeldOut, Scores, chrf_metric, held_out, score, training_documents
from cogsym.errors import CogsymError, RunStopped
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.plan import LayerPlan
from cogsym.records import reason, write_whole
from cogsym.signals import exit_status
from cogsym.training.finetune import TrainResult, train
from cogsym.training.settings import TrainSettings

STEPS = 330
BATCH = 2  # rows a step
HELD_OUT = 100  # test meanings
EVALUATIONS = 6  # points of the curve
EXAMPLES = 3  # translations shown
DOCUMENTS_PER_STEP = 15 * BATCH  # a row holds about 13, so that none is read twice


@dataclass(frozen=True)
class Method:
    """One way to adapt the base model.

    Attributes:
        name: its column and its folder.
        fraction: share of the layers trained, the outer ones; None trains everything.
        embeddings: the embeddings are trained too, and the head, which is tied to them.
        learning_rate: the peak.
    """

    name: str
    fraction: float | None
    embeddings: bool
    learning_rate: float

    def plan(self, num_layers: int) -> LayerPlan:
        """What is trained."""
        if self.fraction is None:
            return LayerPlan.all(num_layers)
        return LayerPlan.outer(num_layers, self.fraction, embeddings=self.embeddings, head=self.embeddings)


# Each at the best of the rates that were tried for this many steps.
METHODS = (
    Method("cogsym", 0.25, False, 5e-3),
    Method("cogsym-embeddings", 0.25, True, 5e-3),
    Method("full", None, True, 3e-3),
)
LABELS = {
    "before": "before",
    "cogsym": "outer 25 %",
    "cogsym-embeddings": "outer 25 %, embeddings",
    "full": "full",
}
BEST = "cogsym-embeddings"  # the one whose layers are looked into


@contextmanager
def base_folder() -> Iterator[Path]:
    """The folder of the base model that ships with the package."""
    with as_file(files("cogsym.demo") / "base") as folder:
        yield folder


def run_demo(
    out: Path, seed: int = 0, steps: int = STEPS, count: int = HELD_OUT, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo and write `demo.json`, `demo.png`, `demo.svg`, the adapted models and a sweep to `out`.

    All methods train on the same documents in the same order for the same number of steps, in float32.

    Args:
        out: folder to write; an earlier demo there is replaced.
        seed: of the training documents, their order, and the test items.
        steps: optimizer steps of each method, of `BATCH` rows of `ROW` tokens.
        count: test meanings.
        console: where tables and progress go; standard output by default.

    Returns:
        What `demo.json` holds.

    Raises:
        CogsymError: `out` cannot be written, or holds files that no demo wrote.
        RunStopped: it was interrupted, or training was; it has to start anew.
    """
    started = time.monotonic()
    console = console or Console()
    _make_folder(out, {"language": TAVOSI.name, "seed": seed, "steps": steps})
    with base_folder() as folder, _starting_anew(out):
        tokenizer = load_tokenizer(folder)
        base = load_model(folder, torch.float32)
        items = held_out(tokenizer, count, seed)
        documents = training_documents(steps * DOCUMENTS_PER_STEP, seed)
        _introduce(console, base, documents, items)
        scores = {"before": score(base, tokenizer, items)}
        results: dict[str, TrainResult] = {}
        for method in METHODS:
            console.rule(LABELS[method.name])
            model = load_model(folder, torch.float32)
            results[method.name] = _adapt(model, tokenizer, method, documents, items, out, seed, steps, console)
            scores[method.name] = score(results[method.name].model, tokenizer, items)
        console.rule("ablation")
        console.print("Which layers understand Tavosi, perception, and which write it, production?")
        left, pictures = ablate(out / BEST / "model", items, out / "sweep", console)
    report = _report(seed, steps, items, scores, results, base.num_parameters(), time.monotonic() - started)
    _write(out, report)
    plot(report, LABELS, out / "demo.png", out / "demo.svg")
    console.rule("result")
    console.print(_table(report))
    console.print(_examples(report))
    console.print(conclusion(report), highlight=False)
    console.print(left, highlight=False)
    console.print(
        f"After {report['seconds']:.0f} s, {out} holds demo.json, demo.png, demo.svg, the adapted models in "
        f"{', '.join(f'{method.name}/model' for method in METHODS)}, and what ablation leaves of the second in "
        f"sweep/{pictures[0].name}."
    )
    return report


def conclusion(report: dict[str, Any]) -> str:
    """One sentence on what the numbers of a report say."""
    before, alone, best, full = (report["scores"][name] for name in LABELS)
    trained, everything = (report["training"][name] for name in (BEST, "full"))
    share = trained["trained_parameters"] / everything["trained_parameters"]
    time_taken = trained["seconds"] / everything["seconds"]
    return (
        f"With {share:.0%} of the parameters trained, in {time_taken:.0%} of the time of full training, the outer "
        f"quarter with the embeddings understands {report['language']}, with the right meaning in "
        f"{best['accuracy']:.0%} of the questions (full {full['accuracy']:.0%}, before {before['accuracy']:.0%}), and "
        f"writes it at chrF++ {best['chrf']:.1f} (full {full['chrf']:.1f}, before {before['chrf']:.1f}; the outer "
        f"quarter without the embeddings {alone['chrf']:.1f})."
    )


@contextmanager
def _starting_anew(out: Path) -> Iterator[None]:
    """Whatever ends the demo says that it starts anew: it has no `--resume`, which training and sweeps advise."""
    again = f"`cogsym demo` starts anew and replaces what {out} holds"
    try:
        yield
    except KeyboardInterrupt as error:
        raise RunStopped(f"The demo was stopped; {again}.", exit_status(error)) from error
    except RunStopped as error:
        what = "The demo was stopped" if error.exit_status > 128 else str(error).partition(";")[0].rstrip(".")
        raise RunStopped(f"{what}; {again}.", error.exit_status) from error


def _make_folder(out: Path, started: dict[str, Any]) -> None:
    """Make a folder that is new, empty or an earlier demo's ready; demo.json says that it is a demo's."""
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "demo.json").exists():
            raise CogsymError(f"{out} holds files that no demo wrote; choose an empty or a new folder for --out.")
        for name in (*(method.name for method in METHODS), "sweep"):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
        out.mkdir(parents=True, exist_ok=True)
        _write(out, started)
    except OSError as error:
        raise CogsymError(f"The folder {out} cannot be written ({reason(error)}); choose another one.") from error


def _write(out: Path, report: dict[str, Any]) -> None:
    write_whole(out / "demo.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def _introduce(console: Console, base: Any, documents: list[Document], items: HeldOut) -> None:
    console.print(
        f"A model of {base.num_parameters():,} parameters in {base.config.num_hidden_layers} layers knows simple "
        f"English and {len(RELATIVES)} invented languages; it learns another one, {TAVOSI.name}, from "
        f"{len(documents):,} sentences and pairs such as\n",
        highlight=False,
    )
    for document in documents[:3]:
        console.print(f"  {document.text}", highlight=False, markup=False)
    console.print(f"\nIt is asked about {len(items.sources)} meanings that it was never shown.\n", highlight=False)


def _adapt(
    model: Any,
    tokenizer: Any,
    method: Method,
    documents: list[Document],
    items: HeldOut,
    out: Path,
    seed: int,
    steps: int,
    console: Console,
) -> TrainResult:
    settings = TrainSettings(
        length=ROW,
        batch_size=BATCH,
        steps=steps,
        learning_rate=method.learning_rate,
        dtype="fp32",
        eval_every=max(1, steps // EVALUATIONS),
        save_every=steps,
        log_every=max(1, steps // EVALUATIONS),
        seed=seed,
    )
    return train(
        model,
        [documents],
        out / method.name,
        tokenizer=tokenizer,
        plan=method.plan(model.config.num_hidden_layers),
        evaluate={TAVOSI.name: [Document(sentence) for sentence in items.references]},
        settings=settings,
        console=console,
    )


def _report(
    seed: int,
    steps: int,
    items: HeldOut,
    scores: dict[str, Scores],
    results: dict[str, TrainResult],
    parameters: int,
    seconds: float,
) -> dict[str, Any]:
    key = f"eval_{TAVOSI.name}_bits_per_byte"
    metric = chrf_metric()
    metric.corpus_score(scores["before"].translations, [items.references])
    return {
        "language": TAVOSI.name,
        "seed": seed,
        "steps": steps,
        "test_meanings": len(items.sources),
        "parameters": parameters,
        "chance": 1 / OPTIONS,
        "floor_bits_per_byte": items.new_floor,
        "chrf_signature": str(metric.get_signature()),
        "scores": {name: asdict(value) for name, value in scores.items()},
        "training": {
            method.name: {
                "learning_rate": method.learning_rate,
                "trained_parameters": results[method.name].trained_parameters,
                "seconds": results[method.name].seconds,
                "tokens_per_second": results[method.name].tokens_per_second,
                "curve": [
                    {"tokens": line["tokens"], "bits_per_byte": line[key]}
                    for line in results[method.name].history
                    if key in line
                ],
            }
            for method in METHODS
        },
        "sources": items.sources,
        "references": items.references,
        "seconds": seconds,
    }


def _table(report: dict[str, Any]) -> Table:
    language, scores, training = report["language"], report["scores"], report["training"]
    table = Table(title=f"{report['test_meanings']} unseen meanings, seed {report['seed']}", title_justify="left")
    table.add_column("")
    for label in LABELS.values():
        table.add_column(label, justify="right")

    def add(label: str, key: str, pattern: str) -> None:
        table.add_row(label, *(pattern.format(scores[name][key]) for name in LABELS))

    table.add_row("[bold]perception")
    add(f"  right meaning among {OPTIONS} (chance {report['chance']:.0%})", "accuracy", "{:.0%}")
    add("  margin over the best wrong one, nats", "margin", "{:.2f}")
    add("  log p of the right meaning, nats", "understanding", "{:.1f}")
    table.add_row("[bold]production")
    add(f"  bits per byte of {language} (at best {report['floor_bits_per_byte']:.2f})", "bits_per_byte", "{:.2f}")
    add(f"  chrF++, English to {language}", "chrf", "{:.1f}")
    add("  translations right to the letter", "exact", "{:.0%}")
    table.add_row("[bold]retention")
    add("  bits per byte of English", "base_bits_per_byte", "{:.2f}")
    table.add_row("[bold]training")
    for label, key, pattern in (
        ("  trained parameters", "trained_parameters", "{:,}"),
        ("  seconds", "seconds", "{:.0f}"),
        ("  tokens per second", "tokens_per_second", "{:,.0f}"),
    ):
        table.add_row(label, "-", *(pattern.format(training[method.name][key]) for method in METHODS))
    return table


def _examples(report: dict[str, Any]) -> Table:
    table = Table(title="Translations", title_justify="left", show_header=False, box=None)
    for i, (source, reference) in enumerate(zip(report["sources"][:EXAMPLES], report["references"], strict=False)):
        table.add_row("English", source)
        for name, label in LABELS.items():
            table.add_row(label, report["scores"][name]["translations"][i])
        table.add_row("right", reference, end_section=True)
        table.add_row()
    return table
