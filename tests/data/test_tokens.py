import errno
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cogsym.data import Document, Source, TokenizedDocuments, pack, read_documents, separator_id, tokenize, tokens
from cogsym.errors import CogsymError

TEMPLATE = "English: {en}\nSwahili: {sw}"


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"en": en, "sw": sw}) + "\n" for en, sw in pairs), "utf-8")
    return path


def document_tokens(tokenized: TokenizedDocuments, d: int) -> list[int]:
    return tokenized.tokens[tokenized.offsets[d] : tokenized.offsets[d + 1]].tolist()


def assert_equal(a: TokenizedDocuments, b: TokenizedDocuments) -> None:
    for name in ("tokens", "offsets", "loss_starts", "num_bytes", "selection"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert a.separator_id == b.separator_id


def byte_of_character() -> dict[str, int]:
    """GPT-2's table of the character that stands for each byte, inverted."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def test_arrays_are_the_tokenizer_s_own_ids(tokenizer, sentences):
    documents = [Document(text) for pair in sentences for text in pair]
    tokenized = tokenize(documents, tokenizer, "all", separator_id=0)
    for d, document in enumerate(documents):
        assert document_tokens(tokenized, d) == tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert tokenized.tokens.dtype == tokenized.loss_starts.dtype == np.int32
    assert tokenized.offsets.dtype == tokenized.num_bytes.dtype == tokenized.selection.dtype == np.int64
    assert tokenized.num_bytes.tolist() == [len(d.text.encode()) for d in documents]
    assert tokenized.loss_starts.tolist() == [0] * len(documents)
    assert tokenized.selection.tolist() == list(range(len(documents)))


def test_loss_starts_at_the_token_of_the_target_s_first_byte(tokenizer, sentences, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", sentences)
    templates = [TEMPLATE, "{en} {sw}", "{en}{sw}", "{en}: {sw} ({en})", "{sw}"]
    byte_of = byte_of_character()
    inside = 0
    for template in templates:
        source = Source(path, template=template)
        tokenized = tokenize(source, tokenizer, "target", separator_id=0)
        for d, document in enumerate(read_documents(source, "target")):
            pieces = tokenizer.convert_ids_to_tokens(document_tokens(tokenized, d))
            ends = np.cumsum([len(piece) for piece in pieces])  # byte-level: a character of a token is a byte
            assert bytes(byte_of[c] for piece in pieces for c in piece) == document.text.encode()
            target_byte = len(document.text[: document.target_start].encode())
            for t, end in enumerate(ends):
                assert (t >= tokenized.loss_starts[d]) == (end > target_byte)
            inside += target_byte not in [0, *ends]
            assert tokenized.num_bytes[d] == len(document.text.encode()) - target_byte
    assert inside, "no token began before its target and ended in it, the case that the offsets are for"


def test_loss_all_ignores_the_target(tokenizer, sentences):
    documents = [Document(f"{en} {sw}", target_start=len(en)) for en, sw in sentences]
    everything = [Document(document.text) for document in documents]
    assert_equal(tokenize(documents, tokenizer, "all", 0), tokenize(everything, tokenizer, "target", 0))


def test_target_without_a_token_counts_none(tokenizer):
    tokenized = tokenize([Document("Habari", target_start=6)], tokenizer, "target", 0)
    assert tokenized.loss_starts.tolist() == np.diff(tokenized.offsets).tolist()
    assert tokenized.num_bytes.tolist() == [0]


def test_target_with_stories260k(stories_tokenizer, sentences, tmp_path):
    source = Source(write_pairs(tmp_path / "pairs.jsonl", sentences), template=TEMPLATE)
    tokenized = tokenize(source, stories_tokenizer, "target", separator_id=1, vocab_size=512)
    for d, (en, sw) in enumerate(sentences):
        start, ids = tokenized.loss_starts[d], document_tokens(tokenized, d)
        assert stories_tokenizer.decode(ids[start:]).removeprefix(" ") == sw
        assert stories_tokenizer.decode(ids[:start]).removesuffix(" ") == f"English: {en}\nSwahili:"


def test_padding_and_truncation_of_the_tokenizer_neither_matter_nor_change(tokenizer, sentences):
    documents = [Document(text) for pair in sentences for text in pair]
    expected = tokenize(documents, tokenizer, "all", 0)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.backend_tokenizer.enable_truncation(3)
    other.backend_tokenizer.enable_padding(length=50)
    assert_equal(tokenize(documents, other, "all", 0), expected)
    assert other.backend_tokenizer.truncation["max_length"] == 3
    assert other.backend_tokenizer.padding["length"] == 50


@pytest.mark.parametrize(("documents", "characters"), [(3, 1 << 22), (100, 40), (100, 1)])
def test_batches_change_nothing(tokenizer, sentences, monkeypatch, documents, characters):
    many = [Document(text, target_start=5) for pair in sentences for text in pair]
    expected = tokenize(many, tokenizer, "target", 0)
    monkeypatch.setattr(tokens, "_BATCH", documents)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", characters)
    assert_equal(tokenize(many, tokenizer, "target", 0), expected)


def test_no_document(tokenizer):
    tokenized = tokenize([], tokenizer, "all", 0, vocab_size=330)
    assert tokenized.offsets.tolist() == [0]
    with pytest.raises(CogsymError, match="no document holds a token to predict"):
        pack(tokenized, 8, seed=0)


def test_weight_selects_and_is_no_part_of_the_cache(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"mstari {i}" for i in range(10)))
    for weight in (1.0, 2.0, 0.5, 1.3):
        source = Source(tmp_path / "a.txt", weight=weight)
        tokenized = tokenize(source, tokenizer, "all", 0, tmp_path / "cache")
        texts = [tokenizer.decode(document_tokens(tokenized, d)) for d in tokenized.selection]
        assert texts == [document.text for document in read_documents(source)]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.fixture
def count_reads(monkeypatch) -> list[str]:
    """The sources tokenised anew, by their paths."""
    reads: list[str] = []
    read_once = tokens.read_once
    monkeypatch.setattr(tokens, "read_once", lambda source, loss: reads.append(loss) or read_once(source, loss))
    return reads


def test_cache_hit_is_equal_memory_mapped_and_reads_no_text(tokenizer, sentences, tmp_path, count_reads):
    source = Source(write_pairs(tmp_path / "pairs.jsonl", sentences), template=TEMPLATE)
    cache = tmp_path / "new" / "cache"
    expected = tokenize(source, tokenizer, "target", 0)
    first = tokenize(source, tokenizer, "target", 0, cache)
    second = tokenize(source, tokenizer, "target", 0, cache)
    assert_equal(first, expected)
    assert_equal(second, expected)
    assert len(count_reads) == 2
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]
    # The separator is no part of the cache: it is put in when rows are packed.
    assert tokenize(source, tokenizer, "target", 1, cache).separator_id == 1
    assert len(count_reads) == 2

    (file,) = cache.iterdir()
    with file.open("r+b") as stream:
        stream.seek(file.read_bytes().index(expected.tokens.tobytes()))
        stream.write(np.int32(77).tobytes())
    assert second.tokens[0] == 77 != expected.tokens[0], "the array is the file itself, not a copy"


def test_cache_miss_on_anything_that_changes_the_tokens(tokenizer, sentences, tmp_path, count_reads):
    path = write_pairs(tmp_path / "pairs.jsonl", sentences)
    cache = tmp_path / "cache"
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.add_tokens(["Habari"])
    wanted = [
        (Source(path, template=TEMPLATE), tokenizer, "target"),
        (Source(path, template=TEMPLATE), tokenizer, "all"),
        (Source(path, template="{en} {sw}"), tokenizer, "target"),
        (Source(path, field="en"), tokenizer, "all"),
        (Source(path, field="sw"), tokenizer, "all"),
        (Source(path, field="sw"), other, "all"),
    ]
    for n, (source, used, loss) in enumerate(wanted, start=1):
        assert_equal(tokenize(source, used, loss, 0, cache), tokenize(source, used, loss, 0))
        assert len(list(cache.iterdir())) == n

    source = Source(path, template=TEMPLATE)
    write_pairs(path, sentences[::-1])
    assert_equal(tokenize(source, tokenizer, "target", 0, cache), tokenize(source, tokenizer, "target", 0))
    assert len(list(cache.iterdir())) == len(wanted) + 1

    for name, num_documents in (("same.tsv", 1), ("same.txt", 2)):  # another format, so other documents
        (tmp_path / name).write_text("text\nmoja\n")
        tokenized = tokenize(Source(tmp_path / name), tokenizer, "all", 0, cache)
        assert len(tokenized.loss_starts) == num_documents
    del count_reads[:]
    tokenize(Source((tmp_path / "same.txt").rename(tmp_path / "other.txt")), tokenizer, "all", 0, cache)
    assert not count_reads, "the same content under another name of the same format is a hit"


def test_cache_of_a_datasets_folder(tokenizer, tmp_path, count_reads):
    datasets = pytest.importorskip("datasets")
    folder, cache = tmp_path / "saved", tmp_path / "cache"
    for text in ("moja mbili", "tatu nne"):
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(str(folder))
        for _ in range(2):
            tokenized = tokenize(Source(folder), tokenizer, "all", 0, cache)
            assert tokenizer.decode(document_tokens(tokenized, 0)) == text
    assert len(count_reads) == 2


def test_a_damaged_cache_is_written_anew(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("moja\nmbili\n")
    source = Source(tmp_path / "a.txt")
    expected = tokenize(source, tokenizer, "all", 0, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    raw = file.read_bytes()
    damages = [b"", b"no Arrow file", raw[: len(raw) // 2], raw[:-1]]
    for at in range(8, len(raw), 16):  # one byte in every 16, over metadata, arrays and footer
        damages.append(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
    rewritten = 0
    for damage in damages:
        file.unlink()
        file.write_bytes(damage)
        assert_equal(tokenize(source, tokenizer, "all", 0, tmp_path / "cache"), expected)
        rewritten += file.read_bytes() == raw
    assert rewritten >= len(damages) // 2, "some damaged bytes are padding, but not most"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_flipped_bit_of_a_token_is_noticed(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("moja\nmbili\n")
    source = Source(tmp_path / "a.txt")
    expected = tokenize(source, tokenizer, "all", 0, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    raw = bytearray(file.read_bytes())
    raw[raw.index(expected.tokens.tobytes())] ^= 1
    file.unlink()
    file.write_bytes(raw)
    assert_equal(tokenize(source, tokenizer, "all", 0, tmp_path / "cache"), expected)


def test_disk_full_leaves_no_half_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("moja\nmbili\n")

    class FullDisk:
        def __init__(self, stream, schema):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write_batch(self, batch):
            self.stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", FullDisk)
        with pytest.raises(CogsymError, match=r"No space left on device.*another cache folder"):
            tokenize(Source(tmp_path / "a.txt"), tokenizer, "all", 0, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(CogsymError, match="token cache cannot be written"):
        tokenize(Source(tmp_path / "a.txt"), tokenizer, "all", 0, tmp_path / "a.txt")


def test_source_errors_come_through_with_a_cache(tokenizer, tmp_path):
    with pytest.raises(CogsymError, match="does not exist"):
        tokenize(Source(tmp_path / "a.txt"), tokenizer, "all", 0, tmp_path / "cache")
    (tmp_path / "a.docx").touch()
    with pytest.raises(CogsymError, match="unknown suffix"):
        tokenize(Source(tmp_path / "a.docx"), tokenizer, "all", 0, tmp_path / "cache")


def test_tokenizer_and_model_that_disagree(tokenizer):
    documents = [Document("Habari")]
    size = len(tokenizer)
    tokenize(documents, tokenizer, "all", 0, vocab_size=size)
    with pytest.raises(CogsymError, match=f"disagree: the tokenizer has {size} tokens .* vocabulary of {size - 1} "):
        tokenize(documents, tokenizer, "all", 0, vocab_size=size - 1)
    with pytest.raises(CogsymError, match="disagree"):
        tokenize(documents, tokenizer, "all", separator_id=size, vocab_size=size)

    # A token added beyond the model's vocabulary, often for padding, does no harm until a text holds it.
    grown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    grown.add_tokens(["<pad>"], special_tokens=True)
    tokenize(documents, grown, "all", 0, vocab_size=size)
    with pytest.raises(CogsymError, match=f"disagree: the tokenizer has {size + 1} tokens .* vocabulary of {size} "):
        tokenize([Document("Habari<pad>")], grown, "all", 0, vocab_size=size)


def test_slow_tokenizer():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(CogsymError, match="SlowTokenizer is not a fast tokenizer"):
        tokenize([Document("a")], SlowTokenizer(), "all", 0)  # type: ignore[arg-type]


def test_separator(tokenizer):
    backend = tokenizer.backend_tokenizer
    assert separator_id(tokenizer, "<|endoftext|>") == backend.token_to_id("<|endoftext|>") == 0
    assert separator_id(tokenizer) == backend.token_to_id("<|turn|>") == 1
    assert separator_id(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")) == 0
    with pytest.raises(CogsymError, match=r"'<s>' is not a token .* <\|turn\|>, <\|endoftext\|>"):
        separator_id(tokenizer, "<s>")
    with pytest.raises(CogsymError, match="neither a bos nor an eos"):
        separator_id(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_progress_shows_in_a_terminal_and_only_for_much_text(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "_BATCH", 4)
    many = [Document(f"mstari {i}") for i in range(40)]
    tokenize(many, tokenizer, "all", 0)
    assert capsys.readouterr() == ("", "")

    screen = io.StringIO()
    monkeypatch.setattr(tokens, "Console", lambda file: Console(file=screen, force_terminal=True, width=120))
    tokenize(many[:4], tokenizer, "all", 0)
    assert not screen.getvalue()
    tokenize(many, tokenizer, "all", 0)
    for words in ("Tokenising documents", "40/40", "documents/s", "0:00:00"):
        assert words in screen.getvalue()


def test_globalvoices_speed(stories_tokenizer, data_folder, tmp_path, capsys):
    source = Source(data_folder / "text" / "globalvoices-en-sw" / "train.jsonl", template=TEMPLATE)
    if not source.path.exists():
        pytest.skip("no GlobalVoices text in the test data")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        tokenized = tokenize(source, stories_tokenizer, "target", 1, tmp_path, vocab_size=512)
        seconds.append(time.perf_counter() - begin)
    dataset = pack(tokenized, 1024, seed=0)
    begin = time.perf_counter()
    counted = sum(int((row["labels"] != -100).sum()) for row in dataset)
    row_time = (time.perf_counter() - begin) / len(dataset)
    with capsys.disabled():
        print(
            f"\nGlobalVoices en-sw: {len(tokenized.selection):,} pairs, {len(tokenized.tokens):,} tokens in "
            f"{seconds[0]:.2f} s ({len(tokenized.selection) / seconds[0]:,.0f} documents/s), from the cache in "
            f"{seconds[1]:.3f} s; {len(dataset):,} rows of 1,024, {dataset.fill:.1%} full, "
            f"{row_time * 1e6:.0f} µs a row"
        )
    assert dataset.num_documents == 27_972
    assert counted == dataset.num_loss_tokens
    assert dataset.fill > 0.95
    documents = read_documents(source, "target")
    assert dataset.num_bytes == sum(len(d.text[d.target_start :].encode()) for d in documents)
    for d in range(0, len(documents), 97):
        target = stories_tokenizer.decode(document_tokens(tokenized, d)[tokenized.loss_starts[d] :])
        assert target.removeprefix(" ") == documents[d].text[documents[d].target_start :].removeprefix(" ")
