"""What layers are called with for single tokens, against the decoder entered for each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, VOCABULARY, tiny_model
from torch import Tensor

from cogsym.decoder import decoder_of
from cogsym.models.calls import TokenInputs, token_inputs

POSITIONS = 29


class Entries:
    """How often a decoder is entered."""

    def __init__(self, model: Any) -> None:
        self.number = 0
        decoder_of(model).register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def ids(number: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (number,), generator=torch.Generator().manual_seed(seed))


def assert_like_the_decoder(model: Any, inputs: TokenInputs, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, positions = ids(7, seed), torch.randint(POSITIONS, (7,), generator=generator)
    x, embeddings = inputs(tokens, positions)
    want, every = token_inputs(model, tokens, positions)
    assert torch.equal(x, want) and x.dtype == want.dtype
    assert len(embeddings) == len(every) == model.config.num_hidden_layers
    for got, expected in zip(embeddings, every, strict=True):
        assert (got is None) == (expected is None)
        for a, b in zip(got or (), expected or (), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_tokens_come_to_the_layers_as_from_the_decoder(variant: str, dtype: torch.dtype) -> None:
    model = tiny_model(variant, dtype)
    entries = Entries(model)
    inputs = TokenInputs(model, ids(9, seed=1), POSITIONS)
    asked = entries.number
    assert asked <= 3
    inputs(ids(7, seed=2), torch.arange(7) + 4)
    assert entries.number == asked, "the decoder is entered for each call"
    assert_like_the_decoder(model, inputs, seed=3)


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 5, "long_factor": [4.0] * 5,
    "original_max_position_embeddings": 16, "factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["long", "dynamic"])
@torch.inference_mode()
def test_positions_that_depend_on_the_batch_are_asked_for_each_time(rope: dict[str, Any]) -> None:
    model, other = (tiny_model("llama", rope_parameters=rope, max_position_embeddings=16) for _ in range(2))
    entries = Entries(model)
    inputs = TokenInputs(model, ids(9, seed=1), POSITIONS)
    assert entries.number == 0
    for step in (3, 12, 15, 20, 25):  # the frequencies follow the batch, and remember
        tokens, positions = ids(2, seed=step), torch.tensor([step, step + 2])
        x, embeddings = inputs(tokens, positions)
        want, every = token_inputs(other, tokens, positions)
        assert torch.equal(x, want)
        for got, expected in zip(embeddings, every, strict=True):
            assert all(map(torch.equal, got, expected))
    assert entries.number == 5


@torch.inference_mode()
def test_embeddings_that_are_no_multiple_are_asked_for_each_time() -> None:
    model = tiny_model("llama")
    decoder_of(model).layers[0].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    entries = Entries(model)
    inputs = TokenInputs(model, ids(9, seed=1), POSITIONS)
    assert entries.number > 0
    assert_like_the_decoder(model, inputs, seed=3)


@torch.inference_mode()
def test_a_table_of_one_sequence_is_not_taken_for_another() -> None:
    """A rotary embedding that transformers does not name, whose frequencies follow the batch."""
    model = tiny_model("llama")
    rotary = decoder_of(model).rotary_emb
    forward = rotary.forward

    def following(x: Tensor, position_ids: Tensor) -> Any:
        return forward(x, position_ids * position_ids.max())

    rotary.forward = following
    assert_like_the_decoder(model, TokenInputs(model, ids(9, seed=1), POSITIONS), seed=3)
