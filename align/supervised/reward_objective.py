"""The reward stage's objective on batches of judged responses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.datasets import Case
from align.supervised.trainer import Objective
from policies.batching import collate, collate_branches
from policies.module_names import linears
from policies.trunk import Trunk
from rewards.model import RewardModel
from rewards.objective import FeedbackLoss
from rewards.preferences import Feedback


class FeedbackObjective(Objective):
    """The mean loss of a whole batch of feedback, in nats a row."""

    def __init__(self, model: RewardModel, loss: FeedbackLoss, smoothing: float, centering: float) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.smoothing, self.centering = smoothing, centering

    def forward(
        self,
        ids: Tensor,
        last: Tensor,
        labels: Tensor,
        feedback: Sequence[Feedback],
        num_items_in_batch: Tensor,
        **places: Tensor,
    ) -> dict[str, Tensor]:
        """ids, last, places: of a `Batch`, or of `Branches`. labels: `[rows]`, counted and otherwise of no use."""
        score = self.model.scores_of_rows if "rows" in places else self.model.scores_of_branches
        scores = score(ids=ids, last=last, **places)
        loss = self.loss(scores, feedback, self.smoothing).sum()
        if self.centering:
            counts = [len(each.responses) for each in feedback]
            means = torch.stack([own.mean() for own in self.loss.score(scores, "").split(counts)])
            loss = loss + self.centering * means.square().sum()
        return {"loss": loss / num_items_in_batch}

    @torch.no_grad()
    def heldout_loss(self, cases: Sequence[Case], tokens: int) -> float:
        """The mean loss of held-out rows, in nats, without smoothing and centering."""
        scores = score_cases(self.model, cases, tokens).to(self.model.trunk.causal.device)
        return float(self.loss(scores, [case.feedback for case in cases]).mean())


def score_cases(model: RewardModel, cases: Sequence[Case], tokens: int) -> Tensor:
    """Scores by attribute `[N, A]` of all responses, row after row; each with its prompt, as PPO will score it."""
    return model.attribute_scores(*flat(cases), tokens)


def flat(cases: Sequence[Case]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and tokens of every response, row after row."""
    prompts = [case.prompt_ids for case in cases for _ in case.responses_ids]
    return prompts, [ids for case in cases for ids in case.responses_ids]


def shares_prompts(trunk: Trunk, role: str, cases: Sequence[Case]) -> bool:
    """Whether the responses to a prompt go behind it in one row: where the model allows it, and it is less arithmetic.

    It saves the prompt's linear layers for all responses but one, and costs, in attention, the products of responses
    with each other.
    """
    linear = sum(layer.weight.numel() for layer in linears(trunk.causal).values())
    attention = 2 * trunk.width * trunk.causal.config.get_text_config().num_hidden_layers
    saved = 0
    for case in cases:
        prompt, apart = len(case.prompt_ids), [len(case.prompt_ids) + len(ids) for ids in case.responses_ids]
        together = sum(apart) - (len(apart) - 1) * prompt
        saved += (len(apart) - 1) * prompt * linear + (sum(n * n for n in apart) - together**2) * attention
    return saved > 0 and trunk.branches_agree(role)


def branches(cases: list[Case]) -> dict[str, Any]:
    """A batch in which each prompt is computed once."""
    batch = collate_branches([case.prompt_ids for case in cases], [case.responses_ids for case in cases])
    rows = {"ids": batch.ids, "last": batch.last, "positions": batch.positions, "seen": batch.seen}
    return rows | _verdicts(cases)


def rows(cases: list[Case]) -> dict[str, Any]:
    """A batch of one row for each response."""
    batch = collate(*flat(cases))
    return {"ids": batch.ids, "rows": batch.rows, "last": batch.last} | _verdicts(cases)


def _verdicts(cases: list[Case]) -> dict[str, Any]:
    return {"labels": torch.ones(len(cases)), "feedback": [case.feedback for case in cases]}
