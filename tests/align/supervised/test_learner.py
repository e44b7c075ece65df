"""One rank of a supervised stage: dropout, the settings of its optimizer, and every method at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest

from align.config.ppo_settings import CriticSettings, PpoSettings
from align.config.schema import LearnerSettings, SftSettings
from align.ppo.learner import PpoLearner
from align.roles.build import Blueprint, build_roles
from align.supervised.learner import SupervisedLearner, SupervisedLearners
from align.supervised.objective import Objective
from policies.schema import ModelSettings, PolicySettings
from rewards.schema import FitSettings
from tests.align.supervised.small import LORA, flat, random_adapter, reward_blueprint, sft_blueprint
from tests.align.supervised.toy import local_learners

DROPOUT = LORA.model_copy(update={"dropout": 0.5})
BATCH = [0, 1, 2, 3]


# Dropout


def losses(
    model: Path, policy: PolicySettings, steps: list[int], seed: int = 0, recompute: bool = False
) -> list[float]:
    """The losses of the same batch at steps with a learning rate of 0, and the gradient norm of the last."""
    blueprint = reward_blueprint(model, "rankings", policy, random_adapter(model, policy), tokens_per_microbatch=40)
    with local_learners(blueprint.build, blueprint.settings, seed=seed, recompute=recompute) as learners:
        metrics = [learners.train(BATCH, step, 0.0).metrics for step in steps]
    return [*(values["loss"] for values in metrics), metrics[-1]["gradient_norm"]]


def test_what_is_dropped_depends_on_the_seed_and_the_step(tiny_model: Path) -> None:
    first, other_step, again, _ = losses(tiny_model, DROPOUT, [5, 6, 5])
    other_seed, _ = losses(tiny_model, DROPOUT, [5], seed=1)
    without, _ = losses(tiny_model, LORA, [5])
    assert first == again
    assert len({first, other_step, other_seed, without}) == 4


def test_recomputed_activations_drop_the_same(tiny_model: Path) -> None:
    assert losses(tiny_model, DROPOUT, [5], recompute=True) == pytest.approx(losses(tiny_model, DROPOUT, [5]), rel=1e-5)


def test_nothing_is_dropped_in_evaluation(tiny_model: Path) -> None:
    heldout = []
    for policy in (LORA, DROPOUT):
        blueprint = reward_blueprint(tiny_model, "rankings", policy, random_adapter(tiny_model, policy))
        with local_learners(blueprint.build, blueprint.settings) as learners:
            heldout.append(learners.heldout_metrics()["heldout_loss"])
            learners.train(BATCH, 0, 0.0)
            heldout.append(learners.heldout_metrics()["heldout_loss"])
    assert len(set(heldout)) == 1


# Noise and smoothing


def first_losses(model: Path, **settings: Any) -> tuple[float, float, float]:
    """The loss of a step, that of the same step after it, and the held-out loss; the learning rate is 0."""
    blueprint = sft_blueprint(model, LORA, **settings)
    with local_learners(blueprint.build, blueprint.settings) as learners:
        losses = [learners.train(BATCH, step, 0.0).metrics["loss"] for step in (0, 1)]
        return losses[0], losses[1], learners.heldout_metrics()["heldout_loss"]


def test_noise_on_embeddings_and_smoothed_labels_are_for_training_alone(tiny_model: Path) -> None:
    plain, again, heldout = first_losses(tiny_model)
    assert again == plain
    noisy, other_noise, noisy_heldout = first_losses(tiny_model, neftune_alpha=50.0)
    assert len({plain, noisy, other_noise}) == 3
    smoothed, _, smoothed_heldout = first_losses(tiny_model, label_smoothing=0.3)
    assert smoothed != plain
    assert noisy_heldout == smoothed_heldout == heldout


# The optimizer


def groups_of(learners: SupervisedLearners) -> dict[str, dict[str, Any]]:
    """The optimizer's groups by name, without their parameters."""

    def read(learner: SupervisedLearner) -> dict[str, dict[str, Any]]:
        groups = learner.rank.engine.optimizer.param_groups
        return {group["role"]: {name: value for name, value in group.items() if name != "params"} for group in groups}

    return learners.ranks.call(read)[0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_group_has_its_own_rate_which_follows_the_schedule(zero: int, tiny_model: Path) -> None:
    policy = LORA.model_copy(update={"lora_plus": 16.0})
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1}
    blueprint = reward_blueprint(tiny_model, "rankings", policy, random_adapter(tiny_model, policy), **settings)
    for factor in (0.5, 0.25):
        with local_learners(blueprint.build, blueprint.settings, zero) as learners:
            learners.train(BATCH, 0, factor)
            groups = groups_of(learners)
        rates = {name: group["lr"] / factor for name, group in groups.items()}
        expected = {"reward": 1e-3, "reward.up": 16e-3, "reward.undecayed": 1e-3, "reward.ties": 0.5}
        assert rates == pytest.approx(expected)
        decays = {name: group["weight_decay"] for name, group in groups.items()}
        assert decays == {"reward": 0.1, "reward.up": 0.1, "reward.undecayed": 0.0, "reward.ties": 0.0}
        assert (groups["reward.ties"]["betas"], groups["reward.ties"]["eps"]) == ((0.0, 0.99), 0.05)
        assert {groups[name]["betas"] for name in ("reward", "reward.up", "reward.undecayed")} == {(0.9, 0.999)}


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize(("changed", "epsilon"), [({}, 1e-8), ({"adam_epsilon": 1e-3}, 1e-3)])
def test_epsilon_of_sft_and_reward_training(
    changed: dict[str, Any], epsilon: float, zero: int, tiny_model: Path
) -> None:
    reward = reward_blueprint(tiny_model, "ratings", **changed)
    stages: list[tuple[Any, FitSettings]] = [
        (sft_blueprint(tiny_model), SftSettings(**changed)),
        (reward, reward.settings),
    ]
    for blueprint, settings in stages:
        with local_learners(blueprint.build, settings, zero) as learners:
            learners.train(BATCH, 0, 1.0)
            assert {group["eps"] for group in groups_of(learners).values()} == {epsilon}


@pytest.mark.parametrize(("changed", "epsilon"), [({}, 1e-5), ({"adam_epsilon": 1e-3}, 1e-3)])
def test_epsilon_of_ppo(changed: dict[str, float], epsilon: float, tiny_model: Path, process_group: None) -> None:
    roles = build_roles(Blueprint(ModelSettings(path=str(tiny_model)), LORA, 0, None), CriticSettings())
    learner = PpoLearner(roles, PpoSettings(), LearnerSettings(**changed), 1.0, gradient_checkpointing=False)
    groups = learner.rank.optimizer.param_groups
    learner.close()
    assert {group["role"] for group in groups} == {"policy", "critic", "critic.undecayed"}
    assert {group["eps"] for group in groups} == {epsilon}


def test_a_large_epsilon_shortens_the_steps(tiny_model: Path) -> None:
    lengths = []
    for epsilon in (1e-8, 1.0):
        blueprint = reward_blueprint(tiny_model, "ratings", adam_epsilon=epsilon)
        with local_learners(blueprint.build, blueprint.settings) as learners:
            start = flat(learners.product())
            learners.train(BATCH, 0, 1.0)
            lengths.append(float((flat(learners.product()) - start).norm()))
    assert lengths[1] < 0.5 * lengths[0]


# Methods and ZeRO stages


METHODS = {
    "p_tuning": PolicySettings(method="p_tuning", virtual_tokens=3, encoder_width=8),
    "p_tuning_lstm": PolicySettings(method="p_tuning", virtual_tokens=3, encoder_width=8, encoder="lstm"),
    "prompt_tuning": PolicySettings(method="prompt_tuning", virtual_tokens=3),
    "bitfit": PolicySettings(method="bitfit"),
    "full": PolicySettings(method="full"),
    "bottleneck": PolicySettings(method="bottleneck", bottleneck=4),
    "dropout": DROPOUT,
}
RATE = 10.0
"""So steep that float32 keeps the gradient's digits when it is read off the change of the weights."""


def build_of(kind: str, model: Path, policy: PolicySettings) -> Objective[Any]:
    if kind == "sft":
        return sft_blueprint(model, policy, learning_rate=RATE).build()
    if kind == "from base":
        return reward_blueprint(model, "pairs", policy, learning_rate=RATE, centering=0.1).build()
    ratings = "ordinal" if kind == "attributes" else "regression"
    adapter = random_adapter(model, policy)
    changed = {"learning_rate": RATE, "ratings": ratings, "centering": 0.1}
    return reward_blueprint(model, kind, policy, adapter, **changed).build()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sft", "from base", "rankings", "attributes"])
def test_every_method_trains_the_same_at_every_zero_stage(kind: str, method: str, tiny_model: Path) -> None:
    policy = METHODS[method]
    settings = FitSettings(optimizer="sgd", max_grad_norm=0.01, tokens_per_microbatch=60)
    stages = (0, 1, 2, 3) if policy.spec.zero3.allows(policy) else (0, 1, 2)
    moves, heldout = [], []
    for zero in stages:
        with local_learners(lambda: build_of(kind, tiny_model, policy), settings, zero) as learners:
            start = flat(learners.state()[0].weights)
            learners.train(BATCH, 0, 1.0)
            moves.append(flat(learners.state()[0].weights) - start)
            heldout.append(learners.heldout_metrics()["heldout_loss"])
    assert moves[0].norm() > 0.05
    for move in moves[1:]:
        assert (move - moves[0]).norm() < 1e-4 * moves[0].norm()
    assert heldout == pytest.approx([heldout[0]] * len(stages), rel=1e-4)
