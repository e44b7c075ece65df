"""A classifier, or a regression model, of texts."""

from align.config.stage import Stage

STAGE = Stage(
    name="classify",
    order=15,
    summary="Train a classifier or a regression model on labelled texts, starting from the run's SFT model.",
    folder="classifier",
    scratch=("checkpoints/classify",),
    axis="classifier/step",
    metric_groups=("classifier",),
    sources=("labels",),
    runner="align.stages.classify:run_classify",
    section="classify",
    product="classifier",
    evaluation="align.stages.classify:classifier_figures",
    standalone=True,
)
