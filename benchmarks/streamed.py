"""A sweep of a model that is read from disk one layer at a time beside the same sweep of the model in memory.

    python benchmarks/streamed.py

The model has Qwen2.5-1.5B's shape and random bfloat16 weights, written to a temporary folder layer by layer; the sweep
asks two-way choices under every number of last layers skipped. Each sweep is a process of its own, whose peak resident
memory is told with everything in it, Python and its libraries too; they take turns, and the files stay in the page
cache. Answers must be the same bit for bit. The result is `benchmarks/results/streamed.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WORDS = "habari ya leo mtoto anasoma kitabu shuleni mama anapika chakula kizuri sana".split()
QUESTIONS, CONTEXT_WORDS, OPTION_WORDS, ROUNDS = 20, 36, 8, 3
CONFIGS, BUDGET = "output", 500 * 10**6
RESULT = Path(__file__).parent / "results" / "streamed.json"


def write_model(folder: Path) -> int:
    """Random weights, one layer in memory at a time; how many parameters they are."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    config = Qwen2Config(**SHAPE, dtype="bfloat16")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for n in names}
        for n in names:
            if n.endswith("norm.weight"):
                tensors[n].fill_(1.0)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(folder)
    return sum(shape.numel() for shape in shapes.values())


def write_questions(file: Path) -> None:
    chance = random.Random(0)

    def words(number: int) -> str:
        return " ".join(chance.choices(WORDS, k=number))

    rows = [
        {"question": words(CONTEXT_WORDS), "a": words(OPTION_WORDS), "b": words(OPTION_WORDS), "label": i % 2}
        for i in range(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def run(folder: Path, questions: Path, out: Path, stream: bool) -> None:
    """One sweep, in this process; prints what it took."""
    import cogsym
    from cogsym.sweeps import runner as sweeping

    seconds = []
    ask = sweeping._Sweep.ask

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        ask(*args)
        seconds.append(time.perf_counter() - began)

    sweeping._Sweep.ask = timed  # type: ignore[method-assign]
    task = {
        "name": "choices", "kind": "choice", "data": str(questions), "template": "{question} {option}",
        "options": ["{a}", "{b}"], "label": "label", "metrics": ["margin"],
    }  # fmt: skip
    settings = cogsym.SweepSettings(stream=stream, memory_budget=BUDGET)
    began = time.perf_counter()
    cogsym.sweep(folder, CONFIGS, [task], out, settings=settings)
    whole = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": sum(seconds), "seconds_in_all": whole, "peak_bytes": peak}))


def in_process(folder: Path, questions: Path, out: Path, stream: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", str(folder), str(questions), str(out), str(int(stream))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print("streamed" if stream else "in memory", told, flush=True)
    return told


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, questions, out, stream = args.run
        run(Path(folder), Path(questions), Path(out), bool(int(stream)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, questions = Path(scratch) / "model", Path(scratch) / "questions.jsonl"
        folder.mkdir()
        parameters = write_model(folder)
        write_questions(questions)
        told: dict[str, list[dict[str, float]]] = {"streamed": [], "in memory": []}
        for i in range(ROUNDS):
            for name, runs in told.items():
                runs.append(in_process(folder, questions, Path(scratch) / f"{name}-{i}", name == "streamed"))

        from cogsym.bench import machine
        from cogsym.sweeps.results.store import frame

        names = ["configuration", "document", "metric", "value"]
        one, other = (frame(Path(scratch) / f"{name}-0")[names] for name in told)
        assert one.equals(other), "streamed answers are others"
    medians = {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for name, runs in told.items()
    }
    result = {
        "command": "python benchmarks/streamed.py",
        "machine": machine.describe(),
        "model": "Qwen2.5-1.5B's shape, random weights, bfloat16",
        "parameters": parameters,
        "configurations": len(set(one["configuration"])),
        "documents": QUESTIONS,
        "memory_budget": BUDGET,
        "runs": told,
        **{name.replace(" ", "_"): values for name, values in medians.items()},
        **{
            name: statistics.median(a[key] / b[key] for a, b in zip(told["streamed"], told["in memory"], strict=True))
            for name, key in (("slowdown", "seconds"), ("slowdown_in_all", "seconds_in_all"))
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
