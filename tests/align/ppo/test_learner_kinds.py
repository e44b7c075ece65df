"""Every kind of critic and method of the policy: the learner's gradient against single responses, losses by hand."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithms.episodes import Episode, make_episodes
from align.config.ppo_settings import CriticSettings, PpoSettings
from align.config.schema import LearnerSettings
from align.data.examples import TokenizedDemonstration
from align.ppo.learner import PpoLearner, StepCoefficients
from align.roles.build import Blueprint, build_roles
from align.roles.roles import Roles
from policies.schema import ModelSettings, PolicySettings
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import TransformersEngine

LORA = PolicySettings(rank=4, alpha=8.0)
FULL = PolicySettings(method="full")
SGD = LearnerSettings(optimizer="sgd", max_grad_norm=1e9, tokens_per_microbatch=40)
RATES = StepCoefficients(policy_lr=1e-2, critic_lr=1e-2, kl_in_loss=0.0)
ROWS = [(2, 5), (9, 1), (3, 12), (6, 6), (4, 9), (1, 3)]
ALL = [[list(range(len(ROWS)))]]
KINDS = [None, "head", "adapter", "model"]

Factory = Callable[..., PpoLearner]


@pytest.fixture
def new_learner(tiny_model: Path, process_group: None) -> Iterator[Factory]:
    made: list[PpoLearner] = []

    def new(
        policy: PolicySettings, ppo: PpoSettings, settings: LearnerSettings = SGD, dtype: str = "float32"
    ) -> PpoLearner:
        roles = build_roles(
            Blueprint(ModelSettings(path=str(tiny_model), dtype=dtype), policy, 0, None), ppo.active_critic
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in roles.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        made.append(PpoLearner(roles, ppo, settings, 1.0, gradient_checkpointing=False))
        return made[-1]

    yield new
    for learner in made:
        learner.close()


def settings(kind: str | None, **changes: object) -> PpoSettings:
    if kind is None:
        return PpoSettings(estimator="reinforce++", **changes)
    return PpoSettings(critic=CriticSettings(kind=kind, coefficient=0.3), **changes)


def trajectories() -> list[Trajectory]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(2, 290, (prompt + response,), generator=generator).tolist() for prompt, response in ROWS]
    return [
        Trajectory.from_tokens(Request("", tuple(row[:prompt]), 0), tuple(row[prompt:]), torch.zeros(response), True, 0)
        for row, (prompt, response) in zip(rows, ROWS)
    ]


def episodes(learner: PpoLearner) -> list[Episode]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for row, outputs in zip(trajectories(), learner.score(trajectories())):
        noise = torch.randn(4, row.length, generator=generator)
        values = outputs.values[:-1]
        count = len(values)
        made.append(
            Episode(
                prompt_ids=row.request.prompt_ids,
                response_ids=row.response_ids,
                old_logprobs=outputs.logprobs + noise[0],
                reference_logprobs=outputs.reference_logprobs,
                advantages=noise[1],
                returns=values + noise[2, :count],
                old_values=values + 0.3 * noise[3, :count],
            )
        )
    return made


def row_loss(roles: Roles, row: Episode, ppo: PpoSettings) -> Tensor:
    """The loss of one response, summed over its tokens."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    places = slice(len(row.prompt_ids) - 1, -1)
    states = roles.trunk.hidden(ids, "policy")[0, places]
    logprobs = torch.log_softmax(roles.trunk.head(states, "policy"), -1)
    ratio = (logprobs[torch.arange(len(states)), list(row.response_ids)] - row.old_logprobs).exp()
    loss = -torch.minimum(row.advantages * ratio, row.advantages * ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high))
    if ppo.dual_clip:
        loss = torch.where(row.advantages < 0, torch.minimum(loss, -row.advantages * ppo.dual_clip), loss)
    if roles.critic:
        if roles.critic.role == "critic":
            states = (roles.critic.trunk or roles.trunk).hidden(ids, "critic")[0, places]
        values = roles.critic.head(states)
        near = row.old_values + (values - row.old_values).clamp(-0.2, 0.2)
        loss = loss + 0.3 * torch.maximum((values - row.returns) ** 2, (near - row.returns) ** 2) / 2
    return loss.sum()


def total_loss(roles: Roles, rows: list[Episode], ppo: PpoSettings) -> Tensor:
    """The loss of responses one by one, summed over their tokens."""
    return torch.stack([row_loss(roles, row, ppo) for row in rows]).sum()


def trained(learner: PpoLearner) -> list[torch.nn.Parameter]:
    return [p for group in learner.rank.optimizer.param_groups for p in group["params"]]


def moved(learner: PpoLearner, *arguments: Any) -> Tensor:
    """What an update subtracts from the parameters, divided by the learning rate."""
    before = [p.detach().clone() for p in trained(learner)]
    learner.update(*arguments)
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained(learner))]) / RATES.policy_lr


def expected(learner: PpoLearner, loss: Tensor) -> Tensor:
    # A critic of kind model has an LM head that nothing reads: its gradient is zero.
    gradients = torch.autograd.grad(loss, trained(learner), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("policy", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_responses_one_by_one(
    new_learner: Factory, policy: PolicySettings, kind: str | None
) -> None:
    ppo = settings(kind)
    learner = new_learner(policy, ppo)
    rows = episodes(learner)
    loss = total_loss(learner.roles, rows, ppo) / sum(len(row.response_ids) for row in rows)
    gradient = expected(learner, loss)
    assert distance(moved(learner, rows, ALL, RATES), gradient) < 2e-4


def test_dual_clip_changes_the_gradient_as_the_formula_says(new_learner: Factory) -> None:
    learner = new_learner(LORA, settings("adapter", dual_clip=1.5))
    rows = episodes(learner)
    tokens = sum(len(row.response_ids) for row in rows)
    losses = [total_loss(learner.roles, rows, ppo) / tokens for ppo in (learner.ppo, settings("adapter"))]
    with_clip, without = (expected(learner, loss) for loss in losses)
    assert distance(with_clip, without) > 0.1
    assert distance(moved(learner, rows, ALL, RATES), with_clip) < 2e-4


def test_a_mean_over_sequences_weighs_each_sequence_alike(new_learner: Factory) -> None:
    ppo = settings("adapter")
    learner = new_learner(LORA, ppo)
    rows = [replace(row, weight=1 / len(row.response_ids)) for row in episodes(learner)]
    means = [row_loss(learner.roles, row, ppo) / len(row.response_ids) for row in rows]
    loss = torch.stack(means).mean()
    gradient = expected(learner, loss)
    assert distance(moved(learner, rows, ALL, RATES), gradient) < 2e-4


def test_demonstrations_are_mixed_in_with_their_weight(new_learner: Factory) -> None:
    ppo = settings(None, ptx_coefficient=0.7)
    learner = new_learner(LORA, ppo)
    rows = episodes(learner)
    demonstrations = [TokenizedDemonstration([5, 6, 7, 8, 9], [(2, 5)]), TokenizedDemonstration([10, 11], [(1, 2)])]
    loss = total_loss(learner.roles, rows, ppo) / sum(len(row.response_ids) for row in rows)
    likelihood = torch.zeros(())
    for demonstration in demonstrations:
        prompt, response = demonstration.prompt_ids, demonstration.ids[len(demonstration.prompt_ids) :]
        states = learner.roles.trunk.hidden(torch.tensor([[*prompt, *response]]), "policy")[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(learner.roles.trunk.head(states, "policy"), -1)
        likelihood = likelihood + logprobs[torch.arange(len(response)), response].sum()
    whole = expected(learner, loss - 0.7 * likelihood / 4)
    before = [p.detach().clone() for p in trained(learner)]
    statistics = learner.update(rows, ALL, RATES, [demonstrations])
    step = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, trained(learner))]) / RATES.policy_lr
    assert distance(step, whole) < 2e-4
    assert statistics["ptx_loss"] == pytest.approx(-float(likelihood.detach()) / 4, rel=1e-5)


@pytest.mark.parametrize(("kind", "forward_passes"), [(None, 1), ("head", 1), ("adapter", 2), ("model", 1)])
def test_forward_passes_over_the_base_model_per_microbatch(
    new_learner: Factory, kind: str | None, forward_passes: int
) -> None:
    learner = new_learner(LORA, settings(kind), SGD.model_copy(update={"tokens_per_microbatch": 4096}))
    rows = episodes(learner)
    counted = []
    learner.roles.trunk.causal.base_model.register_forward_hook(lambda *_: counted.append(1))
    learner.update(rows, ALL, RATES)
    assert len(counted) == forward_passes


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_no_critic_is_built_where_none_is_used(new_learner: Factory, estimator: str) -> None:
    learner = new_learner(LORA, PpoSettings(estimator=estimator, samples_per_prompt=2))
    assert "critic" not in learner.roles.trunk.roles
    assert [group["role"] for group in learner.rank.optimizer.param_groups] == ["policy"]
    (outputs,) = learner.score(trajectories()[:1])
    assert len(outputs.values) == 0
    state = learner.state()
    assert (list(state.weights.adapters), list(state.weights.heads)) == (["policy"], [])


@pytest.mark.parametrize("policy", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_restored_bit_for_bit(new_learner: Factory, policy: PolicySettings, kind: str | None) -> None:
    adam = LearnerSettings(tokens_per_microbatch=40)
    learner = new_learner(policy, settings(kind), adam)
    rows = episodes(learner)
    learner.update(rows, ALL, RATES)
    saved = learner.state()
    learner.update(rows, ALL, RATES)
    other = new_learner(policy, settings(kind), adam)
    other.restore([saved], adam.zero)
    other.update(rows, ALL, RATES)
    for one, two in zip(trained(learner), trained(other)):
        assert torch.equal(one, two)


def test_full_fine_tuning_leaves_the_reference_as_it_was(new_learner: Factory) -> None:
    learner = new_learner(FULL, settings("adapter"))
    before = learner.roles.trunk.read_adapter("reference")
    policy = learner.policy_weights()
    assert {n for n in policy if "embed_tokens" in n}
    learner.update(episodes(learner), ALL, RATES)
    after = learner.roles.trunk.read_adapter("reference")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(policy[name], tensor) for name, tensor in learner.policy_weights().items())


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_gradient_does_not_depend_on_microbatches_and_order(
    new_learner: Factory, kind: str, dtype: str, near: float
) -> None:
    gradients = []
    rows: list[Episode] = []
    for tokens, order in ((4096, [0, 1, 2, 3, 4, 5]), (1, [5, 0, 3, 1, 4, 2]), (30, [2, 4, 1, 0, 3, 5])):
        learner = new_learner(LORA, settings(kind), SGD.model_copy(update={"tokens_per_microbatch": tokens}), dtype)
        rows = rows or episodes(learner)
        gradients.append(moved(learner, [rows[i] for i in order], ALL, StepCoefficients(1e3, 1e3, 0.0)))
    for other in gradients[1:]:
        assert distance(other, gradients[0]) < near


def test_lora_plus_steps_b_by_a_multiple_of_the_rate_of_a(new_learner: Factory) -> None:
    moved = {}
    for ratio in (None, 4.0):
        learner = new_learner(LORA.model_copy(update={"lora_plus": ratio}), settings("adapter"))
        before = learner.policy_weights()
        learner.update(episodes(learner), ALL, RATES)
        moved[ratio] = {name: after - before[name] for name, after in learner.policy_weights().items()}
    for name, step in moved[None].items():
        expected = step * (4.0 if "lora_B" in name else 1.0)
        torch.testing.assert_close(moved[4.0][name], expected, rtol=1e-3, atol=1e-6)


def test_padding_counts_where_the_critics_base_model_needs_it(new_learner: Factory) -> None:
    roles = new_learner(LORA, settings("model")).roles
    assert roles.microbatches([2, 7, 3], 12) == [[0, 2, 1]]
    assert roles.critic is not None
    assert roles.critic.trunk is not None
    roles.critic.trunk.supports_packing = False
    assert roles.microbatches([2, 7, 3], 12) == [[0, 2], [1]]


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_one_roles_activations_are_kept_at_a_time(
    new_learner: Factory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = new_learner(LORA, settings(kind), SGD.model_copy(update={"tokens_per_microbatch": 1000}))
    batch = episodes(learner)
    seen: list[str] = []
    hidden = learner.roles.trunk.hidden_packed
    backward = learner.rank.engine.backward

    def note_forward(ids: Tensor, lengths: Sequence[int], role: str) -> Tensor:
        seen.append(role)
        return hidden(ids, lengths, role)

    def note_backward(loss: Tensor) -> None:
        seen.append("backward")
        backward(loss)

    monkeypatch.setattr(learner.roles.trunk, "hidden_packed", note_forward)
    monkeypatch.setattr(learner.rank.engine, "backward", note_backward)
    learner.update(batch, ALL, RATES)
    assert seen == ["policy", "backward"] + ["critic", "backward"] * (kind == "adapter")


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in records, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_in(item)


def assert_owned(record: object) -> None:
    """Each tensor has a storage of its own that is as large as it is: pickled, it takes nothing else along."""
    tensors = [tensor for tensor in tensors_in(record) if tensor.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert tensors
    assert len(storages) == len(tensors)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [0, 2])
def test_every_record_that_travels_owns_its_storage(new_learner: Factory, kind: str | None, zero: int) -> None:
    ppo = settings(kind, whiten_advantages=True)
    learner = new_learner(LORA, ppo, LearnerSettings(tokens_per_microbatch=40, zero=zero))
    engine = TransformersEngine(learner.roles.trunk, frozenset(), max_num_seqs=4, merge=False)
    requests = [trajectory.request for trajectory in trajectories()]
    sampled = engine.generate(requests, Sampling(1.0, 5), role="policy")
    resumed = [replace(trajectory.request, partial_response=trajectory) for trajectory in sampled]
    sampled = engine.generate(resumed, Sampling(1.0, 9), role="policy")
    outputs = learner.score(sampled, ("policy", "reference", "critic", "greedy"))
    scored = [replace(output, score=float(index)) for index, output in enumerate(outputs)]
    batch = make_episodes(sampled, scored, ppo, 0.1)
    learner.update(batch, ALL, RATES)
    assert_owned(sampled)
    assert_owned(outputs)
    assert_owned(batch)
    assert_owned(learner.state())


def test_episodes_take_bytes_in_proportion_to_their_tokens() -> None:
    count, tokens = 64, 256
    pick = torch.Generator().manual_seed(0)
    rows = []
    outputs = []
    for _ in range(count):
        ids = torch.randint(0, 30000, (tokens,), generator=pick).tolist()
        rows.append(Trajectory.from_tokens(Request("", tuple(ids[:32]), 0), ids, torch.zeros(tokens), True, 0))
        noise = torch.randn(3, tokens + 1, generator=pick)
        outputs.append(RoleOutputs(noise[0, 1:].clone(), noise[1, 1:].clone(), values=noise[2].clone(), score=1.0))
    batch = make_episodes(rows, outputs, settings("adapter"), 0.1)
    tensors = sum(tensor.nbytes for tensor in tensors_in(batch))
    assert tensors == count * tokens * 5 * 4  # five float32 per response token
    assert len(pickle.dumps(batch)) < 1.5 * tensors
