"""Values of metrics against sacrebleu's own scores and against counting by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from cogsym.sweeps.results.parts import SCHEMA
from cogsym.sweeps.tasks.metrics import (
    METRICS,
    bleu_statistics,
    chrf_statistics,
    ends_in_loop,
    identify,
    known_languages,
)

_WORDS = "habari za asubuhi rafiki yangu mtoto anasoma, kitabu! shuleni (leo) ya na 3.5 'mama' 東京".split()


def corpus(number: int, seed: int) -> tuple[list[str], list[str]]:
    """Outputs and references that share some words; some outputs are empty, a word, the reference or much too long."""
    chance = random.Random(seed)
    references = [" ".join(chance.choices(_WORDS, k=chance.randint(1, 12))) for _ in range(number)]
    outputs = []
    for reference in references:
        words = [word if chance.random() < 0.7 else chance.choice(_WORDS) for word in reference.split()]
        other = [" ".join(words), "", words[0], reference, " ".join(words * 3), "xyz"]
        outputs.append(chance.choices(other, [8, 1, 1, 1, 1, 1])[0])
    return outputs, references


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("number", [1, 3, 40])
def test_chrf_and_bleu_are_sacrebleu_s_corpus_scores(number, seed):
    outputs, references = corpus(number, seed)
    pairs = list(zip(outputs, references, strict=True))
    chrf = METRICS["chrf++"].combine(np.array([chrf_statistics(*pair) for pair in pairs]).sum(0))
    assert chrf == CHRF(word_order=2).corpus_score(outputs, [references]).score
    bleu = METRICS["bleu"].combine(np.array([bleu_statistics(*pair) for pair in pairs]).sum(0))
    assert bleu == pytest.approx(BLEU().corpus_score(outputs, [references]).score, rel=1e-13)


@pytest.mark.parametrize(
    ("output", "reference"),
    [
        ("", "habari za asubuhi"),
        ("   ", "habari"),
        ("habari", "habari"),
        ("xyz", "habari za asubuhi"),
        ("a b c d", "a x c y"),  # no match of orders 2 to 4
        ("habari za", "habari za asubuhi rafiki yangu"),  # no 4-gram in the output
        ("The cat sat on the mat.", "The cat sat on the mat."),
        ("東京 タワー", "東京"),
    ],
)
def test_chrf_and_bleu_of_one_hard_sentence(output, reference):
    chrf = METRICS["chrf++"].combine(np.array(chrf_statistics(output, reference)))
    assert chrf == CHRF(word_order=2).corpus_score([output], [[reference]]).score
    bleu = METRICS["bleu"].combine(np.array(bleu_statistics(output, reference)))
    assert bleu == pytest.approx(BLEU().corpus_score([output], [[reference]]).score, rel=1e-13, abs=0)


def test_signatures_are_those_that_sacrebleu_prints():
    outputs, references = corpus(5, 0)
    for name, scorer in (("chrf++", CHRF(word_order=2)), ("bleu", BLEU())):
        scorer.corpus_score(outputs, [references])
        assert METRICS[name].signature == str(scorer.get_signature())
    assert "nw:2" in METRICS["chrf++"].signature and "smooth:exp" in METRICS["bleu"].signature


@pytest.mark.parametrize("name", list(METRICS))
def test_combine_runs_over_leading_axes(name):
    metric = METRICS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    statistics = rng.integers(1, 50, (4, 3, metric.size)).astype(float)
    for part in (metric.combine, metric.chance or metric.combine):
        values = part(statistics)
        assert values.shape == (4, 3) and values.dtype == np.float64 and np.isfinite(values).all()
        for i in np.ndindex(4, 3):
            assert values[i] == part(statistics[i])
    assert (metric.signature is not None) == (name in ("chrf++", "bleu"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(METRICS))
def test_nothing_measured_is_no_value(name):
    value = METRICS[name].combine(np.zeros((2, METRICS[name].size)))
    assert (value == 0).all() if METRICS[name].signature else np.isnan(value).all()


def test_values_by_hand():
    def value(name: str, *rows: tuple[float, ...]) -> float:
        return float(METRICS[name].combine(np.array(rows).sum(0)))

    assert value("accuracy", (1, 1, 0.5), (0, 1, 0.5), (1, 1, 0.25)) == pytest.approx(2 / 3)
    assert METRICS["accuracy"].chance(np.array([3, 4, 1.5])) == 0.375
    assert value("margin", (2.0, 1), (-1.0, 1)) == 0.5
    assert value("log_likelihood", (-6.0, 2), (-3.0, 4)) == -1.5
    # Bytes weigh, not documents: 8 bits over 4 bytes and 2 bits over 6.
    assert value("bits_per_byte", (8 * math.log(2), 4), (2 * math.log(2), 6)) == pytest.approx(1.0)
    assert value("empty", (1, 1), (0, 1)) == value("cut", (1, 1), (0, 1)) == value("language", (1, 1), (0, 1)) == 0.5
    assert [name for name in METRICS if METRICS[name].chance] == ["accuracy", "accuracy_per_byte"]
    lower = ["bits_per_byte", "empty", "repeated", "cut"]
    assert [name for name in METRICS if not METRICS[name].higher_is_better] == lower


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("mtoto anasoma kitabu shuleni", False),
        ("mtoto anasoma kitabu, mtoto anasoma kitabu", False),  # twice
        ("leo mtoto anasoma mtoto anasoma mtoto anasoma", True),
        ("mtoto anasoma mtoto anasoma mtoto anasoma mto", True),  # cut in the middle
        ("mtoto anasoma mtoto anasoma mtoto anasoma na mama", False),  # got out of it
        ("sana sana sana", True),
        ("sana sana", False),
        ("Hatimaye...", False),
        ("!!!!!!!!!", True),
        ("東京の東京の東京の", True),
        ("line\nline\nline\n", True),
    ],
)
def test_a_loop_is_a_phrase_three_times_at_the_end(text, loops):
    assert ends_in_loop(text) == loops


def test_languages_are_identified_and_nothing_is_no_language():
    assert identify("Watoto wanasoma vitabu shuleni kila siku asubuhi.") == "sw"
    assert identify("The children read books at school every morning.") == "en"
    assert identify("Saya kosongkan kantong saya karena mau mencari uang.") == "id"
    assert identify("  ") == identify("") == "zxx"
    known = known_languages()
    assert {"sw", "id", "jv", "en"} <= set(known) and not {"su", "zxx"} & set(known)


def test_the_statistics_of_each_metric_are_named_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text("utf-8")
    for name in METRICS:
        metric = METRICS[name]
        assert len(metric.names) == metric.size
        assert f"| `{name}` | {'; '.join(metric.names)} |\n" in text
    for column in SCHEMA.names:
        assert f"`{column}`" in text
