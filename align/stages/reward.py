"""The reward stage: trains a reward model on preferences or labels of steps, or adopts one, and evaluates it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.algorithms.advantages import has_spread
from align.config.schema import Experiment
from align.data.examples import TokenizedPreference, TokenizedSteps
from align.evaluation.process_model import LABELLED_STEPS, step_diagnostics
from align.evaluation.reward_model import RELIABILITY, compute_diagnostics, invariance, write_diagnostics
from align.roles.build import SFT_ROLE
from align.runs.folder import RunFolder, read_facts
from align.stages.context import StageContext
from align.stages.microbatch_size import with_kept_size
from align.stages.supervised import train
from align.supervised.fit import FitResult, fitted_weights
from align.supervised.objective import Objective
from align.supervised.reward_objective import RewardBlueprint, score_preferences
from align.supervised.step_objective import StepBlueprint, score_steps
from policies.build import build_trunk
from policies.files.adapters import load_adapter
from policies.heads import ScalarHead
from policies.text.tokenization import Prompt, decode_response
from policies.trunk import AdapterWeights, Trunk
from rewards.classifier import Classifier
from rewards.diagnostics import ACCURACY, distribution
from rewards.model import RewardModel, load_heads, member_folder, members_in, read_heads, role_of
from rewards.preferences import OVERALL
from rewards.schema import RewardSettings
from rewards.step_labels import LabelScale, label_scale
from rewards.terms.process import NUMBERS, PROBABILITIES, STEP_LABELS

Moments = tuple[float, float]
"""Mean and standard deviation of scores."""

IDENTITY: Moments = (0.0, 1.0)
"""Scores normalised by these are unchanged."""

MEASURED = (*ACCURACY, LABELLED_STEPS)
"""The figures that are also facts of the stage; those of preferences have no steps, and those of steps no pairs."""


@dataclass(frozen=True)
class _Outcome:
    """The results of the stage, to be written to `reward/`.

    Attributes:
        facts: The facts for `stage.json`.
        figures: The figures for `diagnostics.json`; empty without held-out preferences.
        worst_errors: The comparisons on which the model is most wrong.
        save: Writes the model to a folder.
    """

    facts: dict[str, Any]
    figures: dict[str, Any]
    worst_errors: list[dict[str, Any]]
    save: Callable[[Path], None]


@dataclass(frozen=True)
class _Member:
    """The weights of a reward model on the shared base model.

    Attributes:
        adapter: Its adapter; None: the SFT model's.
        heads: The weights of its heads.
        source: The folder that they are from, for messages.
    """

    adapter: AdapterWeights | None
    heads: Sequence[Mapping[str, Tensor]]
    source: Path


def run_reward(context: StageContext) -> None:
    """Train the reward model on its data, or adopt a ready-made one; write it and its figures to `reward/`."""
    started = time.perf_counter()
    if context.experiment.reward.classifier:
        outcome = _adopt_classifier(context, context.experiment.reward.classifier)
    elif context.experiment.reward.process:
        outcome = _train_or_load_process(context)
    else:
        outcome = _train_or_load(context)
    measured = {name: outcome.figures[name] for name in MEASURED if name in outcome.figures}
    if "accuracy" in measured:
        step = _last_step(context, outcome.facts)
        context.tracker.log("reward", step, {"reward_model/heldout_accuracy": measured["accuracy"]})
    with context.new_product(context.run.reward, outcome.facts | measured, started) as folder:
        outcome.save(folder)
        write_diagnostics(folder, outcome.figures, outcome.worst_errors)
        _show_errors(context, outcome, folder / RELIABILITY)


def _show_errors(context: StageContext, outcome: _Outcome, plot: Path) -> None:
    """Show the worst errors, if texts may be sent, and the plot, if there is one, with the metrics of the last step."""
    rows = outcome.worst_errors if context.experiment.tracking.texts else []
    step = _last_step(context, outcome.facts)
    context.tracker.show_errors("reward", step, rows, plot if plot.is_file() else None)


def _train_or_load(context: StageContext) -> _Outcome:
    """Train or load reward models, evaluate them on one base model, and normalise them on SFT responses."""
    settings = context.experiment.reward
    count = _member_count(settings)
    facts: dict[str, Any] = {"members": count}
    if settings.model:
        members = [_read_member(context.experiment, settings.model, number) for number in range(count)]
        facts["model"] = settings.model
        current = folded_moments(settings, Path(settings.model), count)
    else:
        members, results = _train_members(context, count)
        facts |= results
        current = [IDENTITY] * count
    trunk = context.new_trunk("reward", *_roles(members))
    models = _put_on(trunk, members, settings)
    figures: dict[str, Any] = {}
    worst_errors: list[dict[str, Any]] = []
    if heldout := context.datasets.preferences_heldout:
        figures, worst_errors = evaluate_models(models, current, heldout, context.datasets.preferences)
    to_fold = [IDENTITY] * len(models)
    if settings.normalise and (not settings.model or settings.attributes):
        scores = _sft_scores(context, models)
        current = [moments(member_scores) for member_scores in scores]
        to_fold = current
        figures["sft_scores"] = distribution(torch.stack(scores).mean(0))
    facts["moments"] = current
    return _Outcome(facts, figures, worst_errors, save=partial(_save_members, models, to_fold))


def _train_or_load_process(context: StageContext) -> _Outcome:
    """Train or load a process reward model, and evaluate it. Its scores are not normalised: they mean something."""
    experiment = context.experiment
    settings = experiment.reward
    facts: dict[str, Any] = {"members": 1}
    if settings.model:
        member = _read_member(experiment, settings.model, 0)
        facts |= {"model": settings.model, STEP_LABELS: read_facts(Path(settings.model))[STEP_LABELS]}
    else:
        member, results = _train_on_steps(context)
        facts |= results
    models = _put_on(context.new_trunk("reward", *_roles([member])), [member], settings)
    figures: dict[str, Any] = {}
    worst_errors: list[dict[str, Any]] = []
    if heldout := context.datasets.step_labels_heldout:
        figures, worst_errors = evaluate_process_model(models[0], facts, heldout, context.datasets.step_labels)
    return _Outcome(facts, figures, worst_errors, save=partial(_save_members, models, [IDENTITY]))


def _train_on_steps(context: StageContext) -> tuple[_Member, dict[str, Any]]:
    """Train a process reward model on labels of steps. Its head computes logits, or labels that are numbers."""
    context = with_kept_size(context, "reward")
    experiment = context.experiment
    examples = context.datasets.step_labels
    blueprint = StepBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        sft=context.sft_weights(),
        examples=examples,
        heldout=context.datasets.step_labels_heldout,
        settings=experiment.reward,
    )
    member, result = _fit(context, blueprint.build, examples, number=0)
    scale = label_scale([example.example for example in examples])
    facts = asdict(result) | {"skipped_rows": len(context.datasets.skipped.get("step_labels", []))}
    facts[STEP_LABELS] = PROBABILITIES if scale.are_probabilities else NUMBERS
    return _in_units_of_labels(member, scale), facts


def _in_units_of_labels(member: _Member, scale: LabelScale) -> _Member:
    """The member with a head that computes labels instead of standardised ones."""
    (head,) = member.heads
    unscaled = {"weight": head["weight"] * scale.std, "bias": head["bias"] * scale.std + scale.mean}
    return replace(member, heads=[unscaled])


def evaluate_process_model(
    model: RewardModel,
    facts: Mapping[str, Any],
    examples: Sequence[TokenizedSteps],
    trained: Sequence[TokenizedSteps] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a process reward model on labels of steps.

    Args:
        model: The model.
        facts: The facts of its stage, which say what its labels were.
        examples: Held-out examples.
        trained: The training examples, by which the baseline is chosen.

    Returns:
        The figures of `diagnostics.json`, and the worst errors in full.
    """
    scores = score_steps(model, examples, model.trunk.default_microbatch_tokens())
    return step_diagnostics(examples, scores, facts[STEP_LABELS] == PROBABILITIES, trained)


def _train_members(context: StageContext, count: int) -> tuple[list[_Member], dict[str, Any]]:
    """Train the members of an ensemble one after another. Returns their facts, as lists where there are several."""
    members = []
    results = []
    for number in range(count):
        member, result = _train(context, number)
        members.append(member)
        results.append(asdict(result))
    facts: dict[str, Any] = results[0]
    if count > 1:
        facts = {}
        for name in results[0]:
            facts[name] = [result[name] for result in results]
    return members, facts | {"skipped_rows": len(context.datasets.skipped.get("preferences", []))}


def _train(context: StageContext, number: int) -> tuple[_Member, FitResult]:
    """Train a member, starting from the SFT model."""
    context = with_kept_size(context, "reward")
    experiment = context.experiment
    settings = experiment.reward
    preferences = context.datasets.preferences
    blueprint = RewardBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        member=number,
        sft=context.sft_weights(),
        examples=preferences,
        heldout=context.datasets.preferences_heldout,
        settings=settings,
    )
    return _fit(context, blueprint.build, preferences, number)


def _fit(
    context: StageContext,
    build: Callable[[], Objective[Any]],
    examples: Sequence[TokenizedPreference] | Sequence[TokenizedSteps],
    number: int,
) -> tuple[_Member, FitResult]:
    """Train a member on its examples."""
    settings = context.experiment.reward
    role = role_of(number)
    fit_context = context.fit_context("reward", settings, number)
    lengths = [example.length for example in examples]
    result = train(context, build, lengths, settings, fit_context)
    trained = [role] if settings.trains == "adapter" else []
    weights = fitted_weights(fit_context, trained, [role])
    heads = []
    for index in range(len(settings.weights)):
        heads.append({part: weights.heads[role][f"{index}.{part}"] for part in ("weight", "bias")})
    return _Member(weights.adapters.get(role), heads, context.run.reward), result


def _read_member(experiment: Experiment, folder: str | Path, number: int) -> _Member:
    """Read a member of a saved reward model."""
    path = member_folder(folder, number)
    return _Member(load_adapter(path, experiment.policy), read_heads(path, experiment.reward.weights), path)


def _roles(members: Sequence[_Member]) -> tuple[str, ...]:
    """The roles of the members of an ensemble."""
    return tuple(role_of(number) for number in range(len(members)))


def _put_on(trunk: Trunk, members: Sequence[_Member], settings: RewardSettings) -> list[RewardModel]:
    """The members of an ensemble on a trunk that has their roles, and the SFT model's where a member has no adapter."""
    models = []
    for role, member in zip(_roles(members), members, strict=True):
        trunk.write_adapter(role, member.adapter or trunk.read_adapter(SFT_ROLE))
        heads = [ScalarHead.zeros(trunk.width).to(trunk.causal.device) for _ in settings.weights]
        load_heads(heads, member.heads, member.source)
        models.append(RewardModel(trunk, heads, settings.weights, role))
    return models


def _sft_scores(context: StageContext, models: Sequence[RewardModel]) -> list[Tensor]:
    """Each member's scores of the same SFT responses."""
    trunk = models[0].trunk
    samples = context.sample_sft(trunk, context.experiment.reward.normalise)
    prompts = [trajectory.request.prompt_ids for trajectory in samples]
    responses = [trajectory.response_ids for trajectory in samples]
    return [model.score(prompts, responses, trunk.default_microbatch_tokens()) for model in models]


def folded_moments(settings: RewardSettings, folder: Path, members: int) -> list[Moments]:
    """The moments that are already folded into the saved heads of each member of a reward model.

    The heads of named attributes are saved as they are, without moments.
    """
    saved = [] if settings.attributes else read_facts(folder).get("moments", [])
    return [(mean, std) for mean, std in saved[:members]] or [IDENTITY] * members


def evaluate_models(
    models: Sequence[RewardModel],
    folded: Sequence[Moments],
    preferences: Sequence[TokenizedPreference],
    trained: Sequence[TokenizedPreference] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate an ensemble on preferences, on the scale of training, whatever normalisation its heads contain.

    Args:
        models: The members.
        folded: The moments that are folded into each member's heads.
        preferences: Held-out examples.
        trained: The training examples, to which the length baseline is fitted.

    Returns:
        The figures of `diagnostics.json`, and the worst errors in full.
    """
    tokens = models[0].trunk.default_microbatch_tokens()
    scores = []
    for model, (_, std) in zip(models, folded, strict=True):
        scores.append(score_preferences(model, preferences, tokens) * std)
    figures, worst_errors = compute_diagnostics(preferences, torch.stack(scores), models[0].weights, trained)
    return figures | {"invariance": invariance(models[0], preferences, tokens)}, worst_errors


def _member_count(settings: RewardSettings) -> int:
    if settings.ensemble.members:
        return settings.ensemble.members
    return members_in(settings.model) if settings.model else 1


def _adopt_classifier(context: StageContext, path: str) -> _Outcome:
    """Evaluate a ready-made classifier, and normalise it on SFT responses."""
    settings = context.experiment.reward
    classifier = Classifier(path)
    figures: dict[str, Any] = {}
    worst_errors: list[dict[str, Any]] = []
    if heldout := context.datasets.preferences_heldout:
        figures, worst_errors = compute_diagnostics(heldout, classifier_scores(classifier, heldout), {OVERALL: 1.0})
    mean, std = IDENTITY
    if settings.normalise:
        samples = context.sample_sft(context.new_trunk("reward"), settings.normalise)
        responses = [decode_response(context.tokenizer, trajectory.response_ids) for trajectory in samples]
        scores = classifier.score([trajectory.request.prompt for trajectory in samples], responses)
        mean, std = moments(scores)
        figures["sft_scores"] = distribution(scores)
    facts: dict[str, Any] = {"classifier": path, "mean": mean, "std": std}
    return _Outcome(facts, figures, worst_errors, save=lambda folder: None)  # its weights stay where they are


def classifier_scores(classifier: Classifier, preferences: Sequence[TokenizedPreference]) -> Tensor:
    """A classifier's scores `[1, R, 1]` of all responses of the examples, as `compute_diagnostics` takes them."""
    prompts: list[Prompt] = []
    responses: list[str] = []
    for preference in preferences:
        prompts += [preference.example.prompt] * len(preference.example.responses)
        responses += preference.example.responses
    return classifier.score(prompts, responses)[None, :, None]


def load_models(experiment: Experiment, folder: Path) -> list[RewardModel]:
    """Load the members of a folder's reward model on one shared base model."""
    members = [_read_member(experiment, folder, number) for number in range(members_in(folder))]
    trunk = build_trunk(experiment.model, experiment.policy, _roles(members))
    return _put_on(trunk, members, experiment.reward)


def _last_step(context: StageContext, facts: dict[str, Any]) -> int:
    """The step of the stage at which training ended; 0 for a ready-made model."""
    steps: list[int] | int = facts.get("steps", 0)
    if isinstance(steps, int):
        return steps
    last_member = len(steps) - 1
    return context.fit_context("reward", context.experiment.reward, last_member).first + steps[last_member]


def _save_members(models: Sequence[RewardModel], to_fold: Sequence[Moments], folder: Path) -> None:
    for member, (model, (mean, std)) in enumerate(zip(models, to_fold, strict=True)):
        model.save(member_folder(folder, member), mean, std)


def accuracy_figures(run: RunFolder) -> dict[str, Any]:
    """The reward model's part of `evaluation.json`: its accuracy on held-out preferences or steps, where it has any."""
    facts = read_facts(run.reward)
    if "accuracy" not in facts:
        return {}
    return {"reward_model": {name: facts[name] for name in MEASURED if name in facts}}


def moments(scores: Tensor) -> Moments:
    """Mean and standard deviation of scores `[N]`; the latter 1 where the scores differ by rounding alone."""
    std = float(scores.std(correction=0)) if has_spread(scores) else 1.0
    return float(scores.mean()), std
