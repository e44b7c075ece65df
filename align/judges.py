"""What scores responses in PPO and in evaluation, from what the earlier stages left in a run's folder."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from align.evaluate import Evaluator
from align.ppo.build import Blueprint
from align.ppo.passes import EVERY_ROLE
from align.run import RunFolder, read_facts
from align.schema import Experiment
from align.scoring import Gold, Reward, RolesScore, Score, classifier_reward, gold_score, trunk_reward
from policies.adapters import load_adapter, load_head
from policies.trunk import AdapterWeights
from rewards.classifier import Classifier
from rewards.functions import load_function
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request


@dataclass(frozen=True)
class Judges:
    """The roles to build the learner of, the reward of their verdicts, and the gold score."""

    blueprint: Blueprint
    reward: Reward
    gold: Gold | None

    def score_by(self, roles_score: RolesScore, asked: Collection[str] = EVERY_ROLE) -> Score:
        """What these roles say of trajectories, and then the reward."""
        return lambda trajectories: self.reward(trajectories, roles_score(trajectories, asked))


def make_judges(experiment: Experiment, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> Judges:
    """The SFT model is the reference; the reward is an adapter on the trunk, or a ready classifier."""
    policy, facts = experiment.policy, read_facts(run.reward)
    reference = load_adapter(run.sft, policy) if run.sft.is_dir() else None
    where = experiment.evaluation.gold
    gold = gold_score(load_function(where, "evaluation.gold"), tokenizer) if where else None
    blueprint = Blueprint(experiment.model, policy, experiment.seed, reference, None, None)
    if classifier := facts.get("classifier"):
        reward = classifier_reward(Classifier(classifier), tokenizer, facts["mean"], facts["deviation"])
        return Judges(blueprint, reward, gold)
    adapter, head = load_adapter(run.reward, policy), load_head(run.reward)
    return Judges(replace(blueprint, reward=adapter, reward_head=head), trunk_reward, gold)


def make_evaluator(
    experiment: Experiment,
    judges: Judges,
    pool: Pool,
    roles_score: RolesScore,
    reference: AdapterWeights,
    prompts: Sequence[Request],
) -> Evaluator:
    """The evaluator that the experiment asks for."""
    rollouts, settings = experiment.rollouts, experiment.evaluation
    sampling = Sampling(rollouts.temperature, rollouts.max_new_tokens)
    score = judges.score_by(roles_score, ("policy", "reference", "reward"))
    rate = judges.score_by(roles_score, ("reward",))
    return Evaluator(pool, score, rate, judges.gold, reference, prompts, sampling, settings.seed, settings.best_of)
