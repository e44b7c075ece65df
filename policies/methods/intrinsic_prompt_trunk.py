"""The trunk of intrinsic prompt tuning: a soft prompt in a linear subspace.

Shapes: d dimensions of the subspace, K tasks of a prompt table, T virtual tokens, H hidden size.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PROMPT
from policies.files.prompt_table import read_table
from policies.methods.soft_prompt_trunk import SoftPromptTrunk
from policies.trunk import Trunk

COORDINATES = "prompt_coordinates"
"""Name in the file of the trained vector. The prompt itself is beside it, under PEFT's name, for PEFT to load."""
PROMPT_ROUNDING = 1e-3
"""Largest difference, relative to the largest number or to 1, of a prompt that is computed again from its vector."""


class IntrinsicPromptTrunk(SoftPromptTrunk):
    """A trunk whose virtual tokens are origin + z · directions, where each role has its own z."""

    origin: Tensor
    directions: Tensor

    def _build(self, base: PreTrainedModel) -> None:
        self.virtual_token_count = self.settings.virtual_tokens
        origin, directions = self._subspace(base)
        self.register_buffer("origin", origin.to(base.device), persistent=False)  # [T, H]
        self.register_buffer("directions", directions.to(base.device), persistent=False)  # [d, T, H]
        start = torch.zeros(self.settings.intrinsic_dimension, device=base.device)  # [d]
        self.coordinates = nn.ParameterDict({role: nn.Parameter(start.clone()) for role in self.roles})

    def _subspace(self, base: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The origin `[T, H]` and the directions `[d, T, H]` of the subspace, the same for all roles."""
        if self.settings.subspace is not None:
            prompts = self._prompts_of_tasks(Path(self.settings.subspace))
            return principal_subspace(prompts, self.settings.intrinsic_dimension)
        generator = torch.Generator(device="cpu").manual_seed(self.settings.projection_seed)
        dimension = self.settings.intrinsic_dimension
        shape = (dimension, self.virtual_token_count, self.width)
        directions = torch.randn(shape, generator=generator, device="cpu") / dimension**0.5
        return self._initial_tokens(base), directions

    def _real_tokens(self, base: PreTrainedModel) -> Tensor:
        """As in prompt tuning; random ones depend on `policy.projection_seed`, since they are not saved."""
        if self.settings.init_text is not None:
            return super()._real_tokens(base)
        generator = torch.Generator(device="cpu").manual_seed(self.settings.projection_seed)
        size = (self.virtual_token_count,)
        return torch.randint(base.config.vocab_size, size, generator=generator, device="cpu").to(base.device)

    def _prompts_of_tasks(self, table: Path) -> Tensor:
        """The prompts `[K, T, H]` of a prompt table. Raises UserError where they do not span the subspace."""
        prompts = read_table(table)
        shape = (self.virtual_token_count, self.width)
        for task, prompt in prompts.items():
            if prompt.shape != shape:
                raise UserError(
                    f"policy.subspace {table}: the prompt of task {task!r} is {list(prompt.shape)}, but "
                    f"policy.virtual_tokens and the hidden size are {list(shape)}"
                )
        if len(prompts) <= self.settings.intrinsic_dimension:
            raise UserError(
                f"policy.subspace {table}: {len(prompts)} tasks differ in {len(prompts) - 1} dimensions at most: set "
                "policy.intrinsic_dimension to that or less"
            )
        return torch.stack(list(prompts.values()))

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return {COORDINATES: self.coordinates[role]}

    def read_adapter(self, role: str) -> dict[str, Tensor]:
        """A copy of a role's vector, and the virtual tokens that it gives."""
        tokens = self._virtual_tokens(role).detach().clone()
        return {PROMPT: tokens, COORDINATES: self.coordinates[role].detach().clone()}

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's vector.

        Raises:
            UserError: The adapter is not of this method, or its virtual tokens are not what its vector gives here.
        """
        others = {name: tensor for name, tensor in weights.items() if name != PROMPT}
        Trunk.write_adapter(self, role, others)
        if PROMPT not in weights:
            return
        expected = weights[PROMPT].to(self.origin)
        difference = (self._virtual_tokens(role).detach() - expected).abs().max()
        if not difference <= PROMPT_ROUNDING * max(1.0, float(expected.abs().max())):
            raise UserError(
                "the adapter's prompt is not in this subspace: set policy.subspace, policy.projection_seed and "
                "policy.init_text as they were in its training"
            )

    def _virtual_tokens(self, role: str) -> Tensor:
        return self.origin + torch.einsum("d,dth->th", self.coordinates[role], self.directions)  # [T, H]


def principal_subspace(prompts: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """The linear auto-encoder that reconstructs prompts best: their mean and their principal components.

    Args:
        prompts: `[K, T, H]`.
        dimension: d, below K.

    Returns:
        The mean `[T, H]`; and the components `[d, T, H]`, each as long as the standard deviation of the prompts along
        it, with their largest number positive.
    """
    flat = prompts.double().flatten(1)  # [K, T · H]
    mean = flat.mean(0)
    _, values, components = torch.linalg.svd(flat - mean, full_matrices=False)  # [K], [K, T · H]
    directions = components[:dimension] * values[:dimension].unsqueeze(1) / len(flat) ** 0.5  # [d, T · H]
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    shape = prompts.shape[1:]
    return mean.view(shape).float(), directions.view(-1, *shape).float()
