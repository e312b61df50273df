"""A package beside cogsym adds an action, a search, a kind of task and a metric, and touches no list."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packages import install
from sweeps.plain import log_probabilities
from sweeps.runs import L
from tiny_models import tiny_model

from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.results.store import frame

SOURCE = '''
from dataclasses import dataclass

import numpy as np

from cogsym.sweeps.layers.actions import Action
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.search import Round
from cogsym.sweeps.tasks.kinds import Question, TaskKind
from cogsym.sweeps.tasks.metrics import Metric
from cogsym.sweeps.tasks.rows import scored_text

REVERT_MLP = Action("p", attention="model", mlp="base", label="with the base's MLP")
WORST = Metric("nats of the least likely word", True, 2, lambda sums: sums[..., 0] / sums[..., 1])


class Ends:
    """The first and the last layer, whichever is missed less."""

    def __init__(self, settings):
        ends = (0, settings.num_layers - 1)
        self.asked = [Configuration.of(settings.num_layers, {settings.action: [i]}) for i in ends]

    def planned(self):
        yield Round(self.asked, 1)

    def run(self, ask, higher_is_better, report):
        values = ask(self.asked)
        best = max(self.asked, key=lambda c: values[c.code] if higher_is_better else -values[c.code])
        report(f"{best} is missed less", values[best.code])
        return best


@dataclass(frozen=True, kw_only=True)
class Words(TaskKind):
    """How likely is each of the last words?"""

    words: int = 1

    known_metrics = default_metrics = ("worst_word",)
    default_side = "perception"

    def ask(self, where, row, header):
        before, *last = row["sw"].rsplit(" ", self.words)
        scored = [scored_text("{before} {word}", {"before": before, "word": word}, "word", "") for word in last]
        return Question(tuple(scored))

    def judge(self, question, scored, generated):
        return {"worst_word": (min(outcome.log_likelihood for outcome in scored), 1.0)}
'''
POINTS = {
    "cogsym.actions": {"revert_mlp": "ablations:REVERT_MLP"},
    "cogsym.searches": {"ends": "ablations:Ends"},
    "cogsym.task_kinds": {"words": "ablations:Words"},
    "cogsym.metrics": {"worst_word": "ablations:WORST"},
}


def test_a_package_adds_an_action_a_search_and_a_kind_of_task(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    site, out, base = tmp_path / "site", tmp_path / "out", tmp_path / "before"
    site.mkdir()
    install(site, "ablations", POINTS, SOURCE)
    tiny_model("llama", vocab_size=300, initializer_range=0.2, seed=1).save_pretrained(base)
    task = tmp_path / "task.json"
    settings = {"name": "last", "kind": "words", "data": str(text_file), "template": "{sw}", "words": 2, "limit": 6}
    task.write_text(json.dumps(settings), "utf-8")

    def cogsym(*args: object) -> str:
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
        done = subprocess.run(
            [sys.executable, "-m", "cogsym.cli", *map(str, args)],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run = ["sweep", model_folder, "--base", base, "--action", "revert_mlp", "--task", task, "--out", out]
    printed = cogsym(*run, "--configs", "single")
    assert "nats of the least" not in printed and "last, worst_word, every layer kept: " in printed
    # A layer's attention is shared with the model, and what follows its MLP is not: L whole layers, and for each layer
    # its MLP and those behind it.
    assert f"layer-forwards: {L + sum(0.5 + L - 1 - i for i in range(L)):,.0f}, " in printed
    printed = cogsym(*run, "--configs", "ends", "--resume")
    assert "revert mlp " in printed and " is missed less: nats of the least likely word -" in printed
    cogsym("plot", out)
    assert (out / "layers-revert_mlp.svg").exists()

    model, other, tokenizer = load_model(model_folder), load_model(base), load_tokenizer(model_folder)
    rows = [json.loads(line)["sw"] for line in text_file.read_text("utf-8").splitlines()[:6]]
    found = frame(out).set_index(["configuration", "document"])["value"]
    assert len(found) == 6 * (L + 1)
    for layer in range(L):
        plain = copy.deepcopy(model).eval()
        for half in ("mlp", "post_attention_layernorm"):
            setattr(plain.model.layers[layer], half, getattr(other.model.layers[layer], half))
        code = "".join("p" if i == layer else "." for i in range(L))
        for number, row in enumerate(rows):
            before, *last = row.rsplit(" ", 2)
            encoded = [tokenizer(f"{before} {word}", return_offsets_mapping=True) for word in last]
            # A token counts when it covers a character of the word, and then in both.
            given = min(sum(end <= len(before) + 1 for _, end in each["offset_mapping"]) for each in encoded)
            ids = [(tokenizer.eos_token_id, *each["input_ids"]) for each in encoded]
            worst = min(float(log_probabilities(plain, each)[given:].sum()) for each in ids)
            assert found[code, f"line {number + 1}"] == pytest.approx(worst, rel=1e-5)
