"""What a clock is not needed for: FLOPs, bytes, launches, instructions, registers. `python tests/guard/measures.py`
writes a change that is meant into the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import measures

from cogsym.models.block import Block
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.layers.trie import Trie


def changed(kind: str, measure: Any = None) -> list[str]:
    """What is not as committed; skips where that cannot be told here."""
    if reason := measures.KINDS[kind][2]():
        pytest.skip(reason)
    want = measures.expected(kind)
    if want is None:
        pytest.skip(f"no counts are committed for {measures.KINDS[kind][1]()}; measures.py adds them")
    return measures.changes(kind, (measure or measures.KINDS[kind][0])(), want)


@pytest.mark.parametrize("kind", ["steps", "sweeps", "instructions", "device"])
def test_as_committed(kind: str) -> None:
    assert changed(kind) == []


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from, or goes to, the user's cache of compiled kernels."""
    if not measures.why_no_triton():
        import triton

        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def test_triton_as_committed(fresh_cache: None) -> None:
    assert changed("triton") == []


def test_a_block_that_keeps_one_more_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Block.run

    def hoarding(self: Block, x: torch.Tensor, inputs: Any, dial: Any) -> Any:
        y, kept = run(self, x, inputs, dial)
        if dial == "attention":
            kept.attention["qkv"] = torch.empty(*x.shape[:-1], 160)
        return y, kept

    monkeypatch.setattr(Block, "run", hoarding)
    lines = changed("steps")
    # Four frozen layers, 2 x 64 tokens, 160 numbers of 4 bytes; and no FLOP or launch besides, but for empty itself.
    want = measures.expected("steps")["attention: saved bytes"]  # type: ignore[index]
    assert f"attention: saved bytes: {want + 4 * 2 * 64 * 160 * 4:,} instead of {want:,}" in lines
    assert not [line for line in lines if line.startswith(("all:", "input:", "nothing:"))]


def test_a_product_that_is_repeated_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Block.run
    monkeypatch.setattr(Block, "run", lambda *args: (run(*args), run(*args))[1])
    lines = changed("steps")
    assert {line.split(":")[0] for line in lines} == {"all", "attention", "input", "nothing"}
    assert any("FLOPs" in line for line in lines) and any("products" in line for line in lines)


def test_a_sweep_that_computes_a_shared_beginning_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last configuration goes through the layers by itself: its answers are right, its beginning is repeated."""
    run = Engine.run

    def forgetful(self: Engine, trie: Trie, batch: Any, on_ends: Any, on_keys: Any = None, *rest: Any) -> None:
        most = len(trie.configurations) - 1

        def of_the_last(configurations: Any, hidden: Any) -> None:
            on_ends([(most,) for _ in configurations], hidden)

        if on_keys:  # of a text that is written: left alone
            run(self, trie, batch, on_ends, on_keys, *rest)
            return
        run(self, Trie(trie.configurations[:most]), batch, on_ends)
        run(self, Trie(trie.configurations[most:]), batch, of_the_last)

    monkeypatch.setattr(Engine, "run", forgetful)
    lines = changed("sweeps")
    want = measures.expected("sweeps")
    assert want is not None
    # The last of `single` keeps every layer but the last; the five before it are shared with the whole model.
    assert f"single: layer-forwards: {want['single: layer-forwards'] + 5:,} instead of" in "\n".join(lines)
    assert {line.split(":")[0] for line in lines} >= {"output", "single", "grid", "blocks"}


def test_a_fifth_more_instructions_are_seen() -> None:
    """Rows stand for instructions: work grows with them, attention's with their square, but for what has no rows."""
    lines = changed("instructions", lambda: measures.instructions(rows=measures.ROWS * 6 // 5))
    want = measures.expected("instructions")
    assert want is not None and len(lines) == len(want.keys() - {"dequantised, bfloat16"})


def test_other_registers_are_seen(fresh_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel in float32 takes others."""
    if measures.why_no_triton():
        pytest.skip(measures.why_no_triton() or "")
    aot = measures._aot()
    case = ("gated_activation", 14336)
    monkeypatch.setattr(aot, "CASES", {case: lambda F, dtype: aot._gated_activation(F, torch.float32)})
    got = measures.triton_resources()
    want = measures.expected("triton")
    if want is None:
        pytest.skip("no counts are committed for this Triton")
    assert measures.changes("triton", got, {name: want[name] for name in got})


def test_every_kernel_of_the_extension_is_counted() -> None:
    if reason := measures.why_no_instructions():
        pytest.skip(reason)
    from cogsym import _C

    functions = {name for name, _, _ in _C.signatures()}
    counted = {name.split(",")[0] for name in measures.expected("instructions") or {}}
    if not counted:
        pytest.skip(f"no counts are committed for {measures.compiler()}")
    needs_amx = {"token_scores"}  # which valgrind does not have
    assert functions - needs_amx == counted
