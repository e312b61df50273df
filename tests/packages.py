"""Packages beside cogsym, as pip leaves them: a module, and the list of its entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, points: Mapping[str, Mapping[str, str]], source: str) -> None:
    """Write one into a folder that is or will be on Python's path.

    Args:
        folder: where.
        name: of the package and its module.
        points: group -> name -> value of its entry points.
        source: of the module.
    """
    (folder / f"{name}.py").write_text(source, "utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    sections = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(sections), "utf-8")
