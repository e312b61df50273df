from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SENTENCES = [
    ("Good morning, my friend.", "Habari za asubuhi, rafiki yangu."),
    ("The children read books at school.", "Watoto husoma vitabu shuleni."),
    ("We will travel tomorrow — early!", "Tutasafiri kesho — mapema!"),
    ("Ñandú, naïve, 東京 and €5", "Mbuni, ng'ombe, 東京 na €5 😀"),
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 330 tokens, too few for the rarer characters, which fall into several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"English: {en}\nSwahili: {sw}" for en, sw in SENTENCES[:3]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|turn|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def stories_tokenizer(data_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(data_folder / "models" / "stories260K")


@pytest.fixture(scope="session")
def sentences() -> list[tuple[str, str]]:
    return SENTENCES
