"""`cogsym.train`: adapt a model to text, by the CogSym recipe or any other plan."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from cogsym.data import Document, Source, pack, separator_id, tokenize
from cogsym.data.sources import content_digest
from cogsym.decoder import layers_name_of, layers_of
from cogsym.errors import CogsymError, RunStopped
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.plan import LayerPlan
from cogsym.records import differences, reason, replacing, write_whole
from cogsym.training.explain import explain
from cogsym.training.keep import Memory
from cogsym.training.prepare import prepare, restore
from cogsym.training.trainer import OuterTrainer, RunCallback, checkpoints

Text = Source | Sequence[Document]

# How, not what: a run that needed too much memory may go on with less.
_FREE_TO_CHANGE = ("keep", "memory_budget")


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains; the defaults suit a few hundred thousand tokens of a small model on a laptop.

    Attributes:
        length: tokens a packed row.
        batch_size: rows a forward pass.
        accumulation: forward passes an optimizer step.
        epochs: passes over the data, where `steps` does not say.
        steps: optimizer steps; None leaves it to `epochs`.
        learning_rate: the peak, of AdamW.
        schedule: how the rate falls to 0 after the warm-up.
        warmup: share of the steps in which the rate rises.
        weight_decay: of AdamW, norms and biases left out.
        max_grad_norm: gradients are scaled down to this norm.
        dtype: "bf16" keeps frozen weights and computes in bfloat16, with trained weights and their optimizer state in
            float32; "fp32" is float32 throughout. Frozen weights of a model passed in as an object stay as they are.
        lora_rank: train LoRA adapters of this rank on the planned layers' projections, not their weights; None for
            full weights. The scale is 2, alpha = 2 · rank.
        keep: what frozen layers hold for the backward pass, as in `cogsym.prepare`; it changes time and memory, not the
            result.
        memory_budget: bytes that they may hold, with "auto"; None is half of what is free.
        loss: "all" the text, or "target", what follows the first field of a template.
        separator: the token between documents; None takes the tokenizer's bos or eos.
        eval_every: steps between evaluations; None evaluates before and after.
        save_every: steps between checkpoints; the last two are kept.
        log_every: steps between the lines of metrics.jsonl.
        seed: of shuffling, dropout and LoRA's initial weights.
    """

    length: int = 512
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int | None = None
    keep: str = "auto"
    memory_budget: int | None = None
    loss: Literal["all", "target"] = "all"
    separator: str | None = None
    eval_every: int | None = None
    save_every: int = 200
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "length",
            "batch_size",
            "accumulation",
            "epochs",
            "learning_rate",
            "save_every",
            "log_every",
            "max_grad_norm",
        ):
            if not getattr(self, name) > 0:
                raise CogsymError(f"The setting {name} is {getattr(self, name)}, expected a number above 0.")
        for name in ("steps", "lora_rank", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise CogsymError(f"The setting {name} is {getattr(self, name)}, expected a whole number above 0.")
        for name, choices in (
            ("schedule", ("cosine", "linear")),
            ("dtype", ("bf16", "fp32")),
            ("loss", ("all", "target")),
        ):
            if getattr(self, name) not in choices:
                raise CogsymError(f"The setting {name} is {getattr(self, name)!r}, expected {' or '.join(choices)}.")
        Memory(self.keep, self.memory_budget)  # raises


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        model: the trained model in its original dtype, on the CPU or GPU it trained on; adapters are merged into it.
        folder: where it was saved, for plain `from_pretrained`.
        steps: optimizer steps in all.
        trained_parameters: how many were trained.
        seconds: spent in optimizer steps; evaluation and saving left out.
        tokens_per_second: over those seconds.
        history: the lines of metrics.jsonl.
    """

    model: Any
    folder: Path
    steps: int
    trained_parameters: int
    seconds: float
    tokens_per_second: float
    history: list[dict[str, float]]

    def bits_per_byte(self, name: str) -> list[float]:
        """The held-out text's bits per byte at each evaluation, in order."""
        key = f"eval_{name}_bits_per_byte"
        return [line[key] for line in self.history if key in line]


def train(
    model: str | Path | PreTrainedModel,
    data: Sequence[Text],
    out: str | Path,
    *,
    tokenizer: Any = None,
    plan: LayerPlan | None = None,
    evaluate: Mapping[str, Text] | None = None,
    settings: TrainSettings = TrainSettings(),
    resume: bool = False,
    cache_dir: Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the planned layers of a model on text and save an ordinary Hugging Face folder.

    `out` receives `model/` (the result), `metrics.jsonl` and `loss.png` (the curve), `settings.json` (what was asked)
    and `checkpoints/`.

    Args:
        model: a folder, a hub id, or a loaded model, which is trained in place.
        data: sources of text, mixed; or documents at hand.
        out: folder to write; a run that is there already is continued with `resume` and otherwise left alone.
        tokenizer: the model's own where `model` is a name; required for a loaded model.
        plan: which layers; the outermost quarter by default.
        evaluate: held-out text by name, scored in bits per byte before and after.
        settings: everything else.
        resume: go on from the last checkpoint in `out`; the result is that of an uninterrupted run.
        cache_dir: where tokenised text is kept; None keeps none.
        console: where progress is shown.

    Raises:
        CogsymError: input that cannot be used, each with its reason.
        RunStopped: ended early, by Ctrl-C, a full disk or a loss that is not finite; the message says what was saved.
    """
    from cogsym.training.curves import plot_curves  # matplotlib, which `from cogsym import train` does not wait for

    out, console = Path(out), console or Console(stderr=True)
    Memory(settings.keep, settings.memory_budget).check("cuda" if torch.cuda.is_available() else "cpu")
    network, tokenizer = _loaded(model, tokenizer, settings.dtype)
    separator = separator_id(tokenizer, settings.separator)

    def tokenized(text: Text, loss: Literal["all", "target"]) -> Any:
        return tokenize(text, tokenizer, loss, separator, cache_dir, network.config.get_text_config().vocab_size)

    if not data:
        raise CogsymError("There is no text to train on; give at least one source.")
    rows = pack([tokenized(text, settings.loss) for text in data], settings.length, settings.seed)
    held_out = {
        label: pack(tokenized(text, settings.loss), settings.length, None) for label, text in (evaluate or {}).items()
    }

    plan = plan or LayerPlan.outer(len(layers_of(network)))
    asked = {
        "model": str(model) if isinstance(model, (str, Path)) else "a loaded model",
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(settings),
        "data": [_digest(text) for text in data],
    }
    checkpoint = _open_folder(out, asked, resume)

    original = {n: p.dtype for n, p in network.named_parameters()}
    use_cache = network.config.use_cache  # Trainer switches it off, for good
    set_seed(settings.seed)
    adapted: Any = _with_adapters(network, plan, settings.lora_rank) if settings.lora_rank else network
    prepare(adapted, plan, keep=settings.keep, memory_budget=settings.memory_budget)
    for p in adapted.parameters():
        if p.requires_grad:
            # Steps of AdamW are often smaller than bfloat16's spacing and would be lost.
            p.data = p.data.float()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    console.print(str(explain(adapted)), highlight=False)
    console.print(
        f"data: {rows.num_documents:,} documents in {len(rows):,} rows of {settings.length}, {rows.fill:.1%} full",
        highlight=False,
    )

    callback = RunCallback(out / "metrics.jsonl", console)
    trainer = OuterTrainer(
        model=adapted,
        args=_arguments(out / "checkpoints", settings, bool(held_out), checkpoint is None),
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=[callback],
        bf16=settings.dtype == "bf16",
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        callback.close()
        network.config.use_cache = use_cache
    if callback.interrupted:
        raise RunStopped(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, and saved; "
            "the same command with --resume goes on from there.",
            exit_status=130,
        )
    restore(adapted)
    if settings.lora_rank:
        network = adapted.merge_and_unload()
    for n, p in network.named_parameters():
        p.data = p.data.to(original[n])
    _save_model(network, tokenizer, out / "model")
    plot_curves(callback.history, out / "loss.png")
    steps, seconds = trainer.state.global_step, callback.seconds
    rate = callback.history[-1].get("tokens_per_second", 0.0) if callback.history else 0.0
    return TrainResult(network, out / "model", steps, trained, seconds, rate, callback.history)


def _loaded(model: str | Path | PreTrainedModel, tokenizer: Any, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, from a name or as they are."""
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise CogsymError("train was given a loaded model without its tokenizer; pass tokenizer=.")
        return model, tokenizer
    return load_model(model, torch.float32 if dtype == "fp32" else torch.bfloat16), tokenizer or load_tokenizer(model)


def _arguments(folder: Path, settings: TrainSettings, evaluates: bool, fresh: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1: a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every or 10**9,
        eval_on_start=evaluates and fresh,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )


def _with_adapters(model: Any, plan: LayerPlan, rank: int) -> Any:
    if plan.embeddings or plan.head or plan.final_norm:
        raise CogsymError("LoRA trains decoder layers only; leave embeddings, head and final norm out of the plan.")
    linear = [
        (n.rpartition(".")[2], m) for n, m in layers_of(model).named_modules() if isinstance(m, (nn.Linear, Conv1D))
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({name for name, _ in linear}),
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in linear),
        layers_to_transform=list(plan.trained),
        layers_pattern=layers_name_of(model),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise CogsymError(f"LoRA does not fit {type(model).__name__} ({error}); train whole layers.") from error


def _digest(text: Text) -> str:
    if isinstance(text, Source):
        return f"{content_digest(text)} {text.field} {text.template} {text.weight}"
    return hashlib.sha256(repr([(d.text, d.target_start) for d in text]).encode()).hexdigest()


def _open_folder(out: Path, asked: dict[str, Any], resume: bool) -> Path | None:
    """Make `out` ready for a run, and find the checkpoint it goes on from."""
    record = out / "settings.json"
    if record.exists():
        before = json.loads(record.read_text("utf-8"))
        if not resume:
            raise CogsymError(f"{out} holds a run already; continue it with --resume, or choose another --out.")
        if different := differences(_fixed(before), _fixed(json.loads(json.dumps(asked)))):
            raise CogsymError(
                f"The run in {out} was started with {different}; resume it with the same, or choose another --out."
            )
    elif resume:
        raise CogsymError(f"There is no run in {out} to resume; leave --resume out to start one.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(record, (json.dumps(asked, indent=1) + "\n").encode())
    except OSError as error:
        raise CogsymError(f"The folder {out} cannot be written ({reason(error)}); choose another --out.") from error
    whole = checkpoints(out / "checkpoints")
    for folder in (out / "checkpoints").glob("checkpoint-*"):
        if folder not in whole:  # a kill cut it short
            shutil.rmtree(folder)
    return whole[-1] if whole else None


def _fixed(asked: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run may not change."""
    settings = {name: value for name, value in asked["settings"].items() if name not in _FREE_TO_CHANGE}
    return {**asked, "settings": settings}


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    try:
        with replacing(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise RunStopped(
            f"The trained model was not written to {folder} ({why}); the last checkpoint is intact, "
            "free some space and run again with --resume."
        ) from error
