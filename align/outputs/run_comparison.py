"""`align eval --against`: the policies of two runs on the held-out prompts of the first, by its reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config.judge_settings import JudgeSettings
from align.data.datasets import context_length
from align.evaluation.comparison import comparison_figures
from align.evaluation.judge import Comparisons, Replies, judge_pairs
from align.evaluation.policy import HeldoutPlan
from align.outputs.judges import make_judge
from align.outputs.trained_run import TrainedRun
from align.runtime.atomic_files import write_json
from align.stages.pipeline import load_datasets
from policies.errors import UserError
from policies.text.columns import tools as tools_in
from policies.text.tokenization import decode_response, prompt_text
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory, lengths


def compare_runs(trained: TrainedRun, other: TrainedRun) -> dict[str, Any]:
    """Compare the policies of two runs, and write the figures to `comparisons/` in the first run's folder.

    Both respond to the held-out prompts of the first run, with its sampling settings and the same seeds, and are scored
    by its reward and its gold score, and compared by the judge that its `evaluation.judge` names.

    Args:
        trained: The run whose prompts, reward and gold score are used.
        other: The run whose policy it is compared with.

    Returns:
        The contents of the file: the paths of both `runs`, `prompts`, the figures of `policy` and `against`, and of the
        `judge` where there is one.

    Raises:
        UserError: A run has no policy yet, or the first has no reward or no held-out prompts, or responds in an
            environment; or the other run's tokenizer is another one, or its model has too small a context; or the judge
            cannot be asked.
    """
    experiment = trained.experiment
    if experiment.rollouts.environment:
        raise UserError(f"--against samples without an environment, and run {trained.path} has rollouts.environment")
    prompts = load_datasets(experiment).prompts_heldout
    if not prompts:
        raise UserError(f"run {trained.path} has no held-out prompts: set data.prompts, and a reward or the stage ppo")
    _check_same_tokens(trained, other, prompts)
    temperature = experiment.evaluation.temperature
    sampling = Sampling(
        temperature=experiment.rollouts.temperature if temperature is None else temperature,
        max_new_tokens=experiment.rollouts.max_new_tokens,
    )
    (requests,) = HeldoutPlan(prompts, sampling, experiment.evaluation.seed).draws()
    # Stop strings, too, are those of the first run.
    sampler = TrainedRun(other.experiment.model_copy(update={"rollouts": experiment.rollouts}), other.folder)
    judge = experiment.evaluation.judge
    replies = make_judge(judge) if judge else None  # before anything is sampled
    policy = trained.sample(requests, sampling)
    against = sampler.sample(requests, sampling)
    facts: dict[str, Any] = {"runs": [str(trained.path), str(other.path)], "prompts": len(prompts)}
    facts |= comparison_figures(trained.score_trajectories(policy), trained.score_trajectories(against))
    if judge and replies:
        facts["judge"] = _judged(judge, replies, policy=_texts(trained, policy), against=_texts(trained, against))
    file = comparison_file(trained, other)
    file.parent.mkdir(exist_ok=True)
    write_json(file, facts)
    return facts


def comparison_file(trained: TrainedRun, other: TrainedRun) -> Path:
    """The file in a run's folder that holds its comparison with another run, at the scale of its policy."""
    suffix = "" if trained.scale == 1 else f"-scale-{trained.scale:g}"
    return trained.path / "comparisons" / f"{other.path.name}{suffix}.json"


@dataclass(frozen=True)
class _Texts:
    """Responses to n prompts as text, with their lengths in tokens `[n]`."""

    prompts: list[str]
    responses: list[str]
    lengths: Tensor


def _texts(trained: TrainedRun, trajectories: Sequence[Trajectory]) -> _Texts:
    prompts = [prompt_text(trajectory.request.prompt) for trajectory in trajectories]
    responses = [decode_response(trained.tokenizer, trajectory.response_ids) for trajectory in trajectories]
    return _Texts(prompts, responses, lengths(trajectories).double())


def _judged(settings: JudgeSettings, replies: Replies, policy: _Texts, against: _Texts) -> dict[str, Any]:
    """The judge, and its figures of the first run against the second."""
    first, without_verdict = judge_pairs(replies, settings, policy.prompts, policy.responses, against.responses)
    comparisons = Comparisons(
        first=first,
        weights={name: criterion.weight for name, criterion in settings.rubric.items()},
        longer=policy.lengths - against.lengths,
        without_verdict=without_verdict,
    )
    return {"model": settings.model} | comparisons.figures()


def _check_same_tokens(trained: TrainedRun, other: TrainedRun, prompts: Sequence[Request]) -> None:
    """Raise UserError where the other run reads the prompts as other tokens, or has no room for the responses."""
    why = f"run {other.path} cannot answer the prompts of run {trained.path} for its reward"
    if trained.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(f"{why}: the tokenizers of their base models have different vocabularies")
    for request in prompts:
        tools = None if isinstance(request.prompt, str) else tools_in(request.columns, request.prompt)
        try:
            ids = tuple(other.encoder.prompt(request.prompt, tools))
        except ValueError as error:
            raise UserError(f"{why}: {error}") from None
        if ids != tuple(request.prompt_ids):
            raise UserError(f"{why}: their tokenizers, or chat templates, give different tokens for the same prompt")
    positions = context_length(other.experiment)
    needed = max(len(request.prompt_ids) for request in prompts) + trained.experiment.rollouts.max_new_tokens
    if positions is not None and needed > positions:
        raise UserError(f"{why}: they take {needed} tokens, and its model's context length is {positions}")
