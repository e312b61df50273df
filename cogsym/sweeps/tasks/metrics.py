"""What is measured, and how documents make up one value.

A metric of a set of documents is a function of the sum of their statistics. So bits per byte weigh each document by its
bytes, chrF++ and BLEU are the corpus scores that sacrebleu gives, and a bootstrap only adds rows of numbers up anew.

Another package adds a metric for its kinds of tasks with `register_metric`, or with an entry point of the group
"cogsym.metrics" (see `cogsym.registry`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from cogsym.registry import Registry

Statistics = tuple[float, ...]
_Combine = Callable[[np.ndarray], np.ndarray]

_LOOP = 3  # times that a phrase stands at the end of a text that is stuck in it
_CACHED = 1 << 14  # references whose n-grams are kept


@dataclass(frozen=True)
class Metric:
    """How the statistics of documents become one value.

    Attributes:
        label: for an axis, with the unit.
        higher_is_better: whether it is.
        size: statistics a document, S.
        combine: sums of statistics [..., S] to values [...], float64; NaN where nothing was measured. Of a single
            document's statistics it is that document's value.
        chance: sums of statistics [..., S] to what guessing gives [...]; None where guessing has no value.
        signature: sacrebleu's, to be quoted with the value; None for the others.
        of_text: it judges what the model writes, not what it finds likely.
        names: of a document's statistics, in their order; docs/sweeps.md lists them.
    """

    label: str
    higher_is_better: bool
    size: int
    combine: _Combine
    chance: _Combine | None = None
    signature: str | None = None
    of_text: bool = False
    names: tuple[str, ...] = ()


def chrf_statistics(output: str, reference: str) -> Statistics:
    """[24]: n-grams of the output, of the reference, and matches, for characters of order 1 to 6 and words 1 to 2."""
    return tuple(map(float, _CHRF._compute_segment_statistics(output, _chrf_reference(reference))))


def bleu_statistics(output: str, reference: str) -> Statistics:
    """[10]: tokens of the output and of the reference, matching n-grams and n-grams of the output for order 1 to 4."""
    prepared = _BLEU._preprocess_segment(output)
    return tuple(map(float, _BLEU._compute_segment_statistics(prepared, _bleu_reference(reference))))


@lru_cache(_CACHED)
def _chrf_reference(reference: str) -> dict[str, Any]:
    return _CHRF._extract_reference_info([_CHRF._preprocess_segment(reference)])


@lru_cache(_CACHED)
def _bleu_reference(reference: str) -> dict[str, Any]:
    return _BLEU._extract_reference_info([_BLEU._preprocess_segment(reference)])


def known_languages() -> list[str]:
    """The languages that `identify` can name: ISO 639 codes, of two letters where there is one."""
    return sorted(set(_identifier().labels) - {"zxx"})


def identify(text: str) -> str:
    """The language that a text is most likely in, by py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012).

    "zxx" is no language: numbers, markup, nothing at all. Near relatives are told apart less well: of Indonesian news
    sentences one in ten is taken for Malay. So read a share beside the share that the references reach.
    """
    return _identifier().classify(text)[0] if text.strip() else "zxx"


def in_language(text: str, language: str) -> bool:
    """Whether a text is in a language; one that is stuck in a loop is in none, whatever its phrase is taken for."""
    return identify(text) == language and not ends_in_loop(text)


@lru_cache(1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # a second to load, which many tasks do not need

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def ends_in_loop(text: str) -> bool:
    """Whether a text ends in one phrase of at least two characters, three times or more in a row.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", look for a phrase repeated at the end too.
    That it is three times, and counted in characters, so that tokenizers and scripts compare, is our choice. A last
    repetition cut short is no obstacle: the phrase is then another, shifted one. Of 28,000 Swahili news sentences 3 end
    so.
    """
    text = " " + " ".join(text.split())  # "sana sana sana" is three times " sana"
    return any(text[-(_LOOP - 1) * size :] == text[-_LOOP * size : -size] for size in range(2, len(text) // _LOOP + 1))


def ratio(statistics: np.ndarray) -> np.ndarray:
    """The first sum over the second, such as correct answers over questions."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(statistics[..., 0], statistics[..., 1], dtype=np.float64)


def _guessing(statistics: np.ndarray) -> np.ndarray:
    """The sum of 1 / options over questions."""
    return ratio(statistics[..., [2, 1]])


def _bits_per_byte(statistics: np.ndarray) -> np.ndarray:
    return ratio(statistics) / math.log(2)


def _chrf(statistics: np.ndarray) -> np.ndarray:
    """sacrebleu's `CHRF._compute_f_score` over leading axes, 0 to 100."""
    sums = np.asarray(statistics, np.float64)
    outputs, references, matches = (sums[..., i::3] for i in range(3))
    counted = (outputs > 0) & (references > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = _sum(matches / np.where(counted, outputs, np.inf)) / orders
    recall = _sum(matches / np.where(counted, references, np.inf)) / orders
    factor = _CHRF.beta**2
    denominator = factor * precision + recall
    return 100 * ((1 + factor) * precision * recall / np.where(denominator > 0, denominator, np.inf))


def _sum(values: np.ndarray) -> np.ndarray:
    """Over the last axis in order, as sacrebleu does, so that the last bit is the same."""
    return np.add.accumulate(values, -1)[..., -1]


def _bleu(statistics: np.ndarray) -> np.ndarray:
    """sacrebleu's `BLEU.compute_bleu`, smoothed as in mteval-v13a ("exp"), over leading axes, 0 to 100."""
    sums = np.asarray(statistics, np.float64)
    output, reference, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    # The first order without a match counts 1/2 of one, the second 1/4, and so on.
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.log(100 * smoothed / totals).sum(-1) / totals.shape[-1]
        brevity = np.minimum(0.0, 1 - reference / output)
        score = np.exp(brevity + mean)
    # Without any match, and without an n-gram of every order, there is no score.
    return np.where((totals > 0).all(-1) & (matches > 0).any(-1), score, 0.0)


def _signature(scorer: Any) -> str:
    scorer.corpus_score(["-"], [["-"]])  # a signature tells the number of references, known after the first score
    return str(scorer.get_signature())


_CHRF = CHRF(word_order=2)
_BLEU = BLEU()

METRICS = Registry[Metric]("metric", "cogsym.metrics")


def register_metric(name: str, metric: Metric) -> None:
    """Make a metric known under its name in results and in the settings of tasks.

    Raises:
        CogsymError: the name is another metric's.
    """
    METRICS.register(name, metric)


_CHOSEN = ("1 where the right option is the likeliest", "1", "1 / options")
_SHARE = ("1 where it is so", "1")
_CHRF_NAMES = tuple(
    f"{order}-grams of {unit} {whose}"
    for unit, orders in (("characters", _CHRF.char_order), ("words", _CHRF.word_order))
    for order in range(1, orders + 1)
    for whose in ("of the output", "of the reference", "that match")
)
_BLEU_NAMES = (
    "tokens of the output",
    "tokens of the reference",
    *(f"matching {order}-grams" for order in range(1, 5)),
    *(f"{order}-grams of the output" for order in range(1, 5)),
)
_LONG = "accuracy by log-probability per byte"
register_metric("accuracy", Metric("accuracy", True, 3, ratio, chance=_guessing, names=_CHOSEN))
register_metric("accuracy_per_byte", Metric(_LONG, True, 3, ratio, chance=_guessing, names=_CHOSEN))
_MARGIN = ("log p of the right option - log p of the best wrong one", "1")
register_metric("margin", Metric("margin of the right option, nats", True, 2, ratio, names=_MARGIN))
register_metric("log_likelihood", Metric("log-likelihood, nats per token", True, 2, ratio, names=("log p", "tokens")))
register_metric("bits_per_byte", Metric("bits per byte", False, 2, _bits_per_byte, names=("-log p", "bytes")))
register_metric(
    "chrf++", Metric("chrF++", True, 24, _chrf, signature=_signature(_CHRF), of_text=True, names=_CHRF_NAMES)
)
register_metric("bleu", Metric("BLEU", True, 10, _bleu, signature=_signature(_BLEU), of_text=True, names=_BLEU_NAMES))
for _name, _label, _better in (
    ("language", "share of outputs in the right language", True),
    ("empty", "share of empty outputs", False),
    ("repeated", "share of outputs that end in a loop", False),
    ("cut", "share of outputs cut at the length limit", False),
):
    register_metric(_name, Metric(_label, _better, 2, ratio, of_text=True, names=_SHARE))
