"""The stub of the C++ extension, cogsym/_C.pyi, from what the extension says of itself.

    python tests/ops/stub.py

writes it anew.
"""

from __future__ import annotations

from pathlib import Path

STUB = Path(__file__).resolve().parents[2] / "cogsym" / "_C.pyi"
HEAD = '''"""The C++ extension, csrc/. Tensors are addresses, shapes and strides in elements. By tests/ops/stub.py."""

DTYPES: tuple[str, ...]
OPENMP: bool

def cpu_features() -> list[str]: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def signatures() -> list[tuple[str, str, list[tuple[str, str]]]]: ...
'''


def stub(signatures: list[tuple[str, str, list[tuple[str, str]]]]) -> str:
    """The stub's text, as ruff formats it."""
    text = HEAD
    for name, _, arguments in sorted(signatures):
        given = [f"{argument}: {'int' if kind == 'address' else kind}" for argument, kind in arguments] + ["/"]
        line = f"def {name}({', '.join(given)}) -> bool: ...\n"
        lines = ",\n    ".join(given)
        text += line if len(line) <= 121 else f"def {name}(\n    {lines},\n) -> bool: ...\n"
    return text


if __name__ == "__main__":
    import torch  # noqa: F401  the extension uses its OpenMP library

    from cogsym import _C

    STUB.write_text(stub(_C.signatures()), "utf-8")
