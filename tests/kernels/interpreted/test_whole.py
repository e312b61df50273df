"""Training steps and sweeps whose every operation with a Triton kernel runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny_models import batch, tiny_model
from torch import Tensor

import cogsym
from cogsym.ops import backend
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.requests import Generate, Score
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.trie import Trie

PLAN = cogsym.LayerPlan.outer(3, front=1, back=1)


class Words:
    """Writes token ids."""

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient, of 7 tokens of two rows."""
    model.zero_grad()
    loss = model.train()(**{name: x[:2, :7] for name, x in inputs.items()}, use_cache=False).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("variant", "keep", "kind"),
    [
        ("llama", "all", "packed"),
        ("llama", "attention", "padded-left"),
        ("llama", "nothing", "plain"),
        ("gemma2", "input", "packed"),
    ],
)
def test_a_training_step_gives_the_gradients_of_plain_pytorch(
    variant: str, keep: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cogsym.prepare(tiny_model(variant, num_hidden_layers=3, **layers_of(variant)), PLAN, keep=keep)
    inputs = batch(kind)
    with monkeypatch.context() as patch:
        patch.setenv("COGSYM_BACKEND", "reference")
        want = gradients(copy.deepcopy(model).double(), inputs)
    ran = backends(monkeypatch)
    got = gradients(model, inputs)
    assert ran == {"triton"}
    for name, x in got.items():
        assert (x - want[name]).abs().max() <= 2e-5 * want[name].abs().max() + 1e-7, name


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_a_sweep_scores_and_writes_as_plain_pytorch(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept() -> tuple[Any, Any]:
        layers = ResidentLayers(tiny_model(variant, num_hidden_layers=3, initializer_range=0.3, **layers_of(variant)))
        engine, head = Engine(layers), SweepHead(layers.model)
        trie = Trie([Configuration.of(3, {"skip": skipped}) for skipped in ([], [0], [2])], engine.topology)
        asked = [Score((*range(2, 12), 20), 9), Score((*range(2, 12), 21, 22), 10)]
        scored = score(engine, head, trie, asked)
        written = generate(engine, head, trie, [Generate((3, 4, 5), 2)], Stops(Words(), []))
        return [s.log_likelihood for row in scored for s in row], [w.text for row in written for w in row]

    with monkeypatch.context() as patch:
        patch.setenv("COGSYM_BACKEND", "reference")
        scores, texts = swept()
    ran = backends(monkeypatch)
    got = swept()
    assert ran == {"triton"}
    assert got[0] == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert got[1] == texts


def layers_of(variant: str) -> dict[str, Any]:
    """What the configuration of three layers says of each."""
    return {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]} if variant == "gemma2" else {}


def backends(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of the operations that run from now on and have a Triton kernel."""
    ran: set[str] = set()
    implementation = backend.Kernel.implementation

    def noted(self: backend.Kernel, *args: Any) -> Any:
        function = implementation(self, *args)
        if any(each.name == "triton" for each in self.backends):
            ran.add("reference" if function is self.reference else "triton")
        return function

    monkeypatch.setattr(backend.Kernel, "implementation", noted)
    return ran
