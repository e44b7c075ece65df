"""The tensors that each process of a run will hold, in bytes, before one of them is made."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config.schema import Experiment
from align.data.datasets import trains_reward, trains_sft
from policies.files.base_model import load_model_config
from policies.methods.build import make_trunk
from policies.schema import ModelSettings, PolicySettings
from rewards.model import members_in
from rewards.terms import ClassifierTerm

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED = {"adamw": 16, "paged_adamw": 16, "sgd": 8}
"""Bytes a number that trains: weight, gradient and, of Adam, two moments, all float32."""


@dataclass(frozen=True)
class Sizes:
    """base: parameters; base_bytes: as they lie in memory. adapter: numbers of a policy's; judge: of a reward's or a
    critic's, which may lack an output layer; head: of a scalar head. merged: bytes of a merged copy of what the adapter
    changes. token: bytes of a token's keys and values."""

    base: int
    base_bytes: int
    adapter: int
    judge: int
    head: int
    merged: int
    token: int


@dataclass(frozen=True)
class Holding:
    """What a process of a stage holds. role: whose it is."""

    stage: str
    process: str
    role: str
    bytes: float


def measure(model: ModelSettings, policy: PolicySettings) -> Sizes:
    """Count on the meta device, without loading a weight."""
    config = copy.deepcopy(load_model_config(model.path))
    size = BYTES[model.dtype]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in base.parameters())
        held = _four_bit_bytes(base, policy, size) if policy.method == "qlora" else count * size
        trunk = make_trunk(base, policy, ("policy", "critic"))
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        base=count,
        base_bytes=held,
        adapter=sum(p.numel() for p in trunk.adapter("policy").values()),
        judge=sum(p.numel() for p in trunk.adapter("critic").values()),
        head=trunk.width + 1,
        merged=0 if policy.method == "qlora" else trunk.merged_parameter_count() * size,
        token=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width * size,
    )


def _four_bit_bytes(base: PreTrainedModel, policy: PolicySettings, size: int) -> int:
    """Linear layers but the output layer in four bits, with a scale for each 64 numbers (Dettmers et al. 2023)."""
    head = base.get_output_embeddings()
    packed = [m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    rest = sum(parameter.numel() for parameter in base.parameters()) - sum(packed)
    scales = sum(packed) // 64
    return rest * size + sum(packed) // 2 + (scales + scales // 64 if policy.double_quantization else scales * 4)


def memory(experiment: Experiment, stages: list[str], sizes: Sizes) -> list[Holding]:
    """All holdings, stage by stage. Activations and the interpreter's own memory come on top."""
    holdings: list[Holding] = []
    if trains_sft(experiment) and "sft" in stages:
        holdings += [Holding("sft", "trainer", role, size) for role, size in _sft(experiment, sizes)]
    if trains_reward(experiment) and "reward" in stages:
        holdings += [Holding("reward", "trainer", role, size) for role, size in _reward(experiment, sizes)]
    if "ppo" in stages:
        each = "learner" if experiment.learner.ranks < 2 else f"each of {experiment.learner.ranks} ranks"
        holdings += [Holding("ppo", each, role, size) for role, size in _learner(experiment, sizes)]
        workers = experiment.rollouts.workers
        if workers:
            each = "worker" if workers == 1 else f"each of {workers} workers"
            holdings += [Holding("ppo", each, "trunk", _trunk(experiment, sizes))]
            holdings += [Holding("ppo", each, role, size) for role, size in _sampler(experiment, sizes)]
    return holdings


def _trunk(experiment: Experiment, sizes: Sizes) -> int:
    """The shared base; with full fine-tuning there is none besides the roles themselves."""
    return 0 if experiment.policy.method == "full" else sizes.base_bytes


def _sft(experiment: Experiment, sizes: Sizes) -> Iterator[tuple[str, float]]:
    yield "trunk", _trunk(experiment, sizes)
    yield "reference, which trains", sizes.adapter * 16


def _reward(experiment: Experiment, sizes: Sizes) -> Iterator[tuple[str, float]]:
    yield "trunk", _trunk(experiment, sizes)
    yield "reference", sizes.adapter * 4
    heads = sizes.head * len(experiment.reward.weights)
    trained = heads if experiment.reward.trains == "head" else sizes.judge + heads
    yield "reward, which trains", trained * 16 + (sizes.judge + heads - trained) * 4
    if others := (experiment.reward.ensemble.members or 1) - 1:
        yield "reward's other members", (sizes.judge + heads) * 4 * others


def _learner(experiment: Experiment, sizes: Sizes) -> Iterator[tuple[str, float]]:
    learner, ppo = experiment.learner, experiment.ppo
    ranks = max(1, learner.ranks)
    sharded = ranks if learner.zero == 3 else 1
    yield "trunk", _trunk(experiment, sizes) / sharded
    yield "reference", sizes.adapter * 4 / sharded
    reward = experiment.reward
    for name, term in reward.terms.items():
        if isinstance(term, ClassifierTerm):
            yield f"reward {name}, a model of its own", _classifier_bytes(term.path)
    if reward.classifier:
        yield "reward, a model of its own", _classifier_bytes(reward.classifier)
    elif reward.has_model:
        members = reward.ensemble.members or (members_in(reward.model) if reward.model else 1)
        yield "reward", (sizes.judge + sizes.head * (1 + len(reward.attributes))) * members * 4 / sharded
    yield "policy, which trains", _trained(experiment, sizes.adapter)
    if ppo.has_critic and ppo.critic.kind == "head":
        yield "critic, which trains", _trained(experiment, sizes.head)
    elif ppo.has_critic:
        own = sizes if ppo.critic.model is None else measure(_critic_base(experiment), experiment.policy)
        if ppo.critic.kind == "model":
            yield "critic's trunk", _trunk(experiment, own) / sharded
        yield "critic, which trains", _trained(experiment, own.judge + own.head)
    if not experiment.rollouts.workers:
        if learner.ranks or learner.zero == 3:
            yield "sampler's trunk", _trunk(experiment, sizes)
        yield from _sampler(experiment, sizes)


def _critic_base(experiment: Experiment) -> ModelSettings:
    return experiment.model.model_copy(update={"path": experiment.ppo.critic.model})


def _trained(experiment: Experiment, numbers: int) -> float:
    """Bytes of numbers that train on one rank; ZeRO 1 to 3 shards the optimizer, which then has a copy of its own of
    the weights, from 2 on the gradient, at 3 the weights."""
    learner = experiment.learner
    ranks, whole = max(1, learner.ranks), TRAINED[learner.optimizer]
    if learner.zero == 0:
        return numbers * whole
    moments = whole - 8 + 4
    gradient, weight = (4 / ranks if learner.zero >= stage else 4 for stage in (2, 3))
    return numbers * (weight + gradient + moments / ranks)


def _sampler(experiment: Experiment, sizes: Sizes) -> Iterator[tuple[str, float]]:
    rollouts = experiment.rollouts
    yield "sampler", sizes.adapter * 4
    if rollouts.merge and sizes.merged:
        yield "sampler's merged weights", sizes.merged
    rows, tokens = (
        min(rollouts.max_num_seqs, rollouts.effective_chunk_size),
        rollouts.max_prompt_tokens + rollouts.max_new_tokens,
    )
    yield "keys and values, at most", rows * tokens * sizes.token


def _classifier_bytes(path: str) -> int:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(load_model_config(path)))
    return sum(parameter.numel() for parameter in model.parameters()) * 4
