"""Tiny random models of each family, and the plain-PyTorch truth to hold them against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

VOCABULARY = 61
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING = ["full_attention", "sliding_attention"] * 2
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

# name -> (model class, config class, what the variant adds)
VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "llama-yarn-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _YARN_ROPE}),
    "llama-tied-gelu": (
        LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama-one-head-each": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 6}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-windows": (
        Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "qwen3-windows-biases": (
        Qwen3ForCausalLM, Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING, "attention_bias": True},
    ),
}  # fmt: skip


def tiny_model(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode, its norms and biases random too so that none can be forgotten."""
    torch.manual_seed(seed)
    model_class, config_class, extra = VARIANTS[variant]
    model = model_class(config_class(**{**_SHAPE, **extra, **changes}))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model.to(dtype).eval()


def _exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@contextlib.contextmanager
def exact_norms() -> Iterator[None]:
    """transformers computes its norms in float32 even in a float64 model; inside, they are exact."""
    classes = (
        modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen3.Qwen3RMSNorm,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for norm in classes:
            patch.setattr(norm, "forward", _exact_norm)
        yield


def batch(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs, [3, 17] tokens: "plain", "padded-right", "padded-left" or "packed"."""
    generator = torch.Generator().manual_seed(seed)
    B, T = 3, 17
    ids = torch.randint(0, VOCABULARY, (B, T), generator=generator)
    labels = ids.clone()
    inputs = {"input_ids": ids, "labels": labels}
    lengths = torch.tensor([[17], [9], [4]])
    if kind == "padded-right":
        inputs["attention_mask"] = (torch.arange(T) < lengths).long()
    elif kind == "padded-left":
        inputs["attention_mask"] = (torch.arange(T) >= T - lengths).long()
    elif kind == "packed":
        starts = torch.tensor([[0, 0], [6, 11], [1, 16]])
        position = torch.arange(T).expand(B, -1).clone()
        for row, (a, b) in enumerate(starts.tolist()):
            for start in (a, b):
                position[row, start:] = torch.arange(T - start)
        inputs["position_ids"] = position
    if "attention_mask" in inputs:
        labels[inputs["attention_mask"] == 0] = -100
    return inputs
