"""Evaluation gives what the model's logits say, and makes no logits where it knows the head."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import exact_float64, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaForCausalLM

import cogsym
from cogsym.data import PackedDataset, TokenizedDocuments, pack
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities

V = 61
LENGTH, BATCH = 24, 3
FAMILIES = [
    "llama", "llama-tied-gelu", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3",
    "granite",
]  # fmt: skip


def packed(seed: int = 0, vocabulary: int = V) -> PackedDataset:
    """Documents of odd lengths, some without a token on which the loss counts, in rows that are partly padding."""
    rng = np.random.default_rng(seed)
    lengths = np.array([7, 1, 40, 13, 3, 22, 5, 9, 2, 31])
    documents = TokenizedDocuments(
        tokens=rng.integers(0, vocabulary, lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        loss_starts=np.array([0, 1, 11, 0, 2, 0, 5, 3, 0, 0], dtype=np.int32),
        num_bytes=3 * lengths,
        selection=np.arange(len(lengths)),
        separator_id=0,
    )
    return pack(documents, LENGTH, None)


def plain_bits(model: Any, dataset: PackedDataset, dtype: torch.dtype) -> float:
    """Bits per byte from all logits, in `dtype`."""
    nats = 0.0
    for i in range(len(dataset)):
        row = {key: value[None] for key, value in dataset[i].items()}
        labels = row.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**row, use_cache=False).logits[0, :-1].to(dtype)
        nats -= sum(logits[t].log_softmax(-1)[label].item() for t, label in enumerate(labels) if label >= 0)
    return nats / math.log(2) / dataset.num_bytes


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, each.numel() if isinstance(each, Tensor) else 0)
        return out


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_bits_per_byte_in_float64(variant: str, prepared: bool) -> None:
    dataset = packed()
    with exact_float64():
        model = tiny_model(variant, torch.float64)
        want = plain_bits(model, dataset, torch.float64)
        if prepared:
            cogsym.prepare(model, cogsym.LayerPlan.outer(4))
        assert bits_per_byte(model, dataset, BATCH) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bits_per_byte_in_float32_are_as_good_as_those_of_logits(variant: str) -> None:
    dataset = packed()
    model = tiny_model(variant)
    truth = plain_bits(tiny_model(variant, torch.float64), dataset, torch.float64)
    error = abs(plain_bits(model, dataset, torch.float32) - truth)
    assert abs(bits_per_byte(model, dataset, BATCH) - truth) <= 2 * error + 1e-6 * truth


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_bits_per_byte_under_autocast(variant: str) -> None:
    dataset = packed()
    truth = plain_bits(tiny_model(variant, torch.float64), dataset, torch.float64)
    model = tiny_model(variant)
    with torch.autocast("cpu", torch.bfloat16):
        error = abs(plain_bits(model, dataset, torch.float32) - truth)
        got = bits_per_byte(model, dataset, BATCH)
    assert abs(got - truth) <= 2 * error + 1e-4 * truth


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_log_probabilities_of_options(variant: str, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = tiny_model(variant, torch.float64, vocab_size=300)
    questions = [("habari", [" ya leo", " ya", ""]), ("mtoto anasoma kitabu", [" leo"]), ("", [" a", " bb"])]
    got = option_log_probabilities(model, tokenizer, questions, separator_id=0, batch_size=2)
    encode = tokenizer.backend_tokenizer.encode
    for (context, options), values in zip(questions, got, strict=True):
        prefix = [0, *encode(context, add_special_tokens=False).ids]
        for option, value in zip(options, values, strict=True):
            ids = prefix + encode(option, add_special_tokens=False).ids
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            want = sum(logp[t - 1, ids[t]].item() for t in range(len(prefix), len(ids)))
            assert value == pytest.approx(want, rel=1e-9, abs=1e-12)


def lora(model: Any, **options: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return adapted.eval()


def prepared_adapters(model: Any) -> Any:
    return cogsym.prepare(lora(model, target_modules=["q_proj", "down_proj"]), cogsym.LayerPlan.all(4)).eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: cogsym.prepare(model, cogsym.LayerPlan.outer(4)),
        lambda model: lora(model, target_modules=["q_proj", "down_proj"]),
        prepared_adapters,
    ],
    ids=["plain", "prepared", "adapters", "prepared adapters"],
)
def test_no_logits_are_made(change: Callable[[Any], Any]) -> None:
    vocabulary = 5000
    dataset = packed(vocabulary=vocabulary)
    model = change(tiny_model("llama", torch.float64, vocab_size=vocabulary))
    with Largest() as largest:
        got = bits_per_byte(model, dataset, BATCH)
    assert got == pytest.approx(plain_bits(model, dataset, torch.float64), rel=1e-12)
    assert 0 < largest.elements < LENGTH * vocabulary
    assert "forward" not in vars(model.get_output_embeddings())


class OtherLinear(nn.Linear):
    """A class that we do not know."""


def of_another_class(model: Any) -> Any:
    model.lm_head.__class__ = OtherLinear
    return model


def with_a_bias(model: Any) -> Any:
    model.lm_head.bias = nn.Parameter(torch.randn(V, dtype=torch.float64))
    return model


def with_a_hook(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_a_forward_of_its_own(model: Any) -> Any:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3 * forward(hidden)
    return model


class Doubled(LlamaForCausalLM):
    """A family that we do not know."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def of_another_family(model: Any) -> Any:
    model.__class__ = Doubled
    return model


@pytest.mark.parametrize(
    "change",
    [
        of_another_class,
        with_a_bias,
        with_a_hook,
        with_a_forward_of_its_own,
        of_another_family,
        lambda model: lora(model, target_modules=["lm_head"]),
    ],
    ids=["class", "bias", "hook", "forward", "family", "adapter"],
)
def test_a_head_that_is_not_known_runs_itself(change: Callable[[Any], Any]) -> None:
    dataset = packed()
    model = change(tiny_model("llama", torch.float64))
    with Largest() as largest:
        got = bits_per_byte(model, dataset, BATCH)
    assert got == pytest.approx(plain_bits(model, dataset, torch.float64), rel=1e-9)
    assert largest.elements >= BATCH * LENGTH * V


def test_the_model_is_as_it_was() -> None:
    model = tiny_model("llama").train()
    state = copy.deepcopy(model.state_dict())
    bits_per_byte(model, packed(), BATCH)
    assert model.training and all(torch.equal(w, state[n]) for n, w in model.state_dict().items())

    def fails(*_: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        bits_per_byte(model, packed(), BATCH)
    hook.remove()
    assert model.training and "forward" not in vars(model.lm_head)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)
