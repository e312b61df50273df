"""Make the demo's base model: a small Llama trained on generated languages, in one process, with no files read.

    python -m cogsym.demo.train_base OUT

writes OUT/config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and README.md. With one
thread it takes about half an hour.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cogsym.demo import language, semantics, tasks
from cogsym.training.evaluate import bits_per_byte

SEPARATOR = "<|endoftext|>"
VOCABULARY = 640
P_BASE, P_PAIR = 0.35, 0.5
DOCUMENT_KINDS = (0.2, 0.4, 0.4)  # a sentence, a pair into the base language, a pair out of it
HELD_OUT = 512

README = """# Demo base model

A Llama with {layers} layers, hidden size {hidden}, {heads} attention heads ({kv_heads} for keys and values) and
{parameters:,} parameters (embeddings tied), trained from random weights on the generated languages of
`cogsym/demo/language.py` by

    OMP_NUM_THREADS=1 python -m cogsym.demo.train_base OUT

with seed {seed}: {steps:,} steps of {batch} documents, {tokens:,} tokens in all, AdamW at a peak rate of {rate:g}.

Of the documents, {base_share:.0%} are in the base language alone (simple English): sentences, and pairs "a = b" where b
says the same as a in another order. The others are in one of {relatives} invented languages, relatives of the demo's
new language with other words and another grammar: sentences, and pairs with the base language in both directions. So
the model knows what a translation is, as a pretrained model does, but no word of the new language. Meanings of the dev
and test sets were never drawn. Weights are stored in bfloat16.

Held out, {held_out} base-language sentences of the dev set, stored weights read back, computed in float32:

| | bits per sentence | bits per byte |
|---|---|---|
| model | {bits:.2f} | {bits_per_byte:.4f} |
| entropy of the generator | {floor:.2f} | {floor_per_byte:.4f} |
"""


def document(meaning: semantics.Meaning, rng: random.Random) -> str:
    """One training document: base language alone with probability `P_BASE`, else one of the relatives.

    Base language alone is a sentence in a random form or, where there are two, a pair of them. A relative is a sentence
    of its own or a pair with the base language, in either direction.
    """
    if rng.random() < P_BASE:
        forms = language.base_forms(meaning)
        if len(forms) > 1 and rng.random() < P_PAIR:
            left, right = (language.base_sentence(meaning, *form) for form in rng.sample(forms, 2))
            return language.pair(left, right)
        return language.base_sentence(meaning, *rng.choice(forms))
    base = language.base_sentence(meaning)
    relative = language.invented_sentence(meaning, rng.choice(language.RELATIVES))
    return rng.choices((relative, language.pair(relative, base), language.pair(base, relative)), DOCUMENT_KINDS)[0]


def documents(split: str, seed: int) -> Iterator[str]:
    """An endless stream of documents, a function of `split` and `seed`."""
    rng = random.Random(f"documents {seed}")
    return (document(meaning, rng) for meaning in semantics.meanings(split, seed))


def held_out_sentences() -> tuple[list[str], float]:
    """`HELD_OUT` plain base-language sentences of the dev set and the mean bits that the generator spends on one.

    A sentence costs its meaning, and that a document begins with it and in this form.
    """
    meanings = list(itertools.islice(semantics.meanings("dev", 0), HELD_OUT))
    bits = 0.0
    for meaning in meanings:
        begins = P_BASE / len(language.base_forms(meaning)) + (1 - P_BASE) * DOCUMENT_KINDS[2]
        bits += semantics.surprisal(meaning) - math.log2(begins)
    return [language.base_sentence(meaning) for meaning in meanings], bits / HELD_OUT


def tokenizer_texts(count: int, seed: int) -> Iterator[str]:
    """Base-language sentences, and the syllables of the invented languages alone: their sounds, none of their words.

    A syllable is much more frequent than any pair of letters in a sentence, so it is merged first, and an invented
    word is cut into its syllables wherever they stand.
    """
    rng = random.Random(f"tokenizer {seed}")
    for meaning in itertools.islice(semantics.meanings("train", seed), count):
        yield language.base_sentence(meaning, *rng.choice(language.base_forms(meaning)))
        yield ".".join(rng.choices(language.SYLLABLES, k=400))
        yield " ".join(rng.choices(language.SYLLABLES, k=200))


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` entries; byte level, so it can write any language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [len(texts), longest]; label -100 is padding.

    Each text has a separator before it and one after it.
    """
    separator = tokenizer.eos_token_id
    rows = [[separator, *ids, separator] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    width = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    return labels.clamp_min(0), labels


def batches(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], size: int, seed: int) -> Iterator[list[str]]:
    """Batches of `size` texts of similar length, so that little of a batch is padding."""
    rng = random.Random(f"batches {seed}")
    while True:
        pool = sorted(itertools.islice(texts, 64 * size), key=len)
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        yield from chunks


def train(steps: int, batch: int, rate: float, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, int]:
    """Train from random weights; returns the model, its tokenizer and the number of tokens seen."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(tokenizer_texts(3_000, seed))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))),
    )
    stream = batches(tokenizer, documents("train", seed), batch, seed)
    tokens, start = 0, time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = encode(tokenizer, next(stream))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int((labels >= 0).sum())
        if step % 100 == 0:
            seconds = time.monotonic() - start
            left = seconds / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {tokens / seconds:.0f} tokens/s  {left:.0f} s left")
        if step % 500 == 0:
            bits, per_byte = held_out_bits(model, tokenizer)
            print(f"  held out: {bits:.2f} bits per sentence, {per_byte:.4f} per byte", flush=True)
    return model.eval(), tokenizer, tokens


def held_out_bits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[float, float]:
    """Bits per held-out sentence, on average, and bits per byte."""
    sentences, _ = held_out_sentences()
    per_byte = bits_per_byte(model, tasks.packed(tokenizer, sentences))
    return per_byte * sum(len(sentence.encode()) for sentence in sentences) / len(sentences), per_byte


def save(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, arguments: argparse.Namespace
) -> None:
    """Write the model in bfloat16, the tokenizer, and a README whose numbers come from the files just written."""
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "model.safetensors").chmod(0o644)  # it was written for its owner alone
    stored = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    bits, per_byte = held_out_bits(stored, tokenizer)
    sentences, floor = held_out_sentences()
    text = README.format(
        layers=stored.config.num_hidden_layers,
        hidden=stored.config.hidden_size,
        heads=stored.config.num_attention_heads,
        kv_heads=stored.config.num_key_value_heads,
        parameters=stored.num_parameters(),
        seed=arguments.seed,
        steps=arguments.steps,
        batch=arguments.batch,
        tokens=tokens,
        rate=arguments.rate,
        base_share=P_BASE,
        relatives=len(language.RELATIVES),
        held_out=HELD_OUT,
        bits=bits,
        bits_per_byte=per_byte,
        floor=floor,
        floor_per_byte=floor * len(sentences) / sum(len(sentence.encode()) for sentence in sentences),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description="Train the demo's base model.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="documents per step")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer, tokens = train(arguments.steps, arguments.batch, arguments.rate, arguments.seed)
    save(arguments.out, model, tokenizer, tokens, arguments)


if __name__ == "__main__":
    main()
