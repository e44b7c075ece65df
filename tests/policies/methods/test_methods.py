"""Every adaptation method: roles on one base model, files, PEFT, export."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from policies.batching import collate
from policies.build import build_trunk
from policies.errors import UserError
from policies.export import export_adapter, export_merged, export_reward
from policies.files.adapters import PROMPT, load_adapter, save_adapter, save_head
from policies.files.base_model import load_base
from policies.files.prompt_table import add_task
from policies.files.quantization import dequantise
from policies.heads import ScalarHead
from policies.logprobs import token_logprobs
from policies.methods.intrinsic_prompt_trunk import COORDINATES
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine
from tests.policies.gradients import flat_gradients

METHODS = {
    "lora": PolicySettings(rank=4, alpha=8),
    "rslora": PolicySettings(rank=4, alpha=8, rslora=True),
    "dora": PolicySettings(rank=4, alpha=8, dora=True),
    "pissa": PolicySettings(rank=4, alpha=8, init="pissa"),
    "qlora": PolicySettings(method="qlora", rank=4, alpha=8),
    "qlora-fp4": PolicySettings(method="qlora", rank=4, alpha=8, quant_type="fp4", double_quantization=False),
    "loftq": PolicySettings(method="qlora", rank=4, alpha=8, init="loftq"),
    "adalora": PolicySettings(method="adalora", rank=4, alpha=24),
    "loha": PolicySettings(method="loha", rank=4, alpha=8),
    "lokr": PolicySettings(method="lokr", rank=2, alpha=4),
    "krona": PolicySettings(method="lokr", rank=8, alpha=8, kronecker_factor=4),
    "oft": PolicySettings(method="oft", block_size=8),
    "vera": PolicySettings(method="vera", rank=16),
    "ia3": PolicySettings(method="ia3"),
    "bottleneck": PolicySettings(method="bottleneck", bottleneck=8),
    "adamix": PolicySettings(method="adamix", bottleneck=8, experts=3),
    "compacter": PolicySettings(method="compacter", bottleneck=8, kronecker_terms=4, kronecker_rank=2),
    "bitfit": PolicySettings(method="bitfit"),
    "layer_norm": PolicySettings(method="layer_norm"),
    "top_layers": PolicySettings(method="top_layers", layers=1),
    "feature": PolicySettings(method="feature"),
    "prompt_tuning": PolicySettings(method="prompt_tuning", virtual_tokens=5),
    "intrinsic_prompt": PolicySettings(method="intrinsic_prompt", virtual_tokens=5, intrinsic_dimension=6),
    "p_tuning": PolicySettings(method="p_tuning", virtual_tokens=5, encoder_width=16),
    "p_tuning-lstm": PolicySettings(method="p_tuning", virtual_tokens=5, encoder_width=16, encoder="lstm"),
    "prefix_tuning": PolicySettings(method="prefix_tuning", virtual_tokens=5),
    "full": PolicySettings(method="full"),
}
MERGED = [name for name, settings in METHODS.items() if settings.spec.merges_at_export]
NOT_IN_PEFT = ("bottleneck", "adamix", "compacter", "bitfit", "top_layers", "feature", "full")
IN_PEFT = [name for name, settings in METHODS.items() if settings.method not in NOT_IN_PEFT]
ROLES = ("policy", "critic")
IDS = torch.arange(40).reshape(2, 20) + 5
PROMPTS = [tuple(range(start, start + 2 + start % 7)) for start in range(5, 250, 8)]

every_method = pytest.mark.parametrize("name", METHODS)


def make(name: str, folder: Path, roles: tuple[str, ...] = ROLES) -> Trunk:
    return build_trunk(ModelSettings(path=str(folder)), METHODS[name], roles)


def perturbed(trunk: Trunk, role: str, seed: int) -> Trunk:
    """The trunk, with a role well away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: w + 0.15 * torch.randn(w.shape, generator=generator) for n, w in trunk.read_adapter(role).items()}
    if COORDINATES in weights:
        del weights[PROMPT]  # it follows from the coordinates
    trunk.write_adapter(role, weights)
    return trunk


@torch.no_grad()
def logits(trunk: Trunk, role: str, ids: Tensor = IDS) -> Tensor:
    return trunk.head(trunk.hidden(ids, role), role)


@every_method
def test_roles_start_from_the_base_and_move_away_from_it_and_from_each_other(name: str, tiny_model: Path) -> None:
    trunk = make(name, tiny_model, (*ROLES, "reference"))
    base = logits(trunk, "reference" if name == "full" else "")
    if METHODS[name].spec.prompt_kind is not None:
        assert torch.equal(logits(trunk, "policy"), logits(trunk, "critic"))
    else:
        torch.testing.assert_close(logits(trunk, "policy"), base, rtol=1e-5, atol=1e-5)
    perturbed(trunk, "policy", 1)
    perturbed(trunk, "critic", 2)
    policy, critic = logits(trunk, "policy"), trunk.hidden(IDS, "critic").detach()
    assert (policy - base).abs().max() > 0.05
    if name != "feature":  # its critic trains nothing below the scalar head
        assert (trunk.hidden(IDS, "policy") - critic).abs().max() > 0.01
    assert torch.equal(logits(trunk, "reference" if name == "full" else ""), base)
    assert torch.equal(logits(trunk, "policy"), policy)


@every_method
def test_gradients_reach_the_trained_role_and_nothing_else(name: str, tiny_model: Path) -> None:
    trunk = make(name, tiny_model)
    perturbed(trunk, "policy", 1)
    trunk.train_only("policy")
    batch = collate([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]])
    states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
    trunk.hidden_packed(
        batch.ids, batch.lengths, "critic"
    )  # a forward pass of another role before the backward pass changes nothing
    loss = -token_logprobs(states[batch.predictors], batch.response_ids, lambda h: trunk.head(h, "policy"), 1.0).sum()
    trunk.switch("critic")
    loss.backward()
    trained = {id(p) for p in trunk.adapter("policy").values()}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trunk.adapter("policy").values())
    assert all(p.grad is None for p in trunk.parameters() if id(p) not in trained)


@every_method
def test_a_packed_batch_has_the_gradient_of_its_sequences_alone(name: str, tiny_model: Path) -> None:
    trunk = perturbed(make(name, tiny_model), "policy", 1)
    trunk.train_only("policy")
    batch = collate([[5, 6, 7], [8, 9], [10]], [[10, 11], [12, 13, 14], [15, 16, 17, 18]])

    def gradient_of(backward: Callable[[], None]) -> Tensor:
        trunk.zero_grad()
        backward()
        return flat_gradients(trunk.adapter("policy").values()).double()

    def packed() -> None:
        loss_of(trunk.hidden_packed(batch.ids, batch.lengths, "policy")).backward()

    def alone() -> None:
        for ids in batch.ids.split(list(batch.lengths)):
            loss_of(trunk.hidden(ids.unsqueeze(0), "policy")).backward()

    def loss_of(states: Tensor) -> Tensor:
        return trunk.head(states, "policy").float().logsumexp(-1).square().sum()

    expected = gradient_of(alone)
    assert (gradient_of(packed) - expected).norm() <= 1e-5 * expected.norm()


@every_method
def test_the_engine_samples_what_the_learner_scores(name: str, tiny_model: Path) -> None:
    trunk = perturbed(make(name, tiny_model, (SAMPLER_ROLE,)), SAMPLER_ROLE, 3)
    engine = TransformersEngine(trunk, frozenset({1}), max_num_seqs=8)
    engine.load_adapter(1, trunk.read_adapter(SAMPLER_ROLE))
    requests = [Request("", prompt, seed=seed) for seed, prompt in enumerate(PROMPTS[:8])]
    trajectories = engine.generate(requests, Sampling(1.0, 12))
    responses = [trajectory.response_ids for trajectory in trajectories]
    batch = collate([request.prompt_ids for request in requests], responses)
    with torch.no_grad():
        states = trunk.hidden_packed(batch.ids, batch.lengths, SAMPLER_ROLE)
        scored = token_logprobs(
            states[batch.predictors], batch.response_ids, lambda h: trunk.head(h, SAMPLER_ROLE), 1.0
        )
    sampled = torch.cat([trajectory.sampler_logprobs for trajectory in trajectories])
    torch.testing.assert_close(sampled, scored, rtol=1e-4, atol=1e-4)


LOAD = """
import sys, torch
from policies.files.adapters import load_adapter
from policies.build import build_trunk
from policies.schema import ModelSettings
from tests.policies.methods.test_methods import METHODS, logits
torch.set_num_threads(1)
model, root = sys.argv[1:]
for name in METHODS:
    trunk = build_trunk(ModelSettings(path=model), METHODS[name], ("policy",))
    trunk.write_adapter("policy", load_adapter(f"{root}/{name}", METHODS[name]))
    torch.save(logits(trunk, "policy"), f"{root}/{name}.pt")
"""


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of adapters by name, and the logits of the roles that they were saved from."""
    root = tmp_path_factory.mktemp("methods")
    expected: dict[str, Tensor] = {}
    for name in METHODS:
        trunk = perturbed(make(name, tiny_model), "policy", 1)
        save_adapter(root / name, trunk.read_adapter("policy"), trunk.settings, trunk.base)
        expected[name] = logits(trunk, "policy")
    return root, expected


def test_a_new_process_loads_every_method_bit_for_bit(saved: tuple[Path, dict[str, Tensor]], tiny_model: Path) -> None:
    root, expected = saved
    subprocess.run([sys.executable, "-c", LOAD, str(tiny_model), str(root)], check=True, cwd=Path(__file__).parents[3])
    for name in METHODS:
        assert torch.equal(torch.load(root / f"{name}.pt"), expected[name]), name


@pytest.mark.parametrize("name", IN_PEFT)
def test_plain_peft_loads_its_own_methods(name: str, saved: tuple[Path, dict[str, Tensor]], tiny_model: Path) -> None:
    root, expected = saved
    base = load_base(ModelSettings(path=str(tiny_model)), METHODS[name])
    model = PeftModel.from_pretrained(base, str(root / name)).eval()
    with torch.no_grad():
        by_peft = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(by_peft, expected[name], rtol=1e-4, atol=1e-4)


def greedy(continue_one: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """The most likely eight tokens after each prompt, without a cache."""
    continuations: list[list[int]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(8):
            ids = torch.cat([ids, continue_one(ids)[:, -1:].argmax(-1)], dim=1)
        continuations.append(ids[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.parametrize("name", MERGED)
@torch.no_grad()
def test_a_merged_model_continues_as_the_policy_does(
    name: str,
    saved: tuple[Path, dict[str, Tensor]],
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    root, _ = saved
    model = ModelSettings(path=str(tiny_model))
    settings = METHODS[name]
    assert export_merged(model, settings, root / name, tiny_tokenizer, tmp_path / "merged") < 1e-3
    live = make(name, tiny_model)
    live.write_adapter("policy", load_adapter(root / name, settings))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert greedy(lambda ids: merged(input_ids=ids).logits) == greedy(lambda ids: logits(live, "policy", ids))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in MERGED])
def test_methods_that_cannot_be_merged_are_refused(
    name: str,
    saved: tuple[Path, dict[str, Tensor]],
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = ModelSettings(path=str(tiny_model))
    with pytest.raises(UserError, match="cannot be merged"):
        export_merged(model, METHODS[name], saved[0] / name, tiny_tokenizer, tmp_path / "merged")


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_an_exported_adapter_is_reloaded(
    name: str,
    saved: tuple[Path, dict[str, Tensor]],
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = ModelSettings(path=str(tiny_model))
    assert export_adapter(model, METHODS[name], saved[0] / name, tiny_tokenizer, tmp_path / "out") < 1e-3
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_policy_that_is_the_base_is_not_exported(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trunk = make("lora", tiny_model)
    save_adapter(tmp_path / "policy", trunk.read_adapter("policy"), trunk.settings, trunk.base)
    with pytest.raises(RuntimeError, match="nothing was trained"):
        export_merged(
            ModelSettings(path=str(tiny_model)), METHODS["lora"], tmp_path / "policy", tiny_tokenizer, tmp_path / "out"
        )


@pytest.mark.parametrize("name", ["lora", "qlora", "bitfit", "top_layers", "feature", "full"])
@torch.no_grad()
def test_a_reward_model_is_a_classifier_that_transformers_loads(
    name: str, tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trunk = perturbed(make(name, tiny_model, ("reward",)), "reward", 1)
    head = ScalarHead(trunk.width, torch.Generator().manual_seed(0))
    head.bias.add_(3)
    save_adapter(tmp_path / "reward", trunk.read_adapter("reward"), trunk.settings, trunk.base)
    save_head(tmp_path / "reward", head.state_dict())
    difference, bias = export_reward(
        ModelSettings(path=str(tiny_model)), METHODS[name], tmp_path / "reward", tiny_tokenizer, tmp_path / "out"
    )
    assert difference < 1e-3
    assert bias == pytest.approx(3.0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    scores = classifier(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.squeeze(-1) + bias
    torch.testing.assert_close(scores, head(trunk.hidden(IDS, "reward")[:, -1]), rtol=1e-3, atol=1e-3)


def test_oft_rotates_exactly(tiny_model: Path) -> None:
    trunk = perturbed(make("oft", tiny_model), "policy", 1)
    rotation = trunk.causal.get_submodule("model.layers.0.self_attn.q_proj").get_delta_weight("policy").detach()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), rtol=0, atol=1e-5)
    assert (rotation - torch.eye(32)).abs().max() > 0.1


def test_pissa_trains_the_principal_half_alone(tiny_model: Path) -> None:
    trunk = make("pissa", tiny_model)
    trunk.initialise("policy")
    torch.testing.assert_close(logits(trunk, "policy"), logits(trunk, ""), rtol=1e-4, atol=1e-4)
    trunk.train_only("policy")
    trunk.hidden(IDS, "policy").square().sum().backward()
    for name, parameter in trunk.adapter("policy").items():
        assert parameter.grad is not None
        gradient = parameter.grad if "lora_A" in name else parameter.grad.T
        assert gradient[:4].abs().max() > 0
        assert gradient[4:].abs().max() == 0
    down, up = (parameter.detach() for parameter in list(trunk.adapter("policy").values())[:2])
    weight = trunk.causal.get_submodule("model.layers.0.self_attn.q_proj").get_base_layer().weight
    left, values, right = torch.linalg.svd(weight)
    principal = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(2.0 * up[:, :4] @ down[:4], principal, rtol=1e-4, atol=1e-4)


def test_loftq_starts_nearer_to_the_unquantised_model(tiny_model: Path) -> None:
    unquantised = AutoModelForCausalLM.from_pretrained(tiny_model)
    trunk = make("loftq", tiny_model)
    trunk.initialise("policy", "critic")
    layer = trunk.causal.get_submodule("model.layers.1.mlp.up_proj")
    error = unquantised.get_submodule("model.layers.1.mlp.up_proj").weight - dequantise(layer.base_layer)
    remaining = error - layer.get_delta_weight("policy")
    assert remaining.norm() < 0.9 * error.norm()
    best = torch.linalg.svdvals(error.detach())[4:].norm()
    torch.testing.assert_close(remaining.norm(), best, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(trunk, "policy"), logits(trunk, "critic"))


def test_p_tuning_trains_through_its_encoder_and_keeps_the_tokens(tiny_model: Path) -> None:
    trunk = make("p_tuning-lstm", tiny_model)
    trunk.start_training("policy")
    trunk.train_only("policy")
    trained = [n for n, p in trunk.named_parameters() if p.requires_grad]
    assert trained
    assert all("encoders.policy" in name for name in trained)
    trunk.hidden(IDS, "policy").square().sum().backward()
    assert all(p.grad is not None for p in trunk.adapter("policy").values())
    tokens = trunk.read_adapter("policy")
    before = logits(trunk, "policy")
    assert tokens.keys() == {PROMPT}
    trunk.write_adapter("policy", tokens)
    assert trunk.adapter("policy").keys() == {PROMPT}
    torch.testing.assert_close(logits(trunk, "policy"), before, rtol=1e-5, atol=1e-5)


def test_prompt_tuning_starts_from_a_text(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = PolicySettings(method="prompt_tuning", virtual_tokens=7, init_text="The cat sat")
    trunk = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",))
    ids = tiny_tokenizer("The cat sat", add_special_tokens=False)["input_ids"]
    ids = (ids * 7)[:7]
    assert torch.equal(trunk.read_adapter("policy")[PROMPT], trunk.causal.get_input_embeddings().weight[ids])
    before = logits(trunk, "", torch.cat([torch.tensor([ids] * 2), IDS], dim=1))[:, 7:]
    torch.testing.assert_close(logits(trunk, "policy"), before, rtol=1e-4, atol=1e-4)


def test_the_prompts_of_tasks_span_the_subspace(tiny_model: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, *axes = torch.randn(3, 5, 32, generator=generator)  # [T, H] each
    axes = list(torch.linalg.qr(torch.stack(axes).flatten(1).T).Q.T.reshape(2, 5, 32))
    table = tmp_path / "prompts.safetensors"
    places = [(3.0, 1.0), (-3.0, 1.0), (3.0, -1.0), (-3.0, -1.0)]
    for number, (first, second) in enumerate(places):
        add_task(table, f"task {number}", mean + first * axes[0] + second * axes[1], {"base": "any"})
    settings = METHODS["intrinsic_prompt"].model_copy(update={"subspace": str(table), "intrinsic_dimension": 2})
    trunk = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",))
    torch.testing.assert_close(trunk.read_adapter("policy")[PROMPT], mean)
    trunk.write_adapter("policy", {COORDINATES: torch.tensor([1.0, -2.0])})
    moved = trunk.read_adapter("policy")[PROMPT] - mean
    along = [abs(float((moved * axis).sum())) for axis in axes]
    assert along == pytest.approx([3, 2], rel=1e-4)
    assert float(moved.square().sum()) == pytest.approx(3**2 + 2**2, rel=1e-4)

    too_many = settings.model_copy(update={"intrinsic_dimension": 4})
    with pytest.raises(UserError, match="4 tasks differ in 3 dimensions at most"):
        build_trunk(ModelSettings(path=str(tiny_model)), too_many, ("policy",))
    other_size = settings.model_copy(update={"virtual_tokens": 6})
    with pytest.raises(UserError, match=r"prompt of task 'task 0' is \[5, 32\], but .* are \[6, 32\]"):
        build_trunk(ModelSettings(path=str(tiny_model)), other_size, ("policy",))


def test_a_prompt_of_another_subspace_is_refused(tiny_model: Path) -> None:
    weights = perturbed(make("intrinsic_prompt", tiny_model), "policy", 1).read_adapter("policy")
    settings = METHODS["intrinsic_prompt"].model_copy(update={"projection_seed": 1})
    other = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",))
    with pytest.raises(UserError, match=r"not in this subspace: set policy.subspace, policy.projection_seed"):
        other.write_adapter("policy", weights)


def test_a_prefix_from_a_text_is_that_text_before_the_prompt(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = PolicySettings(method="prefix_tuning", virtual_tokens=4, init_text="The cat sat on the mat")
    trunk = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",))
    ids = tiny_tokenizer("The cat sat on the mat", add_special_tokens=False)["input_ids"][:4]
    before = logits(trunk, "", torch.cat([torch.tensor([ids] * 2), IDS], dim=1))[:, 4:]
    torch.testing.assert_close(logits(trunk, "policy"), before, rtol=1e-4, atol=1e-4)


@every_method
def test_the_base_exists_once_whatever_the_number_of_roles(name: str, tiny_model: Path) -> None:
    if name == "full":
        pytest.skip("every role is a model of its own")
    one = make(name, tiny_model, ("policy",))
    four = make(name, tiny_model, ("policy", "reference", "critic", "reward"))
    assert bytes_of_all(four) - bytes_of_adapters(four) == bytes_of_all(one) - bytes_of_adapters(one)


def bytes_of_all(trunk: Trunk) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trunk.parameters()}
    return sum(storages.values())


def bytes_of_adapters(trunk: Trunk) -> int:
    return sum(p.numel() * 4 for role in trunk.roles for p in trunk.adapter(role).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "bitfit", "rank": 8},
            "method bitfit does not read rank, which is for adalora or loha or lokr or lora",
        ),
        ({"init": "loftq"}, "use it with method qlora"),
        ({"method": "qlora", "init": "pissa"}, "use loftq"),
        ({"dora": True, "init": "pissa"}, "do not go together"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicySettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PolicySettings(method="bottleneck", targets=["nowhere"]),
            "no layer of LlamaForCausalLM that can be adapted is named nowhere",
        ),
        (
            PolicySettings(method="compacter", kronecker_terms=5),
            "policy.kronecker_terms 5 does not divide the hidden size, 32",
        ),
        (
            PolicySettings(method="top_layers", layers=9),
            "policy.layers is 9, and LlamaForCausalLM has 2 decoder layers",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    settings: PolicySettings, message: str, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=message):
        build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",))


def test_an_adapter_of_another_method_is_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    root, _ = saved
    with pytest.raises(UserError, match=r"peft_type is 'IA3', but policy.method 'lora' reads 'LORA'"):
        load_adapter(root / "ia3", METHODS["lora"])
    with pytest.raises(UserError, match="use_dora is True"):
        load_adapter(root / "dora", METHODS["lora"])
    with pytest.raises(UserError, match=r"projection_prng_key is 0, but policy.projection_seed is 1"):
        load_adapter(root / "vera", METHODS["vera"].model_copy(update={"projection_seed": 1}))
    with pytest.raises(UserError, match="set both to the same value"):
        load_adapter(root / "prompt_tuning", PolicySettings(method="prompt_tuning", virtual_tokens=6))
