"""The stage `classify`: trains a classifier or a regression model on labelled texts, and evaluates it."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from align.data.labels import verbalizer_ids
from align.evaluation.classifier import evaluate_classifier, headline_figures
from align.evaluation.reward_model import write_diagnostics
from align.roles.build import build_sft_trunk
from align.roles.text_classifier import CLASSIFIER_ROLE, TextClassifier
from align.runs.folder import RunFolder, read_facts
from align.stages.context import StageContext
from align.stages.microbatch_size import with_kept_size
from align.stages.supervised import train
from align.supervised.classifier_objective import ClassifierBlueprint
from align.supervised.fit import FitResult, fitted_weights
from policies.heads import LinearHead

STAGE_NAME = "classify"
LOGGED = ("accuracy", "f1_macro", "rmse", "mae", "pearson", "spearman")
"""The figures that are metrics of the stage's last step."""


def run_classify(context: StageContext) -> None:
    """Train a model on the labelled texts; write it and its figures to `classifier/`."""
    started = time.perf_counter()
    datasets = context.datasets
    model, result = _train(context)
    figures, worst_errors = evaluate_classifier(model, datasets.labels_heldout, datasets.labels)
    context.tracker.log(STAGE_NAME, result.steps, _metrics(figures))
    skipped = {"skipped_rows": len(datasets.skipped.get("labels", []))}
    facts = asdict(result) | skipped | {"heldout": headline_figures(figures)}
    with context.new_product(context.run.product(STAGE_NAME), facts, started) as folder:
        model.save(folder)
        write_diagnostics(folder, figures, worst_errors)


def _metrics(figures: Mapping[str, Any]) -> dict[str, float]:
    return {f"classifier/heldout_{name}": figures[name] for name in LOGGED if name in figures}


def _train(context: StageContext) -> tuple[TextClassifier, FitResult]:
    """Train the model, starting from the SFT model."""
    context = with_kept_size(context, STAGE_NAME)
    experiment = context.experiment
    settings = experiment.classify
    datasets = context.datasets
    assert datasets.label_space is not None  # the labels have been read
    sft = context.sft_weights()
    blueprint = ClassifierBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        sft=sft,
        trains_adapter=settings.trains == "adapter",
        space=datasets.label_space,
        examples=datasets.labels,
        heldout=datasets.labels_heldout,
        learning_rate=settings.learning_rate,
        verbalizers=verbalizer_ids(settings.verbalizers, datasets.label_space, context.tokenizer),
    )
    fit_context = context.fit_context(STAGE_NAME, settings)
    result = train(
        context=context,
        build_objective=blueprint.build,
        lengths=[text.length for text in datasets.labels],
        settings=settings,
        fit_context=fit_context,
    )
    trained = [CLASSIFIER_ROLE] if blueprint.trains_adapter else []
    weights = fitted_weights(fit_context, trained, [CLASSIFIER_ROLE])
    trunk = build_sft_trunk(
        model=experiment.model,
        policy=experiment.policy,
        seed=experiment.seed,
        purpose=STAGE_NAME,
        roles=(CLASSIFIER_ROLE,),
        sft=weights.adapters.get(CLASSIFIER_ROLE, sft),
    )
    head = LinearHead(trunk.width, blueprint.space.outputs)
    head.load_state_dict({"weight": weights.heads[CLASSIFIER_ROLE]["0.weight"]})
    return TextClassifier(trunk, head.to(trunk.causal.device), blueprint.space).eval(), result


def classifier_figures(run: RunFolder) -> dict[str, Any]:
    """The classifier's part of `evaluation.json`."""
    return {"classifier": read_facts(run.product(STAGE_NAME))["heldout"]}
