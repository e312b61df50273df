"""`cogsym train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from cogsym.commands.options import Dtype, Loss, Schedule, Stored, Tracker, cache_dir, option, quiet_transformers
from cogsym.commands.recipe import Model
from cogsym.errors import CogsymError


def train(
    model: Model,
    data: Annotated[
        list[str],
        option(
            "Text to learn: .txt (a document a line), .jsonl, .tsv, .csv, each also with .gz behind, .parquet or a "
            "`datasets` folder. PATH#FIELD "
            "names the column, PATH@2 shows it twice as often. Repeat the option to mix several."
        ),
    ],
    out: Annotated[Path, option("Folder for the model, the loss curve, the numbers and the checkpoints.")],
    template: Annotated[
        str | None,
        option('How a pair becomes a text, columns in braces: "English: {en}\\nSwahili: {sw}".', panel="Text"),
    ] = None,
    chat: Annotated[
        str | None,
        option(
            "The column with a chat, a list of messages with role and content: the tokenizer's chat template writes it "
            "out, and what the assistant says is learned.",
            panel="Text",
        ),
    ] = None,
    loss: Annotated[Loss, option("Learn all the text, or the last column of the template.", panel="Text")] = Loss.all,
    evaluate: Annotated[
        list[str] | None,
        option(
            "Held-out text, PATH or PATH#FIELD, scored in bits per byte before and after; repeatable. Or a part of "
            "--data that is then not learned, such as 5%.",
            "--eval",
            panel="Text",
        ),
    ] = None,
    length: Annotated[
        int | None,
        option(
            "Tokens a row, into which documents are packed; 512, or the model's context where that is less.",
            panel="Text",
        ),
    ] = None,
    separator: Annotated[
        str | None,
        option("The token between documents; the tokenizer's bos or eos where it is left out.", panel="Text"),
    ] = None,
    language: Annotated[
        str | None, option("Code of the text's language, such as sw, for the model's card.", panel="Text")
    ] = None,
    fraction: Annotated[
        float | None, option("Share of the layers to train, outermost first; 0.25 by default.", panel="Layers")
    ] = None,
    front: Annotated[int | None, option("Train this many of the first layers.", panel="Layers")] = None,
    back: Annotated[int | None, option("Train this many of the last layers.", panel="Layers")] = None,
    layers: Annotated[
        str | None,
        option(
            "Train these layers: a list such as 0-3,26-29, or a strategy with its options such as first,k=4.",
            panel="Layers",
        ),
    ] = None,
    everything: Annotated[bool, option("Full fine-tuning, for comparison.", "--all-layers", panel="Layers")] = False,
    embeddings: Annotated[bool, option("Train the embeddings too.", "--embeddings", panel="Layers")] = False,
    head: Annotated[bool, option("Train the output head too.", "--head", panel="Layers")] = False,
    final_norm: Annotated[bool, option("Train the final norm too.", "--final-norm", panel="Layers")] = False,
    lora_rank: Annotated[
        int | None, option("Train LoRA adapters of this rank on those layers, not their weights.", panel="Layers")
    ] = None,
    save_adapter: Annotated[
        bool,
        option(
            "Save the LoRA adapters too, in OUT/adapter as peft does, beside the model into which they are merged.",
            "--save-adapter",
            panel="Layers",
        ),
    ] = False,
    optim: Annotated[
        str,
        option(
            "The optimizer, by the name that transformers' Trainer has for it: adamw_torch_fused, adafactor, sgd, or "
            "adamw_8bit and others where their package is installed.",
            panel="Optimisation",
        ),
    ] = "adamw_torch_fused",
    learning_rate: Annotated[
        float,
        option(
            "Peak rate. With AdamW, on a model of 135 M parameters the best of four was 0.002 for the outer quarter, "
            "0.0008 for all layers and 0.008 for LoRA; larger models take less.",
            panel="Optimisation",
        ),
    ] = 3e-4,
    schedule: Annotated[Schedule, option("How the rate falls to 0.", panel="Optimisation")] = Schedule.cosine,
    warmup: Annotated[float, option("Share of the steps in which the rate rises.", panel="Optimisation")] = 0.05,
    weight_decay: Annotated[float, option("Of the optimizer.", panel="Optimisation")] = 0.0,
    batch_size: Annotated[int, option("Rows a forward pass, of each rank under torchrun.", panel="Optimisation")] = 4,
    accumulation: Annotated[int, option("Forward passes an optimizer step.", panel="Optimisation")] = 1,
    epochs: Annotated[float, option("Passes over the text.", panel="Optimisation")] = 1.0,
    steps: Annotated[int | None, option("Optimizer steps, instead of epochs.", panel="Optimisation")] = None,
    dtype: Annotated[
        Dtype,
        option(
            "Precision; auto stores frozen weights in 16 bits and computes in what the processor is fastest in.",
            panel="Optimisation",
        ),
    ] = Dtype.auto,
    seed: Annotated[int, option("Of the shuffle and of LoRA's first weights.", panel="Optimisation")] = 0,
    keep: Annotated[
        str,
        option(
            "What frozen layers hold for the backward pass: all, attention, input, offload (GPU) or nothing, each less "
            "and slower than the one before; auto fits --memory.",
            panel="Memory",
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        option("What frozen layers may hold, such as 4GB; half of what is free by default.", panel="Memory"),
    ] = None,
    frozen: Annotated[
        Stored | None,
        option(
            "Hold the weights of frozen layers in 8 bits, a quarter of float32's memory; what is saved has them as "
            "they were.",
            panel="Memory",
        ),
    ] = None,
    stream: Annotated[
        bool,
        option(
            "Leave frozen layers on disk and read each as it is needed, for a model larger than memory; MODEL is a "
            "folder, and --keep input or nothing keeps the rest small too.",
            "--stream",
            panel="Memory",
        ),
    ] = False,
    fsdp: Annotated[
        bool,
        option(
            "Under torchrun: leave each rank a part of the weights (FSDP2), for a model larger than one GPU's memory.",
            "--fsdp",
            panel="Memory",
        ),
    ] = False,
    eval_every: Annotated[int | None, option("Evaluate every so many steps too.", panel="Run")] = None,
    save_every: Annotated[int, option("Write a checkpoint every so many steps.", panel="Run")] = 200,
    report_to: Annotated[
        Tracker, option("Send the numbers to this tracker too; TensorBoard's are in OUT/runs.", panel="Run")
    ] = Tracker.none,
    push_to_hub: Annotated[
        str | None,
        option(
            "Upload the model to this repository of the Hugging Face hub at the end: my-name/my-model.", panel="Run"
        ),
    ] = None,
    dry: Annotated[
        bool, option("Say what it would cost in tokens, time, memory and disk, and stop.", "--dry-run", panel="Run")
    ] = False,
    resume: Annotated[bool, option("Go on from the last checkpoint in --out.", "--resume", panel="Run")] = False,
) -> None:
    """Adapt a model to new text by training its outermost layers.

    Writes OUT/model, a folder that plain `from_pretrained` loads, with a model card, and OUT/loss.png and
    OUT/metrics.jsonl beside it. Ctrl-C saves and stops; the same command with --resume goes on. A recipe, a .yaml file
    with these options, can stand in the place of MODEL: `cogsym recipe` prints one.
    """
    quiet_transformers()
    from cogsym import LayerPlan, TrainSettings
    from cogsym.data import Source
    from cogsym.memory import parse_bytes
    from cogsym.models.loading import load_config
    from cogsym.training.finetune import dry_run
    from cogsym.training.finetune import train as run

    held_out_share, evaluate = _share(evaluate or [])
    config = load_config(model).get_text_config()
    if length is None:
        length = min(TrainSettings.length, getattr(config, "max_position_embeddings", None) or TrainSettings.length)
    settings = TrainSettings(
        length=length,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        steps=steps,
        optim=optim,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        weight_decay=weight_decay,
        dtype=dtype.value,
        lora_rank=lora_rank,
        save_adapter=save_adapter,
        keep=keep,
        memory_budget=None if memory is None else parse_bytes(memory),
        frozen_weights="int8" if frozen is Stored.int8 else None,
        stream=stream,
        fsdp=fsdp,
        loss=loss.value,
        separator=separator,
        hold_out=held_out_share,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        language=language,
        report_to=report_to.value,
        push_to_hub=push_to_hub,
    )
    strategy, options = _strategy(everything, layers, {"fraction": fraction, "front": front, "back": back})
    num_layers = config.num_hidden_layers
    parts = {"embeddings": embeddings, "head": head, "final_norm": final_norm}
    plan = LayerPlan.all(num_layers) if everything else LayerPlan.choose(num_layers, strategy, options, **parts)

    def source(text: str) -> Source:
        parsed = Source.parse(text)
        return parsed if parsed.field else Source(parsed.path, template=template, weight=parsed.weight, chat=chat)

    sources = [source(text) for text in data]
    held_out: dict[str, Source] = {}
    for text in evaluate:
        held = source(text)
        name = held.path.stem if not held.field else f"{held.path.stem}-{held.field}"
        if name in held_out:
            raise CogsymError(f"--eval is given two texts of the name {name}, {text} the second; rename one file.")
        held_out[name] = held
    for name, value in (("--template", template), ("--chat", chat)):
        if value is not None and all(s.field for s in (*sources, *held_out.values())):
            raise CogsymError(
                f"{name} is given and every text names a column, as {data[0]} does; leave the column or {name} out."
            )
    if dry:
        if resume:
            raise CogsymError("--dry-run says what a run costs from its beginning; leave --resume out.")
        dry_run(model, sources, out, plan=plan, evaluate=held_out, settings=settings, cache_dir=cache_dir())
        return
    result = run(
        model,
        sources,
        out,
        plan=plan,
        evaluate=held_out,
        settings=settings,
        resume=resume,
        cache_dir=cache_dir(),
    )
    for name in [*held_out, *(["held-out"] if held_out_share else [])]:
        scores = result.bits_per_byte(name)
        typer.echo(f"{name}: {scores[0]:.3f} bits per byte before, {scores[-1]:.3f} after")
    typer.echo(
        f"{result.steps:,} steps, {result.tokens_per_second:,.0f} tokens/s. The model is in {result.folder}, "
        f"the curve in {out / 'loss.png'}."
    )


def _share(evaluate: list[str]) -> tuple[float | None, list[str]]:
    """(The part of the data that --eval holds out, the texts that it names)."""
    shares = [text for text in evaluate if re.fullmatch(r"[0-9.]+\s*%", text)]
    if len(shares) > 1:
        raise CogsymError(f"--eval holds out {shares[0]} and {shares[1]} of the data; give one of them.")
    try:
        share = float(shares[0].rstrip("% ")) / 100 if shares else None
    except ValueError:
        raise CogsymError(f"--eval {shares[0]} is no part of the data; give a number such as 5%.") from None
    return share, [text for text in evaluate if text not in shares]


def _strategy(everything: bool, layers: str | None, outer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The layer strategy that the options of `train` ask for, with its options; contradictions are refused."""
    from cogsym.strategies import parse_strategy

    options = {name: value for name, value in outer.items() if value is not None}
    given = [*(["--all-layers"] * everything), *([f"--layers {layers}"] * (layers is not None))]
    if given and len(given := [*given, *(f"--{name} {value}" for name, value in options.items())]) > 1:
        raise CogsymError(f"{given[0]} and {given[1]} both say which layers are trained; give one of them.")
    return ("outer", options) if layers is None else parse_strategy(layers)
