"""Stage two: a reward model from feedback of every kind, or the one that is given, and whether to trust it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.schema import Experiment
from align.data.datasets import Case
from align.evaluation.reward_model import diagnose, invariance, write_diagnostics
from align.runs.folder import read_facts
from align.runtime.seeds import seed_for
from align.stages.context import Job
from align.stages.sft import ROLE as SFT
from align.supervised.fit import fit
from align.supervised.reward_objective import FeedbackObjective, branches, rows, score_cases, shares_prompts
from policies.files.adapters import load_adapter
from policies.heads import ScalarHead
from policies.methods.build import build_trunk
from policies.schema import PolicySettings
from policies.text.tokenization import decode_response
from policies.trunk import Trunk
from rewards.classifier import Classifier
from rewards.diagnostics import ACCURACY, distribution
from rewards.model import RewardModel, load_heads, member_folder, members_in, read_heads, role_of
from rewards.objective import FeedbackLoss
from rewards.schema import RewardSettings


def run_reward(job: Job) -> None:
    """Train the reward model on the feedback, or adopt the one that is given; write it and its figures to `reward/`."""
    started = time.perf_counter()
    adopt = _run_classifier if job.experiment.reward.classifier else _run_on_trunk
    adopt(job, started)


def _run_on_trunk(job: Job, started: float) -> None:
    settings, inputs = job.experiment.reward, job.inputs
    roles = [role_of(member) for member in range(_members(settings))]
    trunk = job.new_trunk("reward", *roles)
    models = [_new_model(job, trunk, member) for member in range(len(roles))]
    facts: dict[str, Any] = {"members": len(models)}
    moments_of = fold = [(0.0, 1.0)] * len(models)
    if settings.model:
        for member, model in enumerate(models):
            load_member(model, job.experiment.policy, member_folder(settings.model, member))
        facts["model"] = settings.model
        moments_of = folded_moments(settings, Path(settings.model), len(models))
    else:
        fitted = [_train(job, model, member) for member, model in enumerate(models)]
        facts |= {name: [each[name] for each in fitted] if len(fitted) > 1 else fitted[0][name] for name in fitted[0]}
        facts["skipped_rows"] = len(inputs.skipped.get("preferences", []))
    figures: dict[str, Any] = {}
    worst: list[dict[str, Any]] = []
    if heldout := inputs.cases_heldout:
        figures, worst = judge_models(models, moments_of, heldout, inputs.cases)
    if settings.normalise and (not settings.model or settings.attributes):
        samples = job.sample_sft(trunk, settings.normalise)
        prompts, responses = [t.request.prompt_ids for t in samples], [t.response_ids for t in samples]
        of_samples = [model.score(prompts, responses, trunk.tokens_a_pass()) for model in models]
        fold = moments_of = [moments(scores) for scores in of_samples]
        figures["sft_scores"] = distribution(torch.stack(of_samples).mean(0))
    facts["moments"] = moments_of
    _finish(job, facts, figures, worst, started, partial(_save_members, models, fold))


def folded_moments(settings: RewardSettings, folder: Path, members: int) -> list[tuple[float, float]]:
    """Mean and deviation that a folder's scores are normalised by, of each member; the heads of attributes are not."""
    known = [] if settings.attributes else read_facts(folder).get("moments", [])
    return [(mean, deviation) for mean, deviation in known[:members]] or [(0.0, 1.0)] * members


def judge_models(
    models: Sequence[RewardModel],
    moments_of: Sequence[tuple[float, float]],
    cases: Sequence[Case],
    trained: Sequence[Case] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and worst errors of an ensemble, on the scale of training, whatever its scores are normalised by."""
    tokens = models[0].trunk.tokens_a_pass()
    scores = [score_cases(m, cases, tokens) * deviation for m, (_, deviation) in zip(models, moments_of, strict=True)]
    figures, worst = diagnose(cases, torch.stack(scores), models[0].weights, trained)
    return figures | {"invariance": invariance(models[0], cases, tokens)}, worst


def _members(settings: RewardSettings) -> int:
    wanted = settings.ensemble.members
    if not settings.model:
        return wanted or 1
    return wanted or members_in(settings.model)


def _new_model(job: Job, trunk: Trunk, member: int) -> RewardModel:
    """With first heads that depend on the seed, the member, and their place."""
    weights, seed = job.experiment.reward.weights, job.experiment.seed
    generator = torch.Generator().manual_seed(seed_for(seed, "reward head", *[member] * (member > 0)))
    heads = [ScalarHead(trunk.width, generator).to(trunk.causal.device) for _ in weights]
    return RewardModel(trunk, heads, weights, role_of(member))


def load_member(model: RewardModel, policy: PolicySettings, folder: Path) -> None:
    """Give a reward model the adapter and heads of a folder."""
    model.trunk.write_adapter(model.role, load_adapter(folder, policy))
    load_heads(model.heads, read_heads(folder, model.weights), folder)


def _train(job: Job, model: RewardModel, member: int) -> dict[str, Any]:
    """Train a member; what is known of it."""
    settings, inputs, trunk = job.experiment.reward, job.inputs, model.trunk
    trunk.write_adapter(model.role, trunk.read_adapter(SFT))
    if settings.trains == "head":
        trunk.train_only()
    else:
        if not job.run.sft.is_dir():
            trunk.start_training(model.role)
        trunk.train_only(model.role)
    everything = [case.feedback for case in (*inputs.cases, *inputs.cases_heldout)]
    loss = FeedbackLoss(everything, settings.weights, settings.ratings)
    objective = FeedbackObjective(model, loss.to(trunk.causal.device), settings.label_smoothing, settings.centering)
    shared = shares_prompts(trunk, model.role, inputs.cases)
    fitted = fit(
        objective,
        inputs.cases if shared else [replace(case, shared=False) for case in inputs.cases],
        branches if shared else rows,
        settings,
        job.fit_context("reward", member),
        metrics="reward_model",
        heldout=partial(objective.heldout_loss, inputs.cases_heldout, trunk.tokens_a_pass()),
        passes=partial(trunk.passes, padded=shared),
        lora_plus=job.experiment.policy.lora_plus,
    )
    return asdict(fitted)


def _run_classifier(job: Job, started: float) -> None:
    settings = job.experiment.reward
    assert settings.classifier is not None
    classifier = Classifier(settings.classifier)
    facts: dict[str, Any] = {"classifier": settings.classifier, "mean": 0.0, "deviation": 1.0}
    figures: dict[str, Any] = {}
    worst: list[dict[str, Any]] = []
    if heldout := job.inputs.cases_heldout:
        figures, worst = diagnose(heldout, classifier_scores(classifier, heldout), {"": 1.0})
    if settings.normalise:
        samples = job.sample_sft(job.new_trunk("reward"), settings.normalise)
        responses = [decode_response(job.tokenizer, t.response_ids) for t in samples]
        scores = classifier.score([t.request.prompt for t in samples], responses)
        facts["mean"], facts["deviation"] = moments(scores)
        figures["sft_scores"] = distribution(scores)
    _finish(job, facts, figures, worst, started, lambda folder: None)  # the model stays where it is


def classifier_scores(classifier: Classifier, cases: Sequence[Case]) -> Tensor:
    """What a classifier says of the cases' responses, in the form that `diagnose` takes."""
    prompts = [case.feedback.prompt for case in cases for _ in case.feedback.responses]
    return classifier.score(prompts, [text for case in cases for text in case.feedback.responses])[None, :, None]


def load_models(experiment: Experiment, folder: Path) -> list[RewardModel]:
    """The members of the reward model that a folder holds, on one trunk."""
    settings = experiment.reward
    members = range(members_in(folder))
    trunk = build_trunk(experiment.model, experiment.policy, tuple(role_of(member) for member in members))
    models = []
    for member in members:
        heads = [ScalarHead.zeros(trunk.width).to(trunk.causal.device) for _ in settings.weights]
        models.append(RewardModel(trunk, heads, settings.weights, role_of(member)))
        load_member(models[-1], experiment.policy, member_folder(folder, member))
    return models


def _finish(
    job: Job,
    facts: dict[str, Any],
    figures: dict[str, Any],
    worst: list[dict[str, Any]],
    started: float,
    save: Callable[[Path], None],
) -> None:
    """Write the stage's folder: the model, what is known of it, and whether to trust it."""
    judged = {name: figures[name] for name in ACCURACY if name in figures}
    if judged:
        job.tracker.log("reward", _steps(facts), {"reward_model/heldout_accuracy": judged["accuracy"]})
    with job.new_product(job.run.reward, facts | judged, started) as folder:
        save(folder)
        write_diagnostics(folder, figures, worst)


def _steps(facts: dict[str, Any]) -> int:
    steps = facts.get("steps", 0)
    return sum(steps) if isinstance(steps, list) else steps


def _save_members(models: Sequence[RewardModel], moments_of: Sequence[tuple[float, float]], folder: Path) -> None:
    for member, (model, (mean, deviation)) in enumerate(zip(models, moments_of, strict=True)):
        model.save(member_folder(folder, member), mean, deviation)


def moments(scores: Tensor) -> tuple[float, float]:
    """Mean and deviation of scores, the deviation 1 where all are the same."""
    deviation = float(scores.std(correction=0))
    return float(scores.mean()), deviation if deviation > 0 else 1.0
