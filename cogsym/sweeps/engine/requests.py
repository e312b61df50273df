"""What a task asks of a configuration of the model, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """How likely is this continuation?

    Attributes:
        tokens: ids, the separator or bos first where the model wants one.
        first: the first token that is scored, >= 1; the tokens before it are given.
    """

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Generate:
    """How does this go on?

    Attributes:
        tokens: ids of the prompt, the separator or bos first where the model wants one.
        max_new_tokens: after so many it is cut.
        stops: the text ends before the first of these.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """The answer to a `Score`.

    Attributes:
        log_likelihood: natural logarithm of the continuation's probability, the sum over its tokens.
        greedy: each of its tokens is the model's first choice.
        num_tokens: how many tokens were scored.
    """

    log_likelihood: float
    greedy: bool
    num_tokens: int


@dataclass(frozen=True)
class Generated:
    """The answer to a `Generate`.

    Attributes:
        text: what the model wrote, without the stop.
        num_tokens: how many tokens that took, the stop's among them.
        ended: by a "stop", or cut at the "length".
    """

    text: str
    num_tokens: int
    ended: Literal["stop", "length"]


Request = Score | Generate
Outcome = Scored | Generated


@dataclass(frozen=True)
class TaskDocument:
    """A unit of a task: what is measured together, committed together and resampled together.

    Attributes:
        key: its name within the task; results are looked up by it.
        requests: what is asked; options of one question share their first tokens, which run once.
    """

    key: str
    requests: tuple[Request, ...]
