"""Tiny random models of each family, and the plain-PyTorch truth to hold them against."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from cogsym.models import FAMILIES

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
_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA4_ROPE = _YARN_ROPE | {"original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.5}
_PHI = {"head_dim": 6, "rope_parameters": _PARTIAL_ROPE, "initializer_range": 0.2}

# name -> (what transformers calls the model, what the variant adds): those that every test is about.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": _YARN_ROPE}),
    "llama-tied-gelu": ("Llama", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-one-head-each": ("Llama", {"num_key_value_heads": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING}),
    "qwen3": ("Qwen3", {}),
    "qwen3-windows-biases": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 5, "layer_types": _SLIDING, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "attn_implementation": "eager",
        },
    ),
    "gemma3": ("Gemma3", {"sliding_window": 5, "layer_types": _SLIDING, "query_pre_attn_scalar": 7}),
    "phi3": ("Phi3", {"head_dim": 6, "sliding_window": None}),
    "phi3-partial": ("Phi3", {"head_dim": 6, "sliding_window": 5, "rope_parameters": _PARTIAL_ROPE}),
    "olmo2": ("Olmo2", {"head_dim": 6}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1]}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 1.7},
    ),
}  # fmt: skip

# Further families, for the tests that hold every family against transformers; one whose config adds nothing needs no
# line.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", {"rope_parameters": _LLAMA3_ROPE}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "attention_bias": True, "initializer_range": 0.2}),
    "cohere2": ("Cohere2", {"logit_scale": 0.3, "sliding_window": 5, "layer_types": _SLIDING}),
    "cwm": (
        "Cwm",
        {
            "sliding_window": 5, "layer_types": _SLIDING, "rope_parameters": _LLAMA3_ROPE, "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "ernie4_5": ("Ernie4_5", {"use_bias": True}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "exaone4-windows": ("Exaone4", {"sliding_window": 5, "layer_types": _SLIDING}),
    "glm": ("Glm", {"rope_parameters": _PARTIAL_ROPE}),
    "glm4": ("Glm4", {"rope_parameters": _PARTIAL_ROPE}),
    "helium": ("Helium", {"head_dim": 6, "mlp_bias": True}),
    "hyperclovax": (
        "HyperCLOVAX",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 0.6},
    ),
    "hyperclovax-norms-behind": ("HyperCLOVAX", {"use_post_norm": True, "residual_multiplier": 0.7}),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": _SLIDING}),
    "ministral3": ("Ministral3", {"rope_parameters": _LLAMA4_ROPE}),
    "nemotron": ("Nemotron", {"rope_parameters": _PARTIAL_ROPE, "mlp_bias": True}),
    "olmo3": ("Olmo3", {"sliding_window": 5, "layer_types": _SLIDING}),
    "phi": ("Phi", _PHI),
    "phi-qk-norm": ("Phi", _PHI | {"qk_layernorm": True}),
    "seed_oss": ("SeedOss", {"residual_dropout": 0.0, "attention_dropout": 0.0}),
    "stablelm": ("StableLm", {"head_dim": 6, "rope_parameters": _PARTIAL_ROPE, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLm",
        {"head_dim": 6, "rope_parameters": _PARTIAL_ROPE, "use_parallel_residual": True},
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 5, "initializer_range": 0.2}),
}  # fmt: skip

_EXPERTS: dict[str, Any] = {
    "num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 12, "mlp_only_layers": [1], "experts_implementation": "eager",
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
}  # fmt: skip
# The same, of models with a half, or a whole layer, that runs its own forward.
PARTLY_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere-qk-norm": ("Cohere", {"use_qk_norm": True}),
    "stablelm-qk-norm": ("StableLm", {"head_dim": 6, "rope_parameters": _PARTIAL_ROPE, "qk_layernorm": True}),
    "mixtral": ("Mixtral", {**_EXPERTS, "sliding_window": 5}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_EXPERTS, "use_sliding_window": True, "sliding_window": 5, "layer_types": _SLIDING, "qkv_bias": True},
    ),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "attention_bias": True}),
    "gpt-oss": ("GptOss", {**_EXPERTS, "sliding_window": 5, "layer_types": _SLIDING}),
    "qwen3-next": ("Qwen3Next", {**_EXPERTS, **_LINEAR}),
    "qwen3.5": ("Qwen3_5", {**_LINEAR, "attention_bias": True}),
    "qwen3.5-moe": ("Qwen3_5Moe", {**_EXPERTS, **_LINEAR}),
}


def _plain_variants() -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Of the families that are registered and named above nowhere."""
    named = {model for model, _ in (VARIANTS | FURTHER | PARTLY_OWN).values()}
    for path in FAMILIES:
        model = FAMILIES[path].causal_lm.rpartition(".")[2].removesuffix("ForCausalLM")
        if path.startswith("transformers.") and model not in named:
            yield path.split(".")[2], (model, {})


FURTHER |= dict(_plain_variants())
EVERY = VARIANTS | FURTHER | PARTLY_OWN


def tiny_model(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode, its norms and biases random too so that none can be forgotten."""
    torch.manual_seed(seed)
    family, extra = EVERY[variant]
    text = "Text" if family in ("Gemma3", "Qwen3_5", "Qwen3_5Moe") else ""
    config = getattr(transformers, f"{family}{text}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**{**_SHAPE, **extra, **changes}))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            mean = 0.0 if name.endswith("bias") or family.startswith("Gemma") else 1.0
            torch.nn.init.normal_(p, mean=mean, std=0.3)
    return model.to(dtype).eval()


class _Exact:
    """torch, but that what modeling files call float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def exact_float64() -> Iterator[None]:
    """transformers computes norms, eager softmax and the loss in float32 even in float64; inside, they are exact.

    No class is touched, so that layers are known as ever.
    """
    for family, _ in EVERY.values():
        getattr(transformers, f"{family}ForCausalLM")  # imports its file
    files = [m for name, m in sys.modules.items() if name.startswith("transformers.models.") and ".modeling_" in name]
    with pytest.MonkeyPatch.context() as patch:
        for file in (f for f in files if hasattr(f, "torch")):
            patch.setattr(file, "torch", _Exact())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
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
