"""What a run will do and need, before it does it."""

from itertools import groupby
from pathlib import Path

from rich.table import Table

from align.config.schema import Experiment
from align.data.datasets import Datasets, trains_reward, trains_sft
from align.resources.memory import Sizes, measure, memory
from align.resources.ray_cluster import cores, threads
from align.supervised.fit import optimizer_steps
from policies.device import default_device
from policies.layers import native
from rewards.schema import FitSettings


def plan_table(experiment: Experiment, datasets: Datasets, stages: list[str]) -> Table:
    """The plan as a table for people: data, steps, tokens, memory, processes, files."""
    table = Table(title=f"plan of {experiment.name}", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in plan_lines(experiment, datasets, stages, measure(experiment.model, experiment.policy)):
        table.add_row(name, text)
    return table


def plan_lines(experiment: Experiment, datasets: Datasets, stages: list[str], sizes: Sizes) -> list[tuple[str, str]]:
    """Name and text of each line of the plan."""
    lines = [("stages", " → ".join(stages) or "nothing is left to do")]
    if trains_sft(experiment) and "sft" in stages:
        lines.append(("sft", _fit(len(datasets.demonstrations), "demonstrations", experiment.sft)))
    if trains_reward(experiment) and "reward" in stages:
        lines.append(("reward", _fit(len(datasets.preferences), "rows of feedback", experiment.reward)))
    if "ppo" in stages:
        lines += _ppo(experiment, datasets, sizes)
    lines += _memory(experiment, stages, sizes)
    if default_device().type == "cpu" and native.library() is None:
        lines.append(("kernels", "none: no C++ compiler (c++, or what CXX names); every stage takes longer without"))
    lines += [("skipped rows", f"{len(why)} of data.{source}") for source, why in datasets.skipped.items()]
    return [*lines, ("written to", str(Path(experiment.runs) / experiment.name))]


def _fit(rows: int, what: str, settings: FitSettings) -> str:
    steps = optimizer_steps(rows, settings)
    return f"{rows:,} {what}, {settings.epochs:g} epochs of batches of {settings.batch_size}: {steps:,} optimizer steps"


def _ppo(experiment: Experiment, datasets: Datasets, sizes: Sizes) -> list[tuple[str, str]]:
    ppo, rollouts, learner = experiment.ppo, experiment.rollouts, experiment.learner
    episodes = ppo.steps * ppo.batch_size
    updates = ppo.steps * ppo.epochs * ppo.minibatches
    processes = max(1, rollouts.workers) + max(1, learner.ranks) if rollouts.workers or learner.ranks else 1
    each = max(rollouts.workers, learner.ranks, 1)
    return [
        ("ppo", f"{ppo.steps:,} steps of {ppo.batch_size}: {episodes:,} episodes from {len(datasets.prompts):,} prompts"),
        ("updates", f"{ppo.epochs} epochs × {ppo.minibatches} minibatches a step: {updates:,} optimizer steps"),
        ("tokens", f"at most {episodes * rollouts.max_new_tokens:,} generated, {rollouts.max_new_tokens} a response"),
        ("base model", f"{sizes.base / 1e6:,.1f} M parameters, {_bytes(sizes.base_bytes)} in each of {processes} "
                       "processes"),
        ("adapters", f"{sizes.adapter / 1e6:,.2f} M parameters a role; each update sends {_bytes(sizes.adapter * 4)}"),
        ("processes", f"{rollouts.workers} rollout workers, {learner.ranks} learner ranks, {cores()} cores, "
                      f"{threads(experiment.cluster, each)} threads each"),
        ("evaluation", f"{len(datasets.prompts_heldout)} held-out prompts"),
    ]  # fmt: skip


def _memory(experiment: Experiment, stages: list[str], sizes: Sizes) -> list[tuple[str, str]]:
    """A line for each stage and process: its tensors in all, and whose they are."""
    lines = []
    for (stage, process), group in groupby(memory(experiment, stages, sizes), lambda h: (h.stage, h.process)):
        held = list(group)
        parts = ", ".join(f"{h.role} {_bytes(h.bytes)}" for h in held if h.bytes)
        lines.append((f"memory, {stage}: {process}", f"{_bytes(sum(h.bytes for h in held))}: {parts}"))
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
