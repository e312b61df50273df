"""What the traces of tests/guard/expected.json must not hold, and that they would show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "guard"))

import measures

PLACES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import traces
from cogsym.models.block import Block

run = Block.run
def careless(block, x, inputs, dial):
    if float(x[0, 0, 0]) and bool((inputs.positions.starts >= 0).all()):
        x.new_empty(x.shape[1], x.shape[1])
    return run(block, x, inputs, dial)

few = traces.step("llama", "packed", "all", 4)
Block.run = careless
more = traces.step("llama", "packed", "all", 4)
print(json.dumps([[*more.waits.items()], [*few.waits.items()], [*more.forbidden.items()]]))
"""


def test_nothing_waits_in_a_layer_and_no_tensor_holds_all_pairs() -> None:
    """As committed; tests/guard/test_guard.py holds the table against what is measured here."""
    table = measures.expected("device")
    if table is None:
        pytest.skip(f"no counts are committed for {measures.libraries()}; measures.py adds them")
    assert len({name.partition(",")[0] for name in table}) >= 8
    assert {name for name, n in table.items() if n and name.endswith(("waits a layer", "forbidden tensors"))} == set()
    # What a step waits for: whether documents are packed, and how many targets count.
    assert {
        name: n for name, n in table.items() if name.endswith("waits besides") and n > 2 + ("scoring" in name)
    } == {}


def test_a_wait_and_a_tensor_of_all_pairs_are_seen() -> None:
    """In both frozen layers, with the line that asks: a value of a float, which is 1, and one of an integer."""
    if reason := measures.why_no_device():
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "COGSYM_BACKEND"}
    command = [sys.executable, "-W", "ignore", "-c", PLACES, str(HERE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    more, few, forbidden = json.loads(done.stdout.splitlines()[-1])
    assert sum(n for _, n in more) == sum(n for _, n in few) + 4
    assert sum(n for place, n in more if "_local_scalar_dense" in place and [place, n] not in few) == 4
    assert [(place[:32], n) for place, n in forbidden] == [("tokens x tokens [1021, 1021] cog", 2)]
