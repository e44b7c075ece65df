"""Exports the classifier or regression model of a run as a sequence classifier of transformers."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.data.labels import Classes, read_space
from align.outputs.artifacts import classifier_folder
from align.outputs.card_code import label_code
from align.roles.text_classifier import CLASSIFIER_ROLE, KIND, LABELS
from align.runs.folder import RunFolder
from policies.export import export_head, load_live
from policies.files.adapters import load_head
from policies.files.safe_reading import read_object


class ExportedClassifier(NamedTuple):
    """The result of an export.

    Attributes:
        difference: Largest difference between the outputs of the reloaded product and those of the run's model.
        notes: Further lines of the model card.
        code: How to use it, in Python.
    """

    difference: float
    notes: list[str]
    code: str


def export_classifier(
    experiment: Experiment, run: RunFolder, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> ExportedClassifier:
    """Write the classifier of a run, reload it with plain transformers, and compare.

    Its logits are the run's. A regression model's output is in units of the labels, less the mean of the training
    labels, because a sequence classifier has no bias; its config keeps the mean as `label_mean`.

    Args:
        experiment: The run's settings.
        run: The run.
        tokenizer: The base model's tokenizer.
        folder: The folder to write to.

    Raises:
        UserError: The run has no classifier, or its method cannot be merged.
        RuntimeError: The outputs differ by more than rounding explains.
    """
    source = classifier_folder(experiment, run)
    space = read_space(read_object(source / LABELS), source / LABELS)
    weight = load_head(source, KIND)["weight"]  # [C, H]
    live = load_live(experiment.model, experiment.policy, source, CLASSIFIER_ROLE)
    code = label_code(experiment, tokenizer, space)
    if isinstance(space, Classes):
        difference = export_head(
            experiment.model,
            live,
            weight=weight,
            tokenizer=tokenizer,
            folder=folder,
            id2label=dict(enumerate(space.names)),
            label2id={name: number for number, name in enumerate(space.names)},
            problem_type="single_label_classification",
        )
        return ExportedClassifier(difference, [], code)
    difference = export_head(
        experiment.model,
        live,
        weight=space.std * weight,
        tokenizer=tokenizer,
        folder=folder,
        problem_type="regression",
        label_mean=space.mean,
    )
    note = f"Its predictions are its outputs plus {space.mean:.6g}, `label_mean` in its config."
    return ExportedClassifier(difference, ["", note], code)
