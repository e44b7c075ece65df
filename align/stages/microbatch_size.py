"""The size of a stage's microbatches: kept in `config.yaml` once its ranks agree, halved where memory runs out."""

from dataclasses import replace

from align.config.load import load_experiment
from align.config.stage import section_of
from align.runs.folder import RunFolder, change_setting
from align.runtime.failures import Fault, MicrobatchTooLarge
from align.stages.context import StageContext

SIZE = "tokens_per_microbatch"


def setting_of(stage: str) -> str:
    """The name of the setting for the size of a stage's microbatches."""
    return f"{section_of(stage)}.{SIZE}"


def with_kept_size(context: StageContext, stage: str) -> StageContext:
    """The context with the size that `config.yaml` has for the microbatches of a stage, if it has one."""
    section = section_of(stage)
    settings = getattr(context.experiment, section).model_copy(update={SIZE: _kept_size(context.run, stage)})
    return replace(context, experiment=context.experiment.model_copy(update={section: settings}))


def keep_size(run: RunFolder, stage: str, tokens: int) -> None:
    """Keep the size of a stage's microbatches, in tokens, for the rest of the run."""
    if _kept_size(run, stage) != tokens:
        change_setting(run, section_of(stage), SIZE, tokens)


def halve_size(run: RunFolder, stage: str, error: MicrobatchTooLarge) -> int:
    """Halve the size of a stage's microbatches until one like that for which memory did not suffice is divided.

    Args:
        run: The run.
        stage: The stage.
        error: What has failed.

    Returns:
        The size that is kept now, in tokens.

    Raises:
        Fault: The microbatch was a single sequence, which cannot be divided.
    """
    tokens = _kept_size(run, stage)
    if tokens is None or error.sequences == 1:
        raise Fault(
            f"{error}. A sequence cannot be divided: set model.gradient_checkpointing=true, train fewer parameters, or "
            "use more ranks at ZeRO 3; `align plan` tells what each of them saves"
        ) from error
    while tokens >= error.tokens:
        tokens //= 2
    keep_size(run, stage, tokens)
    return tokens


def _kept_size(run: RunFolder, stage: str) -> int | None:
    settings = getattr(load_experiment(run.config), section_of(stage))
    size: int | None = settings.tokens_per_microbatch
    return size
