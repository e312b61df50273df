from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_models import own_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import VOCABULARY as V
from tiny_models import tiny_model
from transformers import BloomConfig, BloomForCausalLM

import cogsym
from cogsym import CogsymError, LayerPlan, strategies
from cogsym.strategies import format_layers, parse_layers, parse_strategy


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


def test_parts_of_a_model_that_calls_its_layers_otherwise() -> None:
    config = BloomConfig(vocab_size=V, hidden_size=8, n_layer=3, n_head=2, tie_word_embeddings=False)
    model = BloomForCausalLM(config)
    parts = {part.name: part for part in LayerPlan.layers(3, [1], final_norm=True).parts(model)}
    assert list(parts) == ["embeddings", "layer 0", "layer 1", "layer 2", "final norm", "head"]
    norm = model.transformer.word_embeddings_layernorm
    assert parts["embeddings"].parameters == (model.transformer.word_embeddings.weight, norm.weight, norm.bias)
    assert [name for name, part in parts.items() if part.trained] == ["layer 1", "final norm"]
    assert parts["final norm"].parameters == (model.transformer.ln_f.weight, model.transformer.ln_f.bias)


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


def test_fraction_beside_front_and_back() -> None:
    with pytest.raises(CogsymError, match=r"fraction of layers to train is 0\.5 beside 1 first and 2 last layers"):
        LayerPlan.outer(8, 0.5, front=1, back=2)
    assert LayerPlan.outer(8, 0.5, front=1).trained == (0, 5, 6, 7)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3,26-29", (0, 1, 2, 3, 26, 27, 28, 29)),
        ("7", (7,)),
        (" 28 - 29 , 0", (0, 28, 29)),
        ("3-5,4,5-6", (3, 4, 5, 6)),
    ],
)
def test_layers_as_text(text: str, layers: tuple[int, ...]) -> None:
    plan = LayerPlan.layers(30, text, head=True)
    assert plan == LayerPlan(30, layers, head=True)
    assert LayerPlan.choose(30, *parse_strategy(text), head=True) == plan
    assert parse_layers(format_layers(layers).replace(" and ", ",")) == list(layers)


@pytest.mark.parametrize("text", ["", ",", "1-", "-1", "3-1", "1;2", "1.5", "0x1", "0-3 5", "0-99999999999"])
def test_text_that_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(CogsymError, match=r"list of layers .* is not understood at .*, such as 0-3,26-29\."):
        LayerPlan.layers(8, text)


@pytest.mark.parametrize("indices", [[1.5], ["2"], [None], "8", [-1]])
def test_layers_that_are_no_indices(indices: Any) -> None:
    with pytest.raises(CogsymError, match=r"trains layer .*, expected indices from 0 to 7"):
        LayerPlan.layers(8, indices)


def test_strategies_by_name() -> None:
    assert LayerPlan.choose(30) == LayerPlan.outer(30)
    assert LayerPlan.choose(30, "outer", {"fraction": 0.5, "front": 1}) == LayerPlan.outer(30, 0.5, 1)
    assert LayerPlan.choose(30, *parse_strategy("first, k=4")) == LayerPlan.first(30, 4)
    assert LayerPlan.choose(30, *parse_strategy("last,k=4"), embeddings=True) == LayerPlan.last(30, 4, embeddings=True)
    assert LayerPlan.choose(30, "layers", {"indices": [3]}) == LayerPlan.layers(30, "3")
    assert LayerPlan.choose(3, "all") == LayerPlan(3, (0, 1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frist,k=4", "layer strategy 'frist' is unknown, expected one of outer, first, .*; did you mean first"),
        ("first", r"options of the layer strategy 'first' are wrong \(missing a required argument: 'k'\), expected: k"),
        ("first,n=4", r"wrong \(.*\), expected: k"),
        ("first,k=4,num_layers=3", r"options of the layer strategy 'first' are wrong \(multiple values"),
        ("first,4", "choice of layers 'first,4' is not understood at '4'; give a list such as 0-3,26-29, or a strat"),
        ("first,k=four", "number of layers is 'four', expected a whole number"),
        ("last,k=", "number of layers is None, expected a whole number"),
        ("outer,front=half", "number of layers is 'half', expected a whole number"),
        ("first,k=-1", "-1 first and 0 last layers, expected both at least 0"),
        ("outer,fraction=much", "fraction of layers to train is much, expected more than 0"),
        ("layers,indices=3", "layer strategy 'layers' chooses 3, expected a list of layers"),
        ("first,k=[", r"choice of layers 'first,k=\[' is not understood at 'k=\['"),
    ],
)
def test_what_no_strategy_is_asked(text: str, message: str) -> None:
    with pytest.raises(CogsymError, match=message) as error:
        LayerPlan.choose(8, *parse_strategy(text))
    assert "\n" not in str(error.value)


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "STRATEGIES", copy.copy(strategies.STRATEGIES))
    monkeypatch.setattr(strategies.STRATEGIES, "_objects", dict(strategies.STRATEGIES._objects))
    cogsym.register_strategy("every", lambda num_layers, step=2: np.arange(0, num_layers, step))
    plan = LayerPlan.choose(8, *parse_strategy("every,step=3"), head=True)
    assert plan == LayerPlan(8, (0, 3, 6), head=True)
    json.dumps(plan.trained)  # as a run records them, whatever the strategy counts with
    with pytest.raises(CogsymError, match="layer strategy 'outer' is registered already"):
        cogsym.register_strategy("outer", lambda num_layers: [])
    for name in ("0-3", "a,b", "a=b", ""):
        with pytest.raises(CogsymError, match=r"expected a word and a function of the number of layers"):
            cogsym.register_strategy(name, lambda num_layers: [])
    with pytest.raises(CogsymError, match=r"'odd' is 3, expected a word and a function"):
        cogsym.register_strategy("odd", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: tiny_model("llama", num_hidden_layers=3), lambda: own_model("gpt2")])
def test_adapters_are_put_on_the_planned_layers(make: Callable[[], Any]) -> None:
    """One calls its layers "layers", the other "h"."""
    asked = LoraConfig(r=2, target_modules=["q_proj", "c_attn"])
    model = get_peft_model(make(), LayerPlan.outer(3).peft_config(asked))
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {re.findall(r"\.(?:layers|h)\.(\d+)\.", name)[0] for name in adapted} == {"0", "2"}
    assert asked.layers_to_transform is None


@pytest.mark.parametrize(
    ("plan", "config", "words"),
    [
        (LayerPlan.outer(4, head=True), LoraConfig(), "LoRA trains decoder layers only; leave embeddings, head"),
        (LayerPlan.outer(4), LoraConfig(target_modules="all-linear"), "are 'all-linear', expected a list of names"),
        (LayerPlan.outer(4), PromptTuningConfig(), "PromptTuningConfig has no layers_to_transform, .*give it to peft"),
    ],
)
def test_adapters_that_cannot_be_put_on_layers(plan: LayerPlan, config: Any, words: str) -> None:
    with pytest.raises(CogsymError, match=words):
        plan.peft_config(config)


def test_a_package_adds_a_strategy_by_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "thirds.py").write_text("def third(num_layers, of):\n    return range(of, num_layers, 3)\n")
    info = tmp_path / "thirds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cogsym.strategies]\nthird = thirds:third\n")
    code = (
        "import sys; from cogsym import LayerPlan; from cogsym.strategies import STRATEGIES, parse_strategy\n"
        "assert list(STRATEGIES) == ['outer', 'first', 'last', 'layers', 'all', 'third']\n"
        "assert 'thirds' not in sys.modules\n"
        "print(LayerPlan.choose(8, *parse_strategy('third,of=1')))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(cogsym.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.startswith("train layers 1, 4 and 7 (3 of 8); "), done.stderr
