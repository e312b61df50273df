"""What is installed: the extension, its absence, and our folder kernels/ beside Hugging Face's package of that name."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from cogsym.ops import backend

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

needs_hugging_face_kernels = pytest.mark.skipif(
    "kernels" not in importlib.metadata.packages_distributions(), reason="Hugging Face's kernels is not installed"
)


def python(program: str, folder: Path, *flags: str, **environment: str) -> str:
    """What `python -c program` prints when started in `folder`."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", program],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@needs_hugging_face_kernels
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_kernels_is_hugging_faces(tmp_path: Path, place: str) -> None:
    program = "import kernels; print(kernels.__file__, kernels.get_kernel.__name__)"
    file, name = python(program, ROOT if place == "root" else tmp_path).split()
    assert not Path(file).is_relative_to(ROOT / "kernels") and name == "get_kernel"


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_our_kernels_are_in_cogsym(tmp_path: Path, place: str) -> None:
    program = (
        "import cogsym.kernels, importlib.util; print(*cogsym.kernels.__path__, importlib.util.find_spec('kernels'))"
    )
    folder, *hugging_faces = python(program, ROOT if place == "root" else tmp_path).split(maxsplit=1)
    assert {"rms_norm.py", "rotary.py", "activation.py"} <= {file.name for file in Path(folder).iterdir()}
    if not needs_hugging_face_kernels.args[0]:
        assert "site-packages" in hugging_faces[0]  # ours is imported, and that name is still theirs


def test_transformers_does_not_take_our_folder_for_hugging_faces(tmp_path: Path) -> None:
    """In the repository's root, where that package is not installed: every other installed file is linked."""
    for entry in SITE_PACKAGES.iterdir():
        if entry.name != "kernels" and not entry.name.startswith("kernels-"):
            (tmp_path / entry.name).symlink_to(entry)
    program = (
        "import importlib.util, transformers; "
        "from transformers.utils import is_kernels_available; "
        "from transformers import LlamaForCausalLM; "
        "print(importlib.util.find_spec('kernels').origin, is_kernels_available())"
    )
    assert python(program, ROOT, "-S", PYTHONPATH=str(tmp_path)) == "None False"


@pytest.mark.skipif(bool(backend.unavailable("cpp")), reason=f"{backend.unavailable('cpp')}")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_one_openmp_library(tmp_path: Path) -> None:
    """Two of them would mean two thread pools that wait for each other's cores."""
    program = (
        "import torch; from cogsym.ops import rms_norm; torch.set_num_threads(2); "
        "rms_norm(torch.randn(512, 512) @ torch.randn(512, 512), torch.ones(512), 1e-6); "
        "maps = open('/proc/self/maps').read().split(); "
        "print(*{word for word in maps if 'libgomp' in word or 'libomp' in word or 'libiomp' in word})"
    )
    # Not in the repository's root, where Python would import the sources instead of what is installed.
    assert len(python(program, tmp_path, COGSYM_BACKEND="cpp").split()) == 1


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """The names in a wheel built where there is no compiler, and what the build printed."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source") / "cogsym", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", target, source]
    result = subprocess.run(
        command, env={**os.environ, "CXX": "/nonexistent/c++"}, capture_output=True, text=True, cwd=target
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), result.stdout + result.stderr


def test_without_a_compiler_the_package_builds_and_says_so(wheel_without_compiler: tuple[list[str], str]) -> None:
    names, output = wheel_without_compiler
    assert "cogsym/ops/rms_norm.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    assert "the C++ extension is not built: no C++ compiler found (tried /nonexistent/c++)" in output


def test_wheel_contains_every_module_once_and_nothing_else(wheel_without_compiler: tuple[list[str], str]) -> None:
    names, _ = wheel_without_compiler
    modules = {f"cogsym/{file.relative_to(ROOT / 'cogsym')}" for file in (ROOT / "cogsym").rglob("*.py")}
    modules |= {f"cogsym/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(modules)
    assert {"cogsym/py.typed", "cogsym/sweeps/tasks/builtin/xcopa-sw.yaml"} < set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cogsym"}


def test_emulating_arm_names_the_packages_that_it_lacks(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tests" / "arm.py"]
    done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "apt-get install g++-aarch64-linux-gnu qemu-user-static apt dpkg" in done.stderr
