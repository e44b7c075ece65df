"""Judging and using what a run has trained, without a learner."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.schema import Experiment
from align.data.datasets import Datasets, TokenizedPreference
from align.evaluation.policy import build_evaluator
from align.evaluation.reward_model import compute_diagnostics
from align.roles.build import build_roles
from align.roles.scoring import score_microbatches
from align.runs.folder import RunFolder, read_facts
from align.runtime.seeds import seed_for
from align.scoring.build import REWARD_STATE, build_scorers
from align.stages.reward import classifier_scores, evaluate_models, folded_moments, load_models
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.files.base_model import load_tokenizer
from policies.files.safe_reading import read_object
from policies.methods.build import build_trunk
from policies.text.tokenization import Prompt, decode_response, encode_prompt
from policies.trunk import AdapterWeights
from rewards.classifier import Classifier
from rollouts.engine import Sampling
from rollouts.pool import LocalPool
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine


def evaluate_run(experiment: Experiment, run: RunFolder, datasets: Datasets) -> dict[str, Any]:
    """Sections `reference`, `policy` and `best_of` of `evaluation.json` for the run's policy."""
    policy = policy_weights(experiment, run)
    tokenizer = load_tokenizer(experiment.model.path)
    scorers = build_scorers(experiment, run, tokenizer)
    scorers.reward.composition.restore(read_object(run.policy / REWARD_STATE))
    roles = build_roles(scorers.blueprint, None, (SAMPLER_ROLE,))
    reference = scorers.blueprint.reference or roles.trunk.read_adapter("reference")
    roles.trunk.write_adapter("policy", policy)
    rollouts = experiment.rollouts

    @torch.no_grad()
    def roles_score(trajectories: Sequence[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        groups = roles.microbatches([t.total_length for t in trajectories])
        return score_microbatches(
            roles, trajectories, groups, rollouts.temperature, roles.trunk.causal.device, requested_roles
        )

    pool = LocalPool(make_transformers_engine(roles.trunk, tokenizer, rollouts), rollouts.effective_chunk_size)
    evaluator = build_evaluator(experiment, scorers, pool, roles_score, reference, datasets.prompts_heldout, tokenizer)
    step = read_object(run.policy / "evaluation.json")["policy"]["step"]
    return evaluator.evaluate(step, policy)


def evaluate_reward_model(
    experiment: Experiment, run: RunFolder, preferences: Sequence[TokenizedPreference], classifier: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and worst errors of the run's reward model, or of a classifier, on these cases."""
    path = classifier or read_facts(run.reward).get("classifier")
    if path:
        return compute_diagnostics(
            preferences, classifier_scores(Classifier(path, "--classifier"), preferences), {"": 1.0}
        )
    models = load_models(experiment, run.reward)
    return evaluate_models(models, folded_moments(experiment.reward, run.reward, len(models)), preferences)


class TextGenerator:
    """Answers prompts by a run's policy, or by its SFT model where PPO has not run."""

    def __init__(self, experiment: Experiment, run: RunFolder) -> None:
        self.tokenizer = load_tokenizer(experiment.model.path)
        trunk = build_trunk(experiment.model, experiment.policy, (SAMPLER_ROLE,))
        self.engine = make_transformers_engine(trunk, self.tokenizer, experiment.rollouts)
        self.engine.load_adapter(0, policy_weights(experiment, run))

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[str]:
        """One response a prompt; the same seed gives the same responses."""
        requests = [
            Request(prompt, tuple(encode_prompt(self.tokenizer, prompt)), seed_for(seed, "generate", index))
            for index, prompt in enumerate(prompts)
        ]
        return [decode_response(self.tokenizer, t.response_ids) for t in self.engine.generate(requests, sampling)]


def policy_weights(experiment: Experiment, run: RunFolder) -> AdapterWeights:
    """The adapter of the run's policy, or of its SFT model where there is none. Raises UserError without either."""
    return load_adapter(policy_folder(run), experiment.policy)


def policy_folder(run: RunFolder) -> Path:
    """Where the run's newest model is."""
    for folder in (run.policy, run.sft):
        if folder.is_dir():
            return folder
    raise UserError(f"run {run.path} has no policy/ and no sft/ yet: `align resume {run.path}` goes on with it")
