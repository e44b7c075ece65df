"""The loss of labelled steps and its gradient, against float64 step by step, however a batch is split."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.data.examples import TokenizedSteps
from align.learner.group import Ranks
from align.learner.state import TrainedWeights
from align.supervised.step_objective import StepBlueprint, score_steps
from policies.schema import ModelSettings, PolicySettings
from rewards.model import REWARD_ROLE
from rewards.schema import RewardSettings
from rewards.step_labels import LabelledSteps
from tests.align.supervised.small import random_adapter, random_ids
from tests.integration.plain_gradients import Parts, PlainModel, parts_of
from tests.integration.split_objectives import STEEP, SteepRank, Step
from tests.random_models import save_precise_llama

POLICY = PolicySettings(rank=4, alpha=8.0)
LABELS = {"hard": (0.0, 1.0, 1.0), "soft": (0.25, 1.0, 0.6), "numbers": (-2.0, 5.0, 0.5)}
SMOOTHING = 0.1
CUTS = ((1, 0), (20, 2), (10_000, 3))
"""Tokens per microbatch, of one response each, of a few, and of the whole batch; and the ZeRO stage."""
BATCH = (0, 2, 3, 5, 6, 8, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with little rounding."""
    return save_precise_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def responses(kind: str, count: int, seed: int = 0) -> list[TokenizedSteps]:
    """Responses with one to four labelled steps, so that a mean over rows is not one over steps."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        steps = 1 + number % 4
        prompt = 1 + number % 3
        ids = random_ids(prompt + 3 * steps + number % 2, generator)
        ends = [prompt + 3 * step + 2 - (number + step) % 2 for step in range(steps)]
        labels = [LABELS[kind][(number + step) % 3] for step in range(steps)]
        example = LabelledSteps("", ("",) * steps, tuple(labels))
        made.append(TokenizedSteps(example, ids, prompt, ends, labels))
    return made


def blueprint_of(model: Path, kind: str, trains: str = "adapter") -> StepBlueprint:
    smoothing = 0.0 if kind == "numbers" else SMOOTHING
    terms = {"process": {"kind": "process"}}
    settings = {"learning_rate": 1.0, "label_smoothing": smoothing, "trains": trains, "terms": terms}
    return StepBlueprint(
        model=ModelSettings(path=str(model), dtype="float32"),
        policy=POLICY,
        seed=0,
        sft=random_adapter(model, POLICY),
        examples=responses(kind, 10),
        heldout=responses(kind, 5, seed=1),
        settings=RewardSettings.model_validate(settings),
    )


def plain_loss(model: PlainModel, parts: Parts, blueprint: StepBlueprint, trains: bool = True) -> tuple[Tensor, float]:
    """The mean loss over all steps in float64, by formulas written out, and the share that is judged right."""
    examples = [blueprint.examples[number] for number in BATCH] if trains else blueprint.heldout
    smoothing = blueprint.settings.label_smoothing if trains else 0.0
    known = torch.tensor([label for example in blueprint.examples for label in example.labels], dtype=torch.float64)
    are_numbers = bool(known.max() > 1)
    losses, right = [], []
    for example in examples:
        hidden, _ = model.run(example.ids, parts)
        for end, label in zip(example.ends, example.labels, strict=True):
            score = parts["heads"]["0.weight"] @ hidden[end] + parts["heads"]["0.bias"][0]
            if are_numbers:
                losses.append((score - (label - known.mean()) / known.std(correction=0)) ** 2 / 2)
                continue
            target = (1 - smoothing) * label + smoothing * (1 - label)
            probability = 1 / (1 + torch.exp(-score))
            losses.append(-target * torch.log(probability) - (1 - target) * torch.log(1 - probability))
            right.append(bool(probability >= 0.5) == (label >= 0.5))
    return torch.stack(losses).mean(), sum(right) / max(len(right), 1)


def check_step(step: Step, blueprint: StepBlueprint, model: Path) -> None:
    """Compare the gradient that a step has subtracted, its metrics and its held-out loss with the plain ones."""
    plain = PlainModel(model, POLICY.alpha / POLICY.rank)
    before = parts_of(step.before, REWARD_ROLE)
    frozen: Parts = {}
    if blueprint.settings.trains == "head":
        frozen = parts_of(TrainedWeights({REWARD_ROLE: blueprint.sft or {}}), REWARD_ROLE)
    leaves: Parts = {}
    for part, tensors in before.items():
        leaves[part] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    loss, accuracy = plain_loss(plain, frozen | leaves, blueprint)
    loss.backward()
    assert step.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    if accuracy:
        assert 0 < accuracy < 1
        assert step.metrics["accuracy"] == pytest.approx(accuracy)
    for part, tensors in parts_of(step.after, REWARD_ROLE).items():
        difference, size = 0.0, 0.0
        for name, after in tensors.items():
            gradient = leaves[part][name].grad
            assert gradient is not None
            difference += float(((before[part][name] - after) / STEEP - gradient).square().sum())
            size += float(gradient.square().sum())
        assert math.sqrt(difference) <= 1e-6 * math.sqrt(size), part
    heldout, _ = plain_loss(plain, frozen | before, blueprint, trains=False)
    assert step.heldout_loss == pytest.approx(heldout.item(), rel=1e-6)


@pytest.mark.parametrize(("kind", "cut"), zip(LABELS, CUTS, strict=True))
def test_the_gradient_is_that_of_float64_however_the_batch_is_split(
    kind: str, cut: tuple[int, int], one_rank: Ranks[SteepRank], model: Path
) -> None:
    tokens, zero = cut
    blueprint = blueprint_of(model, kind)
    (step,) = one_rank.call(SteepRank.step, blueprint.build, BATCH, zero, tokens)
    assert set(parts_of(step.after, REWARD_ROLE)) == {"adapter A", "adapter B", "heads"}
    check_step(step, blueprint, model)


def test_the_head_alone_is_trained_on_states_that_stay(one_rank: Ranks[SteepRank], model: Path) -> None:
    blueprint = blueprint_of(model, "hard", trains="head")
    (step,) = one_rank.call(SteepRank.step, blueprint.build, BATCH, 0, 20)
    assert set(parts_of(step.after, REWARD_ROLE)) == {"heads"}
    check_step(step, blueprint, model)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("kind", LABELS)
def test_two_ranks_have_the_gradient_of_float64(kind: str, zero: int, two_ranks: Ranks[SteepRank], model: Path) -> None:
    blueprint = blueprint_of(model, kind)
    step = two_ranks.call(SteepRank.step, blueprint.build, BATCH, zero, 20)[0]  # the first rank gathers the weights
    check_step(step, blueprint, model)


def test_steps_score_alike_in_any_microbatch_and_in_the_order_of_the_examples(model: Path) -> None:
    objective = blueprint_of(model, "hard").build()
    examples = list(objective.examples)
    together = score_steps(objective.model, examples, 10_000)
    alone = torch.cat([score_steps(objective.model, [example], 1) for example in examples])
    assert len(together) == sum(len(example.ends) for example in examples)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(score_steps(objective.model, examples, 30), alone, rtol=0, atol=1e-5)
