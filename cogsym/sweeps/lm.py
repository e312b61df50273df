"""One configuration of a sweep as a model of lm-evaluation-harness, which gives its answers again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM as HarnessLM  # noqa: N811

from cogsym.errors import CogsymError
from cogsym.sweeps.results.harness import answers_of
from cogsym.sweeps.tasks.harness_requests import fingerprint


class LM(HarnessLM):
    """For the harness's `simple_evaluate`, with its standard errors, samples and loggers, and no model in memory:

        simple_evaluate(LM("sweep-out", "ss........"), tasks=["xcopa_sw"], limit=100)

    Its requests have to be among those of the sweep: the same tasks with the same examples before their questions.
    """

    def __init__(self, out: str | Path, configuration: str) -> None:
        """Read the answers.

        Args:
            out: folder of a sweep with tasks of the harness.
            configuration: its code, a letter a layer, as in results.

        Raises:
            CogsymError: it has no answers of that configuration.
        """
        super().__init__()
        self._name, self._answers = f"the configuration {configuration} in {out}", answers_of(out, configuration)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-probability, whether each token is the likeliest) of each continuation."""
        return [tuple(self._answer(request)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each text."""
        return [self._answer(request) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What each prompt was gone on with."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Instance) -> Any:
        name = fingerprint(request)
        if name not in self._answers:
            raise CogsymError(
                f"The harness asks {self._name} for what the sweep did not ask, {request.args[0][-60:]!r}; give it the "
                "tasks, limit and num_fewshot of the sweep."
            )
        return self._answers[name]
