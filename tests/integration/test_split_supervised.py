"""The gradient of every supervised objective however its batch is split, against the plain sum over its examples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.learner.group import Ranks
from rewards.objective import largest_tie
from rewards.preferences import Pair, Ranking, Rating
from tests.integration.plain_gradients import Plain, parts_of
from tests.integration.split_objectives import Case, SteepRank, Step, cases, sharing_prompts
from tests.random_models import save_precise_llama

STAGES = (0, 1, 2, 3)
CUTS = (1, 90, 10_000)
"""Tokens per microbatch: of one example each, of a few, and of a rank's whole share."""
PARTS = {
    "sft": ["adapter A", "adapter B"],
    "pairs": ["adapter A", "adapter B", "heads"],
    "rankings": ["adapter A", "adapter B", "heads", "ties"],
    "ratings": ["adapter A", "adapter B", "heads", "links"],
    "mixed": ["adapter A", "adapter B", "heads", "links", "ties"],
    "first member": ["adapter A", "adapter B", "heads", "ties"],
    "second member": ["adapter A", "adapter B", "heads", "ties"],
    "heads alone": ["heads", "links", "ties"],
}
"""What is trained by each objective."""
PRECISION = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with so little rounding that float32 gradients are right to half of `PRECISION`."""
    return save_precise_llama(tmp_path_factory.mktemp("model"), tiny_tokenizer)


@pytest.fixture(scope="module")
def objectives(model: Path) -> dict[str, Case]:
    return cases(model)


def step_of(ranks: Ranks[SteepRank], case: Case, numbers: Sequence[int], zero: int, tokens: int) -> Step:
    """A step, in which all ranks compute the same metrics."""
    step, *others = ranks.call(SteepRank.step, case.build, numbers, zero, tokens)
    for other in others:
        assert other.metrics == step.metrics
        assert other.heldout_loss == step.heldout_loss
    return step


def check(step: Step, case: Case, expected: Plain, parts: Sequence[str]) -> None:
    """Compare the gradient that a step has subtracted, and its metrics, with the plain ones."""
    measured = case.measured(step)
    assert sorted(measured) == parts
    for part, tensors in measured.items():
        distance = norm({name: tensor - expected.gradients[part][name] for name, tensor in tensors.items()})
        assert distance <= PRECISION * norm(expected.gradients[part]), part
    whole = math.hypot(*(norm(expected.gradients[part]) for part in parts))
    metrics = {"loss": expected.loss, "gradient_norm": whole}
    if not math.isnan(expected.accuracy):
        metrics |= {"accuracy": expected.accuracy, "margin": expected.margin}
    assert step.metrics == pytest.approx(metrics, rel=PRECISION, abs=PRECISION)


def norm(tensors: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in tensors.values()))


@pytest.mark.parametrize(
    ("name", "zero", "tokens", "shares_prompts"),
    [
        ("sft", 2, 90, False),
        ("pairs", 1, 1, True),
        ("rankings", 3, 90, True),
        ("ratings", 0, 90, False),
        ("mixed", 2, 90, False),
        ("mixed", 3, 10_000, True),
        ("first member", 1, 10_000, False),
        ("second member", 1, 10_000, False),
    ],
)
def test_two_ranks_have_the_gradient_of_the_plain_sum(
    name: str, zero: int, tokens: int, shares_prompts: bool, objectives: dict[str, Case], two_ranks: Ranks[SteepRank]
) -> None:
    case = sharing_prompts(objectives[name]) if shares_prompts else objectives[name]
    step = step_of(two_ranks, case, case.batch, zero, tokens)
    check(step, case, case.plain(step.before, case.batch), PARTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("count", ["one_rank", "two_ranks"])
@pytest.mark.parametrize("name", PARTS)
def test_every_split_has_the_gradient_and_the_metrics_of_the_plain_sum(
    name: str, count: str, zero: int, objectives: dict[str, Case], request: pytest.FixtureRequest
) -> None:
    ranks: Ranks[SteepRank] = request.getfixturevalue(count)
    separate = objectives[name]
    variants = [separate] if name == "sft" else [separate, sharing_prompts(separate)]
    start = step_of(ranks, separate, separate.batch, zero, CUTS[0]).before
    expected = separate.plain(start, separate.batch)
    heldout_loss = separate.plain_heldout_loss(start)
    for case in variants:
        for tokens in CUTS:
            step = step_of(ranks, case, case.batch, zero, tokens)
            check(step, case, expected, PARTS[name])
            assert step.heldout_loss == pytest.approx(heldout_loss, rel=PRECISION)


@pytest.mark.parametrize("name", ["sft", "mixed"])
def test_two_ranks_have_the_metrics_and_the_held_out_loss_of_one(
    name: str, objectives: dict[str, Case], one_rank: Ranks[SteepRank], two_ranks: Ranks[SteepRank]
) -> None:
    case = objectives[name]
    alone = step_of(one_rank, case, case.batch, 0, 90)
    together = step_of(two_ranks, case, case.batch, 2, 90)
    assert {"accuracy", "margin"} <= together.metrics.keys() or name == "sft"
    assert together.metrics == pytest.approx(alone.metrics, rel=PRECISION)
    assert together.heldout_loss == pytest.approx(alone.heldout_loss, rel=PRECISION)
    assert together.heldout_loss == pytest.approx(case.plain_heldout_loss(alone.before), rel=PRECISION)


ALL_STAGES = [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3]


@pytest.mark.parametrize("zero", ALL_STAGES)
@pytest.mark.parametrize("kinds", [(Pair, Ranking), (Ranking, Pair), (Pair, Rating), (Rating, Pair), (Rating, Ranking)])
def test_only_one_rank_may_have_ties_or_ratings(
    kinds: tuple[type, type], zero: int, objectives: dict[str, Case], two_ranks: Ranks[SteepRank]
) -> None:
    """The first rank takes the shorter example, and the second the longer one."""
    case = objectives["mixed"]
    shorter, longer = kinds
    numbers = [min(of_kind(case, shorter), key=case.length), max(of_kind(case, longer), key=case.length)]
    assert case.length(numbers[0]) < case.length(numbers[1])
    step = step_of(two_ranks, case, numbers, zero, 90)
    check(step, case, case.plain(step.before, numbers), PARTS["mixed"])


@pytest.mark.parametrize("zero", ALL_STAGES)
@pytest.mark.parametrize("name", ["sft", "pairs", "mixed"])
def test_a_batch_may_have_fewer_examples_than_ranks(
    name: str, zero: int, objectives: dict[str, Case], two_ranks: Ranks[SteepRank]
) -> None:
    case = objectives[name]
    step = step_of(two_ranks, case, case.batch[-1:], zero, 90)
    check(step, case, case.plain(step.before, case.batch[-1:]), PARTS[name])


def test_the_gradient_of_a_part_that_is_ten_times_too_large_is_noticed(
    objectives: dict[str, Case], one_rank: Ranks[SteepRank]
) -> None:
    """The tie parameters are less than a tenth of the whole gradient, of which their error would be a small part."""
    case = objectives["mixed"]
    step = step_of(one_rank, case, case.batch, 0, 90)
    expected = case.plain(step.before, case.batch)
    check(step, case, expected, PARTS["mixed"])
    before = parts_of(step.before, case.role)["ties"]["ties.free"]
    after = step.after.heads["reward.loss"]["ties.free"]
    after.copy_(before + 10 * (after - before))
    with pytest.raises(AssertionError, match="ties"):
        check(step, case, expected, PARTS["mixed"])


def of_kind(case: Case, kind: type) -> list[int]:
    """The numbers of the examples of a kind; of rankings, those with judged ties."""
    numbers = []
    for number, preference in enumerate(case.preferences):
        if isinstance(preference, kind) and (kind is not Ranking or largest_tie(preference) > 1):
            numbers.append(number)
    return numbers
