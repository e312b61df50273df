"""`cogsym.ops.decode_attention` beside what PyTorch offers for rows of different lengths, on CPU.

    python benchmarks/decode_attention.py

Decoding: each row is one token that sees a prompt, which neighbouring rows may share, and its own continuation.
Scoring: each row is one position of an answer option that sees its question and the option up to itself. PyTorch's
scaled_dot_product_attention runs

    padded       one call, over keys and values that were copied for every row, padded and masked before the clock
                 starts; left out where they take more than 2 GiB
    row loop     one call a row, over its keys, joined when decoding, where they lie apart
    option loop  one call an option, over question and option, also joined before the clock starts (scoring)

each with the heads of a group as rows, which is faster there than repeated keys. The rate counts every key and value
that some row sees once, and stands beside a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cogsym.bench import ops
from cogsym.bench.case import Case, CaseSpec, Setting, dtype_name
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.study import Study, main
from cogsym.ops import AttentionOptions, decode_attention
from cogsym.ops.operation import Example

half, single = torch.bfloat16, torch.float32
DECODING = {  # by model: dtype, rows, prompts, keys of a prompt, most keys of a row's own
    "SmolLM2-135M": (
        (half, 8, 8, 300, 60), (half, 62, 1, 300, 60), (half, 62, 62, 300, 60), (half, 496, 8, 300, 60),
        (half, 1984, 32, 100, 60), (single, 62, 1, 300, 60), (single, 496, 8, 300, 60),
    ),
    "Qwen2.5-0.5B": ((half, 62, 1, 1000, 60), (half, 496, 8, 300, 60)),
    "Llama-3.1-8B": ((half, 1, 1, 1000, 60), (half, 33, 1, 300, 60), (half, 264, 8, 300, 60)),
    "tiny": ((single, 8, 2, 30, 6),),
}  # fmt: skip
SCORING = {  # by model: dtype, questions, keys of a question, options of each, most tokens of an option
    "SmolLM2-135M": ((half, 30, 60, 2, 24), (half, 30, 400, 4, 40), (single, 30, 60, 2, 24)),
    "Llama-3.1-8B": ((half, 4, 200, 4, 40),),
    "tiny": ((single, 3, 6, 2, 4),),
}

Ranges = list[list[tuple[int, int]]]


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for kind, table, words, make in (
        ("decoding", DECODING, "{} rows, {} prompts of {}, own up to {}", decoding_ranges),
        ("scoring", SCORING, "{} questions of {}, {} options up to {}", scoring_ranges),
    ):
        for model in setting.models:
            for dtype, *sizes in table.get(model, ())[: None if setting.full else 1]:
                name = f"{model}, {dtype_name(dtype)}: {kind}, {words.format(*sizes)}"
                build = partial(case, shape_of(model), dtype, partial(make, *sizes))
                found.append(CaseSpec(name, build, rounds=5))
    return found


def decoding_ranges(rows: int, prompts: int, keys: int, own: int) -> tuple[Ranges, Ranges, int]:
    """Ranges of each row; those of each sequence that the option loop calls for; keys of the store."""
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


def unseen_mask(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill(unseen, -torch.inf)


def alternatives(
    q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, sequences: Ranges
) -> dict[str, Callable[..., Tensor]]:
    """By label, each of (q, k, v); what it may prepare is prepared."""
    N, H, D = q.shape
    KV = k.shape[1]
    lengths = [sum(end - begin for begin, end in row) for row in ranges]
    attend = F.scaled_dot_product_attention  # q: [B, KV, rows, D]
    functions: dict[str, Callable[..., Tensor]] = {}

    if 2 * N * max(lengths) * KV * D * q.element_size() < 2 << 30:
        padded_k, padded_v = (q.new_zeros(N, KV, max(lengths), D) for _ in range(2))
        for n, row in enumerate(ranges):
            padded_k[n, :, : lengths[n]], padded_v[n, :, : lengths[n]] = joined(k, row), joined(v, row)
        padding = unseen_mask(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], q.dtype)[:, None, None]
        functions["padded"] = lambda q, k, v: attend(q.view(N, KV, H // KV, D), padded_k, padded_v, padding)

    def row_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.view(N, KV, H // KV, D)
        return torch.cat(
            [attend(grouped[n : n + 1], joined(k, row)[None], joined(v, row)[None]) for n, row in enumerate(ranges)]
        )

    functions["row loop"] = row_loop
    if not sequences:
        return functions

    prepared, place = [], 0
    for question, (begin, end) in sequences:
        rows, keys = end - begin, question[1] - question[0] + end - begin
        mask = unseen_mask(torch.arange(keys) > torch.arange(keys - rows, keys)[:, None], q.dtype)
        both = joined(k, [question, (begin, end)])[None], joined(v, [question, (begin, end)])[None]
        prepared.append((slice(place, place + rows), *both, mask.repeat_interleave(H // KV, 0)))
        place += rows

    def option_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped, o = q.view(N, KV, H // KV, D), torch.empty_like(q)
        for rows, keys, values, mask in prepared:
            own = attend(grouped[rows].transpose(0, 1).flatten(1, 2)[None], keys, values, mask)[0]
            o[rows] = own.unflatten(1, (-1, H // KV)).transpose(0, 1).flatten(1, 2)
        return o

    return functions | {"option loop": option_loop}


def case(shape: Shape, dtype: torch.dtype, make: Callable[[], tuple[Ranges, Ranges, int]]) -> Case:
    torch.manual_seed(0)
    ranges, sequences, keys = make()
    KV, D = shape.kv_heads, shape.head_dim
    q = torch.randn(len(ranges), shape.heads, D).to(dtype)
    k, v = torch.randn(keys, 2, KV, D).to(dtype).unbind(1)
    begins, ends = torch.tensor(ranges).unbind(-1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (decode_attention(q, k, v, begins, ends, AttentionOptions(D**-0.5)),)

    plain = {
        label: lambda q, k, v, function=function: (function(q, k, v).view_as(q),)
        for label, function in alternatives(q, k, v, ranges, sequences).items()
    }
    size = 2 * (k.numel() + q.numel()) * q.element_size()
    example = Example({"q": q, "k": k, "v": v}, ours, plain["row loop"], (), "B", {"forward": size})
    return ops.measured_ways("decode_attention", example, "forward", plain)


STUDY = Study("decode_attention", cases, ops.table, models=("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.1-8B"))

if __name__ == "__main__":
    main(STUDY, __doc__)
