"""Stage two: a reward model from pairwise preferences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.fit import StageContext, fit
from align.sft import refuse_long
from policies.batching import collate
from policies.encoding import encode_prompt, encode_response
from rewards.losses import bradley_terry_loss, pair_accuracy
from rewards.model import ROLE, RewardModel
from rewards.preferences import parse_pair
from rewards.schema import RewardSettings


@dataclass(frozen=True)
class Comparison:
    """A pair in tokens. preference: the probability that the label is right (½ for a tie)."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float
    preference: float


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out pairs in the right order, ties left out, with its 95 % interval (Wilson 1927)."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    pairs: int


def comparison_parser(
    tokenizer: PreTrainedTokenizerBase, settings: RewardSettings
) -> Callable[[Mapping[str, Any]], Comparison]:
    """From a row to a comparison; the parser raises ValueError with the reason for people."""

    def parse(values: Mapping[str, Any]) -> Comparison:
        pair = parse_pair(values)
        comparison = Comparison(
            prompt_ids=encode_prompt(tokenizer, pair.prompt),
            chosen_ids=encode_response(tokenizer, pair.chosen),
            rejected_ids=encode_response(tokenizer, pair.rejected),
            margin=pair.margin,
            preference=0.5 if pair.tie else 1.0 - settings.label_smoothing,
        )
        longest = max(len(comparison.chosen_ids), len(comparison.rejected_ids))
        refuse_long(len(comparison.prompt_ids) + longest, settings.max_tokens, "reward.max_tokens")
        return comparison

    return parse


class PairLoss(nn.Module):
    """The mean Bradley-Terry loss of a whole batch of pairs, in nats."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, last: Tensor, margin: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> dict[str, Tensor]:
        """ids: chosen rows, then rejected rows. margin, labels: `[N]`; labels are the preferences."""
        chosen, rejected = self.model.scores_at(ids, last).chunk(2)
        return {"loss": bradley_terry_loss(chosen, rejected, margin, labels).sum() / num_items_in_batch}


def train_reward(
    model: RewardModel, train: Sequence[Comparison], settings: RewardSettings, context: StageContext
) -> int:
    """Train adapter and head of the reward model. Returns the number of optimizer steps."""
    model.trunk.train_only(ROLE)
    model.head.requires_grad_(True)
    steps = fit(PairLoss(model), train, _tensors, settings, context, metrics="reward_model")
    model.head.requires_grad_(False)
    model.trunk.train_only()
    return steps


def heldout_accuracy(score: Callable[[list[list[int]], list[list[int]]], Tensor], pairs: Sequence[Comparison]) -> Accuracy:
    """Judge a scorer of rows of tokens (prompts, responses) by held-out pairs; equal scores count half."""
    clear = [pair for pair in pairs if pair.preference != 0.5]
    prompts = [pair.prompt_ids for pair in clear]
    chosen, rejected = (score(prompts, r) for r in ([p.chosen_ids for p in clear], [p.rejected_ids for p in clear]))
    return wilson(float(pair_accuracy(chosen, rejected)), len(clear))


def wilson(share: float, count: int) -> Accuracy:
    """A share of `count` trials with its 95 % score interval (Wilson 1927, "Probable inference")."""
    if count == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    z = 1.959964
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half), count)


def _tensors(pairs: list[Comparison]) -> dict[str, Tensor]:
    batch = collate(
        [p.prompt_ids for p in pairs] * 2, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    )
    return {
        "ids": batch.ids,
        "last": batch.last,
        "margin": torch.tensor([p.margin for p in pairs]),
        "labels": torch.tensor([p.preference for p in pairs]),
    }
