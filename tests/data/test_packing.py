import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator
from transformers.masking_utils import find_packed_sequence_indices

from cogsym.data import Document, PackedDataset, Source, TokenizedDocuments, pack, tokenize
from cogsym.errors import CogsymError

SEPARATOR = 0


def distinct_documents(
    lengths: list[int], loss_starts: list[int], selection: list[int] | None = None, first_token: int = 1
) -> TokenizedDocuments:
    """Documents in which every token has its own id, so that a row tells where each of its tokens comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedDocuments(
        tokens=np.arange(first_token, first_token + offsets[-1], dtype=np.int32),
        offsets=offsets,
        loss_starts=np.array(loss_starts, dtype=np.int32),
        num_bytes=np.array(lengths, dtype=np.int64) * 3,
        selection=np.arange(len(lengths)) if selection is None else np.array(selection, dtype=np.int64),
        separator_id=SEPARATOR,
    )


@st.composite
def sources(draw) -> list[TokenizedDocuments]:
    """One to three sources of short and long, empty, fully masked and repeated documents."""
    parts, first_token = [], 1
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
        starts = [draw(st.one_of(st.just(0), st.integers(0, n))) for n in lengths]
        selection = draw(st.none() | st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
        parts.append(distinct_documents(lengths, starts, selection, first_token))
        first_token += sum(lengths)
    return parts


def stacked(dataset: PackedDataset) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in dataset]) for name in dataset[0]}


@settings(max_examples=300, deadline=None)
@given(parts=sources(), length=st.integers(2, 30), seed=st.none() | st.integers(0, 5))
def test_every_token_is_predicted_once_after_the_token_before_it(parts, length, seed):
    before: dict[int, int] = {}  # token -> the token that must stand before it in its document
    expected: Counter[int] = Counter()
    ends: Counter[int] = Counter()  # last token of a document -> how often it must predict the end
    for part in parts:
        for d in range(len(part.loss_starts)):
            ids = [SEPARATOR, *part.tokens[part.offsets[d] : part.offsets[d + 1]].tolist()]
            before.update(zip(ids[1:], ids[:-1], strict=True))
            times = int((part.selection == d).sum())
            expected.update({token: times for token in ids[1 + part.loss_starts[d] :] if times})
            ends[ids[-1]] += 0 if seed is None else times
    if not expected and not ends.total():
        with pytest.raises(CogsymError, match="no document holds a token to predict"):
            pack(parts, length, seed)
        return

    dataset = pack(parts, length, seed)
    rows = stacked(dataset)
    assert all(value.shape == (len(dataset), length) and value.dtype == torch.int64 for value in rows.values())
    found: Counter[int] = Counter()
    found_ends: Counter[int] = Counter()
    group = (rows["position_ids"] == 0).cumsum(-1)
    for ids, labels, positions, groups in zip(
        *(rows[name].tolist() for name in ("input_ids", "labels", "position_ids")), group.tolist(), strict=True
    ):
        assert positions[0] == 0
        assert labels[0] == -100
        for t in range(1, length):
            assert positions[t] in (0, positions[t - 1] + 1)
            inside = groups[t] == groups[t - 1]
            if ids[t] != SEPARATOR and inside:
                assert before[ids[t]] == ids[t - 1], "a document's tokens stand together, in order, after a separator"
            if labels[t] != -100:
                assert labels[t] == ids[t]
                assert inside, "the first token of a document or of a further piece is context only"
                (found_ends if ids[t] == SEPARATOR else found)[ids[t - 1] if ids[t] == SEPARATOR else ids[t]] += 1
    assert found == expected
    assert +found_ends == +ends

    assert dataset.num_loss_tokens == int((rows["labels"] != -100).sum())
    assert dataset.num_documents == sum(len(part.selection) for part in parts)
    assert dataset.num_bytes == sum(int(part.num_bytes[d]) for part in parts for d in part.selection)


@settings(max_examples=200, deadline=None)
@given(parts=sources(), length=st.integers(2, 30), seed=st.none() | st.integers(0, 5))
def test_transformers_finds_the_same_documents(parts, length, seed):
    try:
        rows = stacked(pack(parts, length, seed))
    except CogsymError:
        return
    found = find_packed_sequence_indices(rows["position_ids"])
    document_of = {
        token: (number, d)
        for number, part in enumerate(parts)
        for d in range(len(part.loss_starts))
        for token in part.tokens[part.offsets[d] : part.offsets[d + 1]].tolist()
    }
    for r, ids in enumerate(rows["input_ids"].tolist()):
        groups = [0] * length if found is None else found[r].tolist()
        for group in set(groups):
            members = {document_of[i] for i, g in zip(ids, groups, strict=True) if g == group and i != SEPARATOR}
            assert len(members) <= 1, "two documents in one attention group"
        for t in range(1, length):
            assert (groups[t] != groups[t - 1]) == (rows["position_ids"][r, t] == 0)


def test_evaluation_rows_by_hand():
    part = distinct_documents([3, 2, 9], loss_starts=[0, 1, 6])
    rows = stacked(pack(part, 8, seed=None))
    x = -100
    assert rows["input_ids"].tolist() == [
        [0, 1, 2, 3, 0, 4, 5, 0],
        # the third document's first piece, 0 6 7 ... 12, has one label, its last token
        [0, 6, 7, 8, 9, 10, 11, 12],
        [12, 13, 14, 0, 0, 0, 0, 0],
    ]
    assert rows["labels"].tolist() == [
        [x, 1, 2, 3, x, x, 5, x],
        [x, x, x, x, x, x, x, 12],
        [x, 13, 14, x, x, x, x, x],
    ]
    assert rows["position_ids"].tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 0],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 0, 1, 2, 3, 4],
    ]


def test_training_rows_by_hand():
    x = -100
    dataset = pack(distinct_documents([3], loss_starts=[1]), 8, seed=0)
    assert {name: value.tolist() for name, value in dataset[0].items()} == {
        "input_ids": [0, 1, 2, 3, 0, 0, 0, 0],
        "labels": [x, x, 2, 3, 0, x, x, x],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
    }
    assert (dataset.num_loss_tokens, dataset.num_bytes, dataset.num_documents, dataset.fill) == (3, 9, 1, 5 / 8)


def test_a_piece_without_a_label_is_left_out():
    dataset = pack(distinct_documents([20], loss_starts=[18]), 5, seed=None)
    assert [row["input_ids"].tolist() for row in dataset] == [[16, 17, 18, 19, 20]]
    assert [row["labels"].tolist() for row in dataset] == [[-100, -100, -100, 19, 20]]


def test_evaluation_keeps_the_order():
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 60, size=200).tolist()
    rows = stacked(pack(distinct_documents(lengths, [0] * 200), 64, seed=None))
    labels = rows["labels"][rows["labels"] != -100]
    torch.testing.assert_close(labels, torch.arange(1, sum(lengths) + 1))


def test_seed_decides_the_rows():
    lengths = np.random.default_rng(0).integers(1, 60, size=200).tolist()
    part = distinct_documents(lengths, [0] * 200)
    first, again, other = (stacked(pack(part, 64, seed))["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("length", [128, 256, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_sentence_data_fills_the_rows(length, seed):
    generator = np.random.default_rng(seed)
    lengths = np.maximum(1, generator.lognormal(mean=3.6, sigma=0.6, size=20_000)).astype(int).tolist()
    dataset = pack(distinct_documents(lengths, [0] * len(lengths)), length, seed)
    assert dataset.fill > 0.95


def bits_per_byte(logits_of, dataset: PackedDataset) -> float:
    """Sum of the shifted cross-entropy, as transformers defines it, in bits over `num_bytes`."""
    total = 0.0
    for batch in DataLoader(dataset, batch_size=3, collate_fn=default_data_collator):
        logits = logits_of(batch).double()
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return total / math.log(2) / dataset.num_bytes


@pytest.mark.parametrize("length", [2, 7, 32, 512])
@pytest.mark.parametrize("loss", ["all", "target"])
def test_uniform_model_has_exactly_log2_v_bits_a_token(tokenizer, sentences, length, loss):
    documents = [Document(f"English: {en}\nSwahili: {sw}", 19 + len(en)) for en, sw in sentences]
    dataset = pack(tokenize(documents, tokenizer, loss, 0), length, seed=None)
    vocabulary = len(tokenizer)
    if loss == "all":
        texts = [document.text for document in documents]
        num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    else:
        texts = [document.text[document.target_start :] for document in documents]
        num_tokens = 0
        for document in documents:
            encoding = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
            num_tokens += sum(end > document.target_start for _, end in encoding["offset_mapping"])
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (dataset.num_bytes, dataset.num_loss_tokens) == (num_bytes, num_tokens)
    measured = bits_per_byte(lambda batch: torch.zeros(*batch["input_ids"].shape, vocabulary), dataset)
    assert measured == pytest.approx(num_tokens * math.log2(vocabulary) / num_bytes, rel=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_score_as_if_alone(tokenizer, sentences, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    documents = [Document(text) for pair in sentences for text in pair]
    dataset = pack(tokenize(documents, tokenizer, "all", 0), 200, seed=None)
    assert len(dataset) < len(documents)
    with torch.no_grad():
        packed = bits_per_byte(lambda batch: model(**batch, use_cache=False).logits, dataset)
        nats = 0.0
        for document in documents:
            ids = torch.tensor([[0, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]])
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            nats -= log_probs.gather(-1, ids[0, 1:, None]).sum().item()
    alone = nats / math.log(2) / sum(len(document.text.encode()) for document in documents)
    assert packed == pytest.approx(alone, rel=1e-7)  # rotary and eager softmax are float32 inside


def test_sources_mix_and_rows_are_independent_of_the_access_order(tokenizer, tmp_path):
    for name in ("en", "sw"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(100)))
    parts = [
        tokenize(Source(tmp_path / "en.txt", weight=0.5), tokenizer, "all", 0, tmp_path / "cache"),
        tokenize(Source(tmp_path / "sw.txt", weight=2.0), tokenizer, "all", 0, tmp_path / "cache"),
    ]
    dataset = pack(parts, 128, seed=4)
    assert dataset.num_documents == 250
    text = tokenizer.decode(torch.cat([row["input_ids"] for row in dataset]), skip_special_tokens=False)
    counts = Counter(document.split()[0] for document in text.split("<|endoftext|>") if document.strip())
    assert counts == {"en": 50, "sw": 200}
    backwards = [dataset[i] for i in range(len(dataset) - 1, -1, -1)][::-1]
    for row, other in zip(dataset, backwards, strict=True):
        assert all(torch.equal(row[name], other[name]) for name in row)
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_wrong_arguments():
    part = distinct_documents([3], [0])
    with pytest.raises(CogsymError, match="row of 1 token"):
        pack(part, 1, seed=0)
    other = TokenizedDocuments(part.tokens, part.offsets, part.loss_starts, part.num_bytes, part.selection, 5)
    with pytest.raises(ValueError, match=r"\[0, 5\]"):
        pack([part, other], 8, seed=0)
    with pytest.raises(CogsymError, match="no document holds a token to predict"):
        pack(distinct_documents([4], loss_starts=[4]), 8, seed=None)
