"""Chats to tokens by the tokenizer's own template, with the tokens of the assistant, which alone are learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from cogsym.data.formats import read_records, require_text
from cogsym.data.sources import Source
from cogsym.errors import CogsymError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_EXPECTED = 'expected a list of messages such as [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'


@dataclass(frozen=True, eq=False)
class Chat:
    """The tokens of a chat.

    Attributes:
        tokens: int32 [T], as the template writes them.
        learned: bool [T], those of the assistant's turns.
        num_bytes: UTF-8 bytes of the text that the learned ones cover.
    """

    tokens: np.ndarray
    learned: np.ndarray
    num_bytes: int


def read_chats(source: Source, tokenizer: PreTrainedTokenizerBase, separator_id: int) -> Iterator[Chat]:
    """The chats of a source, as often as they stand in it.

    Which tokens are the assistant's is what the template says where it has generation markers (transformers'
    `return_assistant_tokens_mask`). Of any other, a turn of the assistant is what the template writes behind the
    messages before it and its generation prompt, to the end of that turn, its end-of-turn token with it. A separator
    that the template begins with is left out, as packing puts one there.

    Args:
        source: with `chat`, the column of the messages.
        tokenizer: a fast one of transformers, with a chat template.
        separator_id: the token between documents.

    Raises:
        CogsymError: the tokenizer has no template, or it does not render a chat; a row is no chat, or has no turn of
            the assistant. The message tells the line or row.
    """
    assert source.chat is not None
    template = template_of(tokenizer)
    for where, record in read_records(source.path, (), [source.chat]):
        where = f"{source.path}, {where}"
        subject = f"{where}: field {source.chat!r}"
        messages = _messages(record[source.chat], source.chat, where)
        try:
            chat = _marked(messages, tokenizer) if _MARKED.search(template) else _by_prefixes(messages, tokenizer)
        except TemplateError as error:
            raise CogsymError(
                f"{subject} does not fit the tokenizer's chat template ({error}); mend the row, or leave it out."
            ) from None
        if chat is None:
            raise CogsymError(
                f"{subject} is written by the tokenizer's chat template so that the assistant's turns cannot be told "
                "from the rest; put {% generation %} and {% endgeneration %} around them in the template."
            )
        if not chat.learned.any():
            raise CogsymError(f"{subject} has no turn of the assistant with text in it; mend the row, or leave it out.")
        first = int(len(chat.tokens) > 0 and chat.tokens[0] == separator_id and not chat.learned[0])
        yield Chat(chat.tokens[first:], chat.learned[first:], chat.num_bytes)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template.

    Raises:
        CogsymError: there is none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise CogsymError(
            "The tokenizer has no chat template, which --chat needs; take the model's instruction-tuned version, or "
            "write chat_template.jinja beside its tokenizer.json."
        ) from None


def _messages(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    """The messages of a row, without what a table fills in where a message has no such key."""
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else "null" if value is None else type(value).__name__
        raise CogsymError(f"{where}: field {field!r} is {kind}, {_EXPECTED}.")
    for m, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise CogsymError(f"{where}: message {m} of {field!r} is {type(message).__name__}, {_EXPECTED}.")
        for key in ("role", "content"):
            require_text(message.get(key), key, f"{where}, message {m} of {field!r}")
    return [{key: v for key, v in message.items() if v is not None} for message in value]


def _marked(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Chat | None:
    """A chat by a template with generation markers."""
    rendered: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    tokens, spans = _encoded(text, tokenizer)
    if tokens.tolist() != list(rendered["input_ids"]):
        return None
    return _chat(text, tokens, spans, np.array(rendered["assistant_masks"], dtype=bool))


def _by_prefixes(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Chat | None:
    """A chat by a template without them; None where one of the assistant's turns is not found in it."""

    def render(shown: list[dict[str, Any]], prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt))

    turns = _turns(messages, render)
    if turns is None:
        return None
    text = render(messages)
    tokens, spans = _encoded(text, tokenizer)
    learned = np.zeros(len(tokens), dtype=bool)
    for begin, end in turns:
        learned |= (spans[:, 0] < end) & (spans[:, 1] > begin)
    return _chat(text, tokens, spans, learned)


def _turns(messages: list[dict[str, Any]], render: Callable[..., str]) -> list[tuple[int, int]] | None:
    """Where the assistant's turns begin and end in the text of a chat, in characters."""
    text = render(messages)
    turns = []
    for m, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content, through = message["content"].strip(), render(messages[: m + 1])
        before = render(messages[:m], True) if m else text.partition(content)[0]
        if not text.startswith(before):
            return None
        if not text.startswith(through):
            # Some templates write the last turn in another way, such as with a place for thoughts.
            through = before + content + through.rpartition(content)[2]
            if not content or not text.startswith(through):
                return None
        turns.append((len(before), len(through)))
    return turns


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [T] tokens, int64 [T, 2] the characters from and to which they reach)."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoding["input_ids"], dtype=np.int32), spans


def _chat(text: str, tokens: np.ndarray, spans: np.ndarray, learned: np.ndarray) -> Chat:
    covered = np.zeros(len(text), dtype=bool)  # several tokens may be of one character
    for begin, end in spans[learned]:
        covered[begin:end] = True
    return Chat(tokens, learned, len("".join(text[c] for c in np.flatnonzero(covered)).encode()))
