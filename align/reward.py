"""Stage two: a reward model from pairwise preferences."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from align.fit import Objective, fit
from align.inputs import Comparison
from align.job import Job
from align.seeds import seed_for
from align.sft import ROLE as SFT
from policies.adapters import load_adapter, load_head
from policies.batching import collate, collate_branches
from policies.encoding import decode_response
from policies.heads import ScalarHead
from policies.places import linears
from policies.trunk import Trunk
from rewards.classifier import Classifier
from rewards.losses import bradley_terry_loss, pair_accuracy
from rewards.model import ROLE, RewardModel


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out pairs in the right order, ties left out, with its 95 % interval (Wilson 1927)."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    pairs: int


class PairLoss(Objective):
    """The mean Bradley-Terry loss of a whole batch of pairs, in nats."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        last: Tensor,
        margin: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ids: chosen rows, then rejected rows; or, with positions and seen, the rows of `Branches`.

        margin, labels: `[N]`; labels are the preferences.
        """
        if positions is None or seen is None:
            scores = self.model.scores_at(ids, last)
        else:
            scores = self.model.scores_of_branches(ids, positions, seen, last)
        chosen, rejected = scores.chunk(2)
        return {"loss": bradley_terry_loss(chosen, rejected, margin, labels).sum() / num_items_in_batch}


def run_reward(job: Job) -> None:
    """Train the reward model on the preferences, or adopt the one that is given; write it to `reward/`."""
    started = time.perf_counter()
    adopt = _run_classifier if job.experiment.reward.classifier else _run_on_trunk
    adopt(job, started)


def _run_on_trunk(job: Job, started: float) -> None:
    settings = job.experiment.reward
    trunk = job.new_trunk("reward", ROLE)
    generator = torch.Generator().manual_seed(seed_for(job.experiment.seed, "reward head"))
    model = RewardModel(trunk, ScalarHead(trunk.width, generator).to(trunk.causal.device))
    facts: dict[str, Any] = {}
    tokens = trunk.tokens_a_pass()
    if settings.model:
        trunk.write_adapter(ROLE, load_adapter(settings.model, job.experiment.policy))
        model.load_head(load_head(settings.model), settings.model)
        facts["model"] = settings.model
    else:
        trunk.write_adapter(ROLE, trunk.read_adapter(SFT))
        if not job.run.sft.is_dir():
            trunk.start_training(ROLE)
        trunk.train_only(ROLE)
        context = job.fit_context("reward")
        facts["steps"] = fit(
            PairLoss(model),
            job.inputs.comparisons,
            _branches if _shares_prompts(trunk, job.inputs.comparisons) else _tensors,
            settings,
            context,
            metrics="reward_model",
            lora_plus=job.experiment.policy.lora_plus,
        )
        facts["skipped_rows"] = len(job.inputs.skipped.get("preferences", []))
    if heldout := [pair for pair in job.inputs.comparisons_heldout if not pair.pair.tie]:
        prompts = [pair.prompt_ids for pair in heldout]
        chosen = model.score(prompts, [pair.chosen_ids for pair in heldout], tokens)
        rejected = model.score(prompts, [pair.rejected_ids for pair in heldout], tokens)
        facts |= _judged(job, chosen, rejected, facts.get("steps", 0))
    if settings.normalise and not settings.model:
        samples = job.sample_sft(trunk, settings.normalise)
        scores = model.score([t.request.prompt_ids for t in samples], [t.response_ids for t in samples], tokens)
        mean, deviation = moments(scores)
        model.head.fold(mean, deviation)
        facts |= {"mean": mean, "deviation": deviation}
    with job.new_product(job.run.reward, facts, started) as folder:
        model.save(folder)


def _run_classifier(job: Job, started: float) -> None:
    settings = job.experiment.reward
    assert settings.classifier is not None
    classifier = Classifier(settings.classifier)
    facts: dict[str, Any] = {"classifier": settings.classifier, "mean": 0.0, "deviation": 1.0}
    if heldout := [pair.pair for pair in job.inputs.comparisons_heldout if not pair.pair.tie]:
        prompts = [pair.prompt for pair in heldout]
        chosen = classifier.score(prompts, [pair.chosen for pair in heldout])
        facts |= _judged(job, chosen, classifier.score(prompts, [pair.rejected for pair in heldout]), 0)
    if settings.normalise:
        samples = job.sample_sft(job.new_trunk("reward"), settings.normalise)
        responses = [decode_response(job.tokenizer, t.response_ids) for t in samples]
        mean, deviation = moments(classifier.score([t.request.prompt for t in samples], responses))
        facts |= {"mean": mean, "deviation": deviation}
    with job.new_product(job.run.reward, facts, started):
        pass  # the model stays where it is; the folder holds what is known of it


def _judged(job: Job, chosen: Tensor, rejected: Tensor, step: int) -> dict[str, Any]:
    accuracy = wilson(float(pair_accuracy(chosen, rejected)), len(chosen))
    job.tracker.log("reward", step, {"reward_model/heldout_accuracy": accuracy.accuracy})
    return asdict(accuracy)


def moments(scores: Tensor) -> tuple[float, float]:
    """Mean and deviation of scores, the deviation 1 where all are the same."""
    deviation = float(scores.std(correction=0))
    return float(scores.mean()), deviation if deviation > 0 else 1.0


def wilson(share: float, count: int) -> Accuracy:
    """A share of `count` trials with its 95 % score interval (Wilson 1927, "Probable inference")."""
    if count == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    z = 1.959964
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half), count)


def _shares_prompts(trunk: Trunk, pairs: Sequence[Comparison]) -> bool:
    """Whether the two responses of a pair go behind one prompt: where the model allows it, and it is less arithmetic.

    It saves a prompt's linear layers and costs, in attention, the product of one response with the other.
    """
    linear = sum(layer.weight.numel() for layer in linears(trunk.causal).values())
    attention = 2 * trunk.width * trunk.causal.config.get_text_config().num_hidden_layers
    saved = sum(len(p.prompt_ids) * linear + len(p.prompt_ids) ** 2 * attention for p in pairs)
    cost = sum(2 * len(p.chosen_ids) * len(p.rejected_ids) * attention for p in pairs)
    return saved > cost and trunk.branches_agree(ROLE)


def _branches(pairs: list[Comparison]) -> dict[str, Tensor]:
    batch = collate_branches(
        [p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]
    )
    rows = {"ids": batch.ids, "last": batch.last, "positions": batch.positions, "seen": batch.seen}
    return rows | _verdicts(pairs)


def _tensors(pairs: list[Comparison]) -> dict[str, Tensor]:
    batch = collate([p.prompt_ids for p in pairs] * 2, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs])
    return {"ids": batch.ids, "last": batch.last} | _verdicts(pairs)


def _verdicts(pairs: list[Comparison]) -> dict[str, Tensor]:
    return {
        "margin": torch.tensor([p.pair.margin for p in pairs]),
        "labels": torch.tensor([p.preference for p in pairs]),
    }
