"""What families of models do to the logits of their LM head: they are scaled, and softly capped."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""The names of the soft cap in configs: of Gemma and nanochat, of RecurrentGemma, and of xLSTM."""


@dataclass(frozen=True)
class Factor:
    """A factor of the logits in the config of some families.

    Attributes:
        families: The beginning of their `model_type`.
        key: Its name in the config.
        divides: Whether the logits are divided by it, instead of multiplied.
    """

    families: str
    key: str
    divides: bool = False


FACTORS = (
    Factor("cohere", "logit_scale"),
    Factor("granite", "logits_scaling", divides=True),
    Factor("hyperclovax", "logits_scaling"),
    Factor("falcon_h1", "lm_head_multiplier"),
    Factor("minicpm3", "logits_scaling", divides=True),
)


class LogitTransform:
    """The operations between the LM head and the logits, in the order and the dtype in which transformers has them."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Read them from the config of a model."""
        text: Any = config.get_text_config()
        self._cap = next((cap for key in SOFT_CAPS if (cap := getattr(text, key, None)) is not None), None)
        self._factor: float | None = None
        self._divides = False
        for factor in FACTORS:
            if text.model_type.startswith(factor.families):
                self._factor = getattr(text, factor.key, None)
                self._divides = factor.divides

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits `[..., V]` of the outputs `[..., V]` of the LM head, in their dtype."""
        if self._factor is not None:
            logits = logits / self._factor if self._divides else logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap
