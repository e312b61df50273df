"""`cogsym.train`: adapt a model to text, by the CogSym recipe or any other plan."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, set_seed

from cogsym.data import Document, PackedDataset, Source, content_digest, pack, separator_id, tokenize
from cogsym.data import held_out as split
from cogsym.decoder import layers_of
from cogsym.errors import CogsymError, RunStopped, SettingError
from cogsym.memory import out_of_memory
from cogsym.models import precision
from cogsym.plan import LayerPlan
from cogsym.ranks import Ranks, gone, join
from cogsym.training.adapters import with_adapters
from cogsym.training.arguments import check_tracker, training_arguments
from cogsym.training.card import Base, described, model_card
from cogsym.training.estimate import estimate
from cogsym.training.explain import explain
from cogsym.training.hub import check_hub, push
from cogsym.training.keep import Memory
from cogsym.training.load import load
from cogsym.training.notices import grown, largest_weight, notices, risen, tells_documents_apart
from cogsym.training.optimizer import check_optimizer
from cogsym.training.prepare import prepare, restore
from cogsym.training.run_folder import RunFolder, check_inputs, open_run_folder
from cogsym.training.save import save, write
from cogsym.training.settings import TrainSettings
from cogsym.training.sharded import bytes_held, gathered, shard, trained_tensors
from cogsym.training.shares import SharedRows, shared_batch
from cogsym.training.trainer import OuterTrainer, RunCallback

Text = Source | Sequence[Document]


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        model: the trained model in the dtype of its base, on the CPU or GPU it trained on; adapters are merged into it.
            Layers that were streamed have no weights in it; `folder` has them. With `fsdp` the first rank has it, on
            the CPU, and the others None.
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
    settings: TrainSettings | None = None,
    resume: bool = False,
    cache_dir: Path | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the planned layers of a model on text and save an ordinary Hugging Face folder.

    `out` receives `model/` (the result, with a card), `metrics.jsonl` and `loss.png` (the curve), `settings.json` (what
    was asked) and `checkpoints/`; with `save_adapter` also `adapter/`.

    Args:
        model: a folder, a hub id, or a loaded model, which is trained in place.
        data: sources of text, mixed; or documents at hand.
        out: folder to write, new, empty or of a run, which is continued with `resume` and otherwise left alone.
        tokenizer: the model's own where `model` is a name; required for a loaded model.
        plan: which layers; the outermost quarter by default.
        evaluate: held-out text by name, scored in bits per byte before and after.
        settings: everything else; the defaults of `TrainSettings`.
        resume: go on from the last checkpoint in `out`; the result is that of an uninterrupted run.
        cache_dir: where tokenised text is kept; None keeps none.
        console: where progress is shown.

    Raises:
        CogsymError: input that cannot be used, each with its reason; or `out` holds what no run wrote.
        RunStopped: ended early, by a signal, a full disk or a loss that is not finite; the message says what was saved.
    """
    out, ranks = Path(out), join()
    console = console or Console(stderr=True) if ranks.first else Console(file=io.StringIO(), quiet=True)
    asked = (model, data, out, tokenizer, plan, evaluate, settings or TrainSettings(), resume, cache_dir, ranks)
    run = ranks.agreed(lambda: _read(*asked))
    with _opened(out, run.record, resume, ranks) as folder:
        adapted, callback, steps, trained = _trained(run, folder, console, ranks)
        adapted = _whole(run, adapted, ranks) if run.settings.fsdp else restore(adapted)
        if run.settings.save_adapter:
            ranks.on_first(lambda: write(folder, folder.adapter, adapted))
        network = adapted if adapted is None else _merged(run, adapted)
        texts = [described(text) for text in data]

        def finish() -> None:
            card = model_card(
                out.resolve().name, Base.of(model), run.plan, texts, run.rows, run.record, trained, steps,
                callback.history,
            )  # fmt: skip
            save(network, run.tokenizer, callback.history, card, folder)
            if run.settings.push_to_hub:
                address = push(folder.model, run.settings.push_to_hub)
                console.print(f"pushed to {address}", highlight=False, markup=False, soft_wrap=True)

        ranks.on_first(finish)
    rate = callback.history[-1].get("tokens_per_second", 0.0) if callback.history else 0.0
    return TrainResult(network, folder.model, steps, trained, callback.seconds, rate, callback.history)


def dry_run(
    model: str | Path | PreTrainedModel,
    data: Sequence[Text],
    out: str | Path,
    *,
    tokenizer: Any = None,
    plan: LayerPlan | None = None,
    evaluate: Mapping[str, Text] | None = None,
    settings: TrainSettings | None = None,
    cache_dir: Path | None = None,
    console: Console | None = None,
) -> None:
    """Say what `train` would cost with the same arguments, in tokens, time, memory and disk, and write nothing."""
    console = console or Console(stderr=True)
    if (ranks := join()).size > 1:
        raise CogsymError(f"A dry run says what one process takes and was started as {ranks.size}; start it alone.")
    settings = settings or TrainSettings()
    run = _read(model, data, Path(out), tokenizer, plan, evaluate, settings, False, cache_dir, ranks)
    adapted = _prepared(run, console)
    stored = sum(p.numel() * run.stored.get(n, p.dtype).itemsize for n, p in run.network.named_parameters())
    for line in estimate(
        adapted.to(_device()),
        run.rows,
        run.held_out,
        run.settings,
        run.products == "bfloat16",
        stored,
        run.optimizer_bytes,
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _merged(run, restore(adapted))


@dataclass(frozen=True)
class _Run:
    """What a run trains, and on what.

    `stored` are the dtypes that the parameters are saved in, `batch` is (rows a forward pass, such passes a step),
    `optimizer_bytes` those of the optimizer's state for each parameter.
    """

    network: Any
    tokenizer: Any
    stored: dict[str, torch.dtype]
    plan: LayerPlan
    settings: TrainSettings
    batch: tuple[int, int]
    products: str
    optimizer_bytes: int
    rows: PackedDataset
    held_out: dict[str, PackedDataset]
    record: dict[str, Any]


def _read(
    model: str | Path | PreTrainedModel,
    data: Sequence[Text],
    out: Path,
    tokenizer: Any,
    plan: LayerPlan | None,
    evaluate: Mapping[str, Text] | None,
    settings: TrainSettings,
    resume: bool,
    cache_dir: Path | None,
    ranks: Ranks,
) -> _Run:
    """Everything that is asked for, checked, loaded and packed."""
    if settings.eval_every and not (evaluate or settings.hold_out):
        raise SettingError("eval_every", f"is {settings.eval_every} and there is no held-out text; give some (--eval).")
    if settings.fsdp and ranks.size == 1:
        raise SettingError(
            "fsdp", "is set, which shares the weights out among ranks, and this process is alone; start it by torchrun."
        )
    Memory(settings.keep, settings.memory_budget).check("cuda" if torch.cuda.is_available() else "cpu")
    check_tracker(settings)
    check_hub(settings.push_to_hub)
    sources = [text.path for text in (*data, *(evaluate or {}).values()) if isinstance(text, Source)]
    model_folder = Path(model).expanduser() if isinstance(model, (str, Path)) else None
    check_inputs(out, model_folder if model_folder and model_folder.exists() else None, sources)
    RunFolder(out).check_ours(resume)  # before the model is loaded, which may take long
    optimizer_bytes = check_optimizer(settings)
    products, began_as = _products(settings.dtype), ranks.size
    if resume:  # the arithmetic that it began with, on whichever machine, and the rows a step
        record = RunFolder(out).read_record()
        products, began_as = record.get("products", products), record.get("ranks", 1)
    batch = shared_batch(settings, began_as, ranks.size)
    network, tokenizer, stored = load(model, tokenizer, plan, settings, products)
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if context and settings.length > context:
        raise SettingError(
            "length", f"is {settings.length:,} tokens, expected at most the model's context, {context:,}."
        )
    separator = separator_id(tokenizer, settings.separator)

    def tokenized(text: Text, loss: Literal["all", "target"]) -> Any:
        return tokenize(text, tokenizer, loss, separator, cache_dir, network.config.get_text_config().vocab_size)

    if not data:
        raise CogsymError("There is no text to train on; give at least one source.")
    learned = [tokenized(text, settings.loss) for text in data]
    held_out = {
        label: pack(tokenized(text, settings.loss), settings.length, None) for label, text in (evaluate or {}).items()
    }
    if settings.hold_out:
        parted = [split(text, settings.hold_out) for text in learned]
        learned = [rest for rest, _ in parted]
        held_out["held-out"] = pack([held for _, held in parted], settings.length, None)
    rows = pack(learned, settings.length, settings.seed)
    plan = plan or LayerPlan.outer(len(layers_of(network)))
    record = {
        "model": str(model) if isinstance(model, (str, Path)) else "a loaded model",
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(settings),
        "products": products,
        "ranks": began_as,
        "data": [_digest(text) for text in data],
    }
    return _Run(network, tokenizer, stored, plan, settings, batch, products, optimizer_bytes, rows, held_out, record)


@contextmanager
def _opened(out: Path, record: dict[str, Any], resume: bool, ranks: Ranks) -> Iterator[RunFolder]:
    """The folder of the run, which the first rank holds for all."""
    with ExitStack() as stack:
        held: list[RunFolder] = []
        ranks.on_first(lambda: held.append(stack.enter_context(open_run_folder(out, record, resume))))
        yield held[0] if held else RunFolder(out)


def _prepared(run: _Run, console: Console) -> Any:
    """The model, or peft's wrapper around it, as it is trained; what there is to know is told."""
    network, settings, rows = run.network, run.settings, run.rows
    set_seed(settings.seed)
    if not settings.fsdp:  # which moves what a rank is to hold, and no more
        network.to(_device())  # the Trainer would move each weight apart, after `prepare` laid them beside each other
    adapted = with_adapters(network, run.plan, run.settings.lora_rank)
    prepare(
        adapted,
        run.plan,
        keep=settings.keep,
        memory_budget=settings.memory_budget,
        frozen_weights=settings.frozen_weights,
    )
    for p in adapted.parameters():
        if p.requires_grad:
            # Steps of AdamW are often smaller than bfloat16's spacing and would be lost.
            p.data = p.data.float()
    if settings.dtype == "auto" and run.products == "float32":
        precision.widen(adapted)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if settings.fsdp:
        shard(adapted)
        say("each rank holds {:,} of {:,} bytes of weights".format(*bytes_held(adapted)))
    if sentence := precision.products_sentence(network, _device()):
        say(sentence)
    say(str(explain(adapted)))
    say(f"data: {rows.num_documents:,} documents in {len(rows):,} rows of {settings.length}, {rows.fill:.1%} full")
    if rows.num_documents > len(rows) and not tells_documents_apart(adapted):
        say(f"documents in one row see each other: {type(network).__name__} does not tell them apart by positions")
    for sentence in notices(adapted, settings, run.plan):
        say(sentence)
    return adapted


def _whole(run: _Run, adapted: Any, ranks: Ranks) -> Any:
    """Of weights in parts, on the first rank: the base model, or peft's, with what was trained; elsewhere None."""
    trained = gathered(trained_tensors(adapted), ranks.first)
    if not ranks.first:
        return None
    network, *_ = load(run.record["model"], run.tokenizer, run.plan, run.settings, run.products)
    adapted = with_adapters(network, run.plan, run.settings.lora_rank)
    for n, p in adapted.named_parameters():
        if n in trained:
            p.data = trained[n].to(p.device)
    return adapted


def _merged(run: _Run, adapted: Any) -> Any:
    """The model in the dtypes that its base has, adapters merged."""
    network = adapted.merge_and_unload() if run.settings.lora_rank else adapted
    precision.narrow(network)
    for n, p in network.named_parameters():
        p.data = p.data.to(run.stored[n])
    return network


def _trained(run: _Run, folder: RunFolder, console: Console, ranks: Ranks) -> tuple[Any, RunCallback, int, int]:
    """(The trained model, still prepared, what the callback saw, optimizer steps, parameters trained)."""
    network, settings, rows, held_out = run.network, run.settings, run.rows, run.held_out
    use_cache = network.config.use_cache  # Trainer switches it off, for good
    adapted = _prepared(run, console)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    checkpoint = ranks.on_first(lambda: folder.checkpoint_to_resume(say))
    if ranks.size > 1:
        batch, passes = run.batch
        say(f"{ranks.size} ranks, {batch} rows each a forward pass, {batch * passes * ranks.size} rows a step")
    callback = RunCallback(folder, checkpoint, console, ranks)
    trainer = OuterTrainer(
        model=adapted,
        args=training_arguments(folder.path, settings, run.batch, bool(held_out), checkpoint is None),
        train_dataset=SharedRows(rows, ranks.size * run.batch[0]) if ranks.size > 1 else rows,
        eval_dataset=held_out,
        callbacks=[callback],
        bf16=run.products == "bfloat16",
        folder=folder,
        history=callback.history,
        ranks=ranks,
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer, largest = trainer, largest_weight(adapted)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, MemoryError) as error:
        if ranks.lost(error):
            raise gone() from error
        if not out_of_memory(error):
            raise
        kept = folder.complete_checkpoints()
        saved = f"{kept[-1]} is intact, go on with --resume and --keep nothing, or start" if kept else "start again"
        raise RunStopped(
            f"Step {trainer.state.global_step + 1} does not fit into memory; {saved} with a smaller batch."
        ) from error
    finally:
        callback.close()
        network.config.use_cache = use_cache
    if stopped_by := ranks.largest(callback.stopped_by or 0):
        stopped = RunStopped(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, and saved; "
            "the same command with --resume goes on from there.",
            exit_status=128 + stopped_by,
        )
        raise ranks.once(stopped)
    first_loss = ranks.total(trainer.first_loss) / ranks.size
    rate = settings.learning_rate
    if sentence := risen(first_loss, callback.history, rate) or grown(largest, largest_weight(adapted), rate):
        say(sentence)
    return adapted, callback, trainer.state.global_step, trained


def _products(dtype: str) -> str:
    """What products are computed in, where a run begins."""
    wide = dtype == "fp32" or (dtype == "auto" and precision.should_widen(torch.bfloat16, _device()))
    return "float32" if wide else "bfloat16"


def _device() -> torch.device:
    """Where the Trainer will put the model."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(text: Text) -> str:
    if isinstance(text, Source):
        read = f"{content_digest(text)} {text.field} {text.template} {text.weight}"
        return f"{read} {text.chat}" if text.chat else read
    return hashlib.sha256(repr([(d.text, d.target_start) for d in text]).encode()).hexdigest()
