"""What a run took: the time of its stages and steps, and what was planned beside what was used."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.stage import all_stages
from align.report.run_record import RunRecord
from align.resources.memory import estimate_memory, measure
from align.resources.peak_memory import beside_plan
from align.runtime.wording import byte_count, clock
from policies.errors import UserError

PARTS = {
    "time/rollout": "rollouts",
    "time/score": "scores",
    "time/update": "update",
    "time/sync": "weights to the workers",
    "time/between": "logging, evaluation, checkpoints",
}
"""The parts of a step of PPO, and what is done in each."""


@dataclass(frozen=True)
class Share:
    """A part of a whole.

    Attributes:
        name: What it is.
        text: How much it is.
        percent: Its share of the whole, in percent.
        style: The number of its colour.
    """

    name: str
    text: str
    percent: float
    style: int


def stage_shares(run: RunRecord) -> list[Share]:
    """The time of each finished stage."""
    return _shares(list(run.seconds.items()))


def step_shares(run: RunRecord) -> list[Share]:
    """The time of all steps of PPO, by what was done."""
    seconds = []
    for name, part in PARTS.items():
        total = sum(value for value in run.history.values("ppo", name).values() if value is not None)
        seconds.append((part, total))
    return _shares(seconds)


def _shares(seconds: Sequence[tuple[str, float]]) -> list[Share]:
    total = sum(part for _, part in seconds)
    if total <= 0:
        return []
    shares = []
    for style, (name, part) in enumerate(seconds):
        shares.append(Share(name, f"{clock(part)} ({part / total:.0%})", 100 * part / total, style))
    return shares


def plan_beside_use(run: RunRecord) -> list[tuple[str, str, str]]:
    """What was planned and what was used: a name and two texts for each."""
    rows = list(_steps(run))
    rows += [(f"memory, {stage}: {process}", planned, used) for stage, process, planned, used in _memory(run)]
    return rows


def _steps(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    done = run.history.last_step("ppo")
    if run.experiment is None or done is None:
        return
    ppo = run.experiment.ppo
    tokens = sum(value or 0 for value in run.history.values("ppo", "rollout/tokens").values())
    episodes = ppo.steps * ppo.batch_size
    limit = episodes * run.experiment.rollouts.max_new_tokens
    yield "steps of PPO", f"{ppo.steps:,}", f"{done:,}"
    yield "episodes", f"{episodes:,}", f"{done * ppo.batch_size:,}"
    yield "tokens generated", f"at most {limit:,}", f"{tokens:,.0f}"


def _memory(run: RunRecord) -> Iterator[tuple[str, str, str, str]]:
    """The memory of each kind of process; what was planned is left out where the base model is not at hand."""
    stages = [stage.name for stage in all_stages() if stage.name in run.peaks]
    if run.experiment is None or not stages:
        return
    try:
        if not Path(run.experiment.model.path).is_dir():
            raise UserError("the base model is not on this machine")
        sizes = measure(run.experiment.model, run.experiment.policy)
        uses = estimate_memory(run.experiment, stages, sizes)
    except UserError:
        for stage in stages:
            for process, peak in run.peaks[stage].items():
                yield stage, process, "", byte_count(peak)
        return
    for stage, process, planned, peak in beside_plan(uses, run.peaks):
        yield stage, process, byte_count(planned), byte_count(peak)
