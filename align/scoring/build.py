"""What scores responses in PPO and in evaluation, from what the earlier stages left in a run's folder."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.roles.build import Blueprint, RewardRole
from align.roles.scoring import ALL_ROLES
from align.runs.folder import RunFolder, read_facts
from align.scoring.reward import (
    EvaluationScorer,
    Gold,
    Reward,
    RoleScorer,
    TermScore,
    TrainingScorer,
    classifier_term,
    function_term,
    gold_score,
    length_term,
    model_term,
)
from policies.files.adapters import load_adapter
from policies.files.base_model import check_model_folder
from rewards import rules
from rewards.classifier import Classifier
from rewards.compose import Composition
from rewards.http import endpoint, judge
from rewards.model import member_folder, members_in, read_heads
from rewards.schema import RewardSettings
from rewards.terms import (
    CallSettings,
    ClassifierTerm,
    EndpointTerm,
    ExactTerm,
    FunctionTerm,
    JsonTerm,
    JudgeTerm,
    LengthTerm,
    MathTerm,
    ModelTerm,
    NumberTerm,
    RegexTerm,
    RepetitionTerm,
    TermSettings,
)
from rewards.user_functions import ScoreFunction, load_function

REWARD_STATE = "reward.json"
"""What the composition of the reward had learned when a policy was judged, beside the policy."""


@dataclass(frozen=True)
class Scorers:
    """The roles to build the learner of, the reward of their verdicts, and the gold score."""

    blueprint: Blueprint
    reward: Reward
    gold: Gold | None

    def evaluation_scorer(self, roles_score: RoleScorer, requested_roles: Collection[str]) -> EvaluationScorer:
        """What these roles say of trajectories, and then the reward."""
        return lambda trajectories: self.reward.ask(trajectories, roles_score(trajectories, requested_roles))

    def training_scorer(self, roles_score: RoleScorer) -> TrainingScorer:
        """The same of all roles for a batch of training, from which the reward's composition learns."""
        return lambda trajectories: self.reward.learn(trajectories, roles_score(trajectories, ALL_ROLES))


def build_scorers(experiment: Experiment, run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> Scorers:
    """The SFT model is the reference; the reward is made of its terms, one of which may be an adapter on the trunk."""
    policy, settings = experiment.policy, experiment.reward
    reference = load_adapter(run.sft, policy) if run.sft.is_dir() else None
    where = experiment.evaluation.gold
    gold = gold_score(load_function(where, "evaluation.gold"), tokenizer) if where else None
    blueprint = Blueprint(experiment.model, policy, experiment.seed, reference)
    facts = read_facts(run.reward)
    if settings.has_model and "classifier" not in facts:
        blueprint = replace(blueprint, rewards=_reward_roles(experiment, run))
    terms = {name: build_term(name, term, settings, facts, tokenizer) for name, term in settings.terms.items()}
    return Scorers(blueprint, Reward(terms, Composition(settings.terms, settings.constraint)), gold)


def _reward_roles(experiment: Experiment, run: RunFolder) -> tuple[RewardRole, ...]:
    """The members of the reward model, each with the head of its whole score and those of its attributes."""
    settings, roles = experiment.reward, []
    for member in range(members_in(run.reward)):
        folder = member_folder(run.reward, member)
        heads = read_heads(folder, {"": 1.0})
        if settings.attributes:
            heads += read_heads(folder, settings.attributes)
        roles.append(RewardRole(load_adapter(folder, experiment.policy), tuple(heads)))
    return tuple(roles)


def build_term(
    name: str, term: TermSettings, settings: RewardSettings, facts: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> TermScore:
    """The part that scores by a term. facts: of the reward stage.

    Raises UserError where something that it needs is not there.
    """
    match term:
        case ModelTerm():
            if path := facts.get("classifier"):
                return classifier_term(Classifier(path), tokenizer, facts["mean"], facts["std"])
            return model_term(settings.ensemble, tuple(settings.attributes))
        case ClassifierTerm():
            return classifier_term(Classifier(term.path, f"reward.terms.{name}.path"), tokenizer)
        case LengthTerm():
            return length_term(term)
        case CallSettings():
            return function_term(build_function(name, term), tokenizer, term.call_timeout, term.fallback)
        case _:
            return function_term(build_function(name, term), tokenizer, None, None)


def build_function(name: str, term: TermSettings) -> ScoreFunction:
    """The function of texts that a term stands for. Raises UserError where something that it needs is not there."""
    if isinstance(term, FunctionTerm):
        return load_function(term.function, f"reward.terms.{name}.function")
    return FUNCTIONS[type(term)](term)


def check_term(name: str, term: TermSettings) -> None:
    """Raise UserError where what a term names is not there, before a run starts."""
    match term:
        case ModelTerm() | LengthTerm():
            pass
        case ClassifierTerm():
            check_model_folder(term.path)
        case _:
            build_function(name, term)


FUNCTIONS: dict[type[TermSettings], Callable[[Any], ScoreFunction]] = {
    RegexTerm: rules.regex,
    ExactTerm: rules.exact,
    NumberTerm: rules.number,
    MathTerm: rules.math,
    RepetitionTerm: rules.repetition,
    JsonTerm: rules.json_rule,
    EndpointTerm: endpoint,
    JudgeTerm: judge,
}
"""What makes a function of a term's settings."""
