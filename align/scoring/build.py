"""Builds the scorers of PPO and of evaluation from the products of the earlier stages in a run's folder."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.roles.build import Blueprint, RewardRole
from align.roles.scoring import ALL_ROLES, with_given_tokens
from align.runs.folder import RunFolder, read_facts
from align.scoring.reward import (
    EvaluationScorer,
    GoldScorer,
    Rescore,
    Reward,
    RoleScorer,
    TrainingScorer,
    gold_function,
    gold_scorer,
)
from policies.files.adapters import load_adapter
from rewards.children.pool import FunctionPool
from rewards.compose import Composition
from rewards.model import member_folder, members_in, read_heads
from rewards.preferences import OVERALL
from rewards.terms.base import RewardStage
from rollouts.trajectory import RoleOutputs, Trajectory

REWARD_STATE = "reward.json"
"""The file beside a policy that holds the state of the reward's composition when the policy was evaluated."""


@dataclass(frozen=True)
class Scorers:
    """Everything that scores responses.

    Attributes:
        blueprint: The roles whose forward passes the reward needs; the learner is built from it.
        reward: Computes the score from the role outputs and the texts.
        gold: The true score; None where the experiment has none.
        gold_pool: The processes of the true score's function.
    """

    blueprint: Blueprint
    reward: Reward
    gold: GoldScorer | None
    gold_pool: FunctionPool | None = None

    def close(self) -> None:
        """End the processes in which functions are called; a further call starts new ones."""
        self.reward.close()
        if self.gold_pool:
            self.gold_pool.close()

    def evaluation_scorer(self, role_scorer: RoleScorer, requested_roles: Collection[str]) -> EvaluationScorer:
        """A scorer that runs these roles and then the reward, without updating its composition."""

        def score(trajectories: Sequence[Trajectory]) -> Rescore:
            outputs = with_given_tokens(trajectories, role_scorer(trajectories, requested_roles))
            return self.reward.score_for_evaluation(trajectories, outputs)

        return score

    def training_scorer(self, role_scorer: RoleScorer) -> TrainingScorer:
        """A scorer of training batches that runs all roles and then the reward, and updates its composition."""

        def score(trajectories: Sequence[Trajectory]) -> list[RoleOutputs]:
            outputs = with_given_tokens(trajectories, role_scorer(trajectories, ALL_ROLES))
            return self.reward.score_and_update(trajectories, outputs)

        return score


def build_scorers(experiment: Experiment, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> Scorers:
    """Build the scorers of an experiment.

    The SFT model is the reference. A term of kind `model` or `process` adds its adapters and heads to the roles on the
    shared base model, unless the reward model is a ready-made classifier.

    Args:
        experiment: The settings.
        run: The run, whose folders `sft` and `reward` are read where they exist.
        tokenizer: Tokenizer of the base model.

    Raises:
        UserError: Something that the experiment names is missing or cannot be read.
    """
    settings = experiment.reward
    reference = load_adapter(run.sft, experiment.policy) if run.sft.is_dir() else None
    gold = None
    gold_pool = None
    if experiment.evaluation.gold:
        gold_pool = gold_function(experiment.evaluation.gold)
        gold = gold_scorer(gold_pool, tokenizer, f"evaluation.gold: {experiment.evaluation.gold}")
    blueprint = Blueprint(experiment.model, experiment.policy, experiment.seed, reference)
    facts = read_facts(run.reward)
    if settings.has_model and "classifier" not in facts:
        is_process = settings.process is not None
        blueprint = replace(blueprint, rewards=_reward_roles(experiment, run), reads_tokens=is_process)
    stage = RewardStage(settings, facts)
    terms = {name: term.make_scorer(name, stage) for name, term in settings.terms.items()}
    reward = Reward(
        terms=terms,
        composition=Composition(settings.terms, settings.constraint),
        tokenizer=tokenizer,
        verifiable=[name for name, term in settings.terms.items() if term.is_verifiable],
    )
    return Scorers(blueprint=blueprint, reward=reward, gold=gold, gold_pool=gold_pool)


def _reward_roles(experiment: Experiment, run: RunFolder) -> tuple[RewardRole, ...]:
    """The members of the reward model, each with the head of its overall score and those of its attributes."""
    settings = experiment.reward
    roles: list[RewardRole] = []
    for member in range(members_in(run.reward)):
        folder = member_folder(run.reward, member)
        heads = read_heads(folder, {OVERALL: 1.0})
        if settings.attributes:
            heads += read_heads(folder, settings.attributes)
        roles.append(RewardRole(load_adapter(folder, experiment.policy), tuple(heads)))
    return tuple(roles)
