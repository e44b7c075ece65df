"""Compares a policy with its reference in one process, with the reward that the run has."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from align.config.schema import Experiment
from align.evaluation.policy import REFERENCE_VERSION, Evaluation, build_evaluator
from align.ppo.environment import in_environment
from align.roles.build import build_roles
from align.roles.scoring import score_microbatch, score_microbatches
from align.runs.folder import RunFolder
from align.runtime.seeds import permutation, seed_for
from align.scoring.build import REWARD_STATE, Scorers, build_scorers
from align.scoring.reward import RoleScorer, term_input
from policies.errors import UserError
from policies.files.base_model import load_model_tokenizer
from policies.files.safe_reading import read_object
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.pool import LocalPool, Pool
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine


class LoadedReward:
    """The reward of a run, with the roles that its scores need, and an engine on the same base model.

    Attributes:
        experiment: The run's settings.
        scorers: The scorers of the reward and the gold score.
        roles: The roles, without a critic.
        reference: The reference's adapter.
    """

    def __init__(self, experiment: Experiment, run: RunFolder, adapters: PolicySettings | None = None) -> None:
        """Load the models.

        Args:
            experiment: The run's settings.
            run: The run.
            adapters: Settings of the adapters, where they have a higher rank than the run's; None: the run's.
        """
        self.experiment = experiment
        self.tokenizer = load_model_tokenizer(experiment.model)
        self.scorers = build_scorers(experiment, run, self.tokenizer)
        blueprint = self.scorers.blueprint.widened(adapters or experiment.policy)
        self.roles = build_roles(blueprint, None, (SAMPLER_ROLE,))
        self.reference = blueprint.reference or self.roles.trunk.read_adapter("reference")

    def restore(self, run: RunFolder) -> None:
        """Give the reward the state in which the run's policy was evaluated.

        Raises:
            UserError: The run has no policy yet, and the reward is normalised when one is trained.
        """
        composition = self.scorers.reward.composition
        if run.policy.is_dir():
            composition.restore(read_object(run.policy / REWARD_STATE))
        elif composition.calibrated:
            raise UserError(
                f"reward.terms.{composition.calibrated[0]} is normalised by samples that PPO draws when it starts, and "
                f"run {run.path} has no policy/ yet: `align resume {run.path}` resumes it"
            )

    def calibrate(self, prompts: Sequence[Request]) -> None:
        """Normalise the terms that ask for it, by the reference's responses to some of the prompts."""
        calibrate(
            experiment=self.experiment,
            scorers=self.scorers,
            pool=self.pool,
            role_scorer=self.score_roles,
            reference=self.reference,
            prompts=prompts,
        )

    @cached_property
    def pool(self) -> Pool:
        """An engine on the shared base model, in the run's environment if it has one."""
        rollouts = self.experiment.rollouts
        engine = make_transformers_engine(self.roles.trunk, self.tokenizer, rollouts)
        return in_environment(LocalPool(engine, rollouts.effective_chunk_size), rollouts.environment, self.tokenizer)

    @torch.no_grad()
    def score_roles(self, trajectories: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        """The forward passes of the requested roles."""
        lengths = [trajectory.total_length for trajectory in trajectories]
        microbatches = self.roles.microbatches(lengths, self.experiment.learner.tokens_per_microbatch)
        score = partial(
            score_microbatch,
            self.roles,
            temperature=self.experiment.rollouts.temperature,
            device=self.roles.trunk.causal.device,
            requested_roles=requested_roles,
        )
        return score_microbatches(score, trajectories, microbatches)

    def score(self, trajectories: Sequence[Trajectory]) -> tuple[Tensor, dict[str, Tensor]]:
        """Score responses by the reward as a whole.

        Args:
            trajectories: The responses `[B]`.

        Returns:
            The scores `[B]` float64, and those of each term `[B]` float64, normalised and clipped, but not weighted.
        """
        raw = self.scorers.reward.raw_scores(trajectories, self.score_roles(trajectories, ("reward",)))
        return self.scorers.reward.composition.score(raw)

    def score_by_model(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """Score responses `[B]` by the term that is the reward model alone: `[B]` float64, as the model's heads do."""
        name = self.experiment.reward.model_term
        assert name is not None, "there is no reward model"
        outputs = self.score_roles(trajectories, ("reward",))
        scorer = self.scorers.reward.terms[name]
        return scorer(term_input(trajectories, self.tokenizer, outputs)).values

    def compare(self, policy: AdapterWeights, step: int, prompts: Sequence[Request]) -> Evaluation:
        """Compare a policy with the reference on held-out prompts.

        Args:
            policy: The policy's adapter.
            step: The step at which training left it.
            prompts: The held-out prompts.
        """
        self.roles.trunk.write_adapter("policy", policy)
        evaluator = build_evaluator(
            experiment=self.experiment,
            scorers=self.scorers,
            pool=self.pool,
            role_scorer=self.score_roles,
            reference=self.reference,
            prompts=prompts,
            tokenizer=self.tokenizer,
        )
        return evaluator.evaluate(step, policy)

    def close(self) -> None:
        """End the processes in which functions are called."""
        self.scorers.close()
        if "pool" in self.__dict__:  # it was made
            self.pool.close()


def calibrate(
    experiment: Experiment,
    scorers: Scorers,
    pool: Pool,
    role_scorer: RoleScorer,
    reference: AdapterWeights,
    prompts: Sequence[Request],
) -> None:
    """Normalise those terms of the reward that ask for it, by their scores of the reference's responses.

    Args:
        experiment: The settings.
        scorers: The scorers, whose composition is calibrated.
        pool: Samples the responses.
        role_scorer: The forward passes of the roles.
        reference: The reference's adapter.
        prompts: The training prompts, of which `reward.normalise` are drawn.
    """
    composition = scorers.reward.composition
    if not composition.calibrated:
        return
    pool.load_adapter(REFERENCE_VERSION, reference)
    requests = []
    for i in permutation(len(prompts), experiment.seed, "normalise terms")[: experiment.reward.normalise]:
        requests.append(replace(prompts[i], seed=seed_for(experiment.seed, "normalise terms", i)))
    sampling = Sampling(experiment.rollouts.temperature, experiment.rollouts.max_new_tokens)
    trajectories = pool.generate(requests, sampling)
    raw = scorers.reward.raw_scores(trajectories, role_scorer(trajectories, ("reward",)))
    composition.calibrate(raw)
