"""The command line: `cogsym train`, `sweep`, `recipe`, `generate`, `plot`, `demo`, `bench` and `info`.

Each command checks its arguments, calls the function of the same name in Python and prints the outcome. torch and
transformers are imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cogsym.commands.generate import generate
from cogsym.commands.options import WithRecipe, option, option_of, quiet_transformers
from cogsym.commands.recipe import RecipeCommand, printed
from cogsym.commands.sweep import sweep
from cogsym.commands.train import train
from cogsym.errors import CogsymError, SettingError
from cogsym.ranks import rank_here, speaks

app = typer.Typer(
    name="cogsym",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Teach a language model a new language by training its outermost layers and freezing the middle.",
    epilog="New here? `cogsym demo` shows the whole thing in three minutes, without network or files.",
)


app.command(
    cls=RecipeCommand,
    epilog="Example: `cogsym train HuggingFaceTB/SmolLM2-135M --data news.jsonl#swahili --eval dev.jsonl#swahili "
    "--out smollm2-sw`",
)(train)

app.command(
    cls=RecipeCommand,
    epilog="Example: `cogsym sweep smollm2-sw/model --task xcopa-sw:sw.test.jsonl --task text:dev.jsonl#sw,language=sw "
    "--out smollm2-sweep`",
)(sweep)


@app.command(epilog="Example: `cogsym recipe > recipe.yaml`, then `cogsym train recipe.yaml`")
def recipe(
    ctx: typer.Context,
    command: Annotated[WithRecipe, typer.Argument(help="The command that it is for.")] = WithRecipe.train,
) -> None:
    """Print a recipe: every option of `train` or `sweep` in YAML, with what it means and its default.

    `cogsym train recipe.yaml` runs it.
    """
    commands: Any = ctx.find_root().command
    typer.echo(printed(commands.commands[command]))


app.command(epilog="Example: `cogsym generate smollm2-sw/model --prompt 'Habari za'`")(generate)


@app.command(epilog="Example: `cogsym plot smollm2-sweep --metric margin`")
def plot(
    results: Annotated[Path, typer.Argument(help="The folder that `cogsym sweep` wrote.", metavar="OUT")],
    out: Annotated[Path | None, option("Folder for the pictures, OUT where it is left out.")] = None,
    metric: Annotated[
        list[str] | None,
        option("Draw this metric instead of accuracy, log-likelihood, bits per byte and chrF++; repeatable."),
    ] = None,
) -> None:
    """Draw what a sweep found: perception and production against the layers that are missing.

    Writes each picture as PNG and SVG: `directions` has curves from each end of the model, `grid` maps first against
    last layers, `layers` and `blocks` show single layers and contiguous ones, as far as the sweep ran them.
    """
    from cogsym.sweeps.results.plots import plot as draw

    for path in draw(results, out, metric or ()):
        typer.echo(path)


@app.command(epilog="Example: `cogsym demo --out my-demo`")
def demo(
    out: Annotated[Path, option("Folder for the table and the plots.")] = Path("cogsym-demo"),
    seed: Annotated[int, option("Of the data's order.")] = 0,
) -> None:
    """Watch a small model learn a small new language, with the outer layers and with all of them.

    A base model that ships with cogsym knows one generated language; the demo teaches it a second one three times, by
    its outer layers, by those and its embeddings, and in full, and compares what it then understands (perception) and
    what it writes (production). It needs no network and no files, and less than three minutes on a laptop.
    """
    quiet_transformers()
    from cogsym.demo.comparison import run_demo

    run_demo(out, seed=seed)


@app.command(
    epilog="Examples: `cogsym bench --quick`, `cogsym bench train --full`, `cogsym bench compare A.json B.json`"
)
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ops|overhead|train|sweep|generate|install]... | compare A B",
            help="The questions to measure, all of them where none is named; or two result files to compare.",
        ),
    ] = None,
    model: Annotated[str | None, option("A named model, with random weights, or a model folder.")] = None,
    device: Annotated[str, option("cpu or cuda.")] = "cpu",
    full: Annotated[bool, option("Three minutes, or everything.", "--full/--quick")] = False,
    out: Annotated[Path, option("Folder for the result files and pictures.")] = Path("cogsym-bench"),
    resume: Annotated[bool, option("Go on with the result files in --out.", "--resume")] = False,
    case: Annotated[str, option("Only cases whose names contain these words.")] = "",
) -> None:
    """Measure what cogsym gains on this machine, beside the alternatives; or compare two measurements.

    A quick run takes three minutes, and is sized by how fast the machine is. `compare` exits with status 1 where B is
    slower than A by more than the noise.
    """
    quiet_transformers()
    from rich.console import Console

    from cogsym.bench import compare, report
    from cogsym.bench.suite import STUDIES, run

    words = what or list(STUDIES)
    if words[0] != "compare":
        command = shlex.join(["cogsym", "bench", *words, "--full" if full else "--quick", "--device", device])
        command += f" --model {shlex.quote(Path(model).name)}" if model else ""
        command += f" --case {shlex.quote(case)}" if case else ""
        run(words, model=model, device=device, full=full, out=out, command=command, resume=resume, only=case)
        return
    if len(words) != 3:
        raise CogsymError(
            f"compare was given {len(words) - 1} files, expected two: cogsym bench compare A.json B.json."
        )
    a, b = (report.read(Path(word)) for word in words[1:])
    if compare.show(compare.compare(a, b, (words[1], words[2])), Console()):
        raise typer.Exit(1)


@app.command(epilog="Example: `COGSYM_BACKEND=reference cogsym info`")
def info() -> None:
    """Show versions, the processor, the GPU and what computes each operation here."""
    from cogsym.info import describe

    rows = describe()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def main() -> None:
    """Run the command line; a user's error is one sentence and an exit status, never a traceback.

    Of several ranks the first one speaks, and another one where something is wrong there alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # Before torch loads libgomp, whose threads spin for milliseconds before they sleep: where another program has
        # a core, that keeps off the other one the thread that is waited for. docs/environment.md has what it costs.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if rank_here():
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (until the process ends)
    try:
        app()
    except SettingError as error:
        _end(f"{option_of(error.name)} {error.problem}", error.exit_status, speaks(error))
    except CogsymError as error:
        _end(str(error), error.exit_status, speaks(error))
    except (MemoryError, RuntimeError) as error:
        from cogsym.memory import out_of_memory

        if not out_of_memory(error):
            raise
        _end(
            "memory ran out; what was written is whole, go on with --resume where there is more of it, or ask for less "
            "at a time.",
            1,
        )
    except KeyboardInterrupt:
        _end("stopped at once; nothing after the last checkpoint was saved.", 130, not rank_here())


def _end(sentence: str, status: int, tell: bool = True) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        if tell:
            print(f"cogsym: {sentence}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is left would be flushed once more at the end, and that failure be the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


if __name__ == "__main__":
    main()
