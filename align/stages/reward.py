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
from align.data.datasets import TokenizedPreference
from align.evaluation.reward_model import compute_diagnostics, invariance, write_diagnostics
from align.runs.folder import RunFolder, read_facts
from align.runtime.seeds import seed_for
from align.stages.context import StageContext
from align.supervised.fit import fit
from align.supervised.reward_objective import RewardObjective, branches, rows, score_preferences, shares_prompts
from align.supervised.sft_objective import SFT_ROLE
from policies.files.adapters import load_adapter
from policies.heads import ScalarHead
from policies.methods.build import build_trunk
from policies.schema import PolicySettings
from policies.text.tokenization import decode_response
from policies.trunk import Trunk
from rewards.classifier import Classifier
from rewards.diagnostics import ACCURACY, distribution
from rewards.model import RewardModel, load_heads, member_folder, members_in, read_heads, role_of
from rewards.objective import PreferenceLoss
from rewards.schema import RewardSettings


def run_reward(context: StageContext) -> None:
    """Train the reward model on the feedback, or adopt the one that is given; write it and its figures to `reward/`."""
    started = time.perf_counter()
    adopt = _run_classifier if context.experiment.reward.classifier else _run_on_trunk
    adopt(context, started)


def _run_on_trunk(context: StageContext, started: float) -> None:
    settings, datasets = context.experiment.reward, context.datasets
    roles = [role_of(member) for member in range(_members(settings))]
    trunk = context.new_trunk("reward", *roles)
    models = [_new_model(context, trunk, member) for member in range(len(roles))]
    facts: dict[str, Any] = {"members": len(models)}
    moments_of = fold = [(0.0, 1.0)] * len(models)
    if settings.model:
        for member, model in enumerate(models):
            load_member(model, context.experiment.policy, member_folder(settings.model, member))
        facts["model"] = settings.model
        moments_of = folded_moments(settings, Path(settings.model), len(models))
    else:
        fitted = [_train(context, model, member) for member, model in enumerate(models)]
        facts |= {name: [each[name] for each in fitted] if len(fitted) > 1 else fitted[0][name] for name in fitted[0]}
        facts["skipped_rows"] = len(datasets.skipped.get("preferences", []))
    figures: dict[str, Any] = {}
    worst: list[dict[str, Any]] = []
    if heldout := datasets.preferences_heldout:
        figures, worst = evaluate_models(models, moments_of, heldout, datasets.preferences)
    if settings.normalise and (not settings.model or settings.attributes):
        samples = context.sample_sft(trunk, settings.normalise)
        prompts, responses = [t.request.prompt_ids for t in samples], [t.response_ids for t in samples]
        of_samples = [model.score(prompts, responses, trunk.default_microbatch_tokens()) for model in models]
        fold = moments_of = [moments(scores) for scores in of_samples]
        figures["sft_scores"] = distribution(torch.stack(of_samples).mean(0))
    facts["moments"] = moments_of
    _finish(context, facts, figures, worst, started, partial(_save_members, models, fold))


def folded_moments(settings: RewardSettings, folder: Path, members: int) -> list[tuple[float, float]]:
    """Mean and deviation that a folder's scores are normalised by, of each member; the heads of attributes are not."""
    known = [] if settings.attributes else read_facts(folder).get("moments", [])
    return [(mean, std) for mean, std in known[:members]] or [(0.0, 1.0)] * members


def evaluate_models(
    models: Sequence[RewardModel],
    moments_of: Sequence[tuple[float, float]],
    preferences: Sequence[TokenizedPreference],
    trained: Sequence[TokenizedPreference] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and worst errors of an ensemble, on the scale of training, whatever its scores are normalised by."""
    tokens = models[0].trunk.default_microbatch_tokens()
    scores = [score_preferences(m, preferences, tokens) * std for m, (_, std) in zip(models, moments_of, strict=True)]
    figures, worst = compute_diagnostics(preferences, torch.stack(scores), models[0].weights, trained)
    return figures | {"invariance": invariance(models[0], preferences, tokens)}, worst


def _members(settings: RewardSettings) -> int:
    wanted = settings.ensemble.members
    if not settings.model:
        return wanted or 1
    return wanted or members_in(settings.model)


def _new_model(context: StageContext, trunk: Trunk, member: int) -> RewardModel:
    """With first heads that depend on the seed, the member, and their place."""
    weights, seed = context.experiment.reward.weights, context.experiment.seed
    generator = torch.Generator().manual_seed(seed_for(seed, "reward head", *[member] * (member > 0)))
    heads = [ScalarHead(trunk.width, generator).to(trunk.causal.device) for _ in weights]
    return RewardModel(trunk, heads, weights, role_of(member))


def load_member(model: RewardModel, policy: PolicySettings, folder: Path) -> None:
    """Give a reward model the adapter and heads of a folder."""
    model.trunk.write_adapter(model.role, load_adapter(folder, policy))
    load_heads(model.heads, read_heads(folder, model.weights), folder)


def _train(context: StageContext, model: RewardModel, member: int) -> dict[str, Any]:
    """Train a member; what is known of it."""
    settings, datasets, trunk = context.experiment.reward, context.datasets, model.trunk
    trunk.write_adapter(model.role, trunk.read_adapter(SFT_ROLE))
    if settings.trains == "head":
        trunk.train_only()
    else:
        if not context.run.sft.is_dir():
            trunk.start_training(model.role)
        trunk.train_only(model.role)
    everything = [preference.example for preference in (*datasets.preferences, *datasets.preferences_heldout)]
    loss = PreferenceLoss(everything, settings.weights, settings.ratings)
    objective = RewardObjective(model, loss.to(trunk.causal.device), settings.label_smoothing, settings.centering)
    shared = shares_prompts(trunk, model.role, datasets.preferences)
    fitted = fit(
        objective,
        datasets.preferences if shared else [replace(preference, shared=False) for preference in datasets.preferences],
        branches if shared else rows,
        settings,
        context.fit_context("reward", member),
        metrics="reward_model",
        heldout=partial(objective.heldout_loss, datasets.preferences_heldout, trunk.default_microbatch_tokens()),
        microbatches=partial(trunk.microbatches, padded=shared),
        lora_plus=context.experiment.policy.lora_plus,
    )
    return asdict(fitted)


def _run_classifier(context: StageContext, started: float) -> None:
    settings = context.experiment.reward
    assert settings.classifier is not None
    classifier = Classifier(settings.classifier)
    facts: dict[str, Any] = {"classifier": settings.classifier, "mean": 0.0, "std": 1.0}
    figures: dict[str, Any] = {}
    worst: list[dict[str, Any]] = []
    if heldout := context.datasets.preferences_heldout:
        figures, worst = compute_diagnostics(heldout, classifier_scores(classifier, heldout), {"": 1.0})
    if settings.normalise:
        samples = context.sample_sft(context.new_trunk("reward"), settings.normalise)
        responses = [decode_response(context.tokenizer, t.response_ids) for t in samples]
        scores = classifier.score([t.request.prompt for t in samples], responses)
        facts["mean"], facts["std"] = moments(scores)
        figures["sft_scores"] = distribution(scores)
    _finish(context, facts, figures, worst, started, lambda folder: None)  # the model stays where it is


def classifier_scores(classifier: Classifier, preferences: Sequence[TokenizedPreference]) -> Tensor:
    """What a classifier says of the cases' responses, in the form that `compute_diagnostics` takes."""
    prompts = [preference.example.prompt for preference in preferences for _ in preference.example.responses]
    return classifier.score(prompts, [text for preference in preferences for text in preference.example.responses])[
        None, :, None
    ]


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
    context: StageContext,
    facts: dict[str, Any],
    figures: dict[str, Any],
    worst: list[dict[str, Any]],
    started: float,
    save: Callable[[Path], None],
) -> None:
    """Write the stage's folder: the model, what is known of it, and whether to trust it."""
    judged = {name: figures[name] for name in ACCURACY if name in figures}
    if judged:
        context.tracker.log("reward", _steps(facts), {"reward_model/heldout_accuracy": judged["accuracy"]})
    with context.new_product(context.run.reward, facts | judged, started) as folder:
        save(folder)
        write_diagnostics(folder, figures, worst)


def _steps(facts: dict[str, Any]) -> int:
    steps = facts.get("steps", 0)
    return sum(steps) if isinstance(steps, list) else steps


def _save_members(models: Sequence[RewardModel], moments_of: Sequence[tuple[float, float]], folder: Path) -> None:
    for member, (model, (mean, std)) in enumerate(zip(models, moments_of, strict=True)):
        model.save(member_folder(folder, member), mean, std)


def accuracy_figures(run: RunFolder) -> dict[str, Any]:
    """The reward model's part of `evaluation.json`: its accuracy on held-out preferences, where it has any."""
    facts = read_facts(run.reward)
    if "accuracy" not in facts:
        return {}
    return {"reward_model": {name: facts[name] for name in ACCURACY}}


def moments(scores: Tensor) -> tuple[float, float]:
    """Mean and deviation of scores, the deviation 1 where all are the same."""
    std = float(scores.std(correction=0))
    return float(scores.mean()), std if std > 0 else 1.0
