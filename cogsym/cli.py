"""The command line: `cogsym train`, `cogsym sweep`, `cogsym plot`, `cogsym demo`, `cogsym bench`, `cogsym info`.

Each command checks its arguments, calls the function of the same name in Python and prints the outcome. torch and
transformers are imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cogsym.errors import CogsymError

app = typer.Typer(
    name="cogsym",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Teach a language model a new language by training its outermost layers and freezing the middle.",
    epilog="New here? `cogsym demo` shows the whole thing in two minutes, without network or files.",
)


class Schedule(enum.StrEnum):
    """How the learning rate falls."""

    cosine = "cosine"
    linear = "linear"


class Dtype(enum.StrEnum):
    """What weights are stored in and products computed in."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Loss(enum.StrEnum):
    """Which side of a pair is learned."""

    all = "all"
    target = "target"


def _option(text: str, *names: str, panel: str | None = None, **extra: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **extra)


@app.command(
    epilog="Example: `cogsym train HuggingFaceTB/SmolLM2-135M --data news.jsonl#swahili --eval dev.jsonl#swahili "
    "--out smollm2-sw`"
)
def train(
    model: Annotated[str, typer.Argument(help="A model folder (safetensors) or the id of a model on the hub.")],
    data: Annotated[
        list[str],
        _option(
            "Text to learn: .txt (a document a line), .jsonl, .tsv, .parquet or a `datasets` folder. PATH#FIELD "
            "names the column, PATH@2 shows it twice as often. Repeat the option to mix several."
        ),
    ],
    out: Annotated[Path, _option("Folder for the model, the loss curve, the numbers and the checkpoints.")],
    template: Annotated[
        str | None,
        _option('How a pair becomes a text, columns in braces: "English: {en}\\nSwahili: {sw}".', panel="Text"),
    ] = None,
    loss: Annotated[Loss, _option("Learn all the text, or the last column of the template.", panel="Text")] = Loss.all,
    evaluate: Annotated[
        list[str] | None,
        _option(
            "Held-out text, PATH or PATH#FIELD, scored in bits per byte before and after; repeatable.",
            "--eval",
            panel="Text",
        ),
    ] = None,
    length: Annotated[int, _option("Tokens a row; documents are packed into rows.", panel="Text")] = 512,
    separator: Annotated[
        str | None,
        _option("The token between documents; the tokenizer's bos or eos where it is left out.", panel="Text"),
    ] = None,
    fraction: Annotated[
        float | None, _option("Share of the layers to train, outermost first; 0.25 by default.", panel="Layers")
    ] = None,
    front: Annotated[int | None, _option("Train this many of the first layers.", panel="Layers")] = None,
    back: Annotated[int | None, _option("Train this many of the last layers.", panel="Layers")] = None,
    layers: Annotated[
        str | None,
        _option(
            "Train these layers: a list such as 0-3,26-29, or a strategy with its options such as first,k=4.",
            panel="Layers",
        ),
    ] = None,
    everything: Annotated[bool, _option("Full fine-tuning, for comparison.", "--all-layers", panel="Layers")] = False,
    embeddings: Annotated[bool, _option("Train the embeddings too.", "--embeddings", panel="Layers")] = False,
    head: Annotated[bool, _option("Train the output head too.", "--head", panel="Layers")] = False,
    final_norm: Annotated[bool, _option("Train the final norm too.", "--final-norm", panel="Layers")] = False,
    lora_rank: Annotated[
        int | None, _option("Train LoRA adapters of this rank on those layers, not their weights.", panel="Layers")
    ] = None,
    learning_rate: Annotated[float, _option("Peak rate of AdamW.", panel="Optimisation")] = 3e-4,
    schedule: Annotated[Schedule, _option("How the rate falls to 0.", panel="Optimisation")] = Schedule.cosine,
    warmup: Annotated[float, _option("Share of the steps in which the rate rises.", panel="Optimisation")] = 0.05,
    weight_decay: Annotated[float, _option("Of AdamW.", panel="Optimisation")] = 0.0,
    batch_size: Annotated[int, _option("Rows a forward pass.", panel="Optimisation")] = 4,
    accumulation: Annotated[int, _option("Forward passes an optimizer step.", panel="Optimisation")] = 1,
    epochs: Annotated[float, _option("Passes over the text.", panel="Optimisation")] = 1.0,
    steps: Annotated[int | None, _option("Optimizer steps, instead of epochs.", panel="Optimisation")] = None,
    dtype: Annotated[
        Dtype,
        _option(
            "Precision; auto stores frozen weights in 16 bits and computes in what the processor is fastest in.",
            panel="Optimisation",
        ),
    ] = Dtype.auto,
    seed: Annotated[int, _option("Of the shuffle and of LoRA's first weights.", panel="Optimisation")] = 0,
    keep: Annotated[
        str,
        _option(
            "What frozen layers hold for the backward pass: all, attention, input, offload (GPU) or nothing, each less "
            "and slower than the one before; auto fits --memory.",
            panel="Memory",
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        _option("What frozen layers may hold, such as 4GB; half of what is free by default.", panel="Memory"),
    ] = None,
    eval_every: Annotated[int | None, _option("Evaluate every so many steps too.", panel="Run")] = None,
    save_every: Annotated[int, _option("Write a checkpoint every so many steps.", panel="Run")] = 200,
    resume: Annotated[bool, _option("Go on from the last checkpoint in --out.", "--resume", panel="Run")] = False,
) -> None:
    """Adapt a model to new text by training its outermost layers.

    Writes OUT/model, a folder that plain `from_pretrained` loads, with OUT/loss.png and OUT/metrics.jsonl beside it.
    Ctrl-C saves and stops; the same command with --resume goes on.
    """
    _quiet_transformers()
    from cogsym import LayerPlan, TrainSettings
    from cogsym.data import Source
    from cogsym.memory import parse_bytes
    from cogsym.models.loading import load_config
    from cogsym.training.finetune import train as run

    settings = TrainSettings(
        length=length,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        steps=steps,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        weight_decay=weight_decay,
        dtype=dtype.value,
        lora_rank=lora_rank,
        keep=keep,
        memory_budget=None if memory is None else parse_bytes(memory),
        loss=loss.value,
        separator=separator,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
    )
    strategy, options = _strategy(everything, layers, {"fraction": fraction, "front": front, "back": back})
    num_layers = load_config(model).get_text_config().num_hidden_layers
    parts = {"embeddings": embeddings, "head": head, "final_norm": final_norm}
    plan = LayerPlan.all(num_layers) if everything else LayerPlan.choose(num_layers, strategy, options, **parts)

    def source(text: str) -> Source:
        parsed = Source.parse(text)
        return parsed if parsed.field else Source(parsed.path, template=template, weight=parsed.weight)

    held_out = {s.path.stem if not s.field else f"{s.path.stem}-{s.field}": s for s in map(source, evaluate or [])}
    result = run(
        model,
        [source(text) for text in data],
        out,
        plan=plan,
        evaluate=held_out,
        settings=settings,
        resume=resume,
        cache_dir=_cache_dir(),
    )
    for name in held_out:
        scores = result.bits_per_byte(name)
        typer.echo(f"{name}: {scores[0]:.3f} bits per byte before, {scores[-1]:.3f} after")
    typer.echo(
        f"{result.steps:,} steps, {result.tokens_per_second:,.0f} tokens/s. The model is in {result.folder}, "
        f"the curve in {out / 'loss.png'}."
    )


def _strategy(everything: bool, layers: str | None, outer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layer strategy that the options of `train` ask for, with its options; contradictions are refused."""
    from cogsym.strategies import parse_strategy

    options = {name: value for name, value in outer.items() if value is not None}
    given = [*(["--all-layers"] * everything), *([f"--layers {layers}"] * (layers is not None))]
    if given and len(given := [*given, *(f"--{name} {value}" for name, value in options.items())]) > 1:
        raise CogsymError(f"{given[0]} and {given[1]} both say which layers are trained; give one of them.")
    return ("outer", options) if layers is None else parse_strategy(layers)


@app.command(
    epilog="Example: `cogsym sweep smollm2-sw/model --task xcopa-sw:sw.test.jsonl --task text:dev.jsonl#sw,language=sw "
    "--out smollm2-sweep`"
)
def sweep(
    model: Annotated[str, typer.Argument(help="A model folder (safetensors) or the id of a model on the hub.")],
    task: Annotated[
        list[str],
        _option(
            "What to ask: a built-in task with its data, such as xcopa-sw:sw.test.jsonl; text:PATH#FIELD,language=sw "
            "for bits per byte; or a task file. Settings follow after commas: limit=100. Repeatable."
        ),
    ],
    out: Annotated[Path, _option("Folder for the results.")],
    configs: Annotated[
        str,
        _option(
            "Which layers: input, output, grid, single, blocks, several with commas between; a .json or .yaml file "
            "with a list such as `- {skip: [0, 1, 28-29]}`; or greedy or beam, searches for the layers that are missed "
            "least by the first metric of the first task.",
            panel="Layers",
        ),
    ] = "input,output",
    action: Annotated[
        str,
        _option("What input, output ... do to their layers, such as skip, skip_mlp or revert.", panel="Layers"),
    ] = "skip",
    remove: Annotated[
        int | None, _option("How many layers a search removes; half of them by default.", panel="Layers")
    ] = None,
    width: Annotated[
        int | None, _option("How many sets of layers beam follows; four by default.", panel="Layers")
    ] = None,
    base: Annotated[
        str | None, _option("The model before it was adapted, whose layers `revert` puts in.", panel="Layers")
    ] = None,
    temperature: Annotated[
        float, _option("Draw tokens at this temperature; 0 takes the most likely.", panel="Writing")
    ] = 0.0,
    top_p: Annotated[float, _option("Draw from the tokens that reach this probability.", panel="Writing")] = 1.0,
    seed: Annotated[int, _option("Of the draws.", panel="Writing")] = 0,
    truncate: Annotated[
        bool, _option("Cut documents that are longer than the context; else they are refused.", "--truncate")
    ] = False,
    separator: Annotated[
        str | None, _option("The token before each document; the tokenizer's bos or eos where it is left out.")
    ] = None,
    dtype: Annotated[
        Dtype,
        _option(
            "Precision; auto keeps the checkpoint's weights and computes in what the processor is fastest in.",
            panel="Run",
        ),
    ] = Dtype.auto,
    memory: Annotated[
        str | None, _option("What states and caches may take, such as 4GB; half of what is free.", panel="Run")
    ] = None,
    strict_memory: Annotated[
        bool, _option("Refuse documents that need more by themselves.", "--strict-memory", panel="Run")
    ] = False,
    stream: Annotated[
        bool | None,
        _option("Read layers one at a time from disk; by default only where the model does not fit.", panel="Run"),
    ] = None,
    dry_run: Annotated[bool, _option("Say what it would cost, and stop.", "--dry-run", panel="Run")] = False,
    resume: Annotated[bool, _option("Go on with what --out holds.", "--resume", panel="Run")] = False,
) -> None:
    """Run tasks under many layer configurations of a model in one pass.

    Writes OUT/results, Parquet parts with a row for each document, configuration and metric. `cogsym plot OUT` draws
    them. Ctrl-C stops; the same command with --resume goes on.
    """
    _quiet_transformers()
    import torch

    from cogsym.memory import parse_bytes
    from cogsym.sweeps.engine.sampling import Sampling
    from cogsym.sweeps.progress import counted
    from cogsym.sweeps.runner import SweepSettings
    from cogsym.sweeps.runner import sweep as run

    settings = SweepSettings(
        action=action,
        remove=remove,
        width=width,
        sampling=Sampling(temperature, top_p, seed),
        truncate=truncate,
        separator=separator,
        memory_budget=None if memory is None else parse_bytes(memory),
        strict_memory=strict_memory,
        stream=stream,
        dtype={Dtype.auto: None, Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}[dtype],
    )
    found = run(model, configs, task, out, base=base, settings=settings, resume=resume, dry_run=dry_run)
    if found is not None:
        unablated = found[found["direction"] == "none"]
        for _, line in unablated.iterrows():
            typer.echo(
                f"{line['task']}, {line['metric']}, every layer kept: {line['value']:.4g} "
                f"({line['low']:.4g} to {line['high']:.4g})"
            )
        number = counted(found["configuration"].nunique(), "configuration")
        typer.echo(f"{number} in {out}; `cogsym plot {out}` draws them.")


@app.command(epilog="Example: `cogsym plot smollm2-sweep --metric margin`")
def plot(
    results: Annotated[Path, typer.Argument(help="The folder that `cogsym sweep` wrote.", metavar="OUT")],
    out: Annotated[Path | None, _option("Folder for the pictures, OUT where it is left out.")] = None,
    metric: Annotated[
        list[str] | None,
        _option("Draw this metric instead of accuracy, log-likelihood, bits per byte and chrF++; repeatable."),
    ] = None,
) -> None:
    """Draw what a sweep found: perception and production against the layers that are missing.

    Writes each picture as PNG and SVG: `directions` has curves from each end of the model, `grid` maps first against
    last layers, `layers` and `blocks` show single layers and contiguous ones, as far as the sweep ran them.
    """
    from cogsym.sweeps.results.plots import plot as draw

    for path in draw(results, out, metric or ()):
        typer.echo(path)


@app.command(epilog="Example: `cogsym demo --out my-demo`")
def demo(
    out: Annotated[Path, _option("Folder for the table and the plots.")] = Path("cogsym-demo"),
    seed: Annotated[int, _option("Of the data's order.")] = 0,
) -> None:
    """Watch a small model learn a small new language, with the outer layers and with all of them.

    A base model that ships with cogsym knows one generated language; the demo teaches it a second one, twice, and
    compares. It needs no network and no files, and about two minutes on a laptop.
    """
    _quiet_transformers()
    from cogsym.demo.comparison import run_demo

    run_demo(out, seed=seed)


@app.command(
    epilog="Examples: `cogsym bench --quick`, `cogsym bench train --full`, `cogsym bench compare A.json B.json`"
)
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ops|overhead|train|sweep|generate|install]... | compare A B",
            help="The questions to measure, all of them where none is named; or two result files to compare.",
        ),
    ] = None,
    model: Annotated[str | None, _option("A named model, with random weights, or a model folder.")] = None,
    device: Annotated[str, _option("cpu or cuda.")] = "cpu",
    full: Annotated[bool, _option("Three minutes, or everything.", "--full/--quick")] = False,
    out: Annotated[Path, _option("Folder for the result files and pictures.")] = Path("cogsym-bench"),
    resume: Annotated[bool, _option("Go on with the result files in --out.", "--resume")] = False,
    case: Annotated[str, _option("Only cases whose names contain these words.")] = "",
) -> None:
    """Measure what cogsym gains on this machine, beside the alternatives; or compare two measurements.

    A quick run takes three minutes on two cores. `compare` exits with status 1 where B is slower than A by more than
    the noise.
    """
    _quiet_transformers()
    from rich.console import Console

    from cogsym.bench import compare, report
    from cogsym.bench.suite import STUDIES, run

    words = what or list(STUDIES)
    if words[0] != "compare":
        command = shlex.join(["cogsym", "bench", *words, "--full" if full else "--quick", "--device", device])
        command += f" --model {shlex.quote(Path(model).name)}" if model else ""
        command += f" --case {shlex.quote(case)}" if case else ""
        run(words, model=model, device=device, full=full, out=out, command=command, resume=resume, only=case)
        return
    if len(words) != 3:
        raise CogsymError(
            f"compare was given {len(words) - 1} files, expected two: cogsym bench compare A.json B.json."
        )
    a, b = (report.read(Path(word)) for word in words[1:])
    if compare.show(compare.compare(a, b, (words[1], words[2])), Console()):
        raise typer.Exit(1)


@app.command(epilog="Example: `COGSYM_BACKEND=reference cogsym info`")
def info() -> None:
    """Show versions, the processor, the GPU and what computes each operation here."""
    from cogsym.info import describe

    rows = describe()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("cogsym")


def _quiet_transformers() -> None:
    """Our own progress is enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft asks transformers for this by a name that is going away, which no user can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def main() -> None:
    """Run the command line; a user's error is one sentence and an exit status, never a traceback."""
    try:
        app()
    except CogsymError as error:
        _end(str(error), error.exit_status)
    except KeyboardInterrupt:
        _end("stopped at once; nothing after the last checkpoint was saved.", 130)


def _end(sentence: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"cogsym: {sentence}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is left would be flushed once more at the end, and that failure be the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
