"""The tests of operations on 64-bit Arm, with and without its bfloat16 unit, emulated on a Debian machine:

    python tests/arm.py [--folder FOLDER] [pytest's arguments]

Makes in FOLDER, and keeps there for the next time: a root with Debian's Python for arm64, unpacked without an
installation; torch and what the tests need, from PyPI; and the extension, compiled across. An emulator then runs
pytest, on all of tests/ops but the plain PyTorch backend unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
TOOLS = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static", "apt-get": "apt", "dpkg": "dpkg"}  # packages
PACKAGES = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
TORCH = "torch==2.10.0"  # PyPI's last for Arm that does without CUDA's libraries; the operations need nothing newer
WHEELS = ("filelock", "fsspec", "jinja2", "networkx", "numpy", "pytest", "sympy", "transformers", "typing-extensions")
# Every extension, but for wide vectors, which torch would use and whose emulation is slow, as is that of signatures.
PROCESSOR = "max,sve=off,pauth-impdef=on"
COPIED = ("cogsym", "csrc", "tests", "pyproject.toml", "setup.py")


def main() -> int:
    """Run it; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="1.2 GB; default: a temporary one")
    options, arguments = parser.parse_known_args()
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        sys.exit(f"Emulating Arm needs {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}")
    if options.folder:
        return run(options.folder.resolve(), arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), arguments)


def run(folder: Path, arguments: list[str]) -> int:
    """Make what `folder` lacks, then run pytest there."""
    once(folder / "root", unpack_python)
    once(folder / "site", lambda site: install_wheels(site, (folder / "root/usr/bin/python3").readlink().name))
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    shutil.copy(build(folder), tree / "cogsym" / "_C.so")
    command = [str(shutil.which(EMULATOR)), "-cpu", PROCESSOR, "-L", folder / "root", folder / "root/usr/bin/python3"]
    # Not the conftest.py of tests/, which makes models.
    command += ["-m", "pytest", "-p", "no:cacheprovider", "--confcutdir=tests/ops"]
    command += arguments or ["tests/ops", "-k", "not reference"]
    # This machine's compilers make nothing that Arm runs: Inductor must not find them.
    paths = {"PYTHONPATH": f"{tree}:{folder / 'site'}", "PATH": str(folder / "root/usr/bin")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **paths}
    return subprocess.run(command, cwd=tree, env=environment).returncode


def once(target: Path, make: Callable[[Path], None]) -> None:
    """`make(target)` where that is not whole yet."""
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(target)


def unpack_python(root: Path) -> None:
    """Debian's Python and its headers, with all that they depend on, by an apt whose state is its own."""
    state = root.parent / "apt"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
    }
    apt = ["apt-get", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    subprocess.run([*apt, "update"])  # fails for one source without arm64, where the others have what is needed
    subprocess.run([*apt, "install", "--yes", "--download-only", *PACKAGES], check=True)
    for package in sorted((state / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root], check=True)


def install_wheels(site: Path, python: str) -> None:
    """torch, and what it and the tests import."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, "--only-binary=:all:"]
    pip += ["--python-version", python.removeprefix("python")]
    pip += [f"--platform={platform}_aarch64" for platform in ("manylinux_2_28", "manylinux2014")]
    # pip would take what a wheel needs for what this machine's would need.
    subprocess.run([*pip, "--no-deps", TORCH], check=True)
    subprocess.run([*pip, "--upgrade", "--constraint", ROOT / "constraints.txt", *WHEELS], check=True)


def build(folder: Path) -> Path:
    """The extension, compiled for the Python in folder/root."""
    include = folder / "root/usr/include"
    (python,) = include.glob("python3*")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder / "build"]
    environment = {**os.environ, "CXX": f"{COMPILER} -I{python} -idirafter {include}"}
    subprocess.run([*command, "--build-lib", folder / "lib"], cwd=ROOT, env=environment, check=True)
    built = list((folder / "lib").rglob("_C*.so"))  # by this machine's name for it
    if not built:
        sys.exit("The extension was not built for Arm; the compiler's output is above.")
    return built[0]


if __name__ == "__main__":
    sys.exit(main())
