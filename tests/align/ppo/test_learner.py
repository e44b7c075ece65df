"""The learner against an oracle: plain transformers and PEFT, float64, one response at a time, all logits at once."""

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.algorithms.episodes import Episode
from align.config.ppo_settings import CriticSettings, KlSettings, PpoSettings
from align.config.schema import LearnerSettings
from align.learner.group import deal_by_length
from align.learner.state import LearnerState
from align.ppo.episode_shards import make_shards
from align.ppo.learner import PpoLearner, StepCoefficients
from align.roles.build import Blueprint, RewardRole, build_roles
from align.roles.roles import Critic, Roles
from policies.flops import training_flops
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rollouts.packed_records import TokenBatch
from rollouts.trajectory import Request, RoleOutputs, Trajectory, policy_mask
from tests.random_episodes import assert_same_bits

TEMPERATURE = 0.7
POLICY = PolicySettings(rank=4, alpha=8.0, dropout=0.5)  # dropout must be off in every forward of the loop
PPO = PpoSettings(
    clip_low=0.2,
    clip_high=0.3,
    entropy_coefficient=0.01,
    kl=KlSettings(where="loss", estimator="k3"),
    critic=CriticSettings(value_clip=0.2),
)
SGD = LearnerSettings(optimizer="sgd", max_grad_norm=1e9, tokens_per_microbatch=40)
ADAM = LearnerSettings(optimizer="adamw", max_grad_norm=1.0, tokens_per_microbatch=40, weight_decay=0.1)
RATES = StepCoefficients(policy_lr=1.0, critic_lr=1.0, kl_in_loss=0.3)
SMALL = StepCoefficients(policy_lr=1e-2, critic_lr=1e-2, kl_in_loss=0.3)
ROLES = ("reference", "policy", "critic", "reward")
ROWS = [(2, 5), (9, 1), (3, 12), (6, 6), (4, 9), (1, 3), (8, 8), (5, 2)]

Factory = Callable[..., PpoLearner]


def random_weights(trunk: Trunk) -> dict[str, AdapterWeights]:
    """Different random adapters for the four roles, far enough from zero to change every number."""
    generator = torch.Generator().manual_seed(11)
    return {
        role: {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in trunk.adapter(role).items()}
        for role in ROLES
    }


@pytest.fixture
def new_learner(tiny_model: Path, process_group: None) -> Iterator[Factory]:
    """Makes learners whose roles all differ, the same ones whenever it is called."""
    made: list[PpoLearner] = []

    def new(settings: LearnerSettings = SGD, ppo: PpoSettings = PPO, recompute: bool = False) -> PpoLearner:
        model = ModelSettings(path=str(tiny_model))
        probe = build_roles(Blueprint(model, POLICY, 0, None), None).trunk
        reward = probe.read_adapter("policy")
        head = {"weight": torch.randn(32, generator=torch.Generator().manual_seed(5)) / 6, "bias": torch.tensor([0.25])}
        roles = build_roles(Blueprint(model, POLICY, 0, None, (RewardRole(reward, (head,)),)), ppo.active_critic)
        for role, weights in random_weights(roles.trunk).items():
            roles.trunk.write_adapter(role, weights)
        made.append(PpoLearner(roles, ppo, settings, TEMPERATURE, gradient_checkpointing=recompute))
        return made[-1]

    yield new
    for learner in made:
        learner.close()


def trajectories() -> list[Trajectory]:
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 290, (count,), generator=generator).tolist())

    return [
        Trajectory.from_tokens(Request("", ids(prompt), 0), ids(response), torch.zeros(response), index % 3 > 0, 1)
        for index, (prompt, response) in enumerate(ROWS)
    ]


def episodes(scored: list[RoleOutputs]) -> list[Episode]:
    """Targets so near to the outputs of the roles that some tokens are clipped and some are not."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for row, outputs in zip(trajectories(), scored):
        noise = torch.randn(4, row.length, generator=generator)
        made.append(
            Episode(
                prompt_ids=row.request.prompt_ids,
                response_ids=row.response_ids,
                old_logprobs=outputs.logprobs + 0.3 * noise[0],
                reference_logprobs=outputs.reference_logprobs,
                advantages=noise[1],
                returns=outputs.values[:-1] + noise[2],
                old_values=outputs.values[:-1] + 0.3 * noise[3],
            )
        )
    return made


ALL = [list(range(len(ROWS)))]
HALVES = [[0, 2, 4, 6], [1, 3, 5, 7]]


def critic_of(roles: Roles) -> Critic:
    assert roles.critic is not None
    return roles.critic


def flat(weights: AdapterWeights) -> Tensor:
    return torch.cat([weights[name].detach().flatten() for name in sorted(weights)]).double()


def snapshot(learner: PpoLearner) -> dict[str, Tensor]:
    """Policy and critic, each as one vector."""
    critic = dict(learner.roles.trunk.read_adapter("critic"))
    critic |= {f"~head.{name}": value.clone() for name, value in critic_of(learner.roles).head.state_dict().items()}
    return {"policy": flat(learner.roles.trunk.read_adapter("policy")), "critic": flat(critic)}


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the larger."""
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()))


class Oracle:
    """The four roles of a learner, by PEFT's own switching and in float64."""

    def __init__(self, learner: PpoLearner, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model: PeftModel = get_peft_model(base, config, adapter_name=ROLES[0])
        for role in ROLES[1:]:
            model.add_adapter(role, config)
        for role in ROLES:
            set_peft_model_state_dict(model, learner.roles.trunk.read_adapter(role), adapter_name=role)
        self.model = model.double().eval()
        self.heads = {
            "critic": [p.detach().double().requires_grad_(True) for p in critic_of(learner.roles).head.parameters()],
            "reward": [p.detach().double() for p in learner.roles.reward_heads.parameters()],
        }

    def parameters(self, role: str) -> dict[str, Tensor]:
        mark = f".{role}."
        found = {n.replace(mark, "."): p for n, p in self.model.named_parameters() if mark in n}
        if role == "critic":
            found |= dict(zip(("~head.weight", "~head.bias"), self.heads["critic"]))
        return found

    def states(self, ids: tuple[int, ...], role: str) -> tuple[Tensor, Tensor]:
        """Last hidden states `[T, H]` and logits `[T, V]` of one sequence."""
        self.model.set_adapter(role)
        self.model.requires_grad_(False)
        for parameter in self.parameters(role).values():
            parameter.requires_grad_(True)
        out = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]

    def distribution(self, prompt: tuple[int, ...], response: tuple[int, ...], role: str) -> Tensor:
        """Log-probabilities `[T, V]` from which each token of the response was drawn."""
        _, logits = self.states(prompt + response, role)
        return torch.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)

    def logprobs(self, prompt: tuple[int, ...], response: tuple[int, ...], role: str) -> Tensor:
        distribution = self.distribution(prompt, response, role)
        return torch.stack([distribution[t, token] for t, token in enumerate(response)])

    def scalars(self, prompt: tuple[int, ...], response: tuple[int, ...], role: str) -> Tensor:
        """The outputs of the role's head before each token of the response and after the last, `[T + 1]`."""
        hidden, _ = self.states(prompt + response, role)
        weight, bias = self.heads[role]
        return hidden[len(prompt) - 1 :] @ weight + bias

    def gradients(self, batch: list[Episode], ppo: PpoSettings, beta: float) -> tuple[dict[str, Tensor], float]:
        """Gradients of the mean loss per token by role, each as one vector, and the policy loss per token."""
        tokens = sum(len(e.response_ids) for e in batch)
        value_clip = ppo.critic.value_clip
        assert value_clip is not None
        total = 0.0
        for episode in batch:
            row = (episode.prompt_ids, episode.response_ids)
            distribution = self.distribution(*row, "policy")
            new = torch.stack([distribution[t, token] for t, token in enumerate(episode.response_ids)])
            loss = torch.zeros((), dtype=torch.float64)
            for t in range(len(new)):
                ratio = (new[t] - episode.old_logprobs[t]).exp()
                advantage = episode.advantages[t].double()
                part = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high))
                total += part.item() / tokens
                difference = new[t] - episode.reference_logprobs[t].double()
                kl = torch.exp(-difference) - 1 + difference
                entropy = -(distribution[t].exp() * distribution[t]).sum()
                loss = loss + part + beta * kl - ppo.entropy_coefficient * entropy
            (loss / tokens).backward()
            values = self.scalars(*row, "critic")[:-1]
            loss = torch.zeros((), dtype=torch.float64)
            for value, old, target in zip(values, episode.old_values, episode.returns):
                near = old + (value - old).clamp(-value_clip, value_clip)
                loss = loss + torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
            (loss / tokens).backward()
        return {role: flat(self.gradient(role)) for role in ("policy", "critic")}, total

    def gradient(self, role: str) -> dict[str, Tensor]:
        gradients = {}
        for name, parameter in self.parameters(role).items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad
        return gradients


def test_scores_are_those_of_unbatched_float64(new_learner: Factory, tiny_model: Path) -> None:
    learner = new_learner()
    oracle = Oracle(learner, tiny_model)
    for row, outputs in zip(trajectories(), learner.score(trajectories())):
        ids = (row.request.prompt_ids, row.response_ids)
        near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(outputs.logprobs, oracle.logprobs(*ids, "policy").detach(), **near)
        torch.testing.assert_close(outputs.reference_logprobs, oracle.logprobs(*ids, "reference").detach(), **near)
        torch.testing.assert_close(outputs.values, oracle.scalars(*ids, "critic").detach(), **near)
        assert outputs.score == pytest.approx(oracle.scalars(*ids, "reward")[-1].item(), abs=1e-4)
        assert len(outputs.values) == row.length + 1


def test_scoring_is_independent_of_neighbours_and_order(new_learner: Factory) -> None:
    learner = new_learner()
    together = learner.score(trajectories())
    backwards = learner.score(trajectories()[::-1])[::-1]
    for row, one, other in zip(trajectories(), together, backwards):
        (alone,) = learner.score([row])
        for outputs in (one, other):
            torch.testing.assert_close(outputs.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs.values, alone.values, rtol=1e-5, atol=1e-5)
            assert outputs.score == pytest.approx(alone.score, abs=1e-5)


def test_dropout_is_off_when_scoring_and_training(new_learner: Factory) -> None:
    learner = new_learner()
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in learner.roles.modules())
    first, second = learner.score(trajectories()), learner.score(trajectories())
    assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(first, second))
    assert not any(module.training for module in learner.roles.modules())
    learner.update(episodes(first), [ALL], SMALL)
    assert not any(module.training for module in learner.roles.modules())


@pytest.mark.parametrize("value_clip", [0.2, 1e9])
def test_gradient_is_that_of_the_oracle(new_learner: Factory, tiny_model: Path, value_clip: float) -> None:
    ppo = PPO.model_copy(update={"critic": CriticSettings(value_clip=value_clip)})
    learner = new_learner(ppo=ppo)
    batch = episodes(learner.score(trajectories()))
    expected, policy_loss = Oracle(learner, tiny_model).gradients(batch, ppo, RATES.kl_in_loss)
    before = snapshot(learner)
    statistics = learner.update(batch, [ALL], RATES)
    after = snapshot(learner)
    for role in ("policy", "critic"):
        assert distance(before[role] - after[role], expected[role]) < 1e-5
        assert statistics[f"{role}_gradient_norm"] == pytest.approx(float(expected[role].norm()), rel=1e-4)
    assert statistics["policy_loss"] == pytest.approx(policy_loss, rel=1e-4)
    assert 0 < statistics["policy_clipped"] < 1
    assert (0 < statistics["value_clipped"] < 1) == (value_clip < 1)


def test_the_change_of_the_ratio_is_that_of_the_probabilities(new_learner: Factory) -> None:
    learner = new_learner()
    scored = learner.score(trajectories())
    batch = episodes(scored)
    old = torch.cat([episode.old_logprobs for episode in batch]).double()
    new = torch.cat([outputs.logprobs for outputs in scored]).double()
    change = new.exp() / old.exp() - 1
    statistics = learner.update(batch, [ALL], RATES)
    assert statistics["ratio_change"] == pytest.approx(float(change.mean()), rel=1e-3)
    assert statistics["squared_ratio_change"] == pytest.approx(float(change.square().mean()), rel=1e-3)
    assert statistics["ratio_max"] == pytest.approx(1 + float(change.max()), rel=1e-3)


def test_gradient_does_not_depend_on_the_microbatches(new_learner: Factory) -> None:
    moved, statistics = [], []
    for tokens in (1, 37, 4096):
        learner = new_learner(SGD.model_copy(update={"tokens_per_microbatch": tokens}))
        batch = episodes(learner.score(trajectories()))
        before = snapshot(learner)
        statistics.append(learner.update(batch, [ALL], RATES))
        moved.append({role: before[role] - after for role, after in snapshot(learner).items()})
    for role in ("policy", "critic"):
        assert distance(moved[0][role], moved[1][role]) < 1e-5
        assert distance(moved[0][role], moved[2][role]) < 1e-5
    assert statistics[0] == pytest.approx(statistics[2], rel=1e-4)


def test_recomputing_activations_gives_the_same_gradient(new_learner: Factory) -> None:
    after = []
    for recompute in (False, True):
        learner = new_learner(recompute=recompute)
        learner.update(episodes(learner.score(trajectories())), [ALL], RATES)
        after.append(snapshot(learner))
    for role in ("policy", "critic"):
        assert distance(after[0][role], after[1][role]) < 1e-7


def test_optimizer_steps_are_epochs_times_minibatches(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    steps = []
    learner.rank.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    statistics = learner.update(episodes(learner.score(trajectories())), [HALVES] * 3, SMALL)
    assert statistics["optimizer_steps"] == len(steps) == 6
    assert {float(state["step"]) for state in learner.rank.optimizer.state.values()} == {6.0}
    assert len(learner.rank.optimizer.state) == sum(
        len(group["params"]) for group in learner.rank.optimizer.param_groups
    )


def test_an_update_counts_what_its_sequences_take_at_the_peak(
    new_learner: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is simulated: this machine need not have one."""
    learner = new_learner(ADAM)
    batch = episodes(learner.score(trajectories()))
    assert learner.update(batch, [ALL], SMALL)["seconds_at_peak"] == 0
    monkeypatch.setattr(learner.rank, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    learner.utilization = learner.rank.utilization()
    monkeypatch.undo()
    roles = [training_flops(learner.roles.trunk, role) for role in ("policy", "critic")]
    once = sum(flops.total([episode.length for episode in batch]) for flops in roles if flops)
    seconds = learner.update(batch, [HALVES] * 3, SMALL)["seconds_at_peak"]
    assert seconds == pytest.approx(3 * once / 67e12)  # float32 without TF32


def test_updates_start_without_an_old_gradient(new_learner: Factory) -> None:
    learner, fresh = new_learner(), new_learner()
    batch = episodes(learner.score(trajectories()))
    learner.update(batch, [[HALVES[0]]], StepCoefficients(0.0, 0.0, 0.3))
    learner.update(batch, [[HALVES[1]]], RATES)
    fresh.update(batch, [[HALVES[1]]], RATES)
    for role, expected in snapshot(fresh).items():
        assert distance(snapshot(learner)[role], expected) < 1e-7


def test_policy_and_critic_are_clipped_each_by_itself(new_learner: Factory, tiny_model: Path) -> None:
    learner = new_learner(SGD.model_copy(update={"max_grad_norm": 0.01}))
    batch = episodes(learner.score(trajectories()))
    expected, _ = Oracle(learner, tiny_model).gradients(batch, PPO, RATES.kl_in_loss)
    before = snapshot(learner)
    learner.update(batch, [ALL], RATES)
    for role, after in snapshot(learner).items():
        assert float(expected[role].norm()) > 0.01
        assert float((before[role] - after).norm()) == pytest.approx(0.01, rel=1e-3)
        assert distance(before[role] - after, 0.01 * expected[role] / expected[role].norm()) < 1e-3


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("place", ["advantages", "returns"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    new_learner: Factory, place: str, zero: int
) -> None:
    learner = new_learner(ADAM.model_copy(update={"zero": zero}))
    good, bad = (episodes(learner.score(trajectories())) for _ in range(2))
    getattr(bad[3], place)[0] = math.nan
    assert learner.update(good, [ALL], SMALL)["skipped_steps"] == 0
    before = snapshot(learner)
    assert learner.update(bad, [ALL], SMALL)["skipped_steps"] == 1
    assert all(torch.equal(before[role], after) for role, after in snapshot(learner).items())

    assert learner.update(good, [ALL], SMALL)["skipped_steps"] == 0
    assert all(distance(before[role], after) > 0 for role, after in snapshot(learner).items())
    assert all(after.isfinite().all() for after in snapshot(learner).values())


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_very_first_gradient_may_be_not_finite(new_learner: Factory, zero: int) -> None:
    learner = new_learner(ADAM.model_copy(update={"zero": zero}))
    bad = episodes(learner.score(trajectories()))
    bad[3].advantages[0] = math.nan
    assert learner.update(bad, [ALL], SMALL)["skipped_steps"] == 1


def test_policy_at_rate_zero_keeps_its_bits_while_the_critic_learns(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    before = snapshot(learner)
    learner.update(episodes(learner.score(trajectories())), [HALVES], StepCoefficients(0.0, 1e-2, 0.3))
    after = snapshot(learner)
    assert torch.equal(before["policy"], after["policy"])
    assert distance(before["critic"], after["critic"]) > 1e-3


@pytest.mark.parametrize(("target", "steps"), [(1e-6, 1), (1e6, 6), (None, 6)])
def test_update_ends_once_the_policy_has_moved_too_far(new_learner: Factory, target: float | None, steps: int) -> None:
    learner = new_learner(ADAM, PPO.model_copy(update={"target_kl": target}))
    statistics = learner.update(episodes(learner.score(trajectories())), [HALVES] * 3, SMALL)
    assert statistics["optimizer_steps"] == steps
    assert statistics["approximate_kl"] > 1e-6


def test_update_changes_policy_and_critic_and_nothing_else(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    before = {name: parameter.detach().clone() for name, parameter in learner.roles.named_parameters()}
    learner.update(episodes(learner.score(trajectories())), [HALVES], SMALL)
    changed = {name for name, p in learner.roles.named_parameters() if not torch.equal(before[name], p)}
    trained = {n for n in before if ".policy." in n or ".critic." in n or n.startswith("critic.head.")}
    assert changed == trained


@pytest.mark.parametrize("zero", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_restored_learner_continues_bit_for_bit(new_learner: Factory, zero: int) -> None:
    settings = ADAM.model_copy(update={"zero": zero})
    learner = new_learner(settings)
    batch = episodes(learner.score(trajectories()))
    learner.update(batch, [HALVES], SMALL)
    saved = learner.state()
    learner.update(batch, [HALVES], SMALL)
    expected = learner.state()

    resumed = new_learner(settings)
    resumed.restore([saved], zero)
    resumed.update(batch, [HALVES], SMALL)
    actual = resumed.state()
    one, other = tensors_of(expected), tensors_of(actual)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    before = tensors_of(saved)
    assert any(not torch.equal(before[name], one[name]) for name in before if name.startswith("policy."))


def tensors_of(state: LearnerState) -> dict[str, Tensor]:
    """All tensors of a state by name."""
    named = {f"optimizer.{name}": tensor for name, tensor in state.optimizer.items()}
    for kind in (state.weights.adapters, state.weights.heads):
        for role, tensors in kind.items():
            named |= {f"{role}.{name}": tensor for name, tensor in tensors.items()}
    return named


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_several_steps_are_the_same_at_every_stage(new_learner: Factory, zero: int) -> None:
    after = []
    for stage in (0, zero):
        learner = new_learner(ADAM.model_copy(update={"zero": stage}))
        batch, start = episodes(learner.score(trajectories())), learner.state()
        learner.update(batch, [HALVES, HALVES], SMALL)
        after.append(learner.state())
    for part in ("policy.", "critic."):
        vectors = []
        for state in (start, *after):
            vectors.append(torch.cat([t.flatten() for n, t in tensors_of(state).items() if n.startswith(part)]))
        before, one, other = vectors
        assert (one - other).norm() < 1e-3 * (one - before).norm(), part


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_change_no_bit_of_an_update(new_learner: Factory, shards: int) -> None:
    after = []
    for is_sharded in (False, True):
        learner = new_learner(ADAM)
        batch = episodes(learner.score(trajectories()))
        orders = [HALVES, [HALVES[1], HALVES[0]]]
        stored = make_shards(batch, orders, shards, share=sent) if is_sharded else batch
        statistics = learner.update(stored, orders, SMALL)
        after.append((statistics, tensors_of(learner.state())))
    (one, tensors), (other, other_tensors) = after
    assert one == other
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors | other_tensors)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_packed_trajectories_change_no_bit_of_their_scores(new_learner: Factory, shares: int) -> None:
    learner = new_learner()
    for share in deal_by_length([row.total_length for row in trajectories()], shares):
        batch = [trajectories()[i] for i in share]
        (packed,) = sent([TokenBatch(batch)])
        (outputs,) = sent([learner.score(packed)])
        assert_same_bits(outputs, learner.score(batch))


def sent(values: Sequence[Any]) -> Sequence[Any]:
    """Values as they arrive in another process."""
    return [pickle.loads(pickle.dumps(value, protocol=5)) for value in values]


def test_a_saved_state_is_a_copy(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    batch = episodes(learner.score(trajectories()))
    learner.update(batch, [ALL], SMALL)
    saved = learner.state()
    kept = {name: tensor.clone() for name, tensor in saved.optimizer.items()}
    learner.update(batch, [ALL], SMALL)
    assert all(torch.equal(kept[name], saved.optimizer[name]) for name in kept)


def test_a_state_from_before_the_first_step_forgets_the_moments(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    batch = episodes(learner.score(trajectories()))
    start = learner.state()
    learner.update(batch, [HALVES], SMALL)
    expected = snapshot(learner)
    learner.restore([start], ADAM.zero)
    learner.update(batch, [HALVES], SMALL)
    assert all(torch.equal(expected[role], after) for role, after in snapshot(learner).items())


def test_policy_weights_are_a_copy_of_the_policy(new_learner: Factory) -> None:
    learner = new_learner(ADAM)
    sent = learner.policy_weights()
    assert torch.equal(flat(sent), snapshot(learner)["policy"])
    learner.update(episodes(learner.score(trajectories())), [ALL], SMALL)
    assert not torch.equal(flat(sent), snapshot(learner)["policy"])


def test_without_a_reward_head_the_score_is_not_a_number(tiny_model: Path, process_group: None) -> None:
    roles = build_roles(Blueprint(ModelSettings(path=str(tiny_model)), POLICY, 0, None), CriticSettings())
    learner = PpoLearner(roles, PPO, SGD, TEMPERATURE, gradient_checkpointing=False)
    (outputs,) = learner.score(trajectories()[:1])
    learner.close()
    assert math.isnan(outputs.score)
    assert outputs.values.tolist() == [0.0] * (trajectories()[0].length + 1)


def test_roles_start_as_the_blueprint_says(tiny_model: Path) -> None:
    model = ModelSettings(path=str(tiny_model))
    probe = build_roles(Blueprint(model, POLICY, 0, None), None).trunk
    sft = {name: torch.randn_like(tensor) for name, tensor in probe.read_adapter("policy").items()}
    reward = {name: torch.randn_like(tensor) for name, tensor in sft.items()}
    head = {"weight": torch.randn(32), "bias": torch.ones(1)}
    roles = build_roles(Blueprint(model, POLICY, 0, sft, (RewardRole(reward, (head,)),)), CriticSettings())
    assert torch.equal(flat(roles.trunk.read_adapter("policy")), flat(sft))
    assert torch.equal(flat(roles.trunk.read_adapter("reference")), flat(sft))
    assert torch.equal(flat(roles.trunk.read_adapter("critic")), flat(reward))
    assert torch.equal(flat(roles.trunk.read_adapter("reward")), flat(reward))
    assert torch.equal(critic_of(roles).head.weight, head["weight"])
    assert critic_of(roles).head.weight.data_ptr() != next(roles.reward_heads.parameters()).data_ptr()
    assert not any(p.requires_grad for p in roles.reward_heads.parameters())


def test_what_stands_at_tokens_of_others_has_no_part_in_an_update(new_learner: Factory) -> None:
    rows = trajectories()
    scored = new_learner().score(rows)
    inserted = [((1, 3),) if row.length > 4 else () for row in rows]
    results = []
    for noise in (0.0, 0.4):
        learner = new_learner()
        made = []
        for episode, spans in zip(episodes(scored), inserted, strict=True):
            others = ~policy_mask(len(episode.response_ids), spans)
            changed = {
                name: getattr(episode, name) + noise * others
                for name in ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")
            }
            made.append(replace(episode, **changed, inserted=spans))
        statistics = learner.update(made, [[list(range(len(made)))]], RATES)
        results.append((statistics, learner.policy_weights()))
    (one, weights), (other, other_weights) = results
    assert one == other
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
