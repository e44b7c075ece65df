"""The plan's bytes of activations against those that autograd holds when a real learner's backward pass begins."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from align.algorithms.episodes import Episode
from align.config.schema import Experiment, SftSettings
from align.data.examples import TokenizedDemonstration, TokenizedPreference
from align.ppo.learner import PpoLearner, StepCoefficients
from align.resources.activations import largest_lengths
from align.resources.memory import estimate_memory, measure
from align.resources.saved_tensors import count_logits
from align.roles.build import Blueprint, build_roles
from align.supervised.learner import SupervisedLearner
from align.supervised.reward_objective import RewardBlueprint
from align.supervised.sft_objective import SftBlueprint
from policies.build import make_trunk, trunk_without_weights
from policies.errors import UserError
from policies.layers import kernel_calls, native
from policies.logprobs import token_logprobs_and_entropy
from policies.method_spec import methods
from policies.schema import PolicySettings
from rewards.preferences import Pair, PreferenceExample
from tests.integration.tiny_run import make_settings

LENGTH = 256
"""Tokens of each sequence, as many as the settings allow."""
NEAR = 0.01
"""The part of the bytes by which the plan may be off, for indices and small tensors of the loss that it leaves out."""
PROMPT = 16
SEQUENCES = 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES,
    "gemma3_text": SIZES | {"sliding_window": 64, "layer_types": LAYER_TYPES, "query_pre_attn_scalar": 16},
}
POLICIES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16},
    "qlora": {"method": "qlora", "rank": 8, "alpha": 16},
    "full": {"method": "full"},
    "bottleneck": {"method": "bottleneck", "bottleneck": 16},
    "prompt_tuning": {"method": "prompt_tuning"},
    "prefix_tuning": {"method": "prefix_tuning"},
}
OTHER_POLICIES: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "rank": 8},
    "adamix": {"method": "adamix", "bottleneck": 16},
    "compacter": {"method": "compacter", "bottleneck": 16},
    "intrinsic_prompt": {"method": "intrinsic_prompt"},
    "loha": {"method": "loha", "rank": 8},
    "lokr": {"method": "lokr", "rank": 8},
    "oft": {"method": "oft", "block_size": 16},
    "vera": {"method": "vera", "rank": 32},
}


class Held:
    """A tensor that autograd holds, and the number of the layer that has saved it."""

    def __init__(self, tensor: Tensor, layer: int | None) -> None:
        self.tensor = tensor
        self.layer = layer


class Saved:
    """What autograd holds of the forward passes of a module, without its parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {address(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        self.layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
        self.inputs: set[int] = set()
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.running: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(lambda _, inputs, number=number: self.enter(number, inputs)))
            hooks.append(layer.register_forward_hook(lambda *_: setattr(self, "running", None)))
        with torch.autograd.graph.saved_tensors_hooks(self.hold, lambda held: held.tensor):
            yield
        for hook in hooks:
            hook.remove()

    def enter(self, number: int, inputs: tuple[Any, ...]) -> None:
        self.running = number
        self.inputs |= {address(value) for value in inputs if isinstance(value, Tensor)}

    def hold(self, tensor: Tensor) -> Held:
        held = Held(tensor.detach(), self.running)
        self.held.add(held)
        return held

    def bytes(self) -> int:
        """Bytes of all storages that are held now."""
        return sum(storages([held.tensor for held in self.held], self.weights).values())

    def largest_layer(self) -> int:
        """Bytes that the layer which saves most has saved, without what is its input or saved outside of layers."""
        outside = storages([held.tensor for held in self.held if held.layer is None], set())
        elsewhere = self.weights | self.inputs | outside.keys()
        sizes = []
        for number in range(len(self.layers)):
            own = [held.tensor for held in self.held if held.layer == number]
            sizes.append(sum(storages(own, elsewhere).values()))
        return max(sizes)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storages(tensors: Sequence[Tensor], without: set[int]) -> dict[int, int]:
    """Bytes of the tensors' storages by address."""
    return {address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors if address(tensor) not in without}


Learner = SupervisedLearner | PpoLearner


def held_at_backward(learner: Learner, train: Callable[[Any], object], by_layer: bool = False) -> int:
    """The most bytes that autograd holds at the beginning of a backward pass; or that the largest layer saves."""
    saved = Saved(learner.rank.module)
    backward = learner.rank.engine.backward
    noted: list[int] = []

    def note(loss: Tensor) -> None:
        noted.append(saved.largest_layer() if by_layer else saved.bytes())
        backward(loss)

    learner.rank.engine.backward = note
    with saved.noted():
        train(learner)
    learner.rank.engine.backward = backward
    learner.close()
    return max(noted)


def measured(build: Callable[[bool], Learner], train: Callable[[Any], object], checkpointing: bool) -> int:
    """What a learner holds; with checkpointing, also what its largest layer saves when it is recomputed."""
    held = held_at_backward(build(checkpointing), train)
    return held + held_at_backward(build(False), train, by_layer=True) if checkpointing else held


@pytest.fixture(scope="module")
def model_of(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a random model of a family."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                family, vocab_size=len(tiny_tokenizer), eos_token_id=1, pad_token_id=0, **FAMILIES[family]
            )
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folders[family])
            tiny_tokenizer.save_pretrained(folders[family])
        return folders[family]

    return make


def experiment_of(base: Path, folder: Path, policy: dict[str, Any], **changes: Any) -> Experiment:
    microbatch = {"tokens_per_microbatch": SEQUENCES * LENGTH}
    settings = make_settings(base, folder) | {
        "policy": policy,
        "sft": microbatch | {"max_tokens": LENGTH},
        "reward": microbatch | {"max_tokens": LENGTH},
        "learner": microbatch,
        "rollouts": {"max_prompt_tokens": PROMPT, "max_new_tokens": LENGTH - PROMPT},
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return Experiment.model_validate(settings)


def planned(experiment: Experiment, stage: str) -> float:
    uses = estimate_memory(experiment, [stage], measure(experiment.model, experiment.policy))
    tokens = SEQUENCES * LENGTH
    (activations,) = [use for use in uses if use.role == f"activations, {tokens:,} tokens per microbatch"]
    assert activations.transient
    return activations.bytes


def random_ids(count: int) -> list[int]:
    return torch.randint(2, 290, (count,)).tolist()


def sft_learner(experiment: Experiment, checkpointing: bool) -> SupervisedLearner:
    examples = [TokenizedDemonstration(random_ids(LENGTH), [(1, LENGTH)]) for _ in range(SEQUENCES)]
    blueprint = SftBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=0,
        examples=examples,
        heldout=examples,
        settings=SftSettings(),
    )
    return SupervisedLearner(blueprint.build(), experiment.sft, 0, seed=0, gradient_checkpointing=checkpointing)


def pair_of(prompt: int, response: int) -> TokenizedPreference:
    """A pair of responses with these numbers of tokens."""
    responses = [random_ids(response) for _ in range(2)]
    return TokenizedPreference(PreferenceExample("", ("better", "worse"), Pair()), random_ids(prompt), responses)


def reward_learner(
    experiment: Experiment, examples: list[TokenizedPreference], checkpointing: bool
) -> SupervisedLearner:
    blueprint = RewardBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=0,
        member=0,
        sft=None,
        examples=examples,
        heldout=examples,
        settings=experiment.reward,
    )
    return SupervisedLearner(blueprint.build(), experiment.reward, 0, seed=0, gradient_checkpointing=checkpointing)


def ppo_learner(experiment: Experiment, checkpointing: bool) -> PpoLearner:
    roles = build_roles(Blueprint(experiment.model, experiment.policy, 0, None), experiment.ppo.active_critic)
    return PpoLearner(roles, experiment.ppo, experiment.learner, 1.0, checkpointing)


def train_supervised(learner: SupervisedLearner) -> None:
    learner.train(range(len(learner.objective.examples)), 0, 1.0)


def train_ppo(learner: PpoLearner) -> None:
    zeros = torch.zeros(LENGTH - PROMPT)
    episodes = []
    for _ in range(SEQUENCES):
        episode = Episode(
            prompt_ids=tuple(random_ids(PROMPT)),
            response_ids=tuple(random_ids(LENGTH - PROMPT)),
            old_logprobs=zeros,
            reference_logprobs=zeros,
            advantages=zeros + 1,
            returns=zeros + 1,
            old_values=zeros,
        )
        episodes.append(episode)
    learner.update(episodes, [[list(range(SEQUENCES))]], StepCoefficients(1e-5, 1e-5, 0.0))


def supported(policies: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """Each method without gradient checkpointing, and with it where its own table does not refuse that."""
    cases = [(name, False) for name in policies]
    for name, policy in policies.items():
        if not methods()[policy.get("method", "lora")].checkpointing_conflict:
            cases.append((name, True))
    return cases


@pytest.mark.parametrize(("name", "checkpointing"), supported(POLICIES))
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_holds_what_the_plan_says(
    family: str,
    name: str,
    checkpointing: bool,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    process_group: None,
) -> None:
    model = {"gradient_checkpointing": checkpointing}
    experiment = experiment_of(model_of(family), tmp_path, POLICIES[name], model=model)
    try:
        expected = planned(experiment, "sft")
    except UserError as refusal:
        pytest.skip(str(refusal))
    held = measured(lambda checkpoint: sft_learner(experiment, checkpoint), train_supervised, checkpointing)
    assert expected == pytest.approx(held, rel=NEAR)


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_sft_of_other_methods_holds_what_the_plan_says(
    name: str, model_of: Callable[[str], Path], tmp_path: Path, process_group: None
) -> None:
    experiment = experiment_of(model_of("llama"), tmp_path, OTHER_POLICIES[name])
    held = measured(lambda checkpoint: sft_learner(experiment, checkpoint), train_supervised, False)
    assert planned(experiment, "sft") == pytest.approx(held, rel=NEAR)


@pytest.mark.parametrize("name", ["lora", "qlora", "bottleneck", "prompt_tuning"])
def test_sft_in_bfloat16_holds_what_the_plan_says(
    name: str, model_of: Callable[[str], Path], tmp_path: Path, process_group: None
) -> None:
    experiment = experiment_of(model_of("qwen3"), tmp_path, POLICIES[name], model={"dtype": "bfloat16"})
    held = measured(lambda checkpoint: sft_learner(experiment, checkpoint), train_supervised, False)
    assert planned(experiment, "sft") == pytest.approx(held, rel=NEAR)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_sft_without_kernels_holds_what_the_plan_says(
    name: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    process_group: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers save more then; sequences that are too long for the kernel of attention take the same path."""
    experiment = experiment_of(model_of("qwen3"), tmp_path, POLICIES[name])
    with_kernels = planned(experiment, "sft")
    monkeypatch.setattr(native, "library", lambda: None)
    held = measured(lambda checkpoint: sft_learner(experiment, checkpoint), train_supervised, False)
    assert planned(experiment, "sft") == pytest.approx(held, rel=NEAR)
    assert planned(experiment, "sft") > 1.1 * with_kernels


def test_dropout_keeps_its_masks(model_of: Callable[[str], Path], tmp_path: Path, process_group: None) -> None:
    policy = POLICIES["lora"] | {"dropout": 0.1}
    experiment = experiment_of(model_of("llama"), tmp_path, policy)
    held = measured(lambda checkpoint: sft_learner(experiment, checkpoint), train_supervised, False)
    assert planned(experiment, "sft") == pytest.approx(held, rel=NEAR)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_reward_training_holds_what_the_plan_says(
    name: str, checkpointing: bool, model_of: Callable[[str], Path], tmp_path: Path, process_group: None
) -> None:
    model = {"gradient_checkpointing": checkpointing}
    experiment = experiment_of(model_of("llama"), tmp_path, POLICIES[name], model=model)
    expected = planned(experiment, "reward")

    sharing = [pair_of(LENGTH - 64, 32) for _ in range(SEQUENCES)]
    build = partial(reward_learner, experiment, sharing)
    assert expected == pytest.approx(measured(build, train_supervised, checkpointing), rel=NEAR)

    separate = [pair_of(1, LENGTH - 1) for _ in range(SEQUENCES // 2)]
    build = partial(reward_learner, experiment, separate)
    assert measured(build, train_supervised, checkpointing) <= expected


def test_a_reward_model_that_only_trains_its_head_saves_nothing(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    experiment = experiment_of(model_of("llama"), tmp_path, POLICIES["lora"], reward={"trains": "head"})
    uses = estimate_memory(experiment, ["reward"], measure(experiment.model, experiment.policy))
    assert not any(use.transient for use in uses)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [None, "head", "adapter", "model"])
def test_ppo_holds_what_the_plan_says(
    kind: str | None, checkpointing: bool, model_of: Callable[[str], Path], tmp_path: Path, process_group: None
) -> None:
    ppo = {"critic": {"kind": kind}} if kind else {"estimator": "reinforce++"}
    model = {"gradient_checkpointing": checkpointing}
    experiment = experiment_of(model_of("qwen3"), tmp_path, POLICIES["lora"], ppo=ppo, model=model)
    held = measured(lambda checkpoint: ppo_learner(experiment, checkpoint), train_ppo, checkpointing)
    assert planned(experiment, "ppo") == pytest.approx(held, rel=NEAR)


def test_a_critic_on_a_larger_model_decides(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    larger = {"critic": {"kind": "model", "model": str(model_of("gemma3_text"))}}
    of_larger = planned(experiment_of(model_of("llama"), tmp_path, POLICIES["lora"], ppo=larger), "ppo")
    own = {"critic": {"kind": "model"}}
    alone = planned(experiment_of(model_of("gemma3_text"), tmp_path, POLICIES["lora"], ppo=own), "ppo")
    assert of_larger == alone


def test_at_zero_3_both_objectives_of_ppo_are_differentiated_together(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    uses = {}
    for zero in (2, 3):
        experiment = experiment_of(model_of("llama"), tmp_path, POLICIES["full"], learner={"zero": zero, "ranks": 1})
        uses[zero] = planned(experiment, "ppo")
    assert uses[3] == pytest.approx(2 * uses[2], rel=0.02)


def test_peft_computes_lora_at_zero_3(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In bfloat16 it keeps a float32 copy of the inputs."""
    saved = {}
    for zero in (2, 3):
        settings = {"model": {"dtype": "bfloat16"}, "learner": {"zero": zero, "ranks": 1}}
        saved[zero] = planned(experiment_of(model_of("llama"), tmp_path, POLICIES["lora"], **settings), "sft")
    assert saved[3] > 1.3 * saved[2]


def test_unset_a_microbatch_has_as_many_tokens_as_suit_a_cpu(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    experiment = experiment_of(model_of("llama"), tmp_path, POLICIES["lora"], sft={"tokens_per_microbatch": None})
    uses = estimate_memory(experiment, ["sft"], measure(experiment.model, experiment.policy))
    assert "activations, 2,048 tokens per microbatch" in [use.role for use in uses]


@pytest.mark.parametrize(
    ("tokens", "longest", "padded", "lengths"),
    [
        (10, 4, False, (4, 4, 2)),
        (10, 4, True, (4, 4)),
        (8, 4, False, (4, 4)),
        (3, 4, False, (4,)),
    ],
)
def test_sequences_of_the_largest_microbatch(tokens: int, longest: int, padded: bool, lengths: tuple[int, ...]) -> None:
    assert largest_lengths(tokens, longest, padded) == lengths


def test_a_model_that_cannot_be_run_without_data_is_named(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = experiment_of(model_of("llama"), tmp_path, POLICIES["lora"])
    sizes = measure(experiment.model, experiment.policy)
    monkeypatch.setattr(kernel_calls, "rotate", lambda states, *_: states * float(states.sum()))
    uses = [use for use in estimate_memory(experiment, ["sft"], sizes) if use.transient]
    assert [(use.role, use.bytes) for use in uses] == [("activations, which cannot be counted for this model", 0)]


class LargestTensors(TorchDispatchMode):
    """Notes the most bytes of storages of some size that exist at one time."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                self.storages.add(tensor.untyped_storage())
        by_address = {storage.data_ptr(): storage.nbytes() for storage in self.storages}
        self.most = max(self.most, sum(by_address.values()))
        return out


@pytest.mark.parametrize("learn_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("llama", "full"), ("gemma2", "lora")])
def test_logits_of_a_chunk_take_what_is_counted(
    family: str, method: str, dtype: torch.dtype, learn_entropy: bool
) -> None:
    """Gemma 2 caps its logits, which takes more."""
    config = AutoConfig.for_model(family, vocab_size=2000, **SIZES)
    settings = PolicySettings(method=method)
    policy = make_trunk(AutoModelForCausalLM.from_config(config, dtype=dtype), settings, ("policy",))
    policy.train_only("policy")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    counted = count_logits(trunk_without_weights(base, settings, ("policy",)), "policy", 3000, learn_entropy)

    hidden = torch.randn(1500, 64, dtype=dtype, requires_grad=True)
    head = partial(policy.head, role="policy")
    ids = torch.randint(2000, (1500,))
    with LargestTensors(1024 * 2000) as largest:
        logprobs, entropy = token_logprobs_and_entropy(hidden, ids, head, 1.0, learn_entropy)
        torch.autograd.grad((logprobs + entropy).sum(), hidden)
    assert counted == largest.most
    assert counted >= 2 * 1024 * 2000 * dtype.itemsize
