"""The reward stage's objective on batches of judged responses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.datasets import TokenizedPreference
from align.supervised.trainer import Objective
from policies.batching import collate, collate_shared_prompts
from policies.module_names import linears
from policies.trunk import Trunk
from rewards.model import RewardModel
from rewards.objective import PreferenceLoss
from rewards.preferences import PreferenceExample


class RewardObjective(Objective):
    """The mean loss of a whole batch of feedback, in nats a row."""

    def __init__(self, model: RewardModel, loss: PreferenceLoss, smoothing: float, centering: float) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.smoothing, self.centering = smoothing, centering

    def forward(
        self,
        ids: Tensor,
        last: Tensor,
        labels: Tensor,
        feedback: Sequence[PreferenceExample],
        num_items_in_batch: Tensor,
        **places: Tensor,
    ) -> dict[str, Tensor]:
        """ids, last, places: of a `Batch`, or of `SharedPromptBatch`. labels: `[rows]`, counted and otherwise of no use."""
        score = self.model.scores_packed if "rows" in places else self.model.scores_shared_prompts
        scores = score(ids=ids, last=last, **places)
        loss = self.loss(scores, feedback, self.smoothing).sum()
        if self.centering:
            counts = [len(each.responses) for each in feedback]
            means = torch.stack([own.mean() for own in self.loss.score(scores, "").split(counts)])
            loss = loss + self.centering * means.square().sum()
        return {"loss": loss / num_items_in_batch}

    @torch.no_grad()
    def heldout_loss(self, preferences: Sequence[TokenizedPreference], tokens: int) -> float:
        """The mean loss of held-out rows, in nats, without smoothing and centering."""
        scores = score_preferences(self.model, preferences, tokens).to(self.model.trunk.causal.device)
        return float(self.loss(scores, [preference.example for preference in preferences]).mean())


def score_preferences(model: RewardModel, preferences: Sequence[TokenizedPreference], tokens: int) -> Tensor:
    """Scores by attribute `[N, A]` of all responses, row after row; each with its prompt, as PPO will score it."""
    return model.attribute_scores(*flat(preferences), tokens)


def flat(preferences: Sequence[TokenizedPreference]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and tokens of every response, row after row."""
    prompts = [preference.prompt_ids for preference in preferences for _ in preference.responses_ids]
    return prompts, [ids for preference in preferences for ids in preference.responses_ids]


def shares_prompts(trunk: Trunk, role: str, preferences: Sequence[TokenizedPreference]) -> bool:
    """Whether the responses to a prompt go behind it in one row: where the model allows it, and it is less arithmetic.

    It saves the prompt's linear layers for all responses but one, and costs, in attention, the products of responses
    with each other.
    """
    linear = sum(layer.weight.numel() for layer in linears(trunk.causal).values())
    attention = 2 * trunk.width * trunk.causal.config.get_text_config().num_hidden_layers
    saved = 0
    for preference in preferences:
        prompt, apart = (
            len(preference.prompt_ids),
            [len(preference.prompt_ids) + len(ids) for ids in preference.responses_ids],
        )
        together = sum(apart) - (len(apart) - 1) * prompt
        saved += (len(apart) - 1) * prompt * linear + (sum(n * n for n in apart) - together**2) * attention
    return saved > 0 and trunk.supports_shared_prompts(role)


def branches(preferences: list[TokenizedPreference]) -> dict[str, Any]:
    """A batch in which each prompt is computed once."""
    batch = collate_shared_prompts(
        [preference.prompt_ids for preference in preferences], [preference.responses_ids for preference in preferences]
    )
    rows = {"ids": batch.ids, "last": batch.last, "positions": batch.positions, "seen": batch.seen}
    return rows | _verdicts(preferences)


def rows(preferences: list[TokenizedPreference]) -> dict[str, Any]:
    """A batch of one row for each response."""
    batch = collate(*flat(preferences))
    return {"ids": batch.ids, "rows": batch.lengths, "last": batch.last} | _verdicts(preferences)


def _verdicts(preferences: list[TokenizedPreference]) -> dict[str, Any]:
    return {"labels": torch.ones(len(preferences)), "feedback": [preference.example for preference in preferences]}
