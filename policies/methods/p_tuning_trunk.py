"""The trunk of p-tuning: a soft prompt that an encoder makes while a supervised stage trains it."""

from collections.abc import Mapping

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.files.adapters import PROMPT
from policies.methods.soft_prompt_trunk import SoftPromptTrunk, prompt_config
from policies.schema import PolicySettings


class PTuningTrunk(SoftPromptTrunk):
    """A trunk with virtual tokens, and an encoder that makes them for roles that are trained from scratch."""

    def _build(self, base: PreTrainedModel) -> None:
        super()._build(base)
        self.encoders = nn.ModuleDict()

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """What is trained of a role: the encoder that makes its virtual tokens, or the tokens themselves."""
        if role in self.encoders:
            return dict(self.encoders[role].named_parameters())
        return super().adapter(role)

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's virtual tokens, and discard its encoder, which would make different ones."""
        if role in self.encoders:
            del self.encoders[role]
        super().write_adapter(role, weights)

    def start_training(self, role: str) -> None:
        """Create an encoder that makes the role's virtual tokens from now on."""
        config = PromptEncoderConfig(
            num_virtual_tokens=self.virtual_token_count,
            token_dim=self.width,
            num_transformer_submodules=1,
            encoder_reparameterization_type=self.settings.encoder.upper(),
            encoder_hidden_size=self.settings.encoder_width,
        )
        encoder = PromptEncoder(config).to(self.causal.device)
        encoder.embedding.weight.data.copy_(self.tokens[role])
        self.encoders[role] = encoder

    def encoder(self, role: str) -> nn.Module | None:
        return dict(self.encoders.items()).get(role)

    def _virtual_tokens(self, role: str) -> Tensor:
        if role in self.encoders:
            return self.encoders[role](torch.arange(self.virtual_token_count, device=self.causal.device))
        return super()._virtual_tokens(role)


def saved_p_tuning_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> PromptEncoderConfig:
    """PEFT's description of saved virtual tokens; the encoder is not saved."""
    return prompt_config(PromptEncoderConfig, base, weights[PROMPT])
