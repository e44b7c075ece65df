import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from policies.batching import collate
from policies.build import make_trunk
from policies.errors import UserError
from policies.files.adapters import save_adapter
from policies.layers import native
from policies.logprobs import token_logprobs
from policies.probes import supports_packing, supports_shared_prompts
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights, Trunk
from tests.policies.gradients import flat_gradients

POLICY = PolicySettings(rank=4, alpha=8.0)
ROLES = ("policy", "critic")
IDS = torch.arange(40).reshape(2, 20) + 5


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_weights(trunk: Trunk, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in trunk.adapter(trunk.roles[0]).items()}


def randomise(trunk: Trunk) -> Trunk:
    for seed, role in enumerate(trunk.roles):
        trunk.write_adapter(role, random_weights(trunk, seed))
    return trunk


@pytest.fixture(scope="module")
def trunk(tiny_model: Path) -> Trunk:
    """Policy and critic with adapters that differ; no test may change it."""
    return randomise(make_trunk(base_of(tiny_model), POLICY, ROLES))


@pytest.fixture
def own_trunk(tiny_model: Path) -> Trunk:
    return randomise(make_trunk(base_of(tiny_model), POLICY, ROLES))


def gemma2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, final_logit_softcapping=3.0, initializer_range=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def logits_of(trunk: Trunk, role: str) -> Tensor:
    with torch.no_grad():
        return trunk.head(trunk.hidden(IDS, role), role)


def test_each_role_has_the_logits_that_peft_gives_for_its_adapter(trunk: Trunk, tiny_model: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(base_of(tiny_model), config, adapter_name="policy")
    theirs.add_adapter("critic", config)
    for role in ROLES:
        set_peft_model_state_dict(theirs, trunk.read_adapter(role), adapter_name=role)
    theirs.eval()
    for role in (*ROLES, *ROLES):  # back and forth
        theirs.set_adapter(role)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(trunk, role), theirs(input_ids=IDS).logits)


def test_a_role_without_an_adapter_is_the_base(trunk: Trunk, tiny_model: Path) -> None:
    with torch.no_grad():
        expected = base_of(tiny_model)(input_ids=IDS).logits
    logits_of(trunk, "policy")
    torch.testing.assert_close(logits_of(trunk, "reference"), expected)
    assert not torch.allclose(logits_of(trunk, "policy"), expected, atol=1e-2)
    assert not torch.allclose(logits_of(trunk, "policy"), logits_of(trunk, "critic"), atol=1e-2)


def test_a_new_adapter_changes_nothing(tiny_model: Path) -> None:
    trunk = make_trunk(base_of(tiny_model), POLICY, ROLES)
    assert torch.equal(logits_of(trunk, "policy"), logits_of(trunk, "reference"))


@pytest.mark.parametrize("roles", [("policy",), ("reference", "policy", "critic", "reward")])
def test_the_base_exists_once_whatever_the_number_of_roles(tiny_model: Path, roles: tuple[str, ...]) -> None:
    base = base_of(tiny_model)
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    count = sum(parameter.numel() for parameter in base.parameters())
    trunk = make_trunk(base, POLICY, roles)
    adapters = sum(p.numel() for p in trunk.adapter("policy").values())
    assert sum(parameter.numel() for parameter in trunk.parameters()) == count + len(roles) * adapters
    own = {p.data_ptr() for role in roles for p in trunk.adapter(role).values()}
    assert {parameter.data_ptr() for parameter in trunk.parameters()} - own == pointers


def test_switching_leaves_requires_grad_alone(own_trunk: Trunk) -> None:
    own_trunk.train_only("policy", "critic")
    before = {name: p.requires_grad for name, p in own_trunk.named_parameters()}
    for role in ("critic", "reference", "policy"):
        own_trunk.switch(role)
        assert {name: p.requires_grad for name, p in own_trunk.named_parameters()} == before


def test_gradients_flow_to_the_roles_that_train_and_to_nothing_else(own_trunk: Trunk) -> None:
    own_trunk.train_only("critic")
    own_trunk.hidden(IDS, "policy").sum()
    own_trunk.hidden(IDS, "critic").sum().backward()
    touched = {name for name, p in own_trunk.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in own_trunk.named_parameters() if ".critic." in name}


def test_reading_an_adapter_gives_a_copy(own_trunk: Trunk) -> None:
    read = own_trunk.read_adapter("policy")
    kept = {name: tensor.clone() for name, tensor in read.items()}
    own_trunk.write_adapter("policy", own_trunk.read_adapter("critic"))
    assert all(torch.equal(kept[name], read[name]) for name in kept)
    assert torch.equal(logits_of(own_trunk, "policy"), logits_of(own_trunk, "critic"))


def test_an_adapter_with_other_names_is_refused(own_trunk: Trunk) -> None:
    weights = own_trunk.read_adapter("policy")
    weights.pop(min(weights))
    with pytest.raises(UserError, match="another base or other targets"):
        own_trunk.write_adapter("policy", weights)


def test_an_adapter_of_another_rank_is_refused(own_trunk: Trunk, tiny_model: Path) -> None:
    other = make_trunk(base_of(tiny_model), PolicySettings(rank=2), ("policy",))
    with pytest.raises(UserError, match="or other sizes in `policy`"):
        own_trunk.write_adapter("policy", other.read_adapter("policy"))


def test_targets_that_match_no_layer_are_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"policy.targets"):
        make_trunk(base_of(tiny_model), PolicySettings(targets=["no_such_layer"]), ROLES)


def test_named_targets_are_the_only_ones(tiny_model: Path) -> None:
    trunk = make_trunk(base_of(tiny_model), PolicySettings(targets=["q_proj"]), ROLES)
    assert all("q_proj" in name for name in trunk.adapter("policy"))
    assert len(trunk.adapter("policy")) == 2 * 2


TOKENS = st.lists(st.integers(0, 299), min_size=1, max_size=9)


@given(sequences=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), supports_packing=st.booleans())
def test_neighbours_change_no_log_probability(
    trunk: Trunk, sequences: list[tuple[list[int], list[int]]], supports_packing: bool
) -> None:
    trunk.supports_packing = supports_packing

    def logprobs(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, ...]:
        batch = collate(prompts, responses)
        states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")[batch.predictors]
        return batch.split(token_logprobs(states, batch.response_ids, partial(trunk.head, role="policy"), 1.0))

    with torch.no_grad():
        together = logprobs(*map(list, zip(*sequences)))
        for (prompt, response), batched in zip(sequences, together):
            (alone,) = logprobs([prompt], [response])
            torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [gemma2])
def test_logits_of_a_trunk_are_the_models_own(make: Callable[[], PreTrainedModel]) -> None:
    base = make()
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    trunk = make_trunk(copy.deepcopy(base), POLICY, ROLES)
    assert float(expected.abs().max()) > 1.0  # so that the cap bends something
    torch.testing.assert_close(logits_of(trunk, "reference"), expected)


def gradients(trunk: Trunk, role: str) -> Tensor:
    trunk.zero_grad()
    trunk.train_only(*ROLES)
    both = {r: trunk.hidden(IDS, r).square().mean() for r in ROLES}  # the backward pass runs under the other role
    both[role].backward()
    return flat_gradients(trunk.adapter(role).values())


@pytest.mark.parametrize("role", ROLES)
def test_recomputation_is_under_the_role_of_its_forward_pass(own_trunk: Trunk, role: str) -> None:
    expected = gradients(own_trunk, role)
    own_trunk.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(own_trunk, role), expected)
    assert own_trunk._role == "critic"


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        dropout=0.5, attention_dropout=0.5, max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5))


@pytest.mark.parametrize("make", [gpt2, opt])
def test_dropout_stays_off_while_activations_are_recomputed(make: Callable[[], PreTrainedModel]) -> None:
    trunk = randomise(make_trunk(make(), PolicySettings(rank=4, dropout=0.5), ROLES))
    expected = gradients(trunk, "policy")
    trunk.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(trunk, "policy"), expected)


def test_after_recomputation_scoring_is_as_before(own_trunk: Trunk) -> None:
    expected = logits_of(own_trunk, "policy")
    own_trunk.enable_gradient_checkpointing()
    gradients(own_trunk, "policy")
    assert torch.equal(logits_of(own_trunk, "policy"), expected)


def test_saved_adapter_loads_in_peft_with_equal_logits(trunk: Trunk, tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", trunk.read_adapter("policy"), trunk.settings, trunk.base)
    theirs = PeftModel.from_pretrained(base_of(tiny_model), str(tmp_path / "a")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, logits_of(trunk, "policy"))


def test_a_packed_forward_pass_reads_nothing_back_from_a_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated one: meta tensors have no content, and whatever waits for one to read it on the host fails."""
    monkeypatch.setattr(native, "default_device", lambda: torch.device("cuda"))
    trunk = make_trunk(base_of(tiny_model), POLICY, ROLES)
    assert trunk.supports_packing
    trunk.causal.to("meta")
    batch = collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]).to(torch.device("meta"))
    states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")[batch.predictors]
    logprobs = token_logprobs(states, batch.response_ids, partial(trunk.head, role="policy"), temperature=1.0)
    assert logprobs.shape == (5,)
    assert [part.device.type for part in batch.split(logprobs)] == ["meta", "meta"]


@pytest.fixture
def bfloat16_trunk(tiny_model: Path) -> Trunk:
    return make_trunk(base_of(tiny_model).bfloat16(), POLICY, ROLES)


def test_responses_share_a_prompt_in_bfloat16_too(bfloat16_trunk: Trunk) -> None:
    assert bfloat16_trunk.supports_shared_prompts("policy")


def test_a_model_that_lets_responses_see_each_other_does_not_share_prompts(
    bfloat16_trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = bfloat16_trunk.hidden_shared_prompts

    def without_mask(ids: Tensor, positions: Tensor, attention_mask: Tensor, role: str) -> Tensor:
        causal = torch.ones_like(attention_mask).tril()
        return shared(ids, positions, causal, role)

    def without_positions(ids: Tensor, positions: Tensor, attention_mask: Tensor, role: str) -> Tensor:
        return shared(ids, torch.zeros_like(positions), attention_mask, role)

    for broken in (without_mask, without_positions):
        monkeypatch.setattr(bfloat16_trunk, "hidden_shared_prompts", broken)
        assert not bfloat16_trunk.supports_shared_prompts("policy")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (TypeError("forward() got an unexpected keyword argument"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_a_lack_of_memory_is_not_taken_for_a_model_that_cannot_pack(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: bool
) -> None:
    def fail(self: Trunk, *arguments: object) -> Tensor:
        raise error

    trunk = make_trunk(base_of(tiny_model), POLICY, ROLES)
    monkeypatch.setattr(Trunk, "packed_states", fail)
    monkeypatch.setattr(Trunk, "hidden_shared_prompts", fail)
    for probe in (partial(supports_packing, trunk), partial(supports_shared_prompts, trunk, "policy")):
        if raised:
            with pytest.raises(type(error), match="memory"):
                probe()
        else:
            assert probe() is False
