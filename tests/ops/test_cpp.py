"""The choice of the C++ kernels' instruction set, and their use from several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cogsym.errors import CogsymError
from cogsym.ops import backend, rms_norm

pytestmark = pytest.mark.skipif(bool(backend.unavailable("cpp")), reason=f"{backend.unavailable('cpp')}")


def test_the_fastest_variant_is_in_use_and_the_features_name_it() -> None:
    from cogsym import _C

    assert _C.isa() in _C.isas() and _C.isas()[0] == "baseline"
    if os.environ.get("COGSYM_CPU_ISA") is None:
        assert _C.isa() == _C.isas()[-1]
    assert set(_C.isas()) - {"baseline"} <= set(_C.cpu_features())
    with pytest.raises(ValueError, match="no variant 'sse9'"):
        _C.set_isa("sse9")


def test_environment_names_a_slower_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogsym.ops import cpp

    before = cpp.extension.isa()
    monkeypatch.setenv("COGSYM_CPU_ISA", "baseline")
    cpp._choose_isa()
    assert cpp.extension.isa() == "baseline"
    cpp.extension.set_isa(before)


def test_environment_names_what_the_processor_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogsym.ops import cpp

    monkeypatch.setenv("COGSYM_CPU_ISA", "sse9")
    with pytest.raises(CogsymError, match="COGSYM_CPU_ISA is 'sse9', expected one of baseline"):
        cpp._choose_isa()


def test_calls_from_several_threads_at_once() -> None:
    x, weight = torch.randn(300, 257), torch.randn(257)
    expected = rms_norm(x, weight, 1e-6)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: rms_norm(x, weight, 1e-6), range(40)))
    assert all(torch.equal(result, expected) for result in results)
