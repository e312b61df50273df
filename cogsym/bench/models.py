"""Models whose shapes are measured: by name, with random weights, or a real folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from cogsym.errors import CogsymError
from cogsym.models.loading import load_config, load_model
from cogsym.ops.operation import Sizes


@dataclass(frozen=True)
class Shape:
    """What the sizes of a decoder's operations follow from.

    Attributes:
        name: as users say it.
        family: what transformers calls it: "Llama" or "Qwen2".
        width: D, of the residual stream.
        mlp_width: F.
        layers: how many.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: of one head.
        vocabulary: V.
        tied: embeddings and head share their weight.
    """

    name: str
    family: str
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Those of a layer's linear maps."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.width * (attention + 3 * self.mlp_width)

    @property
    def head_weights(self) -> int:
        """Those of the head."""
        return self.width * self.vocabulary

    def sizes(self, rows: int, length: int) -> Sizes:
        """Those of an operation's example, for so many sequences of so many tokens."""
        return Sizes(
            rows, length, self.width, self.heads, self.kv_heads, self.head_dim, self.mlp_width, self.vocabulary
        )

    def config(self, layers: int | None = None) -> Any:
        """As transformers describes it, with so many layers."""
        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", "Llama", 576, 1536, 30, 9, 3, 64, 49_152, True),
        Shape("Qwen2.5-0.5B", "Qwen2", 896, 4864, 24, 14, 2, 64, 151_936, True),
        Shape("Llama-3.2-1B", "Llama", 2048, 8192, 16, 32, 8, 64, 128_256, True),
        Shape("Qwen2.5-1.5B", "Qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, True),
        Shape("Qwen2.5-3B", "Qwen2", 2048, 11_008, 36, 16, 2, 128, 151_936, True),
        Shape("Llama-3.2-3B", "Llama", 3072, 8192, 28, 24, 8, 128, 128_256, True),
        Shape("Qwen2.5-7B", "Qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, False),
        Shape("Llama-3.1-8B", "Llama", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
        Shape("Qwen2.5-14B", "Qwen2", 5120, 13_824, 48, 40, 8, 128, 152_064, False),
        Shape("tiny", "Llama", 64, 160, 4, 4, 2, 16, 512, True),  # to try the suite itself
    )
}


def shape_of(model: str) -> Shape:
    """The shape of a named model, or of the one in a folder.

    Raises:
        CogsymError: neither a name that is known nor a folder.
    """
    if model in SHAPES:
        return SHAPES[model]
    if not Path(model).is_dir():
        raise CogsymError(f"--model is '{model}', expected one of {', '.join(SHAPES)} or a model folder.")
    config = load_config(model).get_text_config()
    heads = config.num_attention_heads
    return Shape(
        Path(model).resolve().name,
        type(config).__name__.removesuffix("Config"),
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def build(model: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model: the first `layers` of a folder's, or random weights of a named shape.

    The random weights are drawn on the device, without a copy in another dtype.
    """
    shape = shape_of(model)
    layers = min(layers or shape.layers, shape.layers)
    if model not in SHAPES:
        real = load_model(model, dtype).to(device)
        real.model.layers = real.model.layers[:layers]
        real.config.num_hidden_layers = layers
        return real
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return getattr(transformers, f"{shape.family}ForCausalLM")(shape.config(layers))
    finally:
        torch.set_default_dtype(before)
