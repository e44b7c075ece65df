"""Compares what each process of a run will hold with the memory of its GPU, and finds settings under which it fits."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from align.config.schema import Experiment
from align.config.stage import section_of
from align.resources.memory import ModelSizes, estimate_memory, measure, with_microbatches
from align.resources.tensor_uses import Process, TensorUse, bytes_by_gpu

USABLE = 0.9
"""Share of a GPU's memory that tensors can take. CUDA's context, workspaces of libraries and fragmentation have the
rest."""
SMALLEST_MICROBATCH = 512
"""Tokens below which a microbatch is not made smaller: GPUs compute ever more slowly, and little memory is gained."""
FEWEST_SEQUENCES = 8
"""The same for the sequences that a worker decodes at a time."""
MORE_GPUS = "use more ranks at ZeRO 3, larger GPUs or a smaller model"
"""What is left to do where no setting helps."""

Changes = Mapping[str, Any]
"""Values of settings by their dotted names."""


@dataclass(frozen=True)
class GpuFit:
    """What a process needs of its GPU.

    Attributes:
        stage: The stage.
        process: The kind of process.
        bytes: The bytes of its tensors, and of those of other processes on the same GPU.
        settings: Overrides under which all of it fits; none where it fits as it is, or where none have been found.
        bytes_then: The bytes with these overrides.
        fits: Whether it fits as it is.
    """

    stage: str
    process: str
    bytes: float
    settings: tuple[str, ...]
    bytes_then: float
    fits: bool


def compare_with_gpu(experiment: Experiment, uses: Sequence[TensorUse], gpu_bytes: float) -> list[GpuFit]:
    """Compare every process with the memory of a GPU.

    Args:
        experiment: The settings.
        uses: What the processes hold on such GPUs, from `estimate_memory`.
        gpu_bytes: Memory of the GPU of each process.
    """
    limit = USABLE * gpu_bytes
    fits = []
    for process, size in bytes_by_gpu(experiment, uses).items():
        settings: dict[str, Any] = {}
        size_then = size
        if size > limit:
            search = _Search(experiment, process, gpu_bytes)
            settings = search.settings()
            size_then = search.bytes(settings)
        words = tuple(f"{key}={_yaml(value)}" for key, value in settings.items())
        fits.append(GpuFit(*process, bytes=size, settings=words, bytes_then=size_then, fits=size <= limit))
    return fits


class _Search:
    """Looks for settings under which a process fits on its GPU.

    Where a microbatch is left open, changes of other settings change the number of its tokens, too.
    """

    def __init__(self, experiment: Experiment, process: Process, gpu_bytes: float) -> None:
        self.experiment = experiment
        self.process = process
        self.gpu_bytes = gpu_bytes
        self.sizes: dict[str, ModelSizes] = {}

    def settings(self) -> dict[str, Any]:
        """The first of the changes that suffice, without those that the others do without; none if all do not."""
        stages = [self.process[0]]
        filled = with_microbatches(self.experiment, stages, self._sizes_of(self.experiment), self.gpu_bytes)
        for changes_of in (_changes, _changes_with_four_bits):
            prefixes = self._prefixes(changes_of(filled, self.process))
            if prefixes and self.fits(prefixes[-1]):
                return self._fewest(prefixes[bisect_left(prefixes, True, key=self.fits)])
        return {}

    def _fewest(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Take back those changes that the others do without."""
        for key in list(changes):
            fewer = {name: value for name, value in changes.items() if name != key}
            if change_settings(self.experiment, fewer) is not None and self.fits(fewer):
                changes = fewer
        return changes

    def fits(self, changes: Changes) -> bool:
        """Whether the process fits with these changes."""
        return self.bytes(changes) <= USABLE * self.gpu_bytes

    def bytes(self, changes: Changes) -> float:
        """The bytes on the GPU of the process with these changes, which go together."""
        changed = change_settings(self.experiment, changes)
        assert changed is not None
        uses = estimate_memory(changed, [self.process[0]], self._sizes_of(changed), self.gpu_bytes)
        return bytes_by_gpu(changed, uses).get(self.process, 0.0)

    def _prefixes(self, possible: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
        """The changes one after another, each with those before it; without those that do not go with them."""
        prefixes = []
        changes: dict[str, Any] = {}
        for key, value in possible:
            more = changes | {key: value}
            if change_settings(self.experiment, more) is not None:
                changes = more
                prefixes.append(changes)
        return prefixes

    def _sizes_of(self, experiment: Experiment) -> ModelSizes:
        key = f"{experiment.model.path} {experiment.model.dtype} {experiment.policy.model_dump_json()}"
        if key not in self.sizes:
            self.sizes[key] = measure(experiment.model, experiment.policy)
        return self.sizes[key]


def _changes(experiment: Experiment, process: Process) -> Iterator[tuple[str, Any]]:
    """Settings that make a process smaller, in the order in which they should be tried."""
    stage, kind = process
    section = section_of(stage)
    if "worker" not in kind:
        yield "model.gradient_checkpointing", True
        tokens = getattr(experiment, section).tokens_per_microbatch
        while tokens >= 2 * SMALLEST_MICROBATCH:
            tokens //= 2
            yield f"{section}.tokens_per_microbatch", tokens
        if "ranks" in kind:
            yield f"{section}.zero", 2
            yield f"{section}.zero", 3
    sequences = experiment.rollouts.max_num_seqs
    while stage == "ppo" and sequences >= 2 * FEWEST_SEQUENCES:
        sequences //= 2
        yield "rollouts.max_num_seqs", sequences


def _changes_with_four_bits(experiment: Experiment, process: Process) -> Iterator[tuple[str, Any]]:
    """The same, after the base model is quantised, which ZeRO 3 cannot shard; none where the method is not LoRA."""
    if experiment.policy.method == "lora":
        yield "policy.method", "qlora"
        yield from _changes(experiment, process)


def change_settings(experiment: Experiment, changes: Changes) -> Experiment | None:
    """Change settings of an experiment.

    Args:
        experiment: The experiment, which stays as it is.
        changes: Values by dotted names.

    Returns:
        Another experiment; None where the settings do not go together.
    """
    values = experiment.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    try:
        return Experiment.model_validate(values)
    except ValidationError:
        return None


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
