"""Estimates the bytes of tensors that each process of a run will hold, before any is allocated."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config.schema import Experiment
from align.config.stage import section_of
from align.data.datasets import trains_reward, trains_sft
from align.resources.activations import ActivationEstimate
from align.resources.microbatches import set_microbatches
from align.resources.saved_tensors import NeedsDataError
from align.resources.tensor_uses import TensorUse, bytes_by_gpu
from policies.build import base_without_weights, trunk_without_weights
from policies.files.base_model import load_model_config
from policies.methods.layer_adapter_trunk import LayerAdapterTrunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk
from rewards.model import members_in
from rewards.schema import FitSettings
from rewards.terms.classifier import ClassifierTerm

STAGES = ("sft", "classify", "reward", "dpo", "ppo")
"""The stages whose memory is estimated."""
FLOAT32 = 4
"""Bytes of a number in adapters and heads, which are float32 whatever `model.dtype` is."""
TRAINED = {"adamw": 16, "paged_adamw": 16, "sgd": 8}
"""Bytes per trained parameter: weight, gradient and Adam's two moments, all in float32."""


@dataclass(frozen=True)
class ModelSizes:
    """Parameters and bytes of a base model and of what a policy's method adds to it.

    Attributes:
        base: Parameters of the base model.
        base_bytes: Bytes of the base model in memory, with the frozen tensors that the method adds for all roles.
        adapter: Parameters of a policy's adapter.
        sft_trained: Parameters that SFT trains: those of the adapter, or of the encoder that makes it.
        sft_state_bytes: Bytes of what else the steps of SFT change, besides the optimizer's state.
        scalar_adapter: Parameters of a reward model's or a critic's adapter, which has nothing on the LM head.
        head: Parameters of a scalar head.
        merged_bytes: Bytes of a merged copy of the weights that the adapter changes.
        kv_bytes: Bytes of the KV cache per token.
        trunk: The model with its adapters, on the meta device.
    """

    base: int
    base_bytes: int
    adapter: int
    sft_trained: int
    sft_state_bytes: int
    scalar_adapter: int
    head: int
    merged_bytes: int
    kv_bytes: int
    trunk: Trunk


@dataclass(frozen=True)
class Sharding:
    """How what a stage trains is divided over its ranks.

    Attributes:
        ranks: Number of ranks; 0: one in the controller's process.
        zero: The ZeRO stage.
        optimizer: Name of the optimizer.
    """

    ranks: int
    zero: int
    optimizer: str

    @property
    def process(self) -> str:
        """The kind of process."""
        return "learner" if self.ranks < 2 else f"each of {self.ranks} ranks"

    @property
    def shards(self) -> int:
        """Number of parts of weights that are not trained."""
        return max(1, self.ranks) if self.zero == 3 else 1

    def trained_bytes(self, parameters: int) -> float:
        """Bytes of trained parameters on one rank.

        ZeRO 1 to 3 shard the optimizer's state, 2 and 3 the gradient as well, and 3 the weights.
        """
        ranks = max(1, self.ranks)
        unsharded = TRAINED[self.optimizer]
        if self.zero == 0:
            return parameters * unsharded
        moments = unsharded - 2 * FLOAT32
        gradient = FLOAT32 / ranks if self.zero >= 2 else FLOAT32
        weight = FLOAT32 / ranks if self.zero >= 3 else FLOAT32
        return parameters * (weight + gradient + moments / ranks)


def measure(model: ModelSettings, policy: PolicySettings) -> ModelSizes:
    """Count parameters on the meta device, without loading weights.

    Args:
        model: Settings of the base model.
        policy: Settings of the adapters.

    Raises:
        UserError: The model cannot be read.
    """
    base = base_without_weights(model, policy)
    itemsize = base.dtype.itemsize
    parameters = _parameter_count(base)
    base_bytes = _four_bit_bytes(base, policy, itemsize) if policy.spec.four_bits else parameters * itemsize
    # Adapters in layers have nothing on the LM head: those of all roles are alike, and adding one takes a moment.
    are_alike = issubclass(policy.spec.load_trunk(), LayerAdapterTrunk)
    roles = ("policy",) if are_alike else ("policy", "critic")
    own_buffers = {id(buffer) for buffer in base.buffers()}
    trunk = trunk_without_weights(base, policy, roles)
    sft_trained, sft_state_bytes = _measure_sft(trunk)
    base_bytes += sum(buffer.nbytes for buffer in trunk.buffers() if id(buffer) not in own_buffers)
    merges = policy.spec.merges_for_sampling.allows(policy)
    return ModelSizes(
        base=parameters,
        base_bytes=base_bytes,
        adapter=sum(p.numel() for p in trunk.adapter("policy").values()),
        sft_trained=sft_trained,
        sft_state_bytes=sft_state_bytes,
        scalar_adapter=sum(p.numel() for p in trunk.adapter(roles[-1]).values()),
        head=trunk.width + 1,
        merged_bytes=trunk.merged_parameter_count() * itemsize if merges else 0,
        kv_bytes=_kv_elements(base.config) * itemsize,
        trunk=trunk,
    )


def _measure_sft(trunk: Trunk) -> tuple[int, int]:
    """Parameters that SFT trains, and bytes of what else its steps change. The trunk is as before afterwards."""
    trunk.start_training("policy")
    encoder = trunk.encoder("policy")
    trained = trunk.adapter("policy").values() if encoder is None else encoder.parameters()
    parameters = sum(parameter.numel() for parameter in trained)
    state = trunk.step_state("policy")
    state_bytes = 0 if state is None else sum(buffer.nbytes for buffer in state.buffers())
    if encoder is not None:
        trunk.write_adapter("policy", trunk.read_adapter("policy"))  # discards the encoder
    return parameters, state_bytes


def _parameter_count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _kv_elements(config: PretrainedConfig) -> int:
    """Elements of the KV cache per token."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * kv_heads * head_dim


def _four_bit_bytes(base: PreTrainedModel, policy: PolicySettings, itemsize: int) -> int:
    """Bytes with all linear layers but the LM head in four bits, and a scale per 64 weights (Dettmers et al. 2023)."""
    lm_head = base.get_output_embeddings()
    linears = [m for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not lm_head]
    quantized = sum(layer.weight.numel() for layer in linears)
    scales = quantized // 64
    # Double quantization: a scale in one byte, and a second-level scale in float32 per 256 of those.
    scale_bytes = scales + scales // 64 if policy.double_quantization else scales * FLOAT32
    return (_parameter_count(base) - quantized) * itemsize + quantized // 2 + scale_bytes


def estimate_memory(
    experiment: Experiment, stages: list[str], sizes: ModelSizes, gpu_bytes: float | None = None
) -> list[TensorUse]:
    """Estimate the tensors of every process, stage by stage.

    Args:
        experiment: The settings.
        stages: The stages that will run.
        sizes: Sizes of the experiment's model and policy, from `measure`.
        gpu_bytes: Memory of the GPU of each process, on which the size of microbatches depends that the settings leave
            open; None: the processes compute on CPUs.

    Returns:
        One record per process and role, without the interpreter's own memory.
    """
    held = list(_held(experiment, stages, sizes))
    filled = _with_microbatches(experiment, held, sizes.trunk, gpu_bytes)
    activations = ActivationEstimate(filled, sizes.trunk)
    roles = {
        "sft": activations.sft,
        "classify": activations.classify,
        "reward": activations.reward,
        "dpo": activations.dpo,
        "ppo": activations.ppo,
    }
    training = _training_processes(experiment)
    uses: list[TensorUse] = []
    for (stage, process), group in groupby(held, lambda use: use.owner):
        uses += group
        if process == training[stage]:
            uses += _transient(stage, process, roles[stage]())
    return uses


def with_microbatches(
    experiment: Experiment, stages: list[str], sizes: ModelSizes, gpu_bytes: float | None
) -> Experiment:
    """Set `tokens_per_microbatch` of stages, where it is unset, as `estimate_memory` does; for arguments, see there."""
    return _with_microbatches(experiment, list(_held(experiment, stages, sizes)), sizes.trunk, gpu_bytes)


def _with_microbatches(
    experiment: Experiment, held: Sequence[TensorUse], trunk: Trunk, gpu_bytes: float | None
) -> Experiment:
    sums = bytes_by_gpu(experiment, held)
    training = _training_processes(experiment)
    held_by_stage = {stage: size for (stage, process), size in sums.items() if process == training[stage]}
    return set_microbatches(experiment, trunk, held_by_stage, gpu_bytes)


def _training_processes(experiment: Experiment) -> dict[str, str]:
    """The kind of process that trains, by stage."""
    return {stage: sharding_of(experiment, stage).process for stage in STAGES}


def _held(experiment: Experiment, stages: list[str], sizes: ModelSizes) -> Iterator[TensorUse]:
    """What processes hold all the time."""
    training = _training_processes(experiment)
    if trains_sft(experiment) and "sft" in stages:
        yield from _uses("sft", training["sft"], _sft(experiment, sizes))
    if "classify" in stages:
        yield from _uses("classify", training["classify"], _classifier(experiment, sizes))
        yield from _uses("classify", "evaluation", _evaluated_classifier(experiment, sizes))
    if trains_reward(experiment) and "reward" in stages:
        yield from _uses("reward", training["reward"], _reward(experiment, sizes))
        yield from _uses("reward", "evaluation", _evaluated_reward(experiment, sizes))
    if "dpo" in stages:
        yield from _uses("dpo", training["dpo"], _dpo(experiment, sizes))
    if "ppo" in stages:
        yield from _uses("ppo", training["ppo"], _learner(experiment, sizes))
        if workers := experiment.rollouts.workers:
            process = "worker" if workers == 1 else f"each of {workers} workers"
            yield from _uses("ppo", process, _worker(experiment, sizes))


def _uses(stage: str, process: str, roles: Iterable[tuple[str, float]]) -> Iterator[TensorUse]:
    for role, size in roles:
        yield TensorUse(stage, process, role, size)


def _transient(stage: str, process: str, roles: Iterable[tuple[str, float]]) -> list[TensorUse]:
    """What exists only while a microbatch is computed."""
    try:
        return [TensorUse(stage, process, role, size, transient=True) for role, size in roles]
    except NeedsDataError:
        return [TensorUse(stage, process, "activations, which cannot be counted for this model", 0, transient=True)]


def sharding_of(experiment: Experiment, stage: str) -> Sharding:
    """How what a stage trains is divided, from its settings."""
    if stage == "ppo":
        learner = experiment.learner
        return Sharding(learner.ranks, learner.zero, learner.optimizer)
    settings: FitSettings = getattr(experiment, section_of(stage))
    return Sharding(experiment.ranks_of(settings), experiment.zero_of(settings), settings.optimizer)


def _base_bytes(experiment: Experiment, sizes: ModelSizes) -> int:
    """Bytes of the shared base model; with full fine-tuning there is none besides the roles themselves."""
    return sizes.base_bytes if experiment.policy.spec.shares_base else 0


def _sft(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    sharding = sharding_of(experiment, "sft")
    yield "base model", _base_bytes(experiment, sizes) / sharding.shards
    yield "reference, trained", sharding.trained_bytes(sizes.sft_trained) + sizes.sft_state_bytes


def _classifier(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    """The head counts as one of a single output: each class has a row of H numbers, which no plan depends on."""
    sharding = sharding_of(experiment, "classify")
    yield "base model", _base_bytes(experiment, sizes) / sharding.shards
    frozen = sizes.scalar_adapter if experiment.classify.trains == "head" else 0
    trained = sizes.scalar_adapter + sizes.head - frozen
    yield "classifier, trained", sharding.trained_bytes(trained) + frozen * FLOAT32 / sharding.shards


def _evaluated_classifier(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    """The controller evaluates it; where it has trained it, that takes less than before."""
    if experiment.ranks_of(experiment.classify):
        yield "base model", _base_bytes(experiment, sizes)
        yield "classifier", (sizes.scalar_adapter + sizes.head) * FLOAT32


def _reward(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    """The members of an ensemble are trained one after another."""
    sharding = sharding_of(experiment, "reward")
    yield "base model", _base_bytes(experiment, sizes) / sharding.shards
    heads = sizes.head * len(experiment.reward.weights)
    frozen = sizes.scalar_adapter if experiment.reward.trains == "head" else 0
    trained = sizes.scalar_adapter + heads - frozen
    yield "reward, trained", sharding.trained_bytes(trained) + frozen * FLOAT32 / sharding.shards


def _dpo(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    """The reference is the policy before the first step: its log-probabilities are kept, not its weights."""
    sharding = sharding_of(experiment, "dpo")
    yield "base model", _base_bytes(experiment, sizes) / sharding.shards
    yield "policy, trained", sharding.trained_bytes(sizes.adapter)


def _evaluated_reward(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    """The controller evaluates all members at once; a single one that it has trained takes less than before."""
    members = experiment.reward.ensemble.members or 1
    if members > 1 or experiment.ranks_of(experiment.reward):
        yield "base model", _base_bytes(experiment, sizes)
        yield "reference", sizes.adapter * FLOAT32
        heads = sizes.head * len(experiment.reward.weights)
        yield "reward", (sizes.scalar_adapter + heads) * members * FLOAT32


def _learner(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    learner = experiment.learner
    sharding = sharding_of(experiment, "ppo")
    shards = sharding.shards
    yield "base model", _base_bytes(experiment, sizes) / shards
    yield "reference", sizes.adapter * FLOAT32 / shards
    yield from _reward_models(experiment, sizes, shards)
    yield "policy, trained", sharding.trained_bytes(sizes.adapter)
    if experiment.ppo.has_critic:
        yield from _critic(experiment, sizes, sharding)
    if not experiment.rollouts.workers:
        if learner.ranks or learner.zero == 3:
            yield "sampler's base model", _base_bytes(experiment, sizes)
        yield from _sampler(experiment, sizes)


def _reward_models(experiment: Experiment, sizes: ModelSizes, shards: int) -> Iterator[tuple[str, float]]:
    reward = experiment.reward
    for name, term in reward.terms.items():
        if isinstance(term, ClassifierTerm):
            yield f"reward {name}, a separate model", _classifier_bytes(term.path)
    if reward.classifier:
        yield "reward, a separate model", _classifier_bytes(reward.classifier)
    elif reward.has_model:
        members = reward.ensemble.members or (members_in(reward.model) if reward.model else 1)
        heads = sizes.head * (1 + len(reward.attributes))
        yield "reward", (sizes.scalar_adapter + heads) * members * FLOAT32 / shards


def _critic(experiment: Experiment, sizes: ModelSizes, sharding: Sharding) -> Iterator[tuple[str, float]]:
    critic = experiment.ppo.critic
    if critic.kind == "head":
        yield "critic, trained", sharding.trained_bytes(sizes.head)
        return
    if critic.model is not None:
        base = experiment.model.model_copy(update={"path": critic.model})
        sizes = measure(base, experiment.policy)
    if critic.kind == "model":
        yield "critic's base model", _base_bytes(experiment, sizes) / sharding.shards
    yield "critic, trained", sharding.trained_bytes(sizes.scalar_adapter + sizes.head)


def _worker(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    yield "base model", _base_bytes(experiment, sizes)
    yield from _sampler(experiment, sizes)


def _sampler(experiment: Experiment, sizes: ModelSizes) -> Iterator[tuple[str, float]]:
    rollouts = experiment.rollouts
    yield "sampler", sizes.adapter * FLOAT32
    if rollouts.merge and sizes.merged_bytes:
        yield "sampler's merged weights", sizes.merged_bytes
    sequences = min(rollouts.max_num_seqs, rollouts.effective_chunk_size)
    tokens = rollouts.max_prompt_tokens + rollouts.max_new_tokens
    yield "KV cache, at most", sequences * tokens * sizes.kv_bytes


def _classifier_bytes(path: str) -> int:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(load_model_config(path)))
    return _parameter_count(model) * FLOAT32
