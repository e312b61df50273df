"""The extension describes itself: its stub, its errors, and a kernel file that nothing lists."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogsym.ops import backend

sys.path.insert(0, str(Path(__file__).parent))
from stub import STUB, stub

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(bool(backend.unavailable("cpp")), reason=f"{backend.unavailable('cpp')}")


@built
def test_the_stub_is_what_the_extension_says() -> None:
    from cogsym import _C

    assert STUB.read_text("utf-8") == stub(_C.signatures()), "write it anew: python tests/ops/stub.py"


@built
def test_functions_have_a_signature_and_a_text() -> None:
    from cogsym import _C

    for name, text, arguments in _C.signatures():
        function = getattr(_C, name)
        assert list(inspect.signature(function).parameters) == [argument for argument, _ in arguments]
        assert function.__doc__ == text and function.__name__ == name and function.__module__ == "cogsym._C"


@built
def test_arguments_that_do_not_fit() -> None:
    from cogsym import _C

    tables = (0, (0, 0), 0, (0, 0))
    turn = (0, 0, 0, 0, 0, 0, False, False, 0, 0, 1)
    with pytest.raises(TypeError, match="rotary takes 17 arguments, 1 were given"):
        _C.rotary(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="x_strides is not a tuple of 3 integers"):
        _C.rotary(0, (1, 2), *tables, *turn)
    with pytest.raises(ValueError, match="dtype is 4, expected 0 to 3"):
        _C.rotary(0, (1, 2, 3), *tables, *turn[:8], 4, 0, 1)
    with pytest.raises(TypeError, match="int"):
        _C.rotary("0", (1, 2, 3), *tables, *turn)  # type: ignore[arg-type]


SOURCE = """
#include "scratch.h"

namespace cogsym {
namespace COGSYM_ISA {
namespace {

struct Doubled {
    const void* x;
    void* y;
    int64_t count;
    DType dtype;
    Scratch scratch;
};

int64_t doubled(const Doubled& a) {
    Arena arena(a.scratch);
    double* factor = arena.take<double>(1);
    if (!a.scratch) return arena.used();
    *factor = 2;
    with_type(a.dtype, [&](auto element) {
        using T = decltype(element);
        const T* x = static_cast<const T*>(a.x);
        write(static_cast<T*>(a.y), a.count, [=](int64_t i) { return widen(x[i]) * compute_t<T>(*factor); });
    });
    return 0;
}

#define FIELD(name) COGSYM_FIELD(Doubled, name)
constexpr Field fields[] = {FIELD(x), FIELD(y), FIELD(count), FIELD(dtype), FIELD(scratch)};
#undef FIELD

}  // namespace

COGSYM_KERNELS(doubled) = {kernel<doubled>("doubled", "y = 2 x.", fields), {}};

}  // namespace COGSYM_ISA
}  // namespace cogsym
"""
PROGRAM = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, y = array.array("f", range(100)), array.array("f", [0] * 100)
for isa in module.isas():
    module.set_isa(isa)
    assert module.doubled(x.buffer_info()[0], y.buffer_info()[0], 100, 0)
    assert y.tolist() == [2.0 * i for i in range(100)]
print(module.signatures())
"""


@built
def test_a_kernel_file_is_found_where_it_lies(tmp_path: Path) -> None:
    """csrc with one kernel that no list names: built for every instruction set, called and described."""
    pytest.importorskip("pybind11")
    (tmp_path / "csrc").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    for file in (*(ROOT / "csrc").glob("*.h"), ROOT / "csrc" / "module.cpp", ROOT / "csrc" / "cpu.cpp"):
        shutil.copy(file, tmp_path / "csrc")
    (tmp_path / "csrc" / "doubled.cpp").write_text(SOURCE, "utf-8")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (library,) = (tmp_path / "lib").rglob("_C*.so") if done.returncode == 0 else (None,)
    assert library, done.stdout + done.stderr
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [("x", "address"), ("y", "address"), ("count", "int"), ("dtype", "int")]
    assert done.stdout.strip() == str([("doubled", "y = 2 x.", expected)])
