"""Sweeps that are short of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import in_child
from sweeps.runs import CONTEXT, L, by_row
from sweeps.task_rows import write_rows
from texts import sentences
from tiny_models import tiny_model

from cogsym import CogsymError, RunStopped, SweepSettings
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.ops import backend
from cogsym.sweeps import runner as module
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.layers.configurations import configurations
from cogsym.sweeps.tasks.task import load_task


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_pieces_that_do_not_fit_are_halved(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run, sizes = Engine.run, []

    def small(self: Any, trie: Any, batch: Any, *more: Any) -> None:
        if len(batch.packed.tokens) > 40:
            raise error
        sizes.append(len(batch.packed.tokens))
        run(self, trie, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", small)
        sweep("input", tasks)
    assert "Out of memory with 7 documents; going on with 3 at a time." in sweep.said  # type: ignore[attr-defined]
    assert len(sizes) > 6
    sweep("input", tasks, out=tmp_path / "at once")
    one, other = by_row(tmp_path / "out"), by_row(tmp_path / "at once")
    assert one.index.equals(other.index)
    # Other products of matrices, so the last bits differ; what is written does not.
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-5, atol=1e-5)
    assert one["text"].tolist() == other["text"].tolist()


def test_a_document_that_does_not_fit(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine.run
    documents = load_task(tasks[0]).documents(load_tokenizer(tmp_path / "base"), CONTEXT)
    lengths = [len(d.requests[0].tokens) - 1 for d in documents]
    bad = max(range(1, 7), key=lengths.__getitem__)

    def small(self: Any, trie: Any, batch: Any, *more: Any) -> None:
        if max(map(len, batch.sequences)) >= lengths[bad]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, trie, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", small)
        with pytest.raises(RunStopped, match="does not fit into memory under 5 configurations") as caught:
            sweep("input", tasks[:1])
    assert documents[bad].key in str(caught.value) and "task text" in str(caught.value)
    kept = set(by_row(tmp_path / "out").index.get_level_values("document"))
    assert kept == {d.key for d in documents[:bad]}
    sweep("input", tasks[:1], resume=True)
    assert len(by_row(tmp_path / "out")) == 7 * 5


def test_another_error_is_not_taken_for_one_of_memory(
    sweep: Callable[..., Any], tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "run", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        sweep("input", tasks)


def test_budgets_are_kept(sweep: Callable[..., Any], tasks: Any, model_folder: Path) -> None:
    """What pieces are said to take is at least what their states, keys and values are."""
    from cogsym.sweeps.engine.budget import PassMemory, TokenBytes
    from cogsym.sweeps.engine.weights import ResidentLayers
    from cogsym.sweeps.layers.trie import Trie

    layers = ResidentLayers(load_model(model_folder))
    trie = Trie(configurations("grid", L))
    costs, tokenizer = PassMemory(TokenBytes.of(layers), trie), load_tokenizer(model_folder)
    documents = [d for task in tasks for d in load_task(task).documents(tokenizer, CONTEXT)]
    sizes = []
    for budget in (1, costs.of(documents[:3]), costs.of(documents[:9]), 10**12):
        left, pieces = documents, []
        while left:
            number = costs.piece(left, budget, large=True)
            pieces.append(left[:number])
            assert number == 1 or costs.of(left[:number]) <= budget
            assert number == len(left) or costs.of(left[: number + 1]) > budget
            left = left[number:]
        assert [d for piece in pieces for d in piece] == documents
        sizes.append(len(pieces))
    assert sizes[0] == len(documents) and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)
    prompts = documents[-2:]
    held = sum(t.numel() * t.element_size() for t in stores(layers, trie, prompts))
    assert 0 < held <= costs.of(prompts)


def stores(layers: Any, trie: Any, documents: Any) -> list[torch.Tensor]:
    """The keys and values that generation allocates."""
    from cogsym.sweeps.engine import generate as generating
    from cogsym.sweeps.engine.requests import Generate
    from cogsym.sweeps.engine.sampling import Sampling
    from cogsym.sweeps.engine.unembedding import SweepHead

    requests = [r for d in documents for r in d.requests if isinstance(r, Generate)]
    stops = Stops(load_tokenizer_of(layers), [])
    decoder = generating._Decoder(Engine(layers), SweepHead(layers.model), trie, requests, stops, Sampling())
    with torch.inference_mode():
        decoder.run()
    return [t for store in decoder._stores.values() for t in (store.k, store.v)]


def load_tokenizer_of(layers: Any) -> Any:
    return load_tokenizer(layers.model.config.name_or_path)


LIBRARIES = 32  # MiB of code that they generate for shapes, and of their own buffers


def peak(sweep: Callable[..., Any], task: Any, model: Path, out: Path, budget: int) -> tuple[float, str]:
    """(MiB that a sweep adds to its process at the most, beside what it has when its first document comes; what it
    said)."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1])

    def work() -> None:
        before = []
        ask = module._Sweep._ask

        def watched(self: Any, *args: Any) -> None:
            if not before:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
                before.append(status("VmRSS"))
            ask(self, *args)

        pytest.MonkeyPatch().setattr(module._Sweep, "_ask", watched)
        sweep("input", [task], model=model, out=out, settings=SweepSettings(memory_budget=budget))
        (out / "told").write_text(f"{(status('VmHWM') - before[0]) / 1024}\n{sweep.said}")  # type: ignore[attr-defined]

    assert in_child(work) == 0
    first, _, said = (out / "told").read_text().partition("\n")
    return float(first), said


@pytest.fixture
def wide_model(model_folder: Path) -> Path:
    """One of whose states, keys and values the libraries' own memory is a small part."""
    tiny_model(
        "llama", vocab_size=300, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    ).save_pretrained(model_folder)  # fmt: skip
    return model_folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("kind", ["text", "translation"])
def test_the_process_keeps_to_its_budget(
    sweep: Callable[..., Any], tmp_path: Path, wide_model: Path, kind: str
) -> None:
    """Where there is room for several documents, and where there is none for one, which a warning then says."""
    if reason := backend.unavailable("cpp"):
        pytest.skip(f"plain PyTorch's attention holds scores that no budget counts, and {reason}")
    rows = [{"sw": " ".join(sentences(15, seed=i)), "en": " ".join(sentences(15, seed=99 + i))} for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    text = {"name": "it", "kind": "text", "data": f"{tmp_path / 'rows.jsonl'}#sw", "language": "sw"}
    translation = {
        "name": "it", "kind": "translation", "side": "production", "data": str(tmp_path / "rows.jsonl"),
        "language": "sw", "template": "{en} = {sw}", "max_new_tokens": 4,
    }  # fmt: skip
    task = text if kind == "text" else translation
    used, said = peak(sweep, task, wide_model, tmp_path / "large", 150 << 20)
    pieces = int(re.search(r"8 documents in (\d+) pieces?", said)[1])
    assert pieces < 8 and "Warning: The memory budget" not in said
    assert used < 150 + LIBRARIES, said
    used, said = peak(sweep, task, wide_model, tmp_path / "small", 1 << 20)
    told = re.search(
        r"Warning: The memory budget is 1\.0 MiB and the document line \d+ of the task it takes up to (\S+) MiB by "
        r"itself, which will be used\.\n", said,
    )  # fmt: skip
    assert told and "8 documents in 8 pieces" in said
    assert used < float(told[1]) + LIBRARIES, said


def test_strict_memory_refuses_what_does_not_fit(sweep: Callable[..., Any], tasks: Any, tmp_path: Path) -> None:
    strict = SweepSettings(memory_budget=100_000, strict_memory=True)
    for dry_run in (True, False):
        with pytest.raises(
            CogsymError, match=r"budget is 0\.1 MiB and the document .* takes up to \S+ MiB by itself; g"
        ):
            sweep("input", tasks, settings=strict, dry_run=dry_run)
        assert not list(tmp_path.glob("out/results/*"))
    sweep("input", tasks, settings=replace(strict, memory_budget=100 << 20))
    assert "Warning: The memory budget" not in sweep.said  # type: ignore[attr-defined]


def test_a_copy_of_the_weights_has_to_fit_into_the_budget(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    monkeypatch.setattr("cogsym.models.projections.pack_linear", lambda weight: packed.append(weight.nbytes))
    for name, budget, some in (("none", None, True), ("large", 100 << 20, True), ("small", 10_000, False)):
        sweep("input", tasks, out=tmp_path / name, settings=SweepSettings(memory_budget=budget))
        assert bool(packed) == some
        packed.clear()
