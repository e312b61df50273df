"""What requests of lm-evaluation-harness ask of a model, token for token as its own HFLM would ask it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window

from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generate, Outcome, Request, Score, Scored

UNBOUNDED = 1 << 30  # tokens of context of a model that names none
# What a harness's request to write may say; the last four change nothing while the likeliest token is taken.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed"}
_MAX_GEN_TOKS = 256  # HFLM's


class Encoder(TemplateLM):
    """Answers requests of the harness with what they ask of the engine, a list of `Score` and `Generate` each.

    Where a context is too long, its beginning is cut off, as HFLM does; `cut` counts these.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        """For a model's tokenizer and the tokens that the model takes; of UNBOUNDED it is the tokenizer that tells."""
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = context_length if context_length < UNBOUNDED else resolve_max_length(None, tokenizer)
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: bos, else eos."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; with what the tokenizer adds, unless the text begins with it or the caller says so."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **more)

    def requests(self, instance: Instance) -> list[Request]:
        """What one request of the harness asks; its texts are not looked at again.

        Raises:
            CogsymError: it cannot be asked.
        """
        (asked,) = getattr(self, instance.request_type)([instance], disable_tqdm=True)
        return asked

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> Any:
        return [[self._score([*context], [*continuation])] for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> Any:
        """Windows of a text, in which each token is scored once; see `LM.loglikelihood_rolling` of the harness."""
        return [
            [
                self._score(*make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(instance.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for instance in requests
        ]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> Any:
        """The prompt of each, its beginning cut off where there would be no room for the answer."""
        return [[self._generate(*instance.args)] for instance in requests]

    def _score(self, context: list[int], continuation: list[int]) -> Score:
        if not 0 < len(continuation) <= self.max_length:
            raise CogsymError(
                f"A continuation that the harness asks for has {len(continuation)} tokens, expected 1 to the "
                f"{self.max_length} of the context; leave its document out, for example with limit=."
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]  # the last one is not read
        self.cut += len(tokens) < len(context) + len(continuation)
        return Score(tuple(tokens), len(tokens) - len(continuation))

    def _generate(self, context: str, settings: dict[str, Any]) -> Generate:
        normal = normalize_gen_kwargs(settings, _MAX_GEN_TOKS)
        if strange := sorted(set(normal) - _KNOWN):
            raise CogsymError(
                f"The harness asks for text with {strange[0]}={normal[strange[0]]!r}, which a sweep does not know; "
                f"leave it out of the task's generation_kwargs, of which {', '.join(sorted(_KNOWN))} are known."
            )
        if normal["do_sample"] and normal.get("temperature", 0.0) > 0:
            raise CogsymError(
                f"The harness asks for text drawn at the temperature {normal['temperature']}, and a sweep takes the "
                "likeliest tokens of its tasks; set do_sample: false in the task's generation_kwargs."
            )
        room = self.max_length - normal["max_gen_toks"]
        if room <= 0:
            raise CogsymError(
                f"The harness asks for {normal['max_gen_toks']} new tokens and the model's context has "
                f"{self.max_length}; set a smaller max_gen_toks in the task's generation_kwargs."
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(tokens) > room
        return Generate(tuple(tokens[-room:]), normal["max_gen_toks"], tuple(s for s in normal["until"] if s))


def response(instance: Instance, outcomes: Sequence[Outcome]) -> Any:
    """What the harness is to get for a request, as JSON has it: [log p, greedy], log p, or a text."""
    if instance.request_type == "generate_until":
        (written,) = outcomes
        assert not isinstance(written, Scored)
        return written.text
    scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
    if instance.request_type == "loglikelihood_rolling":
        return sum(outcome.log_likelihood for outcome in scored)
    return [scored[0].log_likelihood, scored[0].greedy]


def fingerprint(instance: Instance) -> str:
    """Of a request's sort and texts, by which its response is found again; 16 hexadecimal digits of a SHA-256."""
    asked = json.dumps([instance.request_type, instance.args], default=handle_non_serializable)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]
