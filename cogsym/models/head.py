"""The loss of a causal language model straight from its last hidden states, the logits never made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from cogsym import ops
from cogsym.errors import NoLogitsError
from cogsym.models.attachment import foreign_forward
from cogsym.models.families import logits_of
from cogsym.models.hooks import hook_on

IGNORED = -100  # the label that transformers' losses leave out
_OWN_WORDS = ("shift_labels", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits")


@dataclass
class CausalLMLoss(ModelOutput):
    """What a model returns where only its loss is wanted: the fields of transformers' outputs but the logits.

    Attributes:
        loss: a scalar.
        past_key_values: the cache, where one was asked for.
        hidden_states: those of each layer, where they were asked for.
        attentions: of each layer, where the model's configuration asks for them.
        aux_loss: of a mixture of experts; never there, as a loss that depends on it is the model's own.
        router_logits: likewise.
    """

    loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        """Say why there are no logits.

        Raises:
            NoLogitsError: they are asked for.
            AttributeError: something else is that there is not.
        """
        if name == "logits":
            raise NoLogitsError(
                "A training step of a prepared model with labels gives the loss without logits, which are never made, "
                "and code read the logits; prepare the model with logits=True, and each step has them."
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a causal language model from transformers.

    Attributes:
        model: the model with `model` and `lm_head`.
        scale: factor of the logits.
        soft_cap: their bound, or None.
    """

    model: Any
    scale: float
    soft_cap: float | None

    def why_logits(self) -> str | None:
        """Why the logits must be made by the model's own head, or None."""
        head = self.model.lm_head
        if type(head) is not nn.Linear:
            return f"its head is a {type(head).__qualname__}, expected a Linear"
        if head.bias is not None:
            return "its head has a bias"
        if foreign_forward(head):
            return "another library has replaced the forward of its head"
        if getattr(self.model.config, "output_router_logits", False):
            return "its loss depends on what its routers say"
        if head.weight.is_meta:
            return "the weights of its head are not in memory"
        return "a hook on its head must fire" if hook_on(head) else None

    def serves(self, labels: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call with these keywords may go without logits: training, on labels, with nothing unusual."""
        plain = self.model.training and labels is not None and not any(kwargs.get(word) for word in _OWN_WORDS)
        plain = plain and kwargs.get("return_dict", getattr(self.model.config, "return_dict", True)) is not False
        return bool(plain and self.why_logits() is None)

    def forward(self, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> ModelOutput:
        """The model's output with its loss and no logits.

        Args:
            labels: [B, T], each the token at its own place; -100 counts for nothing.
            num_items_in_batch: what the sum of the losses is divided by; None is the number of labels.
            kwargs: for the decoder.
        """
        outputs = self.model.model(**kwargs)
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        loss = ops.linear_cross_entropy(
            outputs.last_hidden_state,
            self.model.lm_head.weight,
            targets.to(outputs.last_hidden_state.device),
            ignore_index=IGNORED,
            soft_cap=self.soft_cap,
            scale=self.scale,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return CausalLMLoss(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def find_head(model: nn.Module) -> Head | None:
    """The causal language model that is `model`, or that peft has wrapped in it; None where it is not a known one."""
    for module in model.modules():
        if isinstance(getattr(module, "lm_head", None), nn.Module) and (logits := logits_of(module)):
            return Head(module, *logits)
    return None
