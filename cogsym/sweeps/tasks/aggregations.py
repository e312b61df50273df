"""lm-evaluation-harness's aggregations that are functions of sums over documents, as metrics of a sweep are.

The harness keeps what `process_results` says of each document as an item, and its aggregation makes one number of the
list. Where that is a function of a sum, the item has statistics, and intervals can be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric as Scorer

from cogsym.sweeps.tasks.metrics import METRICS, Metric, Statistics, ratio


@dataclass(frozen=True)
class Aggregation:
    """One of them.

    Attributes:
        statistics: of an item, a document's.
        combine: sums of statistics [..., S] to values [...], float64, as in `Metric`.
        names: of a document's statistics, in their order.
    """

    statistics: Callable[[Any], Statistics]
    combine: Callable[[np.ndarray], np.ndarray]
    names: tuple[str, ...]


def _number(item: Any) -> Statistics:
    return float(item), 1.0


def _number_or_nan(item: Any) -> Statistics:
    return (0.0, 0.0) if math.isnan(item) else (float(item), 1.0)


def _pair(item: Any) -> Statistics:
    return float(item[0]), float(item[1])


def _brier(item: Any) -> Statistics:
    right, p = item
    return float(np.sum((np.asarray(p) - np.eye(len(p))[right]) ** 2)), 1.0


def _perplexity(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(-ratio(sums))


def _corpus(scorer: Scorer) -> Callable[[Any], Statistics]:
    """The statistics of (references, output) by a scorer of sacrebleu; either may be a text or a list of them."""

    def statistics(item: Any) -> Statistics:
        references, output = ([side] if isinstance(side, str) else list(side) for side in item)
        (counts,) = scorer._extract_corpus_statistics(output, [[reference] for reference in references])
        return tuple(map(float, counts))

    return statistics


_BLEU, _CHRF, _BITS = METRICS["bleu"], METRICS["chrf++"], METRICS["bits_per_byte"]
AGGREGATIONS: Mapping[str, Aggregation] = {
    "mean": Aggregation(_number, ratio, ("value", "1")),
    "nanmean": Aggregation(_number_or_nan, ratio, ("value", "1")),
    "brier_score": Aggregation(_brier, ratio, ("squared distance", "1")),
    "perplexity": Aggregation(_number, _perplexity, ("log p", "1")),
    "weighted_perplexity": Aggregation(_pair, _perplexity, ("log p", "words or bytes")),
    "bits_per_byte": Aggregation(_pair, lambda sums: -_BITS.combine(sums), ("log p", "bytes")),
    "bleu": Aggregation(_corpus(BLEU()), _BLEU.combine, _BLEU.names),
    "chrf": Aggregation(_corpus(CHRF()), _CHRF.combine, _CHRF.names[:18]),
    "chrf++": Aggregation(_corpus(CHRF(word_order=2)), _CHRF.combine, _CHRF.names),
}


def metric_of(task: Mapping[str, Any], name: str) -> Metric:
    """A metric of a task as a sweep's key describes it.

    Args:
        task: its entry in the key; "metrics" are those of lm-evaluation-harness, name -> [aggregation, whether higher
            is better], and what a document's results name beside them is averaged, as the harness does.
        name: of the metric, in rows.

    Raises:
        CogsymError: it is unknown.
    """
    if "metrics" not in task or name in METRICS:
        return METRICS[name]
    aggregation, higher_is_better = task["metrics"].get(name, ["mean", True])
    known = AGGREGATIONS[aggregation]
    return Metric(name, higher_is_better, len(known.names), known.combine, names=known.names)
