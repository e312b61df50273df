import re
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cogsym.demo import language, semantics, train_base

BASE = Path(str(files("cogsym.demo") / "base"))


def test_plain_transformers_loads_the_shipped_model_and_it_is_as_good_as_its_readme_says() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert type(model) is LlamaForCausalLM
    assert model.config.tie_word_embeddings
    # The model and its tokenizer travel with every installation.
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 4_500_000
    readme = (BASE / "README.md").read_text("utf-8")
    row = re.search(r"\| model \| (?P<sentence>[\d.]+) \| (?P<byte>[\d.]+) \|", readme)
    floor = re.search(r"\| entropy of the generator \| (?P<sentence>[\d.]+) \| (?P<byte>[\d.]+) \|", readme)
    assert row and floor
    bits, bits_per_byte = train_base.held_out_bits(model, tokenizer)
    assert bits == pytest.approx(float(row["sentence"]), abs=0.02)
    assert bits_per_byte == pytest.approx(float(row["byte"]), abs=0.001)
    assert float(floor["sentence"]) == pytest.approx(train_base.held_out_sentences()[1], abs=0.01)
    assert bits_per_byte < 1.05 * float(floor["byte"])


def test_tokenizer_writes_both_languages_and_anything_else() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for meaning in islice(semantics.meanings("dev", 3), 50):
        for text in (language.base_sentence(meaning), language.invented_sentence(meaning, language.TAVOSI)):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode("ñandú ƙwai 一", add_special_tokens=False)) == "ñandú ƙwai 一"


def test_syllables_of_tavosi_are_tokens_wherever_they_stand() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for meaning in islice(semantics.meanings("dev", 4), 50):
        sentence = language.invented_sentence(meaning, language.TAVOSI)
        syllables = [word[i : i + 2] for word in sentence.rstrip(".").split() for i in range(0, len(word), 2)]
        tokens = [tokenizer.decode(token).strip() for token in tokenizer.encode(sentence, add_special_tokens=False)]
        assert tokens == [*syllables, "."]


def test_training_makes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_base", str(tmp_path), "--steps", "21", "--batch", "2"])
    train_base.main()
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} == {
        file.name for file in tmp_path.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path))
    assert "21 steps of 2 documents" in (tmp_path / "README.md").read_text("utf-8")
