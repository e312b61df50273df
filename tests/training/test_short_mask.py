"""No tensor of all pairs of tokens in a step, and moves that keep weights together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cogsym
from cogsym.models import Block, projections
from cogsym.models.attachment import attachment

PLAN = cogsym.LayerPlan.outer(4, front=1, back=1)
PAIRS = 17 * 17  # of the tokens of a batch


class Pairs(TorchDispatchMode):
    """Notes what makes a number for each pair of tokens of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.numel() and x.numel() % PAIRS == 0:
                self.made.append(f"{function} {tuple(x.shape)}")
        return made


@pytest.mark.parametrize("kind", ["plain", "packed", "padded-right", "padded-left"])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gemma3"])
def test_a_step_makes_no_tensor_of_all_pairs_of_tokens(variant: str, kind: str) -> None:
    model = cogsym.prepare(tiny_model(variant), PLAN, keep="attention").train()
    with Pairs() as pairs:
        model(**batch(kind), use_cache=False).loss.backward()
    assert pairs.made == []


def test_what_starts_do_not_say_is_left_to_a_mask() -> None:
    """Padding between tokens; layers that attend by themselves; a cache; a mask of the caller's own."""
    model = cogsym.prepare(tiny_model("llama"), PLAN).eval()
    holes = torch.tensor([[1, 1, 0, 1, 1]])
    ids = torch.randint(VOCABULARY, (1, 5))
    logits = model(input_ids=ids, attention_mask=holes, use_cache=False).logits
    own = cogsym.restore(model)
    torch.testing.assert_close(own(input_ids=ids, attention_mask=holes, use_cache=False).logits, logits)
    cogsym.prepare(own, PLAN)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril() & (torch.arange(5) != 1)
    logits = own(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(cogsym.restore(own)(input_ids=ids, attention_mask=mask, use_cache=False).logits, logits)


@pytest.mark.parametrize(("variant", "tells"), [("llama", True), ("gemma3", True), ("gpt-oss", False)])
def test_whether_positions_pack_is_asked_of_the_decoder(variant: str, tells: bool) -> None:
    model = cogsym.prepare(tiny_model(variant), PLAN)
    assert attachment(model.get_decoder()).tells_documents_apart is tells


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.share_memory()])
def test_weights_of_one_product_stay_together_where_the_model_is_moved(move: Any) -> None:
    def together(layer: Any) -> list[bool]:
        block: Block = attachment(layer).read(layer).block
        return [projections._joined(each._parameters()[0]) is not None for each in block.projections()]

    model = cogsym.prepare(tiny_model("llama"), PLAN)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    move(model)
    first, second, third, last = map(together, model.model.layers)
    assert second == third == [True] * 4 and not all(first) and not all(last)
    for name, x in cogsym.restore(model).state_dict().items():
        torch.testing.assert_close(x.to(before[name].dtype), before[name], rtol=2**-8, atol=0)
    assert all("_apply" not in vars(layer) for layer in model.model.layers)
