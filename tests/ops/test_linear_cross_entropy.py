from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss.loss_utils import ForCausalLMLoss

from cogsym.ops import linear_cross_entropy, logit_blocks, token_scores
from cogsym.ops.counted_rows import counted
from cogsym.ops.linear_cross_entropy import linear_cross_entropy_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.25},
    "soft cap": {"soft_cap": 5.0, "scale": 2.0},
    "smoothing": {"label_smoothing": 0.1},
    "soft cap and smoothing": {"soft_cap": 5.0, "label_smoothing": 0.3},
}
# Which of hidden and weight are trained.
TRAINED = [(True, False), (False, True), (True, True)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks of logits, of rows and of columns, the last ones partly filled."""
    monkeypatch.setitem(logit_blocks.BLOCKS, "cpu", (8, 37))


@pytest.fixture(autouse=True)
def poisoned_everywhere(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from `new_empty` starts as NaN too."""
    new_empty = Tensor.new_empty

    def nan_empty(*args: Any, **kwargs: Any) -> Tensor:
        result = new_empty(*args, **kwargs)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(Tensor, "new_empty", nan_empty)


def make(N: tuple[int, ...], D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head whose logits are about normal with deviation 2, and targets of which some are ignored."""
    targets = torch.randint(V, N[-1:])
    targets[torch.rand(N[-1]) < 0.2] = -100
    return torch.randn(*N, D).to(dtype), (2 * torch.randn(V, D) / D**0.5).to(dtype), targets


def plain_logits(hidden: Tensor, weight: Tensor, soft_cap: float, scale: float) -> Tensor:
    """As a Hugging Face model computes them."""
    logits = F.linear(hidden, weight) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits if logits.dtype == torch.float64 else logits.float()


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float = 0.0, scale: float = 1.0, **options: Any
) -> Tensor:
    """Each token's loss as a Hugging Face model computes it; in float64, the truth."""
    logits = plain_logits(hidden, weight, soft_cap, scale)
    targets = targets.expand(hidden.shape[:-1])
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", **options)
    return loss.view(targets.shape)


def gradients(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, trained: tuple[bool, bool], dloss: Tensor
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_(wants) for t, wants in zip((hidden, weight), trained, strict=True)]
    loss = function(*leaves)
    return loss, *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], dloss.to(loss.dtype))


def compare(
    check: Callable[..., None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    trained: tuple[bool, bool],
    options: dict[str, Any],
) -> None:
    dloss = torch.randn(hidden.shape[:-1])
    ours = gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction="none", **options), hidden, weight, trained, dloss
    )
    own, exact = (
        gradients(lambda h, w: plain(h, w, targets, **options), hidden.to(to), weight.to(to), trained, dloss)
        for to in (hidden.dtype, torch.float64)
    )
    # What the gradients sum up: |dz| ≤ 2 · scale · |dloss|.
    size = 2 * options.get("scale", 1.0) * dloss.abs().double()[..., None]
    of_hidden = (size * weight.double().abs().amax(0)).expand_as(hidden)
    of_weight = (size * hidden.double().abs()).flatten(0, -2).sum(0).expand_as(weight)
    # A logit's rounding to the inputs' dtype is granted once: with a soft cap, PyTorch takes several, and may be lucky.
    granted = max(1.0, torch.finfo(hidden.dtype).eps / torch.finfo(ours[0].dtype).eps / 8)
    # A loss is the difference of the logsumexp and of logits.
    logits = plain_logits(hidden.double(), weight.double(), options.get("soft_cap", 0.0), options.get("scale", 1.0))
    terms = logits.logsumexp(-1).abs() + logits.abs().amax(-1)
    of_loss = torch.maximum((exact[0].abs() + 1) * granted, terms)
    scales = [of_loss, *itertools.compress((of_hidden, of_weight), trained)]
    names = ["loss", *itertools.compress(("dhidden", "dweight"), trained)]
    for what, scale, *values in zip(names, scales, ours, own, exact, strict=True):
        check(*values, f"{what}, trained {trained}, {options}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), [((1,), 5, 7), ((2, 13), 19, 301), ((3, 11), 64, 1000)])
def test_values_and_gradients(
    cpu_backend: str,
    small_blocks: None,
    assert_no_worse: Callable[..., None],
    N: tuple[int, ...],
    D: int,
    V: int,
    dtype: torch.dtype,
) -> None:
    """Every option with every subset of the inputs trained; several sets of states share the targets of one."""
    for options, trained in itertools.product(OPTIONS.values(), TRAINED):
        compare(assert_no_worse, *make(N, D, V, dtype), trained, options)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_error_over_many_values(best_backend: str, assert_no_worse: Callable[..., None], dtype: torch.dtype) -> None:
    """Enough of everything that sums in a poor order would show, in blocks of the size in use."""
    for trained in TRAINED:
        compare(assert_no_worse, *make((700,), 150, 5003, dtype), trained, {})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_reductions(
    best_backend: str, small_blocks: None, reduction: str, weighted: bool, trained: tuple[bool, bool]
) -> None:
    hidden, weight, targets = make((2, 30), 12, 100, torch.float64)
    token_weights = torch.rand(30, dtype=torch.float64).requires_grad_() if weighted else None

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, reduction=reduction, token_weights=token_weights)  # type: ignore

    def truth(h: Tensor, w: Tensor) -> Tensor:
        loss = plain(h, w, targets)
        counts = (targets != -100).double().expand_as(loss)
        if token_weights is not None:
            loss, counts = loss * token_weights, counts * token_weights
        return {"mean": loss.sum() / counts.sum(), "sum": loss.sum(), "none": loss}[reduction]

    dloss = torch.randn(hidden.shape[:-1] if reduction == "none" else (), dtype=torch.float64)
    torch.testing.assert_close(
        gradients(ours, hidden, weight, trained, dloss), gradients(truth, hidden, weight, trained, dloss)
    )
    if token_weights is not None:
        of_weights = [torch.autograd.grad(f(hidden, weight), token_weights, dloss)[0] for f in (ours, truth)]
        torch.testing.assert_close(*of_weights)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)])
def test_loss_of_transformers(best_backend: str, items: int | Tensor | None) -> None:
    """The loss of its causal language models: shifted labels, and a sum divided by the items of several batches."""
    hidden, weight, _ = make((2, 9), 16, 50, torch.float32)
    labels = torch.randint(50, (2, 9))
    labels[0, :4] = labels[1, 7:] = -100
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    theirs = ForCausalLMLoss(F.linear(leaves[0], weight), labels, 50, num_items_in_batch=items)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    ours = linear_cross_entropy(leaves[1], weight, shifted, reduction="mean" if items is None else "sum")
    ours = ours if items is None else ours / items
    torch.testing.assert_close(ours, theirs)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_token_scores(cpu_backend: str, small_blocks: None, dtype: torch.dtype, soft_cap: float | None) -> None:
    hidden, weight, targets = make((3, 2, 14), 8, 205, dtype)
    weight[150] = weight[77]  # equals in different blocks
    scores = token_scores(hidden.requires_grad_(), weight, targets, soft_cap=soft_cap, scale=0.5)
    products = F.linear(hidden, weight).detach()
    logits = products.double() * 0.5
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    counts = (targets != -100).expand(3, 2, 14)
    # The product of a block may differ in its last bit from that of the whole.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps, "check_dtype": False}
    expected = logits.gather(-1, targets.clamp(min=0).expand(3, 2, 14)[..., None])[..., 0]
    torch.testing.assert_close(scores.target_logit[counts], expected[counts], **tolerance)
    torch.testing.assert_close(scores.logsumexp[counts], logits.logsumexp(-1)[counts], **tolerance)
    assert torch.equal(scores.loss, scores.logsumexp - scores.target_logit)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(scores.argmax[counts], products.argmax(-1)[counts])
    assert not (scores.argmax == 150).any()
    assert (scores.argmax[~counts] == -1).all()
    assert not any(t[~counts].any() for t in (scores.target_logit, scores.logsumexp, scores.loss))
    assert not any(t.requires_grad for t in scores)
    loss = linear_cross_entropy(hidden, weight, targets, soft_cap=soft_cap, scale=0.5, reduction="none")
    # In bfloat16 the products of a kernel that makes its own are not rounded.
    exact = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss, scores.loss, **(tolerance if dtype == torch.bfloat16 else exact))


@pytest.mark.parametrize(("N", "V", "D"), [(5, 100, 48), (70, 5000, 576), (1100, 2079, 40)])
def test_token_scores_at_once(best_backend: str, N: int, V: int, D: int) -> None:
    """The kernel that makes its own products, over several tasks of rows and columns, the last ones partly filled."""
    hidden, weight, targets = torch.randn(N, D + 3)[:, :D].bfloat16(), torch.randn(V, D).bfloat16(), torch.arange(N) % V
    weight[V - 1] = weight[V // 2] = 3 * hidden[0]  # the largest logit of the first row, twice
    hidden[1, 0] = torch.nan
    arguments = hidden, targets, weight, 0.0, 0.3
    function = logit_blocks.HEAD_STATISTICS.implementation(*arguments)
    if function is logit_blocks.head_statistics_reference:
        pytest.skip("this processor has no instructions for it")
    state = function(*arguments)
    rows = torch.arange(N) != 1
    logits = 0.3 * hidden.double() @ weight.double().mT
    bounds = {"rtol": 1e-6, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(state.target_logit[rows], logits.gather(1, targets[:, None])[rows, 0], **bounds)
    torch.testing.assert_close(state.logsumexp(0.3, 0.0)[rows], logits.logsumexp(-1)[rows], **bounds)
    assert state.total[1].isnan()
    assert state.argmax is not None and state.argmax[0] == V // 2
    best = logits.gather(1, state.argmax[:, None])[:, 0]
    assert (best[rows] >= logits.amax(1)[rows] - 1e-4).all()


def test_equal_logits(cpu_backend: str, small_blocks: None) -> None:
    """The smallest index, as torch.argmax gives it on a CPU."""
    hidden, weight = torch.ones(3, 4), torch.randint(-1, 2, (300, 4)).float()
    scores = token_scores(hidden, weight, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(scores.argmax, F.linear(hidden, weight).argmax(-1))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(cpu_backend: str, small_blocks: None, dtype: torch.dtype, trained: tuple[bool, bool]) -> None:
    """NaN reaches the loss and the gradient of its own row alone."""
    hidden, weight, _ = make((6,), 8, 120, dtype)
    targets = torch.randint(120, (6,))
    hidden[2, 3] = torch.nan
    hidden[4] = 0
    hidden[4, 1] = torch.inf
    loss, gradient, *_ = gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction="none"), hidden, weight, trained, torch.ones(6)
    )
    assert loss.isnan().tolist() == plain(hidden, weight, targets).isnan().tolist()
    assert loss[2].isnan() and loss[[0, 1, 3, 5]].isfinite().all()
    if trained[0]:
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 5]].isfinite().all()
    else:
        assert gradient.isnan().all(0).any()


def test_logits_of_minus_infinity(cpu_backend: str, small_blocks: None) -> None:
    """A vocabulary whose first block is masked out altogether."""
    hidden, weight = torch.ones(5, 1).requires_grad_(), torch.randn(130, 1)
    weight[:60] = -torch.inf
    targets = torch.randint(60, 130, (5,))
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(loss, plain(hidden, weight, targets))
    scores = token_scores(hidden, weight, targets)
    torch.testing.assert_close(scores.loss, loss)


@pytest.mark.parametrize("trained", TRAINED)
def test_every_target_ignored(best_backend: str, trained: tuple[bool, bool]) -> None:
    hidden, weight, _ = make((2, 5), 8, 50, torch.float32)
    targets = torch.full((5,), -7)
    for reduction in ("mean", "sum", "none"):
        leaves = [t.clone().requires_grad_(wants) for t, wants in zip((hidden, weight), trained, strict=True)]
        loss = linear_cross_entropy(*leaves, targets, ignore_index=-7, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        loss.sum().backward()
        assert not any(leaf.grad.any() for leaf in leaves if leaf.requires_grad)
    assert (token_scores(hidden, weight, targets, ignore_index=-7).argmax == -1).all()


@pytest.mark.parametrize("N", [0, 1])
def test_no_token_and_one_token(best_backend: str, N: int) -> None:
    hidden, weight = torch.randn(3, N, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, plain(hidden, weight, targets).sum())
    assert hidden.grad.shape == hidden.shape and bool(weight.grad.any()) is bool(N)
    state = torch.randn(4)
    assert linear_cross_entropy(state, weight, torch.tensor(3), reduction="none").shape == ()


@pytest.mark.parametrize("trained", TRAINED)
def test_backward_twice(best_backend: str, small_blocks: None, trained: tuple[bool, bool]) -> None:
    hidden, weight, targets = make((20,), 8, 90, torch.float32)
    leaves = [t.requires_grad_(wants) for t, wants in zip((hidden, weight), trained, strict=True)]
    wanted = [t for t in leaves if t.requires_grad]
    loss = linear_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(loss, wanted, torch.tensor(3.0), retain_graph=True)
    for t in first:
        t.zero_()  # what was handed out is the receiver's
    second = torch.autograd.grad(loss, wanted, torch.tensor(-2.0))
    truth = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    exact = plain(*truth, targets).sum() / (targets != -100).sum() * -2
    for ours, theirs in zip(second, torch.autograd.grad(exact, [t for t in truth if t.requires_grad]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    loss = linear_cross_entropy(*leaves, targets)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, wanted, create_graph=True)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return result


@pytest.mark.parametrize("part", ["forward", "scores", "backward"])
def test_products_and_largest_tensor(best_backend: str, small_blocks: None, part: str) -> None:
    """The FLOPs of the products, and no tensor larger than the weight's gradient, a block or the hidden states."""
    N, D, V = 40, 6, 1000
    # In float64 the products are PyTorch's, and counted.
    hidden, weight, targets = torch.randn(N, D).double(), torch.randn(V, D).double(), torch.randint(V, (N,))
    product = 2 * N * D * V
    needs = {"forward": [False, True], "scores": [False], "backward": [(True, False), (False, True), (True, True)]}
    for need in needs[part]:
        with Largest() as made, FlopCounterMode(display=False) as counter:
            if part == "backward":
                rows = torch.ones(len(targets)).double()
                logit_blocks.backward_pass(hidden, targets, weight, rows, rows, 0.0, 1.0, 0.0, *need)
            else:
                scores = part == "scores"
                logit_blocks.forward_pass(
                    hidden, targets, weight, 0.0, 1.0, logit_sum=scores, argmax=scores, dhidden=need
                )
        assert counter.get_total_flops() == product * (1 + sum(need) if part == "backward" else 1 + need)
        assert made.elements == (V * D if part == "backward" and need[1] else max(8 * 37, N * D))


@pytest.mark.parametrize("trained", TRAINED)
def test_ignored_rows_cost_nothing(best_backend: str, small_blocks: None, trained: tuple[bool, bool]) -> None:
    hidden, weight = (
        t.double().requires_grad_(w) for t, w in zip((torch.randn(50, 6), torch.randn(300, 6)), trained, strict=True)
    )
    targets = torch.randint(300, (50,))
    targets[::5] = -100
    with torch.profiler.profile(with_flops=True) as profile:
        linear_cross_entropy(hidden, weight, targets).backward()
    flops = sum(event.flops for event in profile.events() if event.name == "aten::mm")
    assert flops == 2 * 40 * 6 * 300 * (2 if trained == (True, False) else 2 + sum(trained))


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1791, 1792, 2048, 2049, 5000])
def test_pieces_cover_the_rows(count: int) -> None:
    """In order and without gaps, and none of the sizes that oneDNN is slow at."""
    pieces = list(logit_blocks.row_pieces(count, torch.device("cpu"), 64))
    assert [row for begin, end in pieces for row in range(begin, end)] == list(range(count))
    assert all(end - begin <= 512 or 1792 <= end - begin <= 2048 for begin, end in pieces)


@pytest.mark.parametrize("D", [64, 2048, 2049, 8192])
def test_blocks_of_a_gpu(D: int) -> None:
    """Those of narrow states fit a second-level cache; those of wide ones are large."""
    pieces = list(logit_blocks.row_pieces(10_000, torch.device("cuda"), D))
    assert [row for begin, end in pieces for row in range(begin, end)] == list(range(10_000))
    rows, columns = logit_blocks._block_size(torch.device("cuda"), D)
    assert max(end - begin for begin, end in pieces) == rows
    assert 2 * rows * columns == (2**24 if D <= 2048 else 2**27)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", TRAINED)
def test_partial_sums_of_a_gpu_are_float32(
    cpu_backend: str,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    trained: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    """Products that are given as float32, here by a stand-in for what cuBLAS does, are added up without a rounding.

    Every block's is large and the next one's of the other sign; the target's weight is 0.
    """
    rows, columns = torch.arange(32) // 8 % 2, torch.arange(296) // 37 % 2
    hidden, weight = (
        (size * (2 * sign - 1)[:, None] * (1 + 0.1 * torch.randn(len(sign), 24))).to(dtype)
        for size, sign in ((0.02, rows), (0.3, columns))
    )
    weight[0], targets = 0, torch.zeros(32, dtype=torch.int64)
    truth = gradients_of_mean(hidden.double(), weight.double(), targets, trained)
    rounded = gradients_of_mean(hidden, weight, targets, trained)
    mm = torch.mm

    def wide(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        product = mm(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "mm", wide)
    monkeypatch.setattr(logit_blocks, "partial_dtype", lambda x: torch.float32)
    for got, before, true in zip(gradients_of_mean(hidden, weight, targets, trained), rounded, truth, strict=True):
        assert got.dtype == dtype
        error, with_rounded, least = ((t.double() - true).norm() for t in (got, before, true.to(dtype)))
        assert error < 2 * least < with_rounded, f"error {error:.3g}, {with_rounded:.3g} with rounded products"


def gradients_of_mean(
    hidden: Tensor, weight: Tensor, targets: Tensor, trained: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """Those that are trained."""
    leaves = [t.detach().requires_grad_(t_trained) for t, t_trained in zip((hidden, weight), trained, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(linear_cross_entropy(*leaves, targets), wanted)


@pytest.mark.parametrize("trained", [(False, False), *TRAINED])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_kept_and_counted(best_backend: str, trained: tuple[bool, bool], smoothing: float) -> None:
    """Bytes kept for backward, and the FLOPs that a counter sees of the whole operation."""
    N, D, V = 40, 6, 100
    hidden, weight = (t.requires_grad_(w) for t, w in zip((torch.randn(N, D), torch.randn(V, D)), trained, strict=True))
    targets = torch.randint(V, (N,))
    kept: list[Tensor] = []
    at_once = trained == (True, False) and not smoothing
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with FlopCounterMode(display=False) as forward:
            loss = linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, reduction="sum")
        assert forward.get_total_flops() == 2 * N * D * V * (1 + at_once)
        saved = {id(t): t.numel() for t in kept if t is not weight and t.dtype != torch.int64 and t.dim()}
        if any(trained):
            assert sum(saved.values()) == (N * D if at_once else N * D + N)
            with FlopCounterMode(display=False) as backward:
                loss.backward()
            assert backward.get_total_flops() == (0 if at_once else 2 * N * D * V * (1 + sum(trained)))
        else:
            assert not saved and not loss.requires_grad
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        linear_cross_entropy(hidden, weight, targets)
    assert forward.get_total_flops() == 2 * N * D * V


def test_autocast(best_backend: str) -> None:
    """hidden and weight are cast as by a linear layer, and the gradients come back in their own dtypes."""
    hidden, weight, targets = make((30,), 16, 200, torch.float32)
    for trained in TRAINED:
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip((hidden, weight), trained, strict=True)]
        cast = [t.detach().bfloat16().requires_grad_(w) for t, w in zip((hidden, weight), trained, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*leaves, targets)
        same = linear_cross_entropy(*cast, targets)
        assert loss.dtype == torch.float32 and torch.equal(loss, same)
        loss.backward()
        same.backward()
        for leaf, other in zip(leaves, cast, strict=True):
            assert leaf.grad is None if other.grad is None else torch.equal(leaf.grad, other.grad.float())


def test_layouts_change_no_value(best_backend: str, small_blocks: None) -> None:
    hidden, weight, targets = make((4, 5), 8, 60, torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets, reduction="none")
    swapped = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat((weight, weight), 1)[:, :8]
    assert torch.equal(linear_cross_entropy(swapped, sliced, targets, reduction="none"), expected)
    columns = weight.t().contiguous().t()
    torch.testing.assert_close(linear_cross_entropy(swapped, columns, targets, reduction="none"), expected)
    one = linear_cross_entropy(hidden, weight, torch.tensor([7]), reduction="none")
    assert torch.equal(one, linear_cross_entropy(hidden, weight, torch.full((4, 5), 7), reduction="none"))


def test_gradcheck(cpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers in several blocks, the last ones partly filled; a row of a block is more than a register."""
    monkeypatch.setitem(logit_blocks.BLOCKS, "cpu", (8, 11))
    hidden, weight, targets = make((2, 5), 3, 13, torch.float64)
    for options, trained in itertools.product(OPTIONS.values(), TRAINED):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight), trained, strict=True)]
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda h, w, o=options, r=reduction: linear_cross_entropy(h, w, targets, reduction=r, **o), leaves
            )
        reference = (-100, options.get("soft_cap", 0.0), options.get("scale", 1.0), options.get("label_smoothing", 0.0))
        torch.testing.assert_close(
            linear_cross_entropy(*leaves, targets, reduction="none", **options),
            linear_cross_entropy_reference(*leaves, targets, *reference),
        )


def test_opcheck(best_backend: str, small_blocks: None) -> None:
    ops = torch.ops.cogsym
    for dtype, trained in itertools.product((torch.float64, torch.bfloat16), TRAINED):
        hidden, weight, targets = make((2, 9), 8, 60, dtype)
        targets = targets.expand(2, 9)
        hidden, weight = (t.requires_grad_(w) for t, w in zip((hidden, weight), trained, strict=True))
        at_once = trained == (True, False)
        args = (hidden, weight, targets, -100, 4.0, 0.5, 0.0)
        torch.library.opcheck(ops.linear_cross_entropy.default, (*args, at_once))
        hidden, weight = hidden.detach(), weight.detach()
        loss, logsumexp, dhidden = ops.linear_cross_entropy(hidden, weight, *args[2:], True)
        rest = (-100, 4.0, 0.5, 0.0, *trained)
        torch.library.opcheck(
            ops.linear_cross_entropy_backward.default, (loss, hidden, weight, targets, logsumexp, *rest)
        )
        torch.library.opcheck(ops.linear_cross_entropy_scale.default, (dhidden, loss, targets, -100))
        for some_ignored in (targets, targets.clamp(min=0)):
            torch.library.opcheck(ops.token_scores.default, (hidden, weight, some_ignored, -100, 0.0, 1.0))


@pytest.mark.parametrize("trained", TRAINED)
def test_compiled_without_a_break(best_backend: str, trained: tuple[bool, bool]) -> None:
    torch.compiler.reset()
    hidden, weight, targets = make((2, 9), 8, 60, torch.float32)
    leaves = [t.requires_grad_(w) for t, w in zip((hidden, weight), trained, strict=True)]

    def step(h: Tensor, w: Tensor) -> Tensor:
        scores = token_scores(h, w, targets)
        return linear_cross_entropy(h * 2, w, targets, soft_cap=9.0) + scores.loss.sum() + (scores.argmax > 5).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(9, 5)}, r"weight \(9, 5\), expected \[..., D\] and \[V, D\]"),
        ({"weight": torch.ones(9, 4).double()}, "hidden is torch.float32 and weight torch.float64"),
        ({"targets": torch.ones(2)}, "targets are torch.float32, expected torch.int64"),
        ({"targets": torch.ones(3, dtype=torch.int64)}, r"targets have shape \(3,\), expected .* \(2,\)"),
        ({"targets": torch.ones(1, 2, dtype=torch.int64)}, r"targets have shape \(1, 2\)"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0, expected a number above 0, or None"),
        ({"scale": -1.0}, "scale is -1.0, expected a number above 0"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected 0 to 1"),
        ({"reduction": "max"}, "reduction is 'max', expected one of mean, sum, none"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"hidden": torch.ones(2, 4), "weight": torch.ones(9, 4), "targets": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | change))


@pytest.mark.parametrize("target", [-1, 9])
def test_targets_out_of_range(best_backend: str, target: int) -> None:
    with pytest.raises(IndexError, match=f"a target is {target}, expected 0 to 8 or ignore_index -100"):
        linear_cross_entropy(torch.ones(2, 4), torch.ones(9, 4), torch.tensor([3, target]))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_logits_of_any_size(cpu_backend: str, small_blocks: None, scale: float) -> None:
    """Near 1e19 a logit's rounding alone is 5e11: e to the power of it must never be taken."""
    hidden, weight, targets = make((23,), 19, 301, torch.float32)
    hidden, dloss = hidden * 1e18, torch.randn(23)
    for trained in TRAINED:
        own = gradients(lambda h, w: plain(h, w, targets, scale=scale), hidden, weight, trained, dloss)
        got = gradients(
            lambda h, w: linear_cross_entropy(h, w, targets, reduction="none", scale=scale),
            hidden, weight, trained, dloss,
        )  # fmt: skip
        for ours, theirs in zip(got, own, strict=True):
            largest = theirs.abs().max().item() + (0 if theirs.dim() > 1 else 1e19)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest)
    scores, logits = token_scores(hidden, weight, targets, scale=scale), plain_logits(hidden, weight, 0.0, scale)
    torch.testing.assert_close(scores.logsumexp[targets >= 0], logits.logsumexp(-1)[targets >= 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("ignored", [0, 3])
def test_which_rows_count_is_asked_once(ignored: int) -> None:
    """A GPU is waited for where a number is read, or a shape depends on values."""

    class Reads(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    targets = torch.arange(10)
    targets[:ignored] = -100
    with Reads() as reads:
        rows = counted(torch.randn(2, 5, 4), targets.view(2, 5), -100, 10)
    assert torch.equal(rows.targets, torch.arange(ignored, 10))
    assert not {name.partition(".")[0] for name in reads.names} & {"nonzero", "_local_scalar_dense", "item", "equal"}
    assert sum(name.startswith("stack") for name in reads.names) == 1  # of which `tolist` is the one read


def test_scores_on_a_gpu_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There all rows are computed; a target outside the vocabulary, refused on a CPU, is NaN."""
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    targets = torch.randint(11, (2, 5))
    targets[0, 1] = targets[1, 4] = -100
    want = token_scores(hidden, weight, targets, soft_cap=3.0, scale=0.7)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    got = token_scores(hidden, weight, targets, soft_cap=3.0, scale=0.7)
    torch.testing.assert_close(got, want)
    targets[0, 0] = 11
    spoilt = token_scores(hidden, weight, targets, soft_cap=3.0, scale=0.7)
    assert spoilt.loss[0, 0].isnan() and torch.equal(spoilt.loss.flatten()[1:], got.loss.flatten()[1:])
