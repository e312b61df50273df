"""README.md beside a trained model: the card that the Hugging Face hub shows, from the run's own records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cogsym.data import PackedDataset, Source
from cogsym.models.loading import check_model_folder
from cogsym.plan import LayerPlan


@dataclass(frozen=True)
class Base:
    """The model that a run began with, as its own card tells.

    Attributes:
        name: its id on the hub, or its folder's name, without the way to it.
        hub_id: its id on the hub, or that of the model that it was made from; None where neither is known.
        licence: the card's entries of it.
    """

    name: str
    hub_id: str | None
    licence: dict[str, Any]

    @classmethod
    def of(cls, model: Any) -> Base:
        """Of a name, or of a model in memory."""
        if not isinstance(model, (str, Path)):
            return cls(type(model).__name__, None, {})
        folder = check_model_folder(model)
        name = folder.resolve().name if folder else str(model)
        try:
            data = ModelCard.load(folder / "README.md" if folder else name).data.to_dict()
        except Exception:  # there is none, or no network, or it is not one
            data = {}
        made_from = data.get("base_model")
        licence = {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
        return cls(name, (made_from if isinstance(made_from, str) else None) if folder else name, licence)


def model_card(
    name: str,
    base: Base,
    plan: LayerPlan,
    texts: Sequence[str],
    rows: PackedDataset,
    record: Mapping[str, Any],
    trained: int,
    steps: int,
    history: Sequence[Mapping[str, float]],
) -> str:
    """The card, with the hub's metadata in front.

    Args:
        name: of the model.
        base: what it was made from.
        plan: which of its layers were trained.
        texts: what it was trained on, in words.
        rows: the same, packed.
        record: of the run, as its settings.json has it.
        trained: parameters that were trained.
        steps: optimizer steps.
        history: the lines of metrics.jsonl.
    """
    settings = record["settings"]
    rank, rows_a_step = settings["lora_rank"], settings["batch_size"] * settings["accumulation"] * record["ranks"]
    data = ModelCardData(
        base_model=base.hub_id,
        language=settings["language"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cogsym", *(["lora"] if rank else [])],
        **base.licence,
    )
    learned = {"all": "all of the text", "target": "the last column of the template"}[settings["loss"]]
    facts = {
        "base model": base.name,
        "plan": str(plan),
        "trained": f"{trained:,} parameters" + (f", LoRA adapters of rank {rank}, merged" if rank else ""),
        "text": ", ".join(texts),
        "size": f"{rows.num_documents:,} documents in {len(rows):,} rows of {settings['length']} tokens",
        "loss": learned,
        "training": f"{steps:,} steps of {rows_a_step} rows, {_last(history, 'tokens', 0):,} tokens",
        "optimizer": f"{settings['optim']}, {settings['schedule']} from a rate of {settings['learning_rate']:g}, "
        f"warm-up {settings['warmup']:.0%}, weight decay {settings['weight_decay']:g}",
        "products": record["products"] + (", frozen weights in 8 bits" if settings["frozen_weights"] else ""),
        "seed": settings["seed"],
    }
    sections = [
        f"# {_words(name)}",
        f"{_words(base.name)}, adapted to new text with cogsym.",
        _table(("", ""), facts.items()),
        "## Results",
        *_results(history),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```',
    ]
    if len(plan.trained) < plan.num_layers:
        sections += [
            "## Citation",
            'Training the outermost layers and freezing the middle is the recipe of "Positional Cognitive '
            'Specialization", AAAI-26, [arXiv 2604.00923](https://arxiv.org/abs/2604.00923); please cite it.',
        ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def described(text: Any) -> str:
    """A text that is trained on: its name, without the way to it, and how it is read."""
    if not isinstance(text, Source):
        return f"{len(text):,} documents given in Python"
    how = {"#": text.field, " by the template ": text.template, " of chats in ": text.chat}
    weight = f", {text.weight:g} times" if text.weight != 1 else ""
    return text.path.resolve().name + "".join(f"{word}{value}" for word, value in how.items() if value) + weight


def _results(history: Sequence[Mapping[str, float]]) -> Iterator[str]:
    scored = sorted({key for line in history for key in line if key.endswith("_bits_per_byte")})
    if scored:
        found = [[line[key] for line in history if key in line] for key in scored]
        names = [key.removeprefix("eval_").removesuffix("_bits_per_byte") for key in scored]
        yield _table(
            ("held-out text, bits per byte", "before", "after"),
            [(name, f"{f[0]:.3f}", f"{f[-1]:.3f}") for name, f in zip(names, found, strict=True)],
        )
    if losses := [line["loss"] for line in history if "loss" in line]:
        yield f"Training loss, nats a token: {losses[0]:.3f} at first, {losses[-1]:.3f} at last."


def _last(history: Sequence[Mapping[str, float]], key: str, default: float) -> float:
    return next((line[key] for line in reversed(history) if key in line), default)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_words(cell) for cell in line)} |" for line in lines)


def _words(text: Any) -> str:
    """On one line, as Markdown shows it and a table takes it."""
    line = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "|<>*`[]\\" else c for c in line)
