"""The loss of labelled texts and its gradient, against float64 and finite differences, however a batch is split."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from align.data.labels import Classes, LabelledText, LabelSpace, Numbers
from align.learner.group import Ranks
from align.learner.state import TrainedWeights
from align.roles.text_classifier import CLASSIFIER_ROLE, collate_texts
from align.supervised.classifier_objective import ClassifierBlueprint, class_loss, number_loss
from align.supervised.learner import SupervisedLearner
from align.supervised.text_states import TEXTS_AT_ONCE, TextState
from policies.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from rewards.schema import FitSettings
from tests.align.supervised.small import labelled_texts, random_adapter
from tests.integration.plain_gradients import Parts, PlainModel, parts_of
from tests.integration.split_objectives import STEEP, SteepRank, Step
from tests.random_models import save_precise_llama

POLICY = PolicySettings(rank=4, alpha=8.0)
SPACES: dict[str, LabelSpace] = {"classification": Classes(("a", "b", "c")), "regression": Numbers(0.1, 0.7)}
CUTS = ((1, 0), (20, 2), (10_000, 3))
"""Tokens per microbatch, of one text each, of a few, and of the whole batch; and the ZeRO stage."""
BATCH = (0, 2, 3, 5, 6, 8, 9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with little rounding."""
    return save_precise_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def blueprint_of(model: Path, task: str, trains_adapter: bool = True) -> ClassifierBlueprint:
    return ClassifierBlueprint(
        model=ModelSettings(path=str(model), dtype="float32"),
        policy=POLICY,
        seed=0,
        sft=random_adapter(model, POLICY),
        trains_adapter=trains_adapter,
        space=SPACES[task],
        examples=labelled_texts(task, 10),
        heldout=labelled_texts(task, 4, seed=1),
        learning_rate=1.0,
    )


def plain_loss(model: PlainModel, parts: Parts, space: LabelSpace, texts: list[LabelledText]) -> Tensor:
    """The mean loss in float64, text by text, by formulas written out."""
    total = torch.zeros((), dtype=torch.float64)
    for text in texts:
        hidden, _ = model.run(text.ids, parts)
        outputs = parts["heads"]["0.weight"] @ hidden[-1]
        if isinstance(space, Classes):
            number = [*space.labels].index(text.label)
            total = total - torch.log(outputs[number].exp() / outputs.exp().sum())
        else:
            total = total + (outputs[0] - (float(text.label) - space.mean) / space.std) ** 2
    return total / len(texts)


def step_of(ranks: Ranks[SteepRank], blueprint: ClassifierBlueprint, zero: int, tokens: int) -> Step:
    return ranks.call(SteepRank.step, blueprint.build, BATCH, zero, tokens)[0]


def check_step(step: Step, blueprint: ClassifierBlueprint, model: Path) -> None:
    """Compare the gradient that a step has subtracted, its loss and its held-out loss with the plain ones."""
    plain = PlainModel(model, POLICY.alpha / POLICY.rank)
    before = parts_of(step.before, CLASSIFIER_ROLE)
    frozen: Parts = {}
    if not blueprint.trains_adapter:
        frozen = parts_of(TrainedWeights({CLASSIFIER_ROLE: blueprint.sft or {}}), CLASSIFIER_ROLE)
    leaves: Parts = {}
    for part, tensors in before.items():
        leaves[part] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    loss = plain_loss(plain, frozen | leaves, blueprint.space, [blueprint.examples[number] for number in BATCH])
    loss.backward()
    assert step.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    square = 0.0
    for part, tensors in parts_of(step.after, CLASSIFIER_ROLE).items():
        difference, size = 0.0, 0.0
        for name, after in tensors.items():
            gradient = leaves[part][name].grad
            assert gradient is not None
            difference += float(((before[part][name] - after) / STEEP - gradient).square().sum())
            size += float(gradient.square().sum())
        assert math.sqrt(difference) <= 1e-6 * math.sqrt(size), part
        square += size
    assert step.metrics["gradient_norm"] == pytest.approx(math.sqrt(square), rel=1e-6)
    heldout = plain_loss(plain, frozen | before, blueprint.space, list(blueprint.heldout))
    assert step.heldout_loss == pytest.approx(heldout.item(), rel=1e-6)


def test_the_head_starts_with_the_rows_of_the_verbalizers(model: Path) -> None:
    blueprint = replace(blueprint_of(model, "classification"), sft=None, verbalizers=[9, 4, 30])
    objective = blueprint.build()
    text = blueprint.examples[0]
    outputs = objective.model.outputs([text.ids])[0]
    logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([text.ids])).logits[0, -1]
    torch.testing.assert_close(outputs, logits[[9, 4, 30]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "zero"), CUTS)
@pytest.mark.parametrize("task", SPACES)
def test_the_gradient_is_that_of_float64_however_the_batch_is_split(
    task: str, tokens: int, zero: int, one_rank: Ranks[SteepRank], model: Path
) -> None:
    blueprint = blueprint_of(model, task)
    step = step_of(one_rank, blueprint, zero, tokens)
    assert set(parts_of(step.after, CLASSIFIER_ROLE)) == {"adapter A", "adapter B", "heads"}
    check_step(step, blueprint, model)


@pytest.mark.parametrize("task", SPACES)
def test_the_head_alone_has_the_gradient_of_a_linear_probe(task: str, one_rank: Ranks[SteepRank], model: Path) -> None:
    blueprint = blueprint_of(model, task, trains_adapter=False)
    step = step_of(one_rank, blueprint, zero=0, tokens=20)
    assert set(parts_of(step.after, CLASSIFIER_ROLE)) == {"heads"}
    check_step(step, blueprint, model)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("trains_adapter", [True, False])
@pytest.mark.parametrize("task", SPACES)
def test_two_ranks_have_the_gradient_of_float64(
    task: str, trains_adapter: bool, zero: int, two_ranks: Ranks[SteepRank], model: Path
) -> None:
    blueprint = blueprint_of(model, task, trains_adapter)
    check_step(step_of(two_ranks, blueprint, zero, tokens=20), blueprint, model)


def test_states_that_are_computed_once_are_those_of_each_text_alone(model: Path, one_rank: Ranks[SteepRank]) -> None:
    blueprint = blueprint_of(model, "classification", trains_adapter=False)
    blueprint = replace(blueprint, examples=labelled_texts("classification", TEXTS_AT_ONCE + 6))  # more than one block
    objective = blueprint.build()
    learner = SupervisedLearner(objective, FitSettings(tokens_per_microbatch=40), zero=0, seed=0)
    assert len(objective.examples) == len(blueprint.examples)
    for text, computed in zip(blueprint.examples, objective.examples, strict=True):
        assert isinstance(computed, TextState)
        with torch.no_grad():
            alone = objective.model.last_states(collate_texts([text.ids]))[0]
        assert computed.label == text.label
        assert computed.state.untyped_storage().nbytes() == computed.state.nbytes
        torch.testing.assert_close(computed.state, alone, rtol=0, atol=1e-5)
    learner.close()


def test_the_accuracy_of_a_batch_is_the_share_of_likeliest_classes(one_rank: Ranks[SteepRank], model: Path) -> None:
    blueprint = blueprint_of(model, "classification")
    step = step_of(one_rank, blueprint, zero=0, tokens=20)
    plain = PlainModel(model, POLICY.alpha / POLICY.rank)
    parts = parts_of(step.before, CLASSIFIER_ROLE)
    right = 0
    for number in BATCH:
        text = blueprint.examples[number]
        outputs = parts["heads"]["0.weight"] @ plain.run(text.ids, parts)[0][-1]
        right += "abc"[int(outputs.argmax())] == text.label
    assert 0 < right < len(BATCH)
    assert step.metrics["accuracy"] == pytest.approx(right / len(BATCH))


def test_losses_have_the_gradients_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda outputs: class_loss(outputs, torch.tensor([0, 3, 1, 1, 2])), (logits,))
    outputs = torch.randn(5, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(5, generator=generator, dtype=torch.float64)
    assert gradcheck(lambda values: number_loss(values, targets), (outputs,))


def test_the_loss_of_equal_logits_is_the_logarithm_of_the_number_of_classes() -> None:
    assert class_loss(torch.zeros(2, 7), torch.tensor([0, 6])).item() == pytest.approx(2 * math.log(7))
    assert class_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([1])).item() == pytest.approx(2e4)


def test_a_classifier_of_top_layers_has_no_lm_head(model: Path) -> None:
    policy = PolicySettings(method="top_layers")
    trunk = build_trunk(ModelSettings(path=str(model), dtype="float32"), policy, (CLASSIFIER_ROLE, "policy"))
    head = {name for name in trunk.adapter("policy") if "lm_head" in name}
    assert head
    assert trunk.adapter(CLASSIFIER_ROLE).keys() == trunk.adapter("policy").keys() - head
