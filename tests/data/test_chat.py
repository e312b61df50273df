"""Chats: which tokens are learned, by each kind of template, and what packing makes of them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cogsym.data import Source, TokenizedDocuments, pack, tokenize
from cogsym.errors import CogsymError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
# The last turn of the assistant has a place for thoughts, and those before it have none.
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
SHOUTING = CHATML.replace("{{ m.content }}", "{% if loop.last %}{{ m.content | upper }}{% else %}-{% endif %}")

TWO_TURNS = [
    {"role": "system", "content": "Jibu kwa Kiswahili 😀."},
    {"role": "user", "content": "Good morning!"},
    {"role": "assistant", "content": "Habari za asubuhi 😀"},
    {"role": "user", "content": "Good morning!<|end|>"},
    {"role": "assistant", "content": " Habari\nyako? "},
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def chats(*rows: Any) -> Source:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
        return Source(path, chat="messages")

    return chats


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learned_text(tokenized: TokenizedDocuments, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of learned tokens."""
    assert tokenized.learned is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokenized.learned, [0]])))
    return [tokenizer.decode(tokenized.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "last"),
    [(CHATML, " Habari\nyako? <|end|>\n"), (MARKED, " Habari\nyako? <|end|>\n"),
     (THINKING, "<think></think> Habari\nyako? <|end|>\n")],
    ids=["prefixes", "markers", "thinking"],
)  # fmt: skip
def test_the_assistant_s_turns_are_learned_and_nothing_else(tokenizer, write, template, last):
    tokenizer = with_template(tokenizer, template)
    tokenized = tokenize(write(TWO_TURNS), tokenizer, "all", separator_id=0)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenized.tokens.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    expected = ["Habari za asubuhi 😀<|end|>\n", last]
    assert learned_text(tokenized, tokenizer) == expected
    assert tokenized.num_bytes.tolist() == [sum(len(turn.encode()) for turn in expected)]
    assert tokenized.num_loss_tokens.tolist() == [tokenized.learned.sum()]
    assert tokenized.loss_starts.tolist() == [tokenized.learned.argmax()]


def test_markers_give_transformers_own_mask(tokenizer, write):
    tokenizer = with_template(tokenizer, MARKED)
    rendered = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    tokenized = tokenize(write(TWO_TURNS), tokenizer, "all", separator_id=0)
    assert tokenized.tokens.tolist() == rendered["input_ids"]
    assert tokenized.learned.tolist() == rendered["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "markers"])
def test_a_greeting_of_the_assistant_is_learned(tokenizer, write, template):
    tokenizer = with_template(tokenizer, template)
    tokenized = tokenize(write([TWO_TURNS[2]]), tokenizer, "all", separator_id=0)
    assert learned_text(tokenized, tokenizer) == ["Habari za asubuhi 😀<|end|>\n"]


def test_packing_learns_the_same_tokens_each_once(tokenizer, write):
    """With rows too short for a chat, too: every label is the token that stands there, and none comes twice."""
    tokenizer = with_template(tokenizer, CHATML)
    separator = tokenizer.bos_token_id  # which the template begins with
    source = write(TWO_TURNS, TWO_TURNS[:3])
    chats = tokenize(source, tokenizer, "all", separator)
    assert not (chats.tokens == separator).any()
    learned = chats.tokens[chats.learned == 1].tolist()
    for length, seed in ((7, None), (30, None), (400, None), (7, 0), (400, 0)):
        rows = pack(chats, length, seed)
        labels = np.concatenate([row["labels"][1:].numpy() for row in rows])
        ids = np.concatenate([row["input_ids"][1:].numpy() for row in rows])
        counted = labels != -100
        assert (labels[counted] == ids[counted]).all()
        assert rows.num_loss_tokens == counted.sum() == len(learned)
        assert rows.num_bytes == chats.num_bytes.sum()
        assert all((row["labels"] != -100).any() for row in rows)  # no row is of the user's alone
        if seed is None:
            assert labels[counted].tolist() == learned


def test_chats_and_text_are_packed_together(tokenizer, write, tmp_path):
    tokenizer = with_template(tokenizer, CHATML)
    (tmp_path / "text.txt").write_text("Habari za asubuhi\n", "utf-8")
    parts = [tokenize(s, tokenizer, "all", 0) for s in (write(TWO_TURNS), Source(tmp_path / "text.txt"))]
    rows = pack(parts, 512, 0)
    labels = rows[0]["labels"]
    assert (labels != -100).sum() == rows.num_loss_tokens == parts[0].learned.sum() + len(parts[1].tokens) + 1


def test_the_cache_knows_chats_and_their_template(tokenizer, write, tmp_path):
    source, cache = write(TWO_TURNS), tmp_path / "cache"
    fresh = [tokenize(source, with_template(tokenizer, t), "all", 0) for t in (CHATML, THINKING)]
    for _ in range(2):
        for template, expected in zip((CHATML, THINKING), fresh, strict=True):
            cached = tokenize(source, with_template(tokenizer, template), "all", 0, cache)
            for name in ("tokens", "learned", "offsets", "loss_starts", "num_bytes"):
                np.testing.assert_array_equal(getattr(cached, name), getattr(expected, name))
    assert len(list(cache.iterdir())) == 2


USER = {"role": "user", "content": "Habari"}


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        (TWO_TURNS, None, "The tokenizer has no chat template, which --chat needs; take"),
        ("Habari", CHATML, "line 1: field 'messages' is str, expected a list of messages such as"),
        ([], CHATML, "line 1: field 'messages' is an empty list, expected a list of messages"),
        (["Habari"], CHATML, "line 1: message 1 of 'messages' is str, expected a list of messages"),
        ([USER, {"from": "gpt", "value": "x"}], CHATML, "line 1, message 2 of 'messages': field 'role' is null, exp"),
        ([{"role": "user", "content": 3}], CHATML, "message 1 of 'messages': field 'content' is int, expected a str"),
        ([{"role": "user", "content": "\ud83d"}], CHATML, "field 'content' holds \\ud83d, half of a character"),
        ([USER], CHATML, "line 1: field 'messages' has no turn of the assistant with text in it; mend the row"),
        ([USER], "{{ raise_exception('roles must alternate') }}", "chat template (roles must alternate); mend the row"),
        (TWO_TURNS, SHOUTING, "cannot be told from the rest; put {% generation %} and {% endgeneration %} around"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_chat_is_refused_in_a_sentence(tokenizer, write, row, template, sentence):
    with pytest.raises(CogsymError) as error:
        tokenize(write(row), with_template(tokenizer, template), "all", 0)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_chat_is_neither_a_field_nor_a_template():
    for other in ({"field": "text"}, {"template": "{text}"}):
        with pytest.raises(CogsymError, match="both a chat"):
            Source(Path("chats.jsonl"), chat="messages", **other)
