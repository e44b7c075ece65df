"""What a run will do and need, before it does it."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from align.cluster import cores, threads
from align.fit import optimizer_steps
from align.inputs import Inputs, trains_reward, trains_sft
from align.schema import Experiment
from policies.copies import make_trunk
from policies.loading import load_model_config
from policies.schema import ModelSettings, PolicySettings
from rewards.schema import FitSettings

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """Parameters of the base, of one adapter, and of a head."""

    base: int
    adapter: int
    head: int


def measure(model: ModelSettings, policy: PolicySettings) -> Sizes:
    """Count parameters on the meta device, without loading a weight."""
    config = copy.deepcopy(load_model_config(model.path))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in base.parameters())
        trunk = make_trunk(base, policy, ("policy",))
    return Sizes(count, sum(p.numel() for p in trunk.adapter("policy").values()), trunk.width + 1)


def plan_table(experiment: Experiment, inputs: Inputs, stages: list[str]) -> Table:
    """The plan as a table for people: data, steps, tokens, memory, processes, files."""
    table = Table(title=f"plan of {experiment.name}", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in plan_lines(experiment, inputs, stages, measure(experiment.model, experiment.policy)):
        table.add_row(name, text)
    return table


def plan_lines(experiment: Experiment, inputs: Inputs, stages: list[str], sizes: Sizes) -> list[tuple[str, str]]:
    """Name and text of each line of the plan."""
    lines = [("stages", " → ".join(stages) or "nothing is left to do")]
    if trains_sft(experiment) and "sft" in stages:
        lines.append(("sft", _fit(len(inputs.examples), "demonstrations", experiment.sft)))
    if trains_reward(experiment) and "reward" in stages:
        lines.append(("reward", _fit(len(inputs.comparisons), "pairs", experiment.reward)))
    if "ppo" in stages:
        lines += _ppo(experiment, inputs, sizes)
    lines += [("skipped rows", f"{len(why)} of data.{source}") for source, why in inputs.skipped.items()]
    return [*lines, ("written to", str(Path(experiment.runs) / experiment.name))]


def _fit(rows: int, what: str, settings: FitSettings) -> str:
    steps = optimizer_steps(rows, settings)
    return f"{rows:,} {what}, {settings.epochs:g} epochs of batches of {settings.batch}: {steps:,} optimizer steps"


def _ppo(experiment: Experiment, inputs: Inputs, sizes: Sizes) -> list[tuple[str, str]]:
    ppo, rollouts, learner = experiment.ppo, experiment.rollouts, experiment.learner
    episodes = ppo.steps * ppo.batch
    updates = ppo.steps * ppo.epochs * ppo.minibatches
    processes = max(1, rollouts.workers) + max(1, learner.ranks) if rollouts.workers or learner.ranks else 1
    base = sizes.base * BYTES[experiment.model.dtype]
    # Two adapters and the head train: weight, gradient and two moments of Adam, 16 bytes a number.
    trained = (2 * sizes.adapter + sizes.head) * (16 if learner.optimizer == "adamw" else 8)
    frozen = 2 * sizes.adapter * 4
    each = max(rollouts.workers, learner.ranks, 1)
    return [
        ("ppo", f"{ppo.steps:,} steps of {ppo.batch}: {episodes:,} episodes from {len(inputs.prompts):,} prompts"),
        ("updates", f"{ppo.epochs} epochs × {ppo.minibatches} minibatches a step: {updates:,} optimizer steps"),
        ("tokens", f"at most {episodes * rollouts.max_new_tokens:,} generated, {rollouts.max_new_tokens} a response"),
        ("base model", f"{sizes.base / 1e6:,.1f} M parameters, {_bytes(base)} in each of {processes} processes"),
        ("adapters", f"{sizes.adapter / 1e6:,.2f} M parameters a role; each update sends {_bytes(sizes.adapter * 4)}"),
        ("roles", f"policy and critic with optimizer {_bytes(trained)}, reference and reward {_bytes(frozen)}"),
        ("processes", f"{rollouts.workers} rollout workers, {learner.ranks} learner ranks, {cores()} cores, "
                      f"{threads(experiment.cluster, each)} threads each"),
        ("evaluation", f"{len(inputs.prompts_heldout)} held-out prompts"),
    ]  # fmt: skip


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
