"""Losses of preference optimisation the slow way: in float64, response by response, by the papers' formulas."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from align.config.dpo_settings import DpoSettings
from align.data.examples import TokenizedPreference
from rewards.preferences import Pair, Ranking, Rating
from tests.integration.plain_gradients import Parts, PlainModel, all_tensors, open_likelihood


@dataclass(frozen=True)
class PlainDpo:
    """Preference optimisation of a policy from a reference.

    Attributes:
        model: The base model in float64.
        settings: The settings of the stage.
        reference: The reference's adapter.
    """

    model: PlainModel
    settings: DpoSettings
    reference: Parts

    def loss(self, policy: Parts, batch: Sequence[TokenizedPreference], mismatched: Sequence[list[int]]) -> Tensor:
        """The mean loss `[]` of a batch.

        Args:
            policy: The policy's adapter.
            batch: The examples.
            mismatched: For each, a response to another prompt.
        """
        total = torch.zeros((), dtype=torch.float64)
        kl = self._kl(policy, batch, mismatched)
        for example in batch:
            logprobs = [self._logprob(policy, example.prompt_ids, ids) for ids in example.responses_ids]
            reference = [self._logprob(self.reference, example.prompt_ids, ids) for ids in example.responses_ids]
            ratios = [logprob - other.detach() for logprob, other in zip(logprobs, reference, strict=True)]
            if self.settings.loss == "simpo":
                lengths = map(len, example.responses_ids)
                total = total + self._simpo([p / n for p, n in zip(logprobs, lengths, strict=True)], example)
            elif self.settings.loss == "kto":
                total = total + self._kto(ratios, example, kl)
            elif self.settings.loss == "ipo":
                total = total + self._ipo(ratios, example)
            else:
                total = total + self._dpo(ratios, example)
        return total / len(batch)

    def _logprob(self, parts: Parts, prompt: list[int], response: list[int]) -> Tensor:
        _, logits = self.model.run(prompt + response, parts)
        logprobs = logits.log_softmax(-1)
        return torch.stack([logprobs[len(prompt) + i - 1, token] for i, token in enumerate(response)]).sum()

    def _kl(self, policy: Parts, batch: Sequence[TokenizedPreference], mismatched: Sequence[list[int]]) -> float:
        ratios = []
        for example, response in zip(batch, mismatched, strict=True):
            ours = self._logprob(policy, example.prompt_ids, response)
            ratios.append(ours.item() - self._logprob(self.reference, example.prompt_ids, response).item())
        return max(0.0, sum(ratios) / len(ratios))

    def _right(self, certainty: float) -> float:
        smoothing = self.settings.label_smoothing
        return certainty * (1 - smoothing) + (1 - certainty) * smoothing

    def _dpo(self, ratios: list[Tensor], example: TokenizedPreference) -> Tensor:
        beta = self.settings.effective_beta
        preference = example.example.preference
        is_whole = isinstance(preference, Ranking) and sum(preference.sizes) > 2
        if not isinstance(preference, Ranking) or not is_whole or (max(preference.sizes) > 1 and not preference.open):
            losses = []
            for first, second, certainty, margin in pairs_of(example):
                difference = beta * (ratios[first] - ratios[second]) - margin
                right = self._right(certainty)
                losses.append(-right * torch.sigmoid(difference).log() - (1 - right) * torch.sigmoid(-difference).log())
            return torch.stack(losses).mean()
        rewards = beta * torch.stack(ratios)
        likelihood = open_likelihood(rewards, preference.sizes, ())
        reverse = open_likelihood(rewards.flip(0), preference.sizes[::-1], ())
        smoothing = self.settings.label_smoothing
        return -(1 - smoothing) * likelihood.log() - smoothing * reverse.log()

    def _ipo(self, ratios: list[Tensor], example: TokenizedPreference) -> Tensor:
        losses = []
        for first, second, certainty, _ in pairs_of(example):
            distance = ratios[first] - ratios[second]
            target = 0.5 / self.settings.effective_beta
            right = self._right(certainty)
            losses.append(right * (distance - target) ** 2 + (1 - right) * (distance + target) ** 2)
        return torch.stack(losses).mean()

    def _simpo(self, means: list[Tensor], example: TokenizedPreference) -> Tensor:
        losses = []
        for first, second, certainty, margin in pairs_of(example):
            gamma = margin + (self.settings.effective_margin if certainty != 0.5 else 0.0)
            difference = self.settings.effective_beta * (means[first] - means[second]) - gamma
            right = self._right(certainty)
            losses.append(-right * torch.sigmoid(difference).log() - (1 - right) * torch.sigmoid(-difference).log())
        return torch.stack(losses).mean()

    def _kto(self, ratios: list[Tensor], example: TokenizedPreference, kl: float) -> Tensor:
        beta = self.settings.effective_beta
        preference = example.example.preference
        if isinstance(preference, Rating):
            good, bad = ([0], []) if preference.values[""] == 1 else ([], [0])
        elif isinstance(preference, Pair):
            good, bad = [0], [1]
        else:
            last = len(ratios) - preference.sizes[-1]
            good, bad = list(range(preference.sizes[0])), list(range(last, len(ratios)))
        losses = []
        for index in good:
            weight = self.settings.desirable_weight or 1.0
            losses.append(weight * (1 - torch.sigmoid(beta * (ratios[index] - kl))))
        for index in bad:
            weight = self.settings.undesirable_weight or 1.0
            losses.append(weight * (1 - torch.sigmoid(beta * (kl - ratios[index]))))
        return torch.stack(losses).mean()


def pairs_of(example: TokenizedPreference) -> list[tuple[int, int, float, float]]:
    """(better, worse, certainty, margin) of each two responses that are compared; equals have the certainty ½."""
    preference = example.example.preference
    if isinstance(preference, Pair):
        return [(0, 1, preference.certainty, preference.margin)]
    assert isinstance(preference, Ranking)
    ranks: list[int] = []
    for rank, size in enumerate(preference.sizes):
        ranks += [rank] * size
    pairs = []
    for first, second in combinations(range(len(ranks)), 2):
        if ranks[first] != ranks[second]:
            pairs.append((first, second, 1.0, 0.0))
        elif not preference.open:
            pairs.append((first, second, 0.5, 0.0))
    return pairs


def gradients_of(loss: Tensor, parts: Parts) -> Parts:
    """The gradient of a loss by what is trained."""
    flat = iter(torch.autograd.grad(loss, list(all_tensors(parts))))
    return {part: {name: next(flat) for name in tensors} for part, tensors in parts.items()}
