"""What a run will do and what it needs, before it starts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.table import Table

from align.config.estimators import is_user_function
from align.config.schema import Experiment
from align.data.datasets import Datasets, evaluates_policy, trains_reward, trains_sft
from align.data.examples import TokenizedDemonstration
from align.data.labels import describe_space
from align.resources.actors import most_actors, reserved_cpus
from align.resources.gpu_fit import MORE_GPUS, compare_with_gpu
from align.resources.memory import FLOAT32, ModelSizes, estimate_memory, measure
from align.resources.node_gpus import GpuMemory, smallest_gpu
from align.resources.peak_memory import beside_plan
from align.resources.placement import CPU, GPU, Node, describe_fit, has_room, no_room, place, total
from align.resources.ray_cluster import ray_cluster
from align.resources.tensor_uses import TensorUse
from align.runtime.wording import byte_count, counted
from policies.device import cores, default_device, gpu_memory
from policies.errors import UserError
from policies.layers import native
from rewards.schema import FitSettings
from rewards.terms.function import UserFunctionSettings


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        name: The name of the run.
        lines: The name and the text of each line.
        uses: What its processes will hold in memory.
    """

    name: str
    lines: list[tuple[str, str]]
    uses: list[TensorUse]


def plan_table(plan: Plan) -> Table:
    """The plan as a table for the terminal."""
    return text_table(f"plan of {plan.name}", plan.lines)


def use_table(plan: Plan, peaks: Mapping[str, Mapping[str, int]]) -> Table:
    """The peak memory of processes beside the plan, as a table for the terminal.

    Args:
        plan: The plan.
        peaks: For each stage that has run, the peak of each kind of process, see `PeakMemory.by_kind`.
    """
    lines = []
    for stage, process, planned, peak in beside_plan(plan.uses, peaks):
        lines.append((f"{stage}: {process}", f"{byte_count(peak)}, planned {byte_count(planned)}"))
    return text_table("peak memory", lines)


def text_table(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    """Lines of a name and a text as a table for the terminal."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in lines:
        table.add_row(name, text)
    return table


def make_plan(
    experiment: Experiment,
    datasets: Datasets,
    stages: list[str],
    *,
    dtype: str | None = None,
    placement: str | None = None,
    note: str | None = None,
    gpu_bytes: float | None = None,
) -> Plan:
    """Plan what the stages will do and need: data, steps, tokens, memory, processes, files.

    Args:
        experiment: The settings.
        datasets: The data that the stages read.
        stages: The stages that will run, in order.
        dtype: The dtype and what has settled it; None: `model.dtype`.
        placement: Where the processes of the stages will run; None: nothing to say.
        note: On what the run's folder holds; None: nothing to say.
        gpu_bytes: Memory of the GPU of each process; None: see `find_gpu`.
    """
    sizes = measure(experiment.model, experiment.policy)
    method = experiment.policy.spec
    lines = [("stages", " → ".join(stages) or "nothing is left to do")]
    if note:
        lines.append(("earlier run", note))
    if experiment.model.architecture:
        lines.append(("base", _made_base(experiment, sizes)))
    lines.append(("method", f"{method.name}: {method.trains}"))
    lines.append(("dtype", dtype or experiment.model.dtype))
    if placement:
        lines.append(("placement", placement))
    lines += _stages(experiment, datasets, stages, sizes)
    gpu = GpuMemory(gpu_bytes) if gpu_bytes else find_gpu(experiment, stages)
    uses = estimate_memory(experiment, stages, sizes, gpu.bytes if gpu else None)
    lines += _memory(uses)
    if gpu:
        lines += _gpus(experiment, uses, gpu)
    if default_device().type == "cpu" and native.library() is None:
        lines.append(
            ("kernels", "none: no C++ compiler (c++, or the one that CXX names); every stage is slower without")
        )
    for source, notes in datasets.notes.items():
        lines += [(f"data.{source}", note) for note in notes]
    for source, reasons in datasets.skipped.items():
        lines.append(("skipped rows", f"{len(reasons)} of data.{source}"))
    lines.append(("written to", str(Path(experiment.runs) / experiment.name)))
    return Plan(experiment.name, lines, uses)


def _made_base(experiment: Experiment, sizes: ModelSizes) -> str:
    """What the base is that the run makes, or has made."""
    config = sizes.trunk.causal.config
    tokens = counted(config.get_text_config().vocab_size, "token")
    return f"made from nothing: {config.model_type}, {_count(sizes.base)} parameters, a tokenizer of {tokens}"


def _stages(
    experiment: Experiment, datasets: Datasets, stages: Sequence[str], sizes: ModelSizes
) -> list[tuple[str, str]]:
    """What each stage will do."""
    lines: list[tuple[str, str]] = []
    if trains_sft(experiment) and "sft" in stages:
        lines.append(("sft", _fit(experiment, experiment.sft, len(datasets.demonstrations), "demonstration")))
        if experiment.data.mixture:
            lines.append(("sft mixture", _mixture(datasets.demonstrations)))
        lines.append(("sft loss", _trained(datasets.demonstrations)))
    if "classify" in stages and datasets.label_space:
        lines.append(("classify", _fit(experiment, experiment.classify, len(datasets.labels), "labelled text")))
        lines.append(("labels", describe_space(datasets.label_space, datasets.labels)))
    if trains_reward(experiment) and "reward" in stages:
        lines.append(("reward", _reward_fit(experiment, datasets)))
    if "dpo" in stages:
        lines.append(("dpo", _fit(experiment, experiment.dpo, len(datasets.preferences), "preference example")))
        lines.append(("dpo loss", f"{experiment.dpo.loss}, β {experiment.dpo.effective_beta:g}"))
        lines.append(("evaluation", _evaluation(experiment, datasets)))
    if "ppo" in stages:
        lines += _ppo(experiment, datasets, sizes)
        lines.append(("reward terms", _terms(experiment)))
        lines += _user_functions(experiment)
    return lines


def _reward_fit(experiment: Experiment, datasets: Datasets) -> str:
    """What the reward stage trains on, and for how many steps."""
    if experiment.reward.process is None:
        return _fit(experiment, experiment.reward, len(datasets.preferences), "preference example")
    labels = sum(len(example.labels) for example in datasets.step_labels)
    responses = _fit(experiment, experiment.reward, len(datasets.step_labels), "response")
    return f"{responses}; {counted(labels, 'labelled step')}"


def describe_placement(experiment: Experiment, stages: Sequence[str]) -> str:
    """Where the actors of some stages will run: a line for the plan.

    Args:
        experiment: The settings.
        stages: The stages.

    Raises:
        UserError: The cluster cannot be joined, or this machine has no room for the actors.
    """
    actors = most_actors(experiment, stages)
    if not actors:
        cluster = experiment.cluster
        threads = cluster.threads or cluster.threads_of_environment or cores()
        return f"this process, {counted(threads, 'thread')}"
    if experiment.cluster.address_to_join:
        return _on_cluster(experiment, actors)
    return _on_this_machine(experiment, actors)


def _on_this_machine(experiment: Experiment, actors: dict[str, int]) -> str:
    resources: dict[str, float] = {CPU: max(cores(), reserved_cpus(experiment, actors))}  # as `ray_cluster` offers
    if gpus := torch.cuda.device_count():
        resources[GPU] = gpus
    nodes = [Node("this machine", resources)]
    placement = place(experiment, actors, gpus)
    if not has_room(placement, nodes):
        raise UserError(no_room(experiment, placement, nodes))
    return f"{placement.description}; on this machine, {counted(cores(), 'core')}"


def _on_cluster(experiment: Experiment, actors: dict[str, int]) -> str:
    with ray_cluster(experiment.cluster, reserved_cpus(experiment, actors)):
        from align.resources.reservation import cluster_nodes  # Ray is slow to import

        nodes = cluster_nodes()
    return describe_fit(experiment, actors, nodes)


def find_gpu(experiment: Experiment, stages: Sequence[str]) -> GpuMemory | None:
    """The GPU that each process has: the smallest of the cluster, where actors use some there, or that of this process.

    Args:
        experiment: The settings.
        stages: The stages that will run.

    Returns:
        Its memory; None where there is no GPU, or no node of the cluster tells.

    Raises:
        UserError: The cluster cannot be joined.
    """
    actors = most_actors(experiment, stages)
    if actors and experiment.cluster.address_to_join:
        with ray_cluster(experiment.cluster, reserved_cpus(experiment, actors)):
            from align.resources.reservation import cluster_nodes

            placement = place(experiment, actors, int(total(cluster_nodes(), GPU)))
            if placement.uses_gpus(actors):
                return smallest_gpu()
    own = gpu_memory()
    return GpuMemory(own) if own else None


def _fit(experiment: Experiment, settings: FitSettings, examples: int, noun: str) -> str:
    epochs = counted(settings.epochs, "epoch")
    steps = counted(settings.optimizer_steps(examples), "optimizer step")
    ranks = experiment.ranks_of(settings)
    where = f" on {counted(ranks, 'learner rank')}" if ranks else ""
    return f"{counted(examples, noun)}, {epochs} in batches of up to {settings.batch_size}: {steps}{where}"


def _mixture(demonstrations: Sequence[TokenizedDemonstration]) -> str:
    """How many examples of an epoch are of each dataset."""
    counts = Counter(demonstration.dataset for demonstration in demonstrations)
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _trained(demonstrations: Sequence[TokenizedDemonstration]) -> str:
    """How much of the demonstrations the loss is over."""
    turns = sum(len(demonstration.turns) for demonstration in demonstrations)
    trained = sum(demonstration.trained_tokens for demonstration in demonstrations)
    tokens = sum(demonstration.length for demonstration in demonstrations)
    cut = sum(demonstration.was_cut for demonstration in demonstrations)
    shortened = f"; {counted(cut, 'row')} cut to fit" if cut else ""
    return f"{counted(turns, 'response')}: {trained:,} of {counted(tokens, 'token')}{shortened}"


def _ppo(experiment: Experiment, datasets: Datasets, sizes: ModelSizes) -> list[tuple[str, str]]:
    ppo = experiment.ppo
    rollouts = experiment.rollouts
    learner = experiment.learner
    episodes = ppo.steps * ppo.batch_size
    updates = ppo.steps * ppo.epochs * ppo.minibatches
    processes = 1
    if rollouts.workers or learner.ranks:
        processes = max(1, rollouts.workers) + max(1, learner.ranks)
    copies = "in one process" if processes == 1 else f"in each of {processes} processes"
    steps = counted(ppo.steps, "step")
    prompts = counted(len(datasets.prompts), "prompt")
    minibatches = f"{counted(ppo.epochs, 'epoch')} × {counted(ppo.minibatches, 'minibatch', 'minibatches')}"
    base = f"{_count(sizes.base)} parameters"
    adapter = f"{_count(sizes.adapter)} parameters"
    return [
        ("ppo", f"{steps} of {ppo.batch_size}: {counted(episodes, 'episode')} from {prompts}"),
        ("updates", f"{minibatches} per step: {counted(updates, 'optimizer step')}"),
        ("KL", f"{ppo.kl_estimator} in the {ppo.kl.where}, coefficient {ppo.kl.coefficient:g}"),
        ("tokens", f"at most {episodes * rollouts.max_new_tokens:,} generated, {rollouts.max_new_tokens} per response"),
        ("base model", f"{base}, {byte_count(sizes.base_bytes)} {copies}"),
        ("adapters", f"{adapter} per role; each update sends {byte_count(sizes.adapter * FLOAT32)}"),
        ("evaluation", _evaluation(experiment, datasets)),
    ]


def _evaluation(experiment: Experiment, datasets: Datasets) -> str:
    if evaluates_policy(experiment):
        return counted(len(datasets.prompts_heldout), "held-out prompt")
    return "held-out preferences alone: without a reward, responses have no score"


def _terms(experiment: Experiment) -> str:
    """The reward's terms by name, each with its kind and, where there is one, the user's function."""
    terms = []
    for name, term in experiment.reward.terms.items():
        kind = term.model_dump(include={"kind"})["kind"]
        if isinstance(term, UserFunctionSettings):
            kind = f"{kind} {term.function}"
        terms.append(name if name == kind else f"{name} ({kind})")
    return ", ".join(terms)


def _user_functions(experiment: Experiment) -> list[tuple[str, str]]:
    """A line for the advantage estimator, the policy loss and the environment, where they are the user's functions."""
    functions = [("estimator", experiment.ppo.estimator), ("policy loss", experiment.ppo.policy_loss)]
    if experiment.rollouts.environment:
        functions.append(("environment", experiment.rollouts.environment))
    return [(name, function) for name, function in functions if is_user_function(function)]


def _memory(uses: Sequence[TensorUse]) -> list[tuple[str, str]]:
    """A line per stage and process: the bytes of its tensors, in total and by role."""
    lines = []
    for (stage, process), group in groupby(uses, lambda use: use.owner):
        own = list(group)
        total = byte_count(sum(use.bytes for use in own))
        roles = ", ".join(_role(use) for use in own if use.bytes or use.transient)
        lines.append((f"memory, {stage}: {process}", f"{total}: {roles}"))
    return lines


def _gpus(experiment: Experiment, uses: Sequence[TensorUse], gpu: GpuMemory) -> list[tuple[str, str]]:
    """A line per stage and process: its bytes beside the memory of a GPU and, if they are too many, what would help."""
    lines = []
    where = f", the smallest GPU, on node {gpu.node}" if gpu.node else ""
    for fit in compare_with_gpu(experiment, uses, gpu.bytes):
        text = f"{byte_count(fit.bytes)} of {byte_count(gpu.bytes)}{where}"
        if fit.settings:
            text += f": too much; {byte_count(fit.bytes_then)} with {' '.join(fit.settings)}"
        elif not fit.fits:
            text += f": too much, whatever the settings; {MORE_GPUS}"
        lines.append((f"GPU, {fit.stage}: {fit.process}", text))
    return lines


def _role(use: TensorUse) -> str:
    return f"{use.role} {byte_count(use.bytes)}" if use.bytes else use.role


def _count(parameters: int) -> str:
    """A number of parameters in thousands or millions."""
    if parameters < 1_000_000:
        return f"{parameters / 1e3:,.1f} K"
    return f"{parameters / 1e6:,.2f} M"
