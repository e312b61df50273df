"""The card beside a trained model: metadata that the hub takes, the run's own numbers, and no path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import cogsym
from cogsym import CogsymError, LayerPlan, TrainSettings
from cogsym.data import Document, Source
from cogsym.training.card import Base

SETTINGS: dict[str, Any] = {"length": 64, "batch_size": 2, "steps": 3, "learning_rate": 1e-2, "dtype": "fp32"}


def test_a_card_tells_what_was_trained_on_what_and_how_it_went(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (model_folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: open\nlicense_link: https://a.org\nbase_model: some/model\n---\n# It\n"
    )
    pairs = Source(text_file, template="English: {en}\\nSwahili: {sw}", weight=2)
    out = tmp_path / "my|model"
    result = cogsym.train(
        model_folder, [Source(text_file, field="sw"), pairs], out, evaluate={"sw": Source(text_file, field="sw")},
        settings=TrainSettings(**SETTINGS, language="sw", lora_rank=2),
    )  # fmt: skip
    card = ModelCard.load(result.folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "some/model", "language": "sw", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["cogsym", "lora"], "license": "other", "license_name": "open",
        "license_link": "https://a.org",
    }  # fmt: skip
    text = card.text
    assert str(tmp_path) not in card.content and text.lstrip().startswith("# my\\|model\n")
    before, after = result.bits_per_byte("sw")
    assert f"| sw | {before:.3f} | {after:.3f} |" in text
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last" in text
    for fact in (
        f"| plan | {LayerPlan.outer(4)} |",
        f"| trained | {result.trained_parameters:,} parameters, LoRA adapters of rank 2, merged |",
        r"| text | news.jsonl#sw, news.jsonl by the template English: {en}\\nSwahili: {sw}, 2 times |",
        "360 documents in ",
        "| training | 3 steps of 2 rows, 384 tokens |",
        "| optimizer | adamw_torch_fused, cosine from a rate of 0.01, warm-up 5%, weight decay 0 |",
        "arXiv 2604.00923",
    ):
        assert fact in text, fact


def test_a_card_of_texts_and_a_model_in_memory(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from cogsym.models.loading import load_model, load_tokenizer

    texts = [Document(json.loads(line)["sw"]) for line in text_file.read_text().splitlines()]
    settings, tokenizer = TrainSettings(**SETTINGS), load_tokenizer(model_folder)
    result = cogsym.train(
        load_model(model_folder),
        [texts],
        tmp_path / "out",
        tokenizer=tokenizer,
        plan=LayerPlan.all(4),
        settings=settings,
    )
    card = ModelCard.load(result.folder / "README.md")
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "| base model | LlamaForCausalLM |" in card.text and "120 documents given in Python" in card.text
    assert "2604.00923" not in card.text and "held-out" not in card.text


def test_the_base_of_a_card(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Base.of(model_folder) == Base("base", None, {})
    for broken in ("---\n[\n---\n", "---\n- a\n---\n", "no metadata\n"):
        (model_folder / "README.md").write_text(broken)
        assert Base.of(str(model_folder)) == Base("base", None, {})
    monkeypatch.setattr(ModelCard, "load", lambda name: ModelCard("---\nlicense: mit\nbase_model: [a/b]\n---\n"))
    assert Base.of("some/model") == Base("some/model", "some/model", {"license": "mit"})
    assert Base.of(model_folder) == Base("base", None, {"license": "mit"})


def test_a_language_that_is_no_code() -> None:
    with pytest.raises(CogsymError, match="language is 'Swahili', expected a code of ISO 639, such as sw or kin"):
        TrainSettings(language="Swahili")
