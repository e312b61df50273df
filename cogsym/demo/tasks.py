"""What the demo trains on and what it measures: documents, held-out questions, and the scores of a model on them."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from sacrebleu.metrics import CHRF
from transformers import PreTrainedTokenizerBase

from cogsym.data import Document, PackedDataset, pack, separator_id, tokenize
from cogsym.demo import language, semantics
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities

ROW = 256  # tokens; a pair of sentences has about 21
LONGEST = 20  # tokens of a translation; the longest sentence has 12
OPTIONS = 4
SHARES = (0.05, 0.35, 0.6)  # production is the harder half, so it gets more of the documents


@dataclass(frozen=True)
class HeldOut:
    """Test items, none of whose meanings is trained on.

    Attributes:
        new_text, base_text: sentences of the two languages, packed for bits per byte.
        new_floor: bits per byte of the generator itself on `new_text`; no model can expect less.
        questions: (context, options), the right option first.
        sources, references: base-language sentences and their translations.
    """

    new_text: PackedDataset
    base_text: PackedDataset
    new_floor: float
    questions: list[tuple[str, list[str]]]
    sources: list[str]
    references: list[str]


@dataclass(frozen=True)
class Scores:
    """What a model knows of the new language, and what is left of the base language.

    Attributes:
        accuracy: perception, share of new-language sentences whose meaning is chosen among `OPTIONS`.
        margin: mean of log p(right) - max log p(wrong), nats.
        understanding: mean log p(right meaning | new-language sentence), nats.
        bits_per_byte: production, of new-language text.
        chrf: production, chrF++ of greedy translations into the new language, 0 to 100.
        exact: share of translations that are the reference, letter by letter.
        base_bits_per_byte: retention, of base-language text.
        translations: the greedy translations, in the order of `HeldOut.sources`.
    """

    accuracy: float
    margin: float
    understanding: float
    bits_per_byte: float
    chrf: float
    exact: float
    base_bits_per_byte: float
    translations: list[str]


def meanings(split: str, seed: int) -> Iterator[semantics.Meaning]:
    """An endless stream of the meanings that the demo speaks of: who does what to whom, without adjectives and places,
    so that a few thousand sentences show every word often."""
    return (
        meaning
        for meaning in semantics.meanings(split, seed)
        if not (meaning.place or meaning.subject.adjective or (meaning.object and meaning.object.adjective))
    )


def surprisal(meaning: semantics.Meaning) -> float:
    """-log2 of the probability that a meaning is the next of `meanings`, in bits."""
    bare, transitive = 1 - semantics.P_ADJECTIVE, semantics.P_TRANSITIVE
    spoken_of = (1 - semantics.P_PLACE) * (transitive * bare**2 + (1 - transitive) * bare)
    return semantics.surprisal(meaning) + math.log2(spoken_of)


def training_documents(count: int, seed: int) -> list[Document]:
    """`count` documents of train meanings: Tavosi alone, pairs into English and pairs out of it, as `SHARES` says."""
    return list(islice(_documents(seed), count))


def _documents(seed: int) -> Iterator[Document]:
    rng = random.Random(f"adaptation {seed}")
    for meaning in meanings("train", seed):
        base, new = language.base_sentence(meaning), language.invented_sentence(meaning, language.TAVOSI)
        texts = (new, language.pair(new, base), language.pair(base, new))
        yield Document(rng.choices(texts, SHARES)[0])


def held_out(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> HeldOut:
    """Test items from `count` test meanings."""
    rng = random.Random(f"questions {seed}")
    unseen: dict[semantics.Meaning, None] = {}
    for meaning in meanings("test", seed):
        unseen[meaning] = None
        if len(unseen) == count:
            break
    base = [language.base_sentence(meaning) for meaning in unseen]
    new = [language.invented_sentence(meaning, language.TAVOSI) for meaning in unseen]
    questions = []
    for meaning, sentence in zip(unseen, new, strict=True):
        options = [meaning, *semantics.distractors(meaning, rng, OPTIONS - 1)]
        questions.append((f"{sentence} =", [f" {language.base_sentence(option)}" for option in options]))
    bits = sum(map(surprisal, unseen))
    return HeldOut(
        new_text=packed(tokenizer, new),
        base_text=packed(tokenizer, base),
        new_floor=bits / sum(len(sentence.encode()) for sentence in new),
        questions=questions,
        sources=base,
        references=new,
    )


def packed(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> PackedDataset:
    """Sentences in rows for bits per byte."""
    documents = [Document(sentence) for sentence in sentences]
    return pack(tokenize(documents, tokenizer, "all", separator_id(tokenizer)), ROW, seed=None)


def score(model: Any, tokenizer: PreTrainedTokenizerBase, items: HeldOut) -> Scores:
    """Perception, production and retention of a model."""
    separator = separator_id(tokenizer)
    options = option_log_probabilities(model, tokenizer, items.questions, separator, batch_size=64)
    margins = [right - max(wrong) for right, *wrong in options]
    translations = translate(model, tokenizer, items.sources)
    return Scores(
        accuracy=sum(margin > 0 for margin in margins) / len(margins),
        margin=sum(margins) / len(margins),
        understanding=sum(right for right, *_ in options) / len(options),
        bits_per_byte=bits_per_byte(model, items.new_text, batch_size=8),
        chrf=chrf_metric().corpus_score(translations, [items.references]).score,
        exact=sum(map(str.__eq__, translations, items.references)) / len(translations),
        base_bits_per_byte=bits_per_byte(model, items.base_text, batch_size=8),
        translations=translations,
    )


def chrf_metric() -> CHRF:
    """ChrF++: character 6-grams and word 2-grams."""
    return CHRF(word_order=2)


@torch.inference_mode()
def translate(model: Any, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[str]:
    """Greedy translations: what the model writes after "sentence =", up to the separator or `LONGEST` tokens."""
    separator = separator_id(tokenizer)
    prompts = [
        [separator, *ids] for ids in tokenizer([f"{s} =" for s in sentences], add_special_tokens=False)["input_ids"]
    ]
    width = max(map(len, prompts))
    ids = torch.tensor([[separator] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=LONGEST,
        eos_token_id=separator,
        pad_token_id=separator,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]
