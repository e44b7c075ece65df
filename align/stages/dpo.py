"""The stage of preference optimisation: trains the policy on preferences, and compares it with the reference."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.data.datasets import evaluates_policy
from align.evaluation.policy import Evaluation
from align.runs.folder import RunFolder
from align.runtime.atomic_files import write_json
from align.scoring.build import REWARD_STATE
from align.stages.context import StageContext
from align.stages.microbatch_size import with_kept_size
from align.stages.policy_evaluation import LoadedReward
from align.stages.supervised import train
from align.supervised.dpo_objective import POLICY_ROLE, DpoBlueprint
from align.supervised.fit import FitResult, fitted_weights
from policies.files.adapters import save_adapter
from policies.trunk import AdapterWeights

POLICY_EVALUATION = "evaluation.json"


def run_dpo(context: StageContext) -> None:
    """Train the policy on the preferences; write it, with its comparison with the reference, to `dpo/`.

    The comparison needs a reward: without one, only the held-out preferences tell how good the policy is.
    """
    started = time.perf_counter()
    context = with_kept_size(context, "dpo")
    experiment = context.experiment
    policy, result = _train(context)
    facts = asdict(result) | {"skipped_rows": len(context.datasets.skipped.get("preferences", []))}
    with context.new_product(context.run.path / "dpo", facts, started) as folder:
        save_adapter(folder, policy, experiment.policy, experiment.model.path)
        if evaluates_policy(experiment):
            _evaluate(context, policy, result.best_step, folder)


def _train(context: StageContext) -> tuple[AdapterWeights, FitResult]:
    """Train the policy, starting from the SFT model."""
    experiment = context.experiment
    settings = experiment.dpo
    preferences = context.datasets.preferences
    blueprint = DpoBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        sft=context.sft_weights(),
        examples=preferences,
        heldout=context.datasets.preferences_heldout,
        settings=settings,
    )
    fit_context = context.fit_context("dpo", settings)
    lengths = [preference.length for preference in preferences]
    result = train(context, blueprint.build, lengths, settings, fit_context)
    return fitted_weights(fit_context, [POLICY_ROLE], []).adapters[POLICY_ROLE], result


def _evaluate(context: StageContext, policy: AdapterWeights, step: int, folder: Path) -> None:
    """Compare the policy with the reference; write the figures and the state of the reward, and log the figures."""
    reward = LoadedReward(context.experiment, context.run)
    try:
        reward.calibrate(context.datasets.prompts)
        evaluation = reward.compare(policy, step, context.datasets.prompts_heldout)
        write_json(folder / POLICY_EVALUATION, evaluation.sections)
        write_json(folder / REWARD_STATE, reward.scorers.reward.composition.state())
    finally:
        reward.close()
    _log(context, evaluation, step)


def _log(context: StageContext, evaluation: Evaluation, step: int) -> None:
    tracking = context.experiment.tracking
    figures = {f"eval/{name}": value for name, value in evaluation.sections["policy"].items() if name != "step"}
    context.tracker.log("dpo", step, figures)
    probes = evaluation.probes(context.tokenizer, tracking.probes)
    context.tracker.probes("dpo", step, probes, show=tracking.texts)


def evaluation_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy; empty where it had no reward."""
    path = run.product("dpo") / POLICY_EVALUATION
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return figures
