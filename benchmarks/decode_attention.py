"""`cogsym.ops.decode_attention` beside what PyTorch offers for rows of different lengths, on CPU.

    python benchmarks/decode_attention.py

Decoding: each row is one token that sees a prompt, which neighbouring rows may share, and its own continuation of up to
`own` tokens. Scoring: each row is one position of an answer option that sees its question and the option up to itself.
PyTorch's scaled_dot_product_attention runs

    padded      one call, over keys and values that were copied for every row, padded and masked before the clock starts
    row_loop    one call a row, over its keys, joined when decoding, where they lie apart
    option_loop one call an option, over question and option, also joined before the clock starts (scoring)

each with the heads of a group as rows, which is faster there than repeated keys; the fastest is the competitor. All
take turns, A B C A B C, after a warm-up. `gigabytes_per_second` counts every key and value that some row sees once, and
stands beside a copy of as many bytes and of a buffer that no cache holds. The result is
`benchmarks/results/decode_attention.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cogsym.bench import floor, machine, method
from cogsym.bench.models import SHAPES
from cogsym.ops import AttentionOptions, decode_attention

half, single = torch.bfloat16, torch.float32
DECODING = [  # shape, dtype, rows, prompts, keys of a prompt, most keys of a row's own
    ("SmolLM2-135M", half, 8, 8, 300, 60),
    ("SmolLM2-135M", half, 62, 1, 300, 60),
    ("SmolLM2-135M", half, 62, 62, 300, 60),
    ("SmolLM2-135M", half, 496, 8, 300, 60),
    ("SmolLM2-135M", half, 1984, 32, 100, 60),
    ("SmolLM2-135M", single, 62, 1, 300, 60),
    ("SmolLM2-135M", single, 496, 8, 300, 60),
    ("Qwen2.5-0.5B", half, 62, 1, 1000, 60),
    ("Qwen2.5-0.5B", half, 496, 8, 300, 60),
    ("Llama-3.1-8B", half, 1, 1, 1000, 60),
    ("Llama-3.1-8B", half, 33, 1, 300, 60),
    ("Llama-3.1-8B", half, 264, 8, 300, 60),
]
SCORING = [  # shape, dtype, questions, keys of a question, options of each, most tokens of an option
    ("SmolLM2-135M", half, 30, 60, 2, 24),
    ("SmolLM2-135M", half, 30, 400, 4, 40),
    ("SmolLM2-135M", single, 30, 60, 2, 24),
    ("Llama-3.1-8B", half, 4, 200, 4, 40),
]
ROUNDS, SECONDS = 5, 0.03
CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / "decode_attention.json"

Ranges = list[list[tuple[int, int]]]


def decoding_ranges(rows: int, prompts: int, keys: int, own: int) -> tuple[Ranges, Ranges, int]:
    """Ranges of each row; those of each sequence that row_loop or option_loop calls for; keys of the store."""
    ranges: Ranges = []
    place = prompts * keys
    for n, length in enumerate(torch.randint(1, own + 1, (rows,)).tolist()):
        prompt = n * prompts // rows
        ranges.append([(prompt * keys, (prompt + 1) * keys), (place, place + length)])
        place += length
    return ranges, [], place


def scoring_ranges(questions: int, keys: int, options: int, longest: int) -> tuple[Ranges, Ranges, int]:
    ranges, sequences = Ranges(), Ranges()
    place = 0
    for _ in range(questions):
        question = (place, place + keys)
        place += keys
        for length in torch.randint(1, longest + 1, (options,)).tolist():
            ranges += [[question, (place, place + i + 1)] for i in range(length)]
            sequences.append([question, (place, place + length)])
            place += length
    return ranges, sequences, place


def joined(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """[KV, keys, D]."""
    return torch.cat([x[begin:end] for begin, end in ranges]).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q: [B, KV, rows, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def competitors(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, sequences: Ranges) -> dict[str, Callable[[], Tensor]]:
    N, H, D = q.shape
    KV = k.shape[1]
    lengths = [sum(end - begin for begin, end in row) for row in ranges]
    grouped = q.view(N, KV, H // KV, D)
    functions: dict[str, Callable[[], Tensor]] = {}

    if 2 * N * max(lengths) * KV * D * q.element_size() < 2 << 30:
        padded_k, padded_v = (q.new_zeros(N, KV, max(lengths), D) for _ in range(2))
        for n, row in enumerate(ranges):
            padded_k[n, :, : lengths[n]], padded_v[n, :, : lengths[n]] = joined(k, row), joined(v, row)
        unseen = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        padding = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill(unseen, -torch.inf)[:, None, None]
        functions["padded"] = lambda: attend(grouped, padded_k, padded_v, padding).reshape(N, H, D)

    def row_loop() -> Tensor:
        rows = [attend(grouped[n : n + 1], joined(k, row)[None], joined(v, row)[None]) for n, row in enumerate(ranges)]
        return torch.cat(rows).view(N, H, D)

    functions["row_loop"] = row_loop
    if not sequences:
        return functions

    prepared, place = [], 0
    for question, (begin, end) in sequences:
        rows, keys = end - begin, question[1] - question[0] + end - begin
        unseen = torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]
        mask = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill(unseen, -torch.inf)
        both = joined(k, [question, (begin, end)])[None], joined(v, [question, (begin, end)])[None]
        prepared.append((slice(place, place + rows), *both, mask.repeat_interleave(H // KV, 0)))
        place += rows

    def option_loop() -> Tensor:
        o = torch.empty_like(q)
        for rows, keys, values, mask in prepared:
            queries = grouped[rows].transpose(0, 1).flatten(1, 2)[None]
            own = attend(queries, keys, values, mask)[0]
            o[rows] = own.unflatten(1, (-1, H // KV)).transpose(0, 1).flatten(1, 2)
        return o

    return functions | {"option_loop": option_loop}


def copy_speed(number: int) -> float:
    """Bytes a second of a copy that reads and writes `number` bytes in all."""
    copy = floor.copy(number, CPU)
    copy()
    return number / method.sample(copy, CPU, SECONDS)


def measure(shape: str, dtype: torch.dtype, ranges: Ranges, sequences: Ranges, S: int) -> dict[str, object]:
    """Milliseconds of each function, bytes a second of ours, and the ratio to the best of PyTorch's."""
    H, KV, D = SHAPES[shape].heads, SHAPES[shape].kv_heads, SHAPES[shape].head_dim
    q = torch.randn(len(ranges), H, D).to(dtype)
    k, v = torch.randn(S, 2, KV, D).to(dtype).unbind(1)
    begins, ends = torch.tensor(ranges).unbind(-1)
    scale = D**-0.5
    functions = {"ours": lambda: decode_attention(q, k, v, begins, ends, AttentionOptions(scale))}
    functions |= competitors(q, k, v, ranges, sequences)
    truth = functions["ours"]().float()
    for name, function in functions.items():
        assert (function().float() - truth).abs().max() < 0.03, name
    variants = {name: method.Variant(function) for name, function in functions.items()}
    rounds = method.interleaved(variants, CPU, rounds=ROUNDS, seconds=SECONDS)
    best = min(list(functions)[1:], key=lambda name: statistics.median(rounds[name]))
    seen = 2 * S * KV * D * q.element_size() + 2 * q.numel() * q.element_size()
    pairs = sum(end - begin for row in ranges for begin, end in row)
    ours = statistics.median(rounds["ours"])
    return {
        "milliseconds": {name: statistics.median(times) * 1e3 for name, times in rounds.items()},
        "gigabytes_per_second": seen / ours / 1e9,
        "copy_of_as_many_bytes": copy_speed(seen) / 1e9,
        "gflops_per_second": 4 * pairs * H * D / ours / 1e9,
        "competitor": best,
        "speed_ratio": method.ratio(rounds[best], rounds["ours"]),
    }


def main() -> None:
    """Measure, compare, write."""
    torch.manual_seed(0)
    cases = []
    for kind, table, make in (("decoding", DECODING, decoding_ranges), ("scoring", SCORING, scoring_ranges)):
        for shape, dtype, *sizes in table:
            ranges, sequences, S = make(*sizes)
            case = {"kind": kind, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "sizes": sizes}
            result = measure(shape, dtype, ranges, sequences, S)
            cases.append({**case, "rows": len(ranges), **result})
            print(
                *case.values(),
                f"{result['milliseconds']['ours']:.3f} ms, {result['gigabytes_per_second']:.1f} of "  # type: ignore
                f"{result['copy_of_as_many_bytes']:.1f} GB/s, {result['gflops_per_second']:.0f} GFLOP/s, "
                f"{result['speed_ratio']['median']:.2f} x {result['competitor']}",  # type: ignore
                flush=True,
            )
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "command": "python benchmarks/decode_attention.py",
        "machine": machine.describe(),
        "copy_gigabytes_per_second": copy_speed(1 << 30) / 1e9,
        "cases": cases,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
