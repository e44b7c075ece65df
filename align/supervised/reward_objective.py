"""The objective of the reward stage: the loss of preference examples."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedPreference
from align.supervised.trainer import Objective
from policies.batching import collate, collate_shared_prompts
from policies.module_names import linears
from policies.trunk import Trunk
from rewards.model import RewardModel
from rewards.objective import PreferenceLoss
from rewards.preferences import OVERALL, PreferenceExample

log = logging.getLogger(__name__)


class RewardObjective(Objective):
    """The mean loss over a batch of preference examples, in nats."""

    def __init__(self, model: RewardModel, loss: PreferenceLoss, label_smoothing: float, centering: float) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.centering = centering

    def forward(
        self,
        examples: Sequence[PreferenceExample],
        ids: Tensor,
        last: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        **layout: Any,
    ) -> dict[str, Tensor]:
        """Compute this microbatch's part of the batch's loss.

        Args:
            examples: `[B]`, the preference examples.
            ids: Token ids, of a `Batch` or a `SharedPromptBatch`.
            last: `[R]` int64, index into `ids` of the last token of each response.
            labels: `[B]`, only counted: the Trainer passes their number in the whole batch as `num_items_in_batch`.
            num_items_in_batch: Number of examples in the whole batch.
            layout: The rest of the batch: `lengths`, or `positions` and `attention_mask`.

        Returns:
            The scalar `loss`.
        """
        scores = self._scores(ids, last, **layout)  # [R, A]
        loss = self.loss(scores, examples, self.label_smoothing).sum()
        if self.centering:
            counts = [len(example.responses) for example in examples]
            scores_by_example = self.loss.score(scores, OVERALL).split(counts)
            means = torch.stack([example_scores.mean() for example_scores in scores_by_example])  # [B]
            loss = loss + self.centering * means.square().sum()
        return {"loss": loss / num_items_in_batch}

    def _scores(
        self,
        ids: Tensor,
        last: Tensor,
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if lengths is not None:
            return self.model.scores_packed(ids, lengths, last)
        assert positions is not None
        assert attention_mask is not None
        return self.model.scores_shared_prompts(ids, positions, attention_mask, last)

    @torch.no_grad()
    def heldout_loss(self, preferences: Sequence[TokenizedPreference], tokens: int) -> float:
        """Mean loss over held-out examples, in nats, without smoothing or centering, in microbatches of `tokens`."""
        scores = score_preferences(self.model, preferences, tokens).to(self.model.trunk.causal.device)
        return float(self.loss(scores, [preference.example for preference in preferences]).mean())


def score_preferences(model: RewardModel, preferences: Sequence[TokenizedPreference], tokens: int) -> Tensor:
    """Score all responses of preference examples, each with its own copy of the prompt, as in PPO.

    Args:
        model: The reward model.
        preferences: The examples.
        tokens: Largest number of tokens per microbatch.

    Returns:
        `[R, A]`, the scores of all R responses by attribute.
    """
    return model.attribute_scores(*flatten_responses(preferences), tokens)


def flatten_responses(preferences: Sequence[TokenizedPreference]) -> tuple[list[list[int]], list[list[int]]]:
    """The prompt of every response, and the responses, in the order of the examples."""
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    for preference in preferences:
        prompts += [preference.prompt_ids] * len(preference.responses_ids)
        responses += preference.responses_ids
    return prompts, responses


def should_share_prompts(trunk: Trunk, role: str, preferences: Sequence[TokenizedPreference]) -> bool:
    """Whether all responses to a prompt should follow one copy of it: the model supports it, and it saves computation.

    It saves the prompt's linear layers for all responses but one. In attention, it costs the products between
    responses, which are computed and then masked.
    """
    linear_cost = sum(layer.weight.numel() for layer in linears(trunk.causal).values())  # per token
    layers = trunk.causal.config.get_text_config().num_hidden_layers
    attention_cost = 2 * trunk.width * layers  # per pair of tokens: queries by keys, and weights by values
    saved = 0
    for preference in preferences:
        prompt = len(preference.prompt_ids)
        separate = [prompt + len(response) for response in preference.responses_ids]
        saved_tokens = (len(separate) - 1) * prompt
        shared = sum(separate) - saved_tokens
        saved_pairs = sum(length * length for length in separate) - shared**2
        saved += saved_tokens * linear_cost + saved_pairs * attention_cost
    if saved <= 0:
        return False
    supported = trunk.supports_shared_prompts(role)
    if not supported:
        log.warning(
            "%s gives other states to responses that share a prompt, in %s: each is computed with a prompt of its own",
            type(trunk.causal).__name__,
            str(trunk.causal.dtype).removeprefix("torch."),
        )
    return supported


def collate_shared(preferences: Sequence[TokenizedPreference]) -> dict[str, Any]:
    """The arguments of `RewardObjective` for a microbatch in which all responses follow one copy of their prompt."""
    prompts = [preference.prompt_ids for preference in preferences]
    responses = [preference.responses_ids for preference in preferences]
    batch = collate_shared_prompts(prompts, responses)
    return {
        "ids": batch.ids,
        "last": batch.last,
        "positions": batch.positions,
        "attention_mask": batch.attention_mask,
        **_examples_and_labels(preferences),
    }


def collate_separate(preferences: Sequence[TokenizedPreference]) -> dict[str, Any]:
    """The arguments of `RewardObjective` for a microbatch with one sequence per response."""
    batch = collate(*flatten_responses(preferences))
    return {"ids": batch.ids, "last": batch.last, "lengths": batch.lengths, **_examples_and_labels(preferences)}


def _examples_and_labels(preferences: Sequence[TokenizedPreference]) -> dict[str, Any]:
    examples = [preference.example for preference in preferences]
    return {"examples": examples, "labels": torch.ones(len(examples))}
