"""The lines of the design's "PPO, exactly" that no other test proves, by whole runs, two ranks and two model families.

The others are proved beside what they are about, in the neighbours of this file and in the other folders of tests.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from align.algorithms.episodes import make_episodes
from align.algorithms.kl import AdaptiveKl
from align.config.ppo_settings import CriticSettings, KlSettings, PpoSettings
from align.config.schema import ClusterSettings, Experiment, LearnerSettings
from align.ppo.checkpoint import read_progress
from align.ppo.learner import StepCoefficients
from align.ppo.learners import PpoLearners, local_learners, ray_learners
from align.ppo.loop import Step, step_coefficients
from align.ppo.metrics import step_metrics
from align.ppo.objective import MAXIMA, STATISTICS
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint, RewardRole, build_roles
from align.roles.roles import Critic, Roles
from align.roles.scoring import score_microbatch
from align.runs.checkpoint import latest
from align.runs.folder import RunFolder, read_facts
from align.runtime.seeds import seed_for
from align.scoring.build import build_scorers
from align.stages.pipeline import load_datasets
from policies.build import make_trunk
from policies.device import ActorOptions, ComputeSettings
from policies.files.adapters import load_adapter
from policies.files.base_model import load_tokenizer, stop_ids
from policies.heads import ScalarHead
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine
from tests.integration.tiny_run import figures, make_settings, run_in_process

Series = Callable[[str], list[float]]

TEMPERATURE = 0.7
POLICY = PolicySettings(rank=4, alpha=8.0, dropout=0.5)
PAD = 0  # the padding token, which is EOS too
STOPS = frozenset(range(PAD, 300, 12))
NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def randomise(trunk: Trunk, *roles: str) -> None:
    for seed, role in enumerate(roles):
        noise = torch.Generator().manual_seed(seed)
        own = trunk.adapter(role)
        trunk.write_adapter(role, {n: 0.15 * torch.randn(p.shape, generator=noise) for n, p in own.items()})


def llama(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gpt2(_: Path) -> PreTrainedModel:
    """Positions are absolute: a sequence shifted by its padding is another one, where a Llama would not notice."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.fixture(params=[llama, gpt2])
def roles(request: pytest.FixtureRequest, tiny_model: Path) -> Roles:
    """Four roles that differ, and the sampler."""
    names = ("policy", "reference", "critic", "reward")
    trunk = make_trunk(request.param(tiny_model), POLICY, (*names, SAMPLER_ROLE))
    randomise(trunk, *names)
    critic, reward = (ScalarHead(trunk.width, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return Roles(trunk, Critic(critic, "critic"), {"reward": [reward]}).eval()


def requests() -> list[Request]:
    """Prompts of many lengths with EOS, which is the pad id, at their start, within and at their end."""
    lengths = (3, 17, 5, 8, 1, 20)
    return [Request("", (PAD, PAD, *range(t, 2 * t), PAD, 7, PAD), seed) for seed, t in enumerate(lengths)]


def sample(roles: Roles) -> list[Trajectory]:
    engine = TransformersEngine(roles.trunk, STOPS, max_num_seqs=6)
    engine.load_adapter(1, roles.trunk.read_adapter("policy"))
    return engine.generate(requests(), Sampling(TEMPERATURE, 12))


@torch.no_grad()
def score(roles: Roles, rows: list[Trajectory]) -> list[RoleOutputs]:
    return score_microbatch(roles, rows, TEMPERATURE, torch.device("cpu"))


@torch.no_grad()
def alone(roles: Roles, row: Trajectory, role: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response, and the last hidden state, by transformers: one sequence, nothing masked."""
    roles.trunk.switch(role)
    ids = torch.tensor([[*row.request.prompt_ids, *row.response_ids]])
    out = roles.trunk.causal(input_ids=ids, output_hidden_states=True)
    logprobs = torch.log_softmax(out.logits[0, -row.length - 1 : -1] / TEMPERATURE, dim=-1)
    return logprobs.gather(1, ids[0, -row.length :, None]).squeeze(1), out.hidden_states[-1][0, -1]


def test_sampler_and_learner_agree_with_each_sequence_alone_at_the_sampling_temperature(roles: Roles) -> None:
    """Temperature included; position ids from the attention mask; masks never from comparing with the pad id."""
    rows = sample(roles)
    assert len({row.length for row in rows}) > 2
    for row, outputs in zip(rows, score(roles, rows)):
        expected, _ = alone(roles, row, "policy")
        torch.testing.assert_close(row.sampler_logprobs, expected, **NEAR)
        torch.testing.assert_close(outputs.logprobs, expected, **NEAR)
        torch.testing.assert_close(outputs.reference_logprobs, alone(roles, row, "reference")[0], **NEAR)


def test_score_and_last_value_are_those_of_the_last_token_where_it_is_eos_and_pad(roles: Roles) -> None:
    """The score lands on the last token, EOS included; masks come from lengths: pad is EOS in half of tokenizers."""
    rows = [replace(row, response_ids=(*row.response_ids[:-1], PAD)) for row in sample(roles)]
    (head,) = next(iter(roles.reward_heads.children())).children()
    assert roles.critic is not None
    for row, outputs in zip(rows, score(roles, rows)):
        assert outputs.score == pytest.approx(head(alone(roles, row, "reward")[1]).item(), abs=1e-4)
        assert outputs.values[-1].item() == pytest.approx(
            roles.critic.head(alone(roles, row, "critic")[1]).item(), abs=1e-4
        )


def one_round(learners: PpoLearners, rows: list[Trajectory]) -> tuple[Tensor, dict[str, float]]:
    """Score, whiten and train on a batch; gives its advantages and the statistics of the update."""
    episodes = make_episodes(rows, learners.score(rows), PpoSettings(), 0.1)
    statistics = learners.update(episodes, [[[*range(len(rows))]]], StepCoefficients(0.1, 0.1, 0.0))
    learners.close()
    return torch.cat([episode.advantages for episode in episodes]), statistics


def test_two_ranks_score_whiten_and_train_as_one_does(tiny_model: Path) -> None:
    """Advantages whitened over the whole batch, across all ranks; every loss over the token count of all ranks."""
    randomise(probe := make_trunk(llama(tiny_model), POLICY, ("policy", "reward")), "policy", "reward")
    head = ScalarHead(probe.width, torch.Generator().manual_seed(1)).state_dict()
    reference, reward = (probe.read_adapter(role) for role in ("policy", "reward"))
    blueprint = Blueprint(ModelSettings(path=str(tiny_model)), POLICY, 0, reference, (RewardRole(reward, (head,)),))
    lengths = (1, 9, 4, 12, 7, 2, 3)
    rows = [
        Trajectory.from_tokens(Request("", (5, 6), 0), tuple(range(t, 2 * t)), torch.zeros(t), t > 3, 0)
        for t in lengths
    ]
    sgd = LearnerSettings(optimizer="sgd", tokens_per_microbatch=20, ranks=2)
    advantages, statistics = one_round(
        local_learners(build_roles(blueprint, CriticSettings()), PpoSettings(), sgd, 1.0, False), rows
    )
    with ray_cluster(ClusterSettings(), 2):
        actors = [ActorOptions(ComputeSettings(1))] * 2
        split, theirs = one_round(ray_learners(blueprint, PpoSettings(), sgd, 1.0, actors), rows)
    torch.testing.assert_close(split, advantages, **NEAR)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-3)
    assert statistics["policy_gradient_norm"] > 0.1
    assert theirs == pytest.approx(statistics, rel=1e-3, abs=1e-4)


def trajectory_and_outputs(difference: Tensor) -> tuple[Trajectory, RoleOutputs]:
    """A trajectory whose log-probabilities under the learner differ so from the sampler's and the reference's."""
    zeros = torch.zeros(len(difference))
    row = Trajectory.from_tokens(Request("", (5,), 0), tuple(range(10, 10 + len(zeros))), zeros, True, 4)
    return row, RoleOutputs(difference, zeros, torch.zeros(len(zeros) + 1), 1.0)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_kl_weighs_in_the_reward_or_in_the_loss_and_never_in_both(where: Any) -> None:
    """KL to the reference by k1, k2 or k3, in the reward (default) or in the loss."""
    ppo = PpoSettings(kl=KlSettings(where=where, estimator="k2"), gae_lambda=1.0)
    row, output = trajectory_and_outputs(torch.tensor([1.0, 2.0]))
    (episode,) = make_episodes([row], [output], ppo, 0.3)
    in_loss = step_coefficients(LearnerSettings(), ppo, 0, 0.3).kl_in_loss
    assert (float(episode.returns[0]), in_loss) == pytest.approx((1 - 0.3 * 2.5, 0) if where == "reward" else (1, 0.3))
    assert PpoSettings().kl.where == "reward"


def test_a_step_logs_the_mismatch_the_coefficient_the_skipped_steps_and_the_version() -> None:
    """The mismatch of sampler and learner is logged; skipped steps are counted and logged."""
    row, output = trajectory_and_outputs(torch.tensor([0.1, 0.3, 0.2]))
    names = (
        *STATISTICS,
        *MAXIMA,
        "policy_gradient_norm",
        "critic_gradient_norm",
        "optimizer_steps",
        "skipped_steps",
        "ptx_loss",
    )
    episodes = make_episodes([row], [output], PpoSettings(), 0.1)
    logged = step_metrics(
        Step(
            index=0,
            trajectories=[row],
            scored=[output],
            episodes=episodes,
            coefficients=StepCoefficients(0, 0, 0),
            kl_coefficient=0.25,
            logit_spacing=0.125,
            statistics=dict.fromkeys(names, 3.0)
            | {"ratio_change": 0.1, "squared_ratio_change": 0.05, "ratio_max": 1.9, "seconds_at_peak": 0.3},
            seconds={"step": 2.0, "update": 1.5},
        ),
        PpoSettings(),
        None,
    )
    assert (logged["rollout/mismatch_mean"], logged["rollout/mismatch_max"]) == pytest.approx((0.2, 0.3))
    assert (logged["kl/coefficient"], logged["learner/skipped_steps"], logged["rollout/version"]) == (0.25, 3, 4)
    # The score is 1, and the KL of the only response 0.1 + 0.3 + 0.2.
    assert logged["reward/kl_penalized"] == pytest.approx(1 - 0.25 * 0.6)
    # One prompt token and three of the response.
    assert (logged["perf/tokens_per_second"], logged["perf/episodes_per_second"]) == (2.0, 0.5)
    assert logged["perf/mfu"] == pytest.approx(0.3 / 1.5)
    assert (logged["policy/ratio_mean"], logged["policy/ratio_std"]) == pytest.approx((1.1, 0.2))
    assert logged["policy/ratio_max"] == 1.9
    returns = episodes[0].returns
    assert logged["value/return_mean"] == pytest.approx(float(returns.mean()))
    assert logged["value/return_max"] == float(returns.max())
    assert (logged["value/prediction_std"], logged["value/prediction_min"]) == (0, 0)


CHANGES: dict[str, dict[str, Any]] = {
    "policy": {"dropout": 0.5},
    "sft": {"learning_rate": 0.05},  # so large that responses of the base are other ones
    "reward": {"normalise": 1000},
    "rollouts": {"temperature": TEMPERATURE},
    "ppo": {"steps": 4, "epochs": 1, "minibatches": 1, "critic": {"warmup": 1}, "kl": {"target": 0.1, "horizon": 40}},
    "learner": {"policy_learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """A run with dropout, a temperature, a warm-up of the critic and an adaptive coefficient; one update a step."""
    settings = make_settings(tiny_model, tmp_path_factory.mktemp("whole"))
    settings |= {name: settings.get(name, {}) | changes for name, changes in CHANGES.items()}
    return Experiment.model_validate(settings), run_in_process(settings)


@pytest.fixture
def series(whole: tuple[Experiment, Path]) -> Series:
    """A metric's values, step by step."""
    return lambda name: [row[name] for row in figures(whole[1]) if "policy/loss" in row]


def test_reward_of_sft_responses_has_mean_zero_and_is_the_critic_s_first_value(whole: tuple[Experiment, Path]) -> None:
    """Reward normalised so that SFT responses have mean 0, the same shift and scale folded into the critic's head."""
    experiment, run = whole[0], RunFolder(whole[1])
    tokenizer = load_tokenizer(experiment.model.path)
    roles = build_roles(build_scorers(experiment, run, tokenizer).blueprint, CriticSettings(), (SAMPLER_ROLE,))
    engine = TransformersEngine(roles.trunk, stop_ids(roles.trunk.causal.generation_config, tokenizer), max_num_seqs=8)
    engine.load_adapter(0, load_adapter(run.sft, experiment.policy))
    pending = [replace(p, seed=seed_for(0, "normalise", i)) for i, p in enumerate(load_datasets(experiment).prompts)]
    scored = score(roles, engine.generate(pending, Sampling(TEMPERATURE, experiment.rollouts.max_new_tokens)))
    scores = torch.tensor([outputs.score for outputs in scored])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(torch.stack([outputs.values[-1] for outputs in scored]), scores, **NEAR)
    assert abs(read_facts(run.reward)["moments"][0][0]) > 0.05


def test_every_step_samples_from_the_policy_that_it_trains(series: Series) -> None:
    """Temperature included, dropout off in every forward; each trajectory carries the version that episodes it."""
    assert series("rollout/version") == [0, 1, 2, 3]
    assert max(series("rollout/mismatch_max")) < 1e-4
    assert max(series("policy/approximate_kl")) < 1e-8
    assert max(series("policy/clip_fraction")) == 0


def test_the_critic_warms_up_alone(series: Series) -> None:
    """Optional warm-up steps for the critic alone."""
    assert series("policy/learning_rate") == [0, 1e-2, 1e-2, 1e-2]
    assert min(series("value/learning_rate")) > 0
    assert series("kl/per_sequence")[:2] == pytest.approx([0, 0], abs=1e-5)
    assert abs(series("kl/per_sequence")[2]) > 1e-2


def test_the_adaptive_coefficient_follows_from_the_kl_before(series: Series, whole: tuple[Experiment, Path]) -> None:
    """The coefficient is fixed or adaptive to a target; its state is in the checkpoint; it is logged every step."""
    coefficient, expected = AdaptiveKl(0.05, target=0.1, horizon=40), []
    for kl in series("kl/per_sequence"):
        expected.append(coefficient.value)
        coefficient.update(kl, episodes=8)
    assert series("kl/coefficient") == pytest.approx(expected, rel=1e-6)
    assert len({*expected, coefficient.value}) == 5
    saved = latest(RunFolder(whole[1]).checkpoints("ppo"))
    assert saved is not None
    assert read_progress(saved, {}).kl_coefficient == pytest.approx(coefficient.value, rel=1e-6)
    assert series("kl/loss") == [0] * 4
