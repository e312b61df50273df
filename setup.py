"""Builds the C++ extension `cogsym._C` with ninja; everything else is in pyproject.toml.

Neither torch nor CMake is needed, only a C++17 compiler (`$CXX`, else c++, g++ or clang++). Every kernel file is
compiled once for each instruction set of the target, and the extension picks one when it is imported. Without a
compiler, or where it fails, the package installs without the extension and its operations run in plain PyTorch.

COGSYM_SANITIZE names sanitizers, as -fsanitize does: docs/sanitizers.md.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SHARED_SOURCES = ("cpu.cpp", "module.cpp")
KERNEL_SOURCES = tuple(sorted({source.name for source in CSRC.glob("*.cpp")} - {*SHARED_SOURCES}))

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# In the order of speed; csrc/cpu.cpp says which processors run them.
X86_VARIANTS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx_bf16": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
ARM_VARIANTS = {"baseline": [], "bf16": ["-march=armv8.2-a+bf16"]}  # NEON is in every 64-bit one
VARIANTS = dict.fromkeys(("x86_64", "amd64", "AMD64"), X86_VARIANTS) | dict.fromkeys(("aarch64", "arm64"), ARM_VARIANTS)

# The two -fno let loops with sqrt and comparisons be vectorised; neither changes a value. -ffast-math would: it forgets
# NaN and infinity.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# GCC 12's own AVX-512 headers use what they left uninitialised (its bug 105593); clang has no such warning.
KERNEL_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
KERNEL_FLAGS += ["-Wno-pass-failed"]  # clang says which `omp simd` loops it leaves scalar: no fault of theirs
# A report names lines and ends the process; -O1 keeps the frames that it shows, and compiles in a third of the time.
SANITIZER = os.environ.get("COGSYM_SANITIZE")
SANITIZE = [f"-fsanitize={SANITIZER}", "-fno-sanitize-recover=all", "-O1", "-g1"] if SANITIZER else []


class BuildFailed(Exception):
    """Why the extension cannot be built; one sentence."""


class NinjaBuild(build_ext):
    """`build_ext` that writes a ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Build the extension, or say why there is none."""
        if SANITIZER and self.inplace:
            raise SystemExit("COGSYM_SANITIZE is set, expected a build of its own: see docs/sanitizers.md.")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.unlink(missing_ok=True)
        try:
            compile_extension(Path(self.build_temp).resolve(), output, bool(self.verbose))
        except BuildFailed as failure:
            print(
                f"cogsym: the C++ extension is not built: {failure} The package works without it, with slower "
                "operations in plain PyTorch; `cogsym info` shows which backend is used.",
                file=sys.stderr,
            )


def compile_extension(folder: Path, output: Path, verbose: bool) -> None:
    """Compile csrc/ into `output`, with object files and build.ninja in `folder`.

    Raises:
        BuildFailed: no compiler, no ninja, or a compilation that fails.
    """
    compiler = find_compiler()
    ninja = find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(compiler, output))
    result = subprocess.run([ninja, "-C", str(folder), *(["-v"] if verbose else [])])
    if result.returncode != 0:
        raise BuildFailed(f"ninja ended with status {result.returncode}; its output is above.")


def find_compiler() -> list[str]:
    """The C++ compiler's command line."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildFailed(f"no C++ compiler found (tried {', '.join(candidates)}); install one or name it in CXX.")


def find_ninja() -> str:
    """The ninja of the build requirement, or one on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if not found:
        raise BuildFailed("ninja is not found; install it with `pip install ninja`.")
    return found


def accepts(compiler: list[str], flags: list[str], program: str = "int main() { return 0; }") -> bool:
    """Whether the compiler builds `program` with `flags`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(program)
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0


def target_machine(compiler: list[str]) -> str:
    """The processor that the compiler writes code for, which may not be the one it runs on."""
    result = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    return result.stdout.split("-")[0] if result.returncode == 0 else platform.machine()


def ninja_file(compiler: list[str], output: Path) -> str:
    """The text of build.ninja."""
    import pybind11

    openmp = accepts(compiler, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }")
    threads = ["-fopenmp"] if openmp else ["-fopenmp-simd"]
    known = VARIANTS.get(target_machine(compiler), {"baseline": []})
    variants = {name: flags for name, flags in known.items() if accepts(compiler, flags)}
    files = " ".join(f"F({Path(name).stem}, isa)" for name in KERNEL_SOURCES)
    define = [f"-DCOGSYM_VARIANTS(V)={' '.join(f'V({name})' for name in variants)}", f"-DCOGSYM_FILES(F, isa)={files}"]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    shared = [*include, *threads, *define]

    builds = [edge(f"{Path(name).stem}.o", CSRC / name, shared) for name in SHARED_SOURCES]
    for variant, flags in variants.items():
        for name in KERNEL_SOURCES:
            kernel = [*threads, f"-DCOGSYM_ISA={variant}", *KERNEL_FLAGS, *flags]
            builds.append(edge(f"{Path(name).stem}.{variant}.o", CSRC / name, kernel))
    objects = [build.split(":")[0].removeprefix("build ") for build in builds]

    if sys.platform == "darwin":
        link = [*compiler, *threads, "-bundle", "-undefined", "dynamic_lookup"]
    else:
        # The thread sanitizer's runtime is preloaded, and may be another compiler's: see .ci/sanitize.
        link = [*compiler, *(SANITIZE if SANITIZER != "thread" else []), *threads, "-shared"]
    return f"""\
rule cxx
  command = {shell(compiler + CXX_FLAGS + SANITIZE)} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {shell(link)} $in -o $out
{"".join(builds)}build {escape(str(output))}: link {" ".join(objects)}
default {escape(str(output))}
"""


def edge(target: str, source: Path, flags: list[str]) -> str:
    """One compilation."""
    return f"build {target}: cxx {escape(str(source))}\n  flags = {shell(flags)}\n"


def shell(words: list[str]) -> str:
    """A command line for the shell that ninja starts."""
    return shlex.join(words).replace("$", "$$")


def escape(path: str) -> str:
    """A path as ninja reads it."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


sources = [f"csrc/{name}" for name in (*SHARED_SOURCES, *KERNEL_SOURCES)]
# Optional: setuptools then does not insist on a file that was not built.
setup(ext_modules=[Extension("cogsym._C", sources, optional=True)], cmdclass={"build_ext": NinjaBuild})
