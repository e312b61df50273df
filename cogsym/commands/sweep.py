"""`cogsym sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogsym.commands.options import Dtype, Stored, option, quiet_transformers
from cogsym.commands.recipe import Model


def sweep(
    model: Model,
    task: Annotated[
        list[str],
        option(
            "What to ask: a built-in task with its data, such as xcopa-sw:sw.test.jsonl; text:PATH#FIELD,language=sw "
            "for bits per byte; a task file; or lm_eval:NAME, one of lm-evaluation-harness. Settings follow after "
            "commas: limit=100. Repeatable."
        ),
    ],
    out: Annotated[Path, option("Folder for the results.")],
    configs: Annotated[
        str,
        option(
            "Which layers: input, output, grid, single, blocks, several with commas between; a .json or .yaml file "
            "with a list such as `- {skip: [0, 1, 28-29]}`; or greedy or beam, searches for the layers that are missed "
            "least by the first metric of the first task.",
            panel="Layers",
        ),
    ] = "input,output",
    action: Annotated[
        str,
        option("What input, output ... do to their layers, such as skip, skip_mlp or revert.", panel="Layers"),
    ] = "skip",
    remove: Annotated[
        int | None, option("How many layers a search removes; half of them by default.", panel="Layers")
    ] = None,
    width: Annotated[
        int | None, option("How many sets of layers beam follows; four by default.", panel="Layers")
    ] = None,
    base: Annotated[
        str | None, option("The model before it was adapted, whose layers `revert` puts in.", panel="Layers")
    ] = None,
    temperature: Annotated[
        float, option("Draw tokens at this temperature; 0 takes the most likely.", panel="Writing")
    ] = 0.0,
    top_p: Annotated[float, option("Draw from the tokens that reach this probability.", panel="Writing")] = 1.0,
    seed: Annotated[int, option("Of the draws.", panel="Writing")] = 0,
    truncate: Annotated[
        bool, option("Cut documents that are longer than the context; else they are refused.", "--truncate")
    ] = False,
    separator: Annotated[
        str | None, option("The token before each document; the tokenizer's bos or eos where it is left out.")
    ] = None,
    dtype: Annotated[
        Dtype,
        option(
            "Precision; auto keeps the checkpoint's weights and computes in what the processor is fastest in.",
            panel="Run",
        ),
    ] = Dtype.auto,
    weights: Annotated[
        Stored | None,
        option(
            "Hold the layers' weights in 8 bits, half of bfloat16's memory; results are then of a model a little "
            "different.",
            panel="Run",
        ),
    ] = None,
    memory: Annotated[
        str | None, option("What states and caches may take, such as 4GB; half of what is free.", panel="Run")
    ] = None,
    strict_memory: Annotated[
        bool, option("Refuse documents that need more by themselves.", "--strict-memory", panel="Run")
    ] = False,
    stream: Annotated[
        bool | None,
        option("Read layers one at a time from disk; by default only where the model does not fit.", panel="Run"),
    ] = None,
    dry_run: Annotated[bool, option("Say what it would cost, and stop.", "--dry-run", panel="Run")] = False,
    resume: Annotated[bool, option("Go on with what --out holds.", "--resume", panel="Run")] = False,
) -> None:
    """Run tasks under many layer configurations of a model in one pass.

    Writes OUT/results, Parquet parts with a row for each document, configuration and metric. `cogsym plot OUT` draws
    them. Ctrl-C stops; the same command with --resume goes on. A recipe, a .yaml file with these options, can stand in
    the place of MODEL: `cogsym recipe sweep` prints one.
    """
    quiet_transformers()
    import torch

    from cogsym.memory import parse_bytes
    from cogsym.sweeps.engine.sampling import Sampling
    from cogsym.sweeps.progress import counted
    from cogsym.sweeps.runner import sweep as run
    from cogsym.sweeps.settings import SweepSettings

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
        weights="int8" if weights is Stored.int8 else None,
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
