"""Tiny models whose decoder layers run their own forward altogether: older ones, hybrids, and Gemma's later ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 61
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
_SHAPE: dict[str, Any] = {
    **_TOKENS, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip
_FALCON: dict[str, Any] = {k: v for k, v in _SHAPE.items() if k != "intermediate_size"}
_GROUPS: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8}
# Layers 2 and 3 take the keys and values of 0 and 1.
_GEMMA: dict[str, Any] = {
    **_GROUPS, "num_hidden_layers": 4, "head_dim": 8, "hidden_size_per_layer_input": 6, "sliding_window": 5,
    "vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}  # fmt: skip

# name -> (class of transformers without "ForCausalLM" or "LMHeadModel", its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt-neo": (
        "GPTNeo",
        {
            **_TOKENS, "hidden_size": 24, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64,
            "attention_types": [[["global", "local", "local"], 1]], "window_size": 5,
        },
    ),
    "gpt-neox": ("GPTNeoX", _SHAPE),
    "bloom": ("Bloom", {**_TOKENS, "hidden_size": 24, "n_layer": 3, "n_head": 4}),
    "xglm": (
        "XGLM",
        {
            **_TOKENS, "pad_token_id": 1, "d_model": 24, "num_layers": 3, "attention_heads": 4, "ffn_dim": 40,
            "max_position_embeddings": 64,
        },
    ),
    "opt": ("OPT", {**_FALCON, "pad_token_id": 1, "ffn_dim": 40, "word_embed_proj_dim": 16}),
    "falcon": ("Falcon", _FALCON),
    "falcon-alibi": ("Falcon", {**_FALCON, "alibi": True}),
    "mpt": ("Mpt", {**_TOKENS, "d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "recurrent-gemma": ("RecurrentGemma", {**_SHAPE, "lru_width": 24, "attention_window_size": 8}),
    "falcon-h1": ("FalconH1", {**_GROUPS, **_MAMBA, "mamba_d_ssm": 32, "mamba_d_head": 8}),
    "bamba": ("Bamba", {**_GROUPS, **_MAMBA, "mamba_d_head": 12, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        {
            **_SHAPE, "num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1,
            "n_mamba_heads": 4, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"] * 2,
        },
    ),
    "gemma3n": ("Gemma3n", {**_GEMMA, "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": None}),
    "gemma4": ("Gemma4", {**_GEMMA, "global_head_dim": 8}),
}  # fmt: skip
OWN = tuple(MODELS)
SHARED_KEYS = ("gemma3n", "gemma4")


def own_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in evaluation mode."""
    family, settings = MODELS[name]
    config: Callable[..., Any] = getattr(hf, f"{family}{'Text' if family.startswith('Gemma') else ''}Config")
    model: Any = getattr(hf, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    torch.manual_seed(seed)
    made = model(config(**{**settings, **changes}))
    for p in made.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return made.eval()


class Passing(nn.Module):
    """A layer that hands the stream on, in the form that its family's decoder takes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.pair = type(layer).__name__ == "BambaDecoderLayer"
        self.tuple = type(layer).__name__ in (
            "GPTNeoBlock", "BloomBlock", "FalconDecoderLayer", "MptBlock", "FalconH1DecoderLayer",
        )  # fmt: skip

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return (x, None) if self.pair else (x,) if self.tuple else x
