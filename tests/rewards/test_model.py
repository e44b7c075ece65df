from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from policies.batching import collate, collate_shared_prompts
from policies.build import make_trunk
from policies.errors import UserError
from policies.files.adapters import load_adapter, load_head
from policies.heads import ScalarHead
from policies.schema import PolicySettings
from rewards.model import RewardModel, load_heads, read_heads

POLICY = PolicySettings(rank=4, alpha=8.0, dropout=0.5)
SHAPES = [(2, 5), (9, 1), (3, 12), (6, 6), (4, 9), (1, 3), (8, 8), (5, 0)]

Factory = Callable[[], RewardModel]


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(2, 290, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(prompt, seed) for seed, (prompt, _) in enumerate(SHAPES)]
RESPONSES = [ids(response, 100 + seed) for seed, (_, response) in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def new_model(tiny_model: Path) -> Factory:
    """Makes reward models with an adapter and a head that say nothing yet."""

    def new() -> RewardModel:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trunk = make_trunk(base, POLICY, ("policy", "reward"))
        return RewardModel(trunk, [ScalarHead.zeros(trunk.width)])

    return new


@pytest.fixture(scope="module")
def model(new_model: Factory) -> RewardModel:
    """A reward model whose adapter, head and bias are random, and whose policy adapter is another."""
    model = new_model()
    generator = torch.Generator().manual_seed(7)
    for role in ("policy", "reward"):
        weights = {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in model.trunk.adapter(role).items()}
        model.trunk.write_adapter(role, weights)
    load_heads(model.heads, [{"weight": torch.randn(32, generator=generator), "bias": torch.tensor([0.25])}], "here")
    return model


@pytest.fixture(scope="module")
def saved(model: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "deep" / "reward"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_model: Path, saved: Path) -> Tensor:
    """Each row's score by PEFT and transformers as they come, from the saved folder: one row, no padding."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft, head = PeftModel.from_pretrained(base, str(saved)).eval(), load_head(saved)
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        output = peft(input_ids=torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False)
        scores.append((output.hidden_states[-1][0, -1] @ head["weight"] + head["bias"]).item())
    return torch.tensor(scores)


@pytest.mark.parametrize("tokens", [1, 20, 40, 10_000])
def test_scores_are_those_of_single_unpadded_sequences_in_order(model: RewardModel, alone: Tensor, tokens: int) -> None:
    torch.testing.assert_close(model.score(PROMPTS, RESPONSES, tokens), alone, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_changes_no_score(model: RewardModel, alone: Tensor) -> None:
    sequences = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    width = max(map(len, sequences)) + 5
    ids = torch.tensor([[3] * (width - len(sequence)) + sequence for sequence in sequences])
    mask = torch.tensor([[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    model.trunk.switch("reward")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    states = model.trunk.states(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(model.heads[0](states[:, -1]).detach(), alone, rtol=1e-5, atol=1e-5)


def test_scores_differ_by_more_than_the_tolerance_of_these_tests(alone: Tensor) -> None:
    assert float(alone.sort().values.diff().min()) > 1e-2


def test_a_batch_of_two_sides_is_scored_by_its_last_tokens(model: RewardModel, alone: Tensor) -> None:
    torch.testing.assert_close(model(collate(PROMPTS, RESPONSES)).detach()[:, 0], alone, rtol=1e-4, atol=1e-4)


def test_scores_are_float32_on_the_cpu_without_a_graph(model: RewardModel) -> None:
    scores = model.score(PROMPTS, RESPONSES, 40)
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)


def test_no_rows_have_no_scores(model: RewardModel) -> None:
    assert model.score([], [], 40).shape == (0,)


def test_gradients_reach_the_head_and_the_reward_adapter_alone(new_model: Factory) -> None:
    model = new_model()
    model.trunk.train_only("reward")
    load_heads(model.heads, [{"weight": torch.ones(32), "bias": torch.zeros(1)}], "here")
    model(collate(PROMPTS, RESPONSES)).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    heads = {"heads.0.weight", "heads.0.bias"}
    assert heads < reached
    assert all(".reward." in name for name in reached - heads)


def test_a_saved_model_scores_the_same_when_it_is_loaded(model: RewardModel, saved: Path, new_model: Factory) -> None:
    loaded = new_model()
    loaded.trunk.write_adapter("reward", load_adapter(saved, POLICY))
    load_heads(loaded.heads, read_heads(saved, {"": 1.0}), saved)
    assert torch.equal(loaded.score(PROMPTS, RESPONSES, 40), model.score(PROMPTS, RESPONSES, 40))


def test_a_head_of_another_width_is_refused(new_model: Factory) -> None:
    with pytest.raises(UserError, match=r"head in old/reward belongs to another base model: .* is 16, .* is 32"):
        load_heads(new_model().heads, [ScalarHead(16).state_dict()], "old/reward")


def test_responses_behind_a_shared_prompt_score_as_behind_their_own(model: RewardModel) -> None:
    """Scores and gradients, whatever the lengths of the other responses."""
    others = RESPONSES[3:] + RESPONSES[:3]
    both = [response for pair in zip(RESPONSES, others) for response in pair]
    alone = collate([prompt for prompt in PROMPTS for _ in range(2)], both)
    branches = collate_shared_prompts(PROMPTS, list(zip(RESPONSES, others)), pad=3)
    assert model.trunk.supports_shared_prompts("reward")
    model.trunk.train_only("reward")
    weights = torch.randn(2 * len(PROMPTS), generator=torch.Generator().manual_seed(0))
    nonempty = [i for i, response in enumerate(both) if response]  # an empty response has no last token of its own

    def scores_and_gradient(by_attribute: Tensor) -> tuple[Tensor, Tensor]:
        scores = by_attribute[nonempty, 0]
        model.zero_grad()
        (scores * weights[nonempty]).sum().backward()
        gradients: list[Tensor] = []
        for parameter in model.trunk.adapter("reward").values():
            assert parameter.grad is not None
            gradients.append(parameter.grad.flatten())
        return scores.detach(), torch.cat(gradients)

    shared = model.scores_shared_prompts(branches.ids, branches.positions, branches.attention_mask, branches.last)
    actual = scores_and_gradient(shared)
    torch.testing.assert_close(actual, scores_and_gradient(model(alone)), rtol=1e-4, atol=1e-4)


def test_prompts_are_not_shared_where_a_window_counts_what_lies_between() -> None:
    torch.manual_seed(0)
    windowed = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        sliding_window=6,
        num_key_value_heads=2,
    )
    mistral = make_trunk(MistralForCausalLM(windowed), POLICY, ("reward",))
    assert not mistral.supports_shared_prompts("reward")
