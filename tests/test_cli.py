"""The command line as a user meets it: help, one sentence for each mistake, exit statuses, real signals."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done
from safetensors.torch import load_file, save_file
from sweeps.plain import greedy_tokens
from transformers import AutoModelForCausalLM

from cogsym.data import separator_id
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.results.store import frame

pytestmark = pytest.mark.usefixtures("heeded_signals")

# In the repository's root Python would take the source tree for the package.
FOLDER = Path(__file__).parent
BIG = ["--length", "64", "--batch-size", "2", "--dtype", "fp32", "--learning-rate", "1e-3"]


def process(*args: str | Path, **extra: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(command(*args), capture_output=True, text=True, cwd=FOLDER, timeout=300, **extra)


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "cogsym.cli", *map(str, args)]


def test_help_of_each_command_has_an_example(cogsym: Callable[..., Done]) -> None:
    assert {"train", "sweep", "recipe", "generate", "plot", "demo", "bench", "info"} <= set(
        cogsym("--help").stdout.split()
    )
    for command in ("train", "sweep", "recipe", "generate", "plot", "demo", "bench", "info"):
        done = cogsym(command, "--help")
        assert done.returncode == 0
        assert "Example" in done.stdout


def test_help_waits_for_no_library() -> None:
    """torch and transformers take seconds to import; the package imports what is asked of it when it is."""
    code = (
        "import sys, cogsym.cli\n"
        "assert not {'torch', 'transformers', 'triton', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
        "cogsym.prepare\n"
        "assert 'torch' in sys.modules and not {'matplotlib', 'datasets'} & set(sys.modules)\n"
        "from cogsym import *\n"
        "assert {'prepare', 'sweep', 'train', 'LayerPlan'} <= set(globals()) and not hasattr(cogsym, 'tran')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_info(cogsym: Callable[..., Done]) -> None:
    done = cogsym("info")
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["torch"].strip().partition("+")[0] == torch.__version__.partition("+")[0]  # wheels may leave +cu130 out
    assert {"rms_norm", "rotary", "gated_activation", "extension", "processor", "gpu"} <= rows.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux")
@pytest.mark.parametrize(
    ("given", "count"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_that_wait_sleep_early(given: dict[str, str], count: str) -> None:
    """What libgomp itself says that it goes by; what the user says is left alone."""
    rest = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = process("info", env=rest | given | {"OMP_DISPLAY_ENV": "verbose"})
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr
    assert all(
        f" cores, {name} {value}\n" in done.stdout for name, value in (given or {"GOMP_SPINCOUNT": count}).items()
    )


def test_generate(cogsym: Callable[..., Done], complaint: Callable[..., str], model_folder: Path) -> None:
    """Greedily, as transformers writes from the same tokens."""
    done = cogsym("generate", model_folder, "--prompt", "habari za", "--prompt", "mimi", "--tokens", "5")
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    wanted = []
    for text in ("habari za", "mimi"):
        ids = [separator_id(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids += greedy_tokens(model, tuple(ids), 5, tokenizer.eos_token_id)
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert done.stdout.split() == " ".join(wanted).split()
    assert "--tokens is 0, expected" in complaint("generate", model_folder, "--prompt", "x", "--tokens", "0")
    assert "--top-p is 3.0, expected" in complaint("generate", model_folder, "--prompt", "x", "--top-p", "3")


def test_train_and_resume(
    complaint: Callable[..., str], cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--eval", f"{text_file}#sw", "--out", out, *BIG]
    done = cogsym(*args, "--steps", "4", "--memory", "1 kB")
    assert done.returncode == 0, done.stderr
    assert "news-sw:" in done.stdout and "bits per byte before" in done.stdout
    AutoModelForCausalLM.from_pretrained(out / "model")
    again = complaint(*args, "--steps", "4")
    assert again.endswith("holds a run already; continue it with --resume, or choose another --out.")


@pytest.mark.parametrize(
    ("options", "again", "trained"),
    [
        (["--layers", "0,2-3"], ["--layers", "2,0,3"], [0, 2, 3]),
        (["--layers", "first,k=2"], ["--front", "2", "--back", "0"], [0, 1]),
        (["--layers", "outer"], [], [0, 3]),
    ],
)
def test_layers_by_a_list_or_a_strategy(
    complaint: Callable[..., str], cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path,
    options: list[str], again: list[str], trained: list[int],
) -> None:  # fmt: skip
    """A run records the layers, and goes on however they are asked for."""
    out = tmp_path / "out"
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", out, "--steps", "2", *BIG]
    assert cogsym(*args, *options).returncode == 0
    assert json.loads((out / "settings.json").read_text())["plan"]["trained"] == trained
    base, got = (load_file(folder / "model.safetensors") for folder in (model_folder, out / "model"))
    assert {int(n.split(".")[2]) for n, w in got.items() if not torch.equal(w, base[n])} == set(trained)
    assert cogsym(*args, *again, "--resume").returncode == 0
    line = complaint(*args, "--layers", "1", "--resume")
    assert f"was started with trained {trained} (now [1])" in line


def test_pairs_through_a_template(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    done = cogsym(
        "train", model_folder, "--data", text_file, "--template", r"en: {en}\nsw: {sw}", "--loss", "target",
        "--out", tmp_path / "out", "--steps", "2", *BIG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_ctrl_c_then_resume_gives_the_same_weights(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    def args(out: Path) -> list[str]:
        return ["train", str(model_folder), "--data", f"{text_file}#sw", "--out", str(out), "--steps", "60", *BIG]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cogsym(*args(whole)).returncode == 0
    with subprocess.Popen(command(*args(cut)), stderr=subprocess.PIPE, text=True, cwd=FOLDER) as running:
        while not (cut / "metrics.jsonl").exists() or not (cut / "metrics.jsonl").read_text():
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130, stderr
    assert "and saved; the same command with --resume goes on from there." in stderr
    assert "Traceback" not in stderr
    assert cogsym(*args(cut), "--resume").returncode == 0
    want, got = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(want[name], got[name]) for name in want)


def stopped(args: list[str | Path], written: Callable[[], bool], ending: str) -> tuple[int, str]:
    """The exit status of a command and what it says when it is ended once something is written.

    Ended by a signal of this name, or by its terminal that is closed.
    """
    terminal, end = os.openpty()
    closing = ending == "terminal"
    with subprocess.Popen(
        command(*args), stdin=end, stderr=end if closing else subprocess.PIPE, text=True, cwd=FOLDER,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as running:  # fmt: skip
        os.close(end)
        while not written():
            assert running.poll() is None
            if select.select([terminal], [], [], 0.02)[0]:
                os.read(terminal, 1 << 16)
        if closing:
            os.close(terminal)  # the system sends SIGHUP, and whatever is written now fails
        else:
            running.send_signal(signal.Signals[ending])
        _, stderr = running.communicate(timeout=120)
    if not closing:
        os.close(terminal)
    return running.returncode, stderr or ""


@pytest.mark.parametrize("ending", ["SIGTERM", "terminal"])
def test_ended_by_a_signal_then_resume_gives_the_same_weights(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path, ending: str
) -> None:
    def args(out: Path) -> list[str | Path]:
        return ["train", model_folder, "--data", f"{text_file}#sw", "--out", out, "--steps", "60", *BIG]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    metrics = cut / "metrics.jsonl"
    assert cogsym(*args(whole)).returncode == 0
    status, stderr = stopped(args(cut), lambda: metrics.exists() and metrics.stat().st_size > 0, ending)
    assert "Traceback" not in stderr
    assert status == 128 + (signal.SIGHUP if ending == "terminal" else signal.SIGTERM), stderr
    assert "and saved; the same command with --resume goes on from there." in stderr or ending == "terminal"
    assert not (cut / "model").exists() and list((cut / "checkpoints").glob("*/manifest.json"))
    assert cogsym(*args(cut), "--resume").returncode == 0
    want, got = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("ending", ["SIGTERM", "terminal"])
def test_a_sweep_ended_by_a_signal_goes_on(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / "out"
    task = f"text:{text_file}#sw"
    args = ["sweep", model_folder, "--task", task, "--configs", "blocks", "--memory", "100kB", "--out", out]

    status, stderr = stopped(args, lambda: any((out / "results").glob("part-*.parquet")), ending)
    assert "Traceback" not in stderr
    assert status == 128 + (signal.SIGHUP if ending == "terminal" else signal.SIGTERM), stderr
    assert f"The sweep was stopped; what {out} holds is whole" in " ".join(stderr.split()) or ending == "terminal"
    before = len(frame(out))
    done = cogsym(*args, "--resume")
    assert done.returncode == 0 and "11 configurations in" in done.stdout, done.stderr
    assert 0 < before < len(frame(out)) == 120 * 11


def test_a_disk_that_fills_up(cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the write fails in the middle, as on a full one."""
    out = tmp_path / "out"
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", out, "--steps", "4", *BIG]
    done = process(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cogsym: The checkpoint at step 4 was not written" in done.stderr
    assert not list((out / "checkpoints").iterdir())
    assert cogsym(*args, "--resume").returncode == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_memory_that_runs_out(
    cogsym: Callable[..., Done],
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    for name, command in (("training.finetune.pack", "train"), ("sweeps.runner.load_layers", "sweep")):
        monkeypatch.setattr(f"cogsym.{name}", full)
        data = ["--data" if command == "train" else "--task", f"{'' if command == 'train' else 'text:'}{text_file}#sw"]
        done = cogsym(command, model_folder, *data, "--out", tmp_path / command)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("cogsym: memory ran out; what was written is whole, go on with --resume")


def test_a_missing_model_folder(complaint: Callable[..., str], text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nowhere" / "model"
    line = complaint("train", folder, "--data", text_file, "--out", tmp_path / "out")
    assert line == f"cogsym: There is no model folder '{folder}'; give a folder that save_pretrained wrote."


def test_a_hub_id_that_cannot_be_had(complaint: Callable[..., str], text_file: Path, tmp_path: Path) -> None:
    line = complaint("train", "nobody/nothing", "--data", text_file, "--out", tmp_path / "out")
    assert "'nobody/nothing'" in line


def test_a_folder_without_safetensors(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    line = complaint("train", model_folder, "--data", text_file, "--out", tmp_path / "out")
    assert "holds no .safetensors file and cogsym unpickles nothing" in line


def test_corrupt_safetensors(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    file = model_folder / "model.safetensors"
    for data in (file.read_bytes()[:1000], b"not weights"):
        file.write_bytes(data)
        line = complaint("train", model_folder, "--data", text_file, "--out", tmp_path / "out")
        assert f"{file} is damaged" in line and line.endswith("fetch or write it again.")


def test_a_checkpoint_that_lacks_a_weight(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    file = model_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    line = complaint("train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out")
    assert "lacks 1 of its weights, such as model.layers.2.mlp.up_proj.weight" in line


def test_a_config_that_is_not_understood(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (model_folder / "config.json").write_text("{")
    assert "is not understood" in complaint("train", model_folder, "--data", text_file, "--out", tmp_path / "out")
    (model_folder / "config.json").unlink()
    assert "holds no config.json" in complaint("train", model_folder, "--data", text_file, "--out", tmp_path / "out")


def test_tokenizer_and_model_that_disagree(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from tiny_models import tiny_model

    tiny_model("llama", vocab_size=200).save_pretrained(model_folder)
    line = complaint("train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out")
    assert "200" in line and "300" in line


def test_no_tokenizer(complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "tokenizer_config.json").unlink()
    line = complaint("train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out")
    assert "tokenizer" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no document"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2"),
        ("a.txt", b"habari\n\xff\xfe\n", "UTF-8"),
        ("a.docx", b"x", "unknown suffix"),
    ],
)
def test_bad_text(
    complaint: Callable[..., str], model_folder: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    line = complaint("train", model_folder, "--data", tmp_path / name, "--out", tmp_path / "out")
    assert message in line and name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "1.5"], "fraction of layers to train is 1.5, expected more than 0 and at most 1"),
        (["--fraction", "0"], "fraction of layers to train is 0.0, expected more than 0 and at most 1"),
        (["--front", "0", "--back", "0"], "The plan trains nothing"),
        (["--front", "3", "--back", "2"], "3 first and 2 last layers"),
        (
            ["--all-layers", "--fraction", "0.5"],
            "--all-layers and --fraction 0.5 both say which layers are trained; give one of them.",
        ),
        (["--all-layers", "--layers", "0-1"], "--all-layers and --layers 0-1 both say which layers are trained"),
        (["--all-layers", "--back", "0"], "--all-layers and --back 0 both say which layers are trained"),
        (["--layers", "0-1", "--fraction", "0.25"], "--layers 0-1 and --fraction 0.25 both say which layers"),
        (["--layers", "all", "--front", "2"], "--layers all and --front 2 both say which layers are trained"),
        (["--fraction", "0.5", "--front", "1", "--back", "1"], "fraction of layers to train is 0.5 beside 1 first and"),
        (["--layers", "0,4"], "The plan trains layer 4, expected indices from 0 to 3"),
        (["--layers", "0-3;5"], "list of layers '0-3;5' is not understood at '0-3;5'; give numbers and ranges"),
        (["--layers", "fisrt,k=2"], "layer strategy 'fisrt' is unknown, expected one of outer, first,"),
        (["--layers", "first"], "options of the layer strategy 'first' are wrong (missing a required argument: 'k')"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0, expected"),
        (["--batch-size", "0"], "--batch-size is 0, expected a number above 0."),
        (["--warmup", "2"], "--warmup is 2.0, expected a share of the steps"),
        (["--seed", "-1"], "--seed is -1, expected a whole number from 0"),
        (["--length", "100000"], "--length is 100,000 tokens, expected at most the model's context, "),
        (["--eval-every", "5"], "--eval-every is 5 and there is no held-out text; give some (--eval)."),
        (["--eval", "5%", "--eval", "7%"], "--eval holds out 5% and 7% of the data"),
        (["--eval", "0%"], "--eval is 0.0, expected a share of the text between 0 and 1."),
        (["--eval", "{sw}", "--eval", "{sw}"], "--eval is given two texts of the name "),
        (["--template", "{en}{sw}", "--eval", "{sw}"], "--template is given and every text names a column, as "),
        (["--dry-run", "--resume"], "--dry-run says what a run costs from its beginning"),
        (["--keep", "some"], "--keep is 'some', expected one of auto, all, attention, input, offload, nothing."),
        (["--keep", "offload"], "--keep is 'offload' and the model is on cpu"),
        (["--memory", "plenty"], "size of memory 'plenty' is not understood; give a number with a unit, such as 4GB."),
        (["--memory", "0GB"], "size of memory '0GB' is not understood"),
        (["--memory", "4GB", "--keep", "all"], "--memory is 4000000000 where keep is 'all'"),
        (["--resume"], "no run in"),
        (["--separator", "<nope>"], "<nope>"),
        (["--template", "{sw} {missing}"], "missing"),
    ],
)
def test_bad_options(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    data = text_file if options[0] == "--template" and len(options) == 2 else f"{text_file}#sw"
    options = [f"{text_file}#sw" if option == "{sw}" else option for option in options]
    assert message in complaint("train", model_folder, "--data", data, "--out", tmp_path / "out", *options)


def test_an_output_that_cannot_be_written(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = complaint("train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "file" / "out")
    assert "cannot be written" in line


def test_a_backend_that_is_not_there(complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGSYM_BACKEND", "vulkan")
    assert complaint("info") == (
        "cogsym: COGSYM_BACKEND is 'vulkan', expected one of reference, cpp, triton; correct or unset it."
    )


def test_metrics_are_json_lines(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cogsym("train", model_folder, "--data", f"{text_file}#sw", "--out", out, "--steps", "10", *BIG)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert line.keys() == {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert "step 10/10, loss" in done.stderr and "tokens/s" in done.stderr


def test_sweep_and_resume(cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["sweep", model_folder, "--task", f"text:{text_file}#sw,limit=5", "--out", out]
    done = cogsym(*args, "--dry-run")
    assert done.returncode == 0 and not out.exists()
    assert "layer-forwards: 10, " in done.stderr and "5 documents in 1 piece, " in done.stderr
    done = cogsym(*args)
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte, every layer kept: " in done.stdout and "8 configurations in" in done.stdout
    parts = list((out / "results").iterdir())
    done = cogsym(*args, "--resume", "--stream")
    assert done.returncode == 0 and list((out / "results").iterdir()) == parts, done.stderr
    done = cogsym(*args, "--resume", "--configs", "greedy", "--remove", "1")
    assert done.returncode == 0 and "layer " in done.stderr and " goes: " in done.stderr
    assert "10 configurations in" in done.stdout  # two of the five that it tries are new


def test_a_configuration_with_no_layer_left(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "none.json").write_text('[{"skip": "0-3"}]')
    task = f"text:{text_file}#sw,limit=5"
    done = cogsym("sweep", model_folder, "--task", task, "--out", tmp_path / "out", "--configs", tmp_path / "none.json")
    assert done.returncode == 0, done.stderr
    assert "layer-forwards: 0, " in done.stderr and "1 configuration in" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--configs", '[{"skip": [1, 4]}]'], "skip for layer 4, expected a layer from 0 to 3; the model has 4."),
        (["--configs", '[{"remove": [1]}]'], "The action 'remove' is unknown, expected one of keep, skip, "),
        (["--configs", '[{"skip": 1, "revert": "0-1"}]'], "names layer 1 twice"),
        (["--configs", '{"skip": 1}'], "holds a dict, expected a list of configurations."),
        (["--configs", "[]"], "The list of configurations is empty"),
        (["--configs", "sideways"], "The set of configurations 'sideways' is unknown, expected one of input, output, "),
        (["--configs", "nowhere.yaml"], "nowhere.yaml cannot be read (No such file or directory)."),
        (["--action", "remove"], "The action 'remove' is unknown, expected one of keep, skip, "),
        (["--action", "skip_mpl"], "did you mean skip_mlp?"),
        (["--action", "skip_mpl", "--configs", "greedy"], "did you mean skip_mlp?"),
        (["--action", "revert"], "A configuration reverts layers but there is no base checkpoint"),
        (["--configs", "greedy", "--remove", "5"], "to remove 5 layers, expected 1 to 4; the model has 4."),
        (["--configs", "greedy", "--width", "2"], "width is 2 and the search greedy follows one set of layers; search"),
        (["--configs", "beam", "--width", "0"], "width of the search is 0, expected 1 set of layers or more."),
        (["--configs", "beem"], "did you mean beam?"),
        (["--configs", "input,greedy"], "The search greedy stands beside other configurations, expected it alone"),
        (["--configs", "greedy,input"], "The search greedy stands beside other configurations, expected it alone"),
        (["--configs", "input,nowhere.json"], "nowhere.json cannot be read (No such file or directory)."),
        (["--seed", "-1"], "--seed is -1, expected a whole number from 0"),
        (["--top-p", "2"], "--top-p is 2.0, expected more than 0 and at most 1."),
        (["--width", "2"], "--width is 2 and only a search takes it"),
        (
            ["--remove", "2"],
            "--remove is 2 and only a search takes it; name one in the place of the configurations: greedy, beam.",
        ),
        (["--memory", "plenty"], "size of memory 'plenty' is not understood"),
        (["--memory", "1kB", "--strict-memory"], "The memory budget is 0.0 MiB and the document line "),
        (["--temperature", "-1"], "--temperature is -1.0, expected 0"),
        (["--resume"], "There is no sweep in"),
        (["--separator", "<nope>"], "<nope>"),
        (["--task", "sudoku:sw.jsonl"], "The task 'sudoku' is unknown"),
    ],
)
def test_bad_options_of_sweep(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    if options[-1].startswith(("[", "{")):
        file = tmp_path / "configs.json"
        file.write_text(options[-1])
        options = [*options[:-1], str(file)]
    task = f"text:{text_file}#sw,limit=5"
    assert message in complaint("sweep", model_folder, "--task", task, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from tiny_models import tiny_model

    base = tmp_path / "before"
    args = [
        "sweep", model_folder, "--task", f"text:{text_file}#sw,limit=5", "--action", "revert", "--base", base, "--out",
        tmp_path / "out",
    ]  # fmt: skip

    def refused(*more: str) -> str:
        done = cogsym(*args, *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert refused() == f"cogsym: There is no model folder '{base}'; give a folder that save_pretrained wrote."
    for stream in ("--stream", "--no-stream"):
        tiny_model("llama", intermediate_size=56, vocab_size=300).save_pretrained(base)
        assert "has shape (56, 36), expected (52, 36), as in the model" in refused(stream)
    tiny_model("llama", vocab_size=300, seed=1).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model_folder / name).read_text("utf-8")
        (base / name).write_text(text.replace("<end>", "<done>"), "utf-8")
    assert "The base checkpoint has another tokenizer: its token '<done>' has the id 0, expected None" in refused()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((model_folder / name).read_bytes())
    done = cogsym(*args)
    assert done.returncode == 0, done.stderr


def test_a_sweep_keeps_out_of_the_folder_of_a_run(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    line = complaint("sweep", model_folder, "--task", f"text:{text_file}#sw,limit=5", "--out", tmp_path / "out")
    assert "holds a training run, expected a folder of the sweep's own; choose another --out." in line


def test_an_empty_task(complaint: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    for content in ("", '{"sw": ""}\n'):
        file.write_text(content)
        line = complaint("sweep", model_folder, "--task", f"text:{file}#sw", "--out", tmp_path / "out")
        assert "empty.jsonl" in line


def test_a_document_longer_than_the_context(
    cogsym: Callable[..., Done], complaint: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("habari ya leo.\n" + "xyz " * 40 + "\n" + "mtoto anasoma.\n")
    args = ["sweep", model_folder, "--task", f"text:{file},name=long", "--out", tmp_path / "out"]
    line = complaint(*args)
    told = "1 of 3 documents of the task long are longer than the context of 64 tokens (the longest, "
    assert told in line and line.endswith("; have them truncated, or leave them out of the data.")
    done = cogsym(*args, "--truncate")
    assert done.returncode == 0 and told in done.stderr and "; they are read in windows." in done.stderr


def test_results_of_another_model(
    complaint: Callable[..., str], cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    args = ["--task", f"text:{text_file}#sw,limit=5", "--out", tmp_path / "out"]
    assert cogsym("sweep", model_folder, *args).returncode == 0
    lines = cogsym("sweep", model_folder, *args).stderr.splitlines()
    assert lines[-1].endswith("holds results already; continue them with --resume, or choose another --out.")
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    done = cogsym("sweep", model_folder, *args, "--resume")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "holds results of another model: revision" in last and last.endswith("; choose another --out.")


def test_results_that_cannot_be_written(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        done = cogsym("sweep", model_folder, "--task", f"text:{text_file}#sw,limit=5", "--out", out)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "cannot be written" in done.stderr.splitlines()[-1]


def test_half_a_layer_of_a_model_that_runs_its_own_forward(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    (model_folder / "model.safetensors").unlink()
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_hidden_layers=2)).save_pretrained(model_folder)
    args = ["sweep", model_folder, "--task", f"text:{text_file}#sw,limit=5", "--out", tmp_path / "out"]
    line = complaint(*args, "--action", "skip_mlp")
    assert "Half a layer cannot be skipped in this model" in line and line.endswith("; skip whole layers.")
    config = MixtralConfig(**shape, num_key_value_heads=1, num_hidden_layers=2, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(model_folder)
    assert "cannot be streamed; leave streaming off." in complaint(*args, "--stream")


def test_adapters_without_their_model(
    complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    line = complaint("sweep", tmp_path / "adapters", "--task", f"text:{text_file}#sw", "--out", tmp_path / "out")
    assert "holds adapters" in line
