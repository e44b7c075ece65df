"""The plan's bytes against those of the tensors that a process really holds."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from align.config.schema import Experiment
from align.ppo.learner import PpoLearner
from align.resources.memory import estimate_memory, measure
from align.roles.build import Blueprint, RewardRole, build_roles
from align.supervised.learner import SupervisedLearner
from policies.files.base_model import load_base
from policies.module_names import linears
from policies.schema import ModelSettings, PolicySettings
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine
from tests.align.ppo.test_learner_kinds import ALL, RATES, episodes
from tests.align.supervised.small import classifier_blueprint, random_adapter, reward_blueprint, sft_blueprint
from tests.integration.tiny_run import make_settings

POLICIES = {
    "lora": {"rank": 8, "alpha": 16},
    "dora": {"rank": 8, "alpha": 16, "dora": True},
    "qlora": {"method": "qlora", "rank": 8, "alpha": 16},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck"},
    "bitfit": {"method": "bitfit"},
    "top_layers": {"method": "top_layers"},
    "prefix_tuning": {"method": "prefix_tuning"},
    "full": {"method": "full"},
}


def storages() -> dict[int, int]:
    """Bytes of the storages of all tensors in this process, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("name", POLICIES)
def test_the_learner_with_its_sampler_holds_what_the_plan_says(
    name: str, tiny_model: Path, tmp_path: Path, process_group: None
) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"policy": POLICIES[name]}
    experiment = Experiment.model_validate(settings)
    uses = estimate_memory(experiment, ["ppo"], measure(experiment.model, experiment.policy))
    planned = sum(use.bytes for use in uses if "at most" not in use.role and not use.transient)

    before = storages()
    donor = build_roles(Blueprint(experiment.model, experiment.policy, 0, None), None).trunk
    weights = donor.read_adapter("policy")
    head = {"weight": torch.zeros(donor.width), "bias": torch.zeros(1)}
    del donor
    blueprint = Blueprint(experiment.model, experiment.policy, 0, weights, (RewardRole(weights, (head,)),))
    roles = build_roles(blueprint, experiment.ppo.critic, (SAMPLER_ROLE,))
    del blueprint
    learner = PpoLearner(roles, experiment.ppo, experiment.learner, 1.0, gradient_checkpointing=False)
    engine = TransformersEngine(roles.trunk, frozenset(), max_num_seqs=2, merge=experiment.rollouts.merge)
    engine.load_adapter(0, weights)
    del weights, head
    measured: list[int] = []

    def note(*_: Any) -> None:
        measured.append(sum(size for address, size in storages().items() if address not in before))

    assert isinstance(learner.rank.optimizer, Optimizer)
    learner.rank.optimizer.register_step_pre_hook(note)
    batch = episodes(learner)
    learner.update(batch, ALL * 2, RATES)
    learner.close()
    assert measured[-1] == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize("stage", ["sft", "classify", "reward"])
def test_a_supervised_learner_holds_what_the_plan_says(
    stage: str, tiny_model: Path, tmp_path: Path, process_group: None
) -> None:
    experiment = Experiment.model_validate(make_settings(tiny_model, tmp_path) | {"policy": POLICIES["lora"]})
    uses = estimate_memory(experiment, [stage], measure(experiment.model, experiment.policy))
    planned = sum(use.bytes for use in uses if use.process == "learner" and not use.transient)
    adapter = random_adapter(tiny_model, experiment.policy)
    blueprints: dict[str, Any] = {
        "sft": sft_blueprint(tiny_model, experiment.policy),
        "classify": classifier_blueprint(tiny_model, "classification", experiment.policy, adapter),
        "reward": reward_blueprint(tiny_model, "pairs", experiment.policy, adapter),
    }

    before = storages()
    learner = SupervisedLearner(blueprints[stage].build(), experiment.sft, zero=0, seed=0)
    measured: list[int] = []

    def note(*_: Any) -> None:
        measured.append(sum(size for address, size in storages().items() if address not in before))

    assert isinstance(learner.rank.optimizer, Optimizer)
    learner.rank.optimizer.register_step_pre_hook(note)
    learner.train([0, 1], 0, 1.0)
    learner.train([2, 3], 1, 1.0)
    learner.close()
    assert measured[-1] == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(("zero", "buffers"), [(1, 0), (2, 0), (3, 1)])
def test_a_rank_holds_what_the_plan_says_beside_the_buffer_of_its_gradients(
    zero: int, buffers: int, tiny_model: Path, tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a small model, at ZeRO 1 and 2, is freed before the step."""
    settings = make_settings(tiny_model, tmp_path) | {"policy": POLICIES["full"], "learner": {"zero": zero}}
    experiment = Experiment.model_validate(settings)
    sizes = measure(experiment.model, experiment.policy)
    planned = sum(use.bytes for use in estimate_memory(experiment, ["sft"], sizes) if not use.transient)
    planned += 4 * sizes.adapter * buffers

    before = storages()
    learner = SupervisedLearner(sft_blueprint(tiny_model, experiment.policy).build(), experiment.sft, zero, seed=0)
    measured: list[int] = []
    step = learner.rank.step

    def note(*rates: Any) -> Any:
        measured.append(sum(size for address, size in storages().items() if address not in before))
        return step(*rates)

    monkeypatch.setattr(learner.rank, "step", note)
    learner.train([0, 1], 0, 1.0)
    learner.train([2, 3], 1, 1.0)
    monkeypatch.undo()
    learner.close()
    assert measured[-1] == pytest.approx(planned, rel=0.1)


def test_zero_3_divides_everything_in_a_supervised_learner_by_its_ranks(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"learner": {"ranks": 2, "zero": 3}}
    experiment = Experiment.model_validate(settings)
    sizes = measure(experiment.model, experiment.policy)
    uses = {use.role: use.bytes for use in estimate_memory(experiment, ["sft"], sizes) if not use.transient}
    weight, gradient, moments = 4, 4, 8
    shard = (weight + gradient + moments) / 2
    assert uses == {"base model": sizes.base_bytes / 2, "reference, trained": sizes.adapter * shard}


def test_the_controller_holds_all_members_of_an_ensemble_to_evaluate_them(tiny_model: Path, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(make_settings(tiny_model, tmp_path))
    ensemble = experiment.reward.ensemble.model_copy(update={"members": 5})
    reward = experiment.reward.model_copy(update={"ensemble": ensemble})
    sizes = measure(experiment.model, experiment.policy)
    uses = estimate_memory(experiment.model_copy(update={"reward": reward}), ["reward"], sizes)
    evaluated = {use.role: use.bytes for use in uses if use.process == "evaluation"}
    assert evaluated["reward"] == 5 * 4 * (sizes.scalar_adapter + sizes.head)
    assert evaluated["base model"] == sizes.base_bytes


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_four_bit_weights_take_what_is_counted(tiny_model: Path, quant_type: str, double: bool) -> None:
    policy = PolicySettings(method="qlora", quant_type=quant_type, double_quantization=double)
    model = ModelSettings(path=str(tiny_model))
    base = load_base(model, policy)
    tensors = list(base.parameters())
    for parameter in base.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    assert measure(model, policy).base_bytes == pytest.approx(sum(t.nbytes for t in tensors), rel=0.02)


def test_linear_weights_in_four_bits_take_a_third_of_those_in_bfloat16(tiny_model: Path) -> None:
    model = ModelSettings(path=str(tiny_model), dtype="bfloat16")
    in_four_bits = measure(model, PolicySettings(method="qlora")).base_bytes
    in_bfloat16 = measure(model, PolicySettings()).base_bytes
    base = load_base(ModelSettings(path=str(tiny_model)))
    linear = 2 * sum(layer.weight.numel() for layer in linears(base).values())
    assert in_four_bits - (in_bfloat16 - linear) <= 0.35 * linear


@pytest.mark.parametrize(
    ("settings", "trained", "state"),
    [({}, 1, 0), ({"method": "adamix", "bottleneck": 8, "experts": 3}, 3, 0), ({"method": "adalora", "rank": 4}, 1, 8)],
    ids=["lora", "adamix", "adalora"],
)
def test_sft_trains_more_than_the_adapter_where_a_method_makes_it_from_more(
    settings: dict[str, Any], trained: int, state: int, tiny_model: Path
) -> None:
    """trained: parameters of SFT per parameter of the adapter; state: bytes that its steps change per parameter."""
    sizes = measure(ModelSettings(path=str(tiny_model)), PolicySettings(**settings))
    assert sizes.sft_trained == trained * sizes.adapter
    assert sizes.sft_state_bytes == state * sizes.adapter


def test_frozen_matrices_of_a_method_are_counted_once(tiny_model: Path) -> None:
    model = ModelSettings(path=str(tiny_model))
    frozen = 16 * (64 + 64) * 4  # rank · (widest input + widest output), in float32
    vera = measure(model, PolicySettings(method="vera", rank=16))
    assert vera.base_bytes - measure(model, PolicySettings()).base_bytes == frozen
