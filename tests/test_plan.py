from __future__ import annotations

import pytest
from tiny_models import tiny_model

from cogsym import CogsymError, LayerPlan


@pytest.mark.parametrize("num_layers", range(2, 129))
def test_outer_quarter(num_layers: int) -> None:
    trained = LayerPlan.outer(num_layers).trained
    # The nearest whole number to L/4, a half up, and one layer at each end at least.
    assert len(trained) == max(2, (2 * num_layers + 4) // 8)
    front = [i for i in trained if i < num_layers / 2]
    back = [i for i in trained if i >= num_layers / 2]
    assert front == list(range(len(front)))
    assert back == list(range(num_layers - len(back), num_layers))
    assert len(front) - len(back) in (0, 1)


@pytest.mark.parametrize(
    ("num_layers", "fraction", "front", "back"),
    [
        (30, 0.25, 4, 4),
        (32, 0.25, 4, 4),
        (28, 0.25, 4, 3),
        (2, 0.25, 1, 1),
        (1, 0.25, 1, 0),
        (16, 1, 8, 8),
        (5, 0.5, 2, 1),
    ],
)
def test_split(num_layers: int, fraction: float, front: int, back: int) -> None:
    assert LayerPlan.outer(num_layers, fraction).trained == (*range(front), *range(num_layers - back, num_layers))


def test_front_and_back_override_the_even_split() -> None:
    assert LayerPlan.outer(12, front=2, back=3).trained == (0, 1, 9, 10, 11)
    assert LayerPlan.outer(12, front=1).trained == (0, 10, 11)  # 3 layers are a quarter
    assert LayerPlan.outer(12, back=0).trained == (0, 1, 2)


def test_other_plans() -> None:
    assert LayerPlan.first(5, 2).trained == (0, 1)
    assert LayerPlan.last(5, 2, head=True) == LayerPlan(5, (3, 4), head=True)
    assert LayerPlan.layers(5, [3, 1, 3]).trained == (1, 3)
    assert LayerPlan.all(3) == LayerPlan(3, (0, 1, 2), True, True, True)


def test_it_says_what_it_trains() -> None:
    assert str(LayerPlan.outer(30)) == (
        "train layers 0-3 and 26-29 (8 of 30); freeze layers 4-25, embeddings, final norm, head"
    )
    assert str(LayerPlan.layers(6, [2], head=True)) == (
        "train layer 2 (1 of 6), head; freeze layers 0-1 and 3-5, embeddings, final norm"
    )
    assert str(LayerPlan.all(2)).endswith("freeze nothing")


@pytest.mark.parametrize("variant", ["llama", "llama-tied-gelu"])
def test_parameter_counts(variant: str) -> None:
    model = tiny_model(variant)
    plan = LayerPlan.outer(4, front=1, back=1)
    parts = plan.parts(model)
    assert sum(p.num_parameters for p in parts) == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for i in (0, 3) for p in model.model.layers[i].parameters())
    assert sum(p.num_parameters for p in parts if p.trained) == trained
    assert f"trained: {trained:,} parameters" in plan.describe(model)


@pytest.mark.parametrize("fraction", [0, -0.25, 1.5, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(
        CogsymError, match=rf"fraction of layers to train is {fraction}, expected more than 0 and at most 1"
    ):
        LayerPlan.outer(8, fraction)


def test_a_plan_that_trains_nothing() -> None:
    for make in (
        lambda: LayerPlan.layers(8, []),
        lambda: LayerPlan.first(8, 0),
        lambda: LayerPlan.outer(8, front=0, back=0),
    ):
        with pytest.raises(CogsymError, match="The plan trains nothing; choose at least one layer"):
            make()


def test_layers_that_are_not_there() -> None:
    with pytest.raises(CogsymError, match="trains layer 8, expected indices from 0 to 7"):
        LayerPlan.layers(8, [1, 8])
    with pytest.raises(CogsymError, match=r"5 first and 4 last layers, expected .* at most the model's 8"):
        LayerPlan.outer(8, front=5, back=4)
    with pytest.raises(CogsymError, match="plan is for 5 layers and the model has 4; make the plan with num_layers=4"):
        LayerPlan.outer(5).parts(tiny_model("llama"))


def test_a_tied_head_goes_with_its_embeddings() -> None:
    with pytest.raises(
        CogsymError, match=r"ties its head to its embeddings.* only the head; set embeddings and head alike"
    ):
        LayerPlan.outer(4, head=True).parts(tiny_model("llama-tied-gelu"))
