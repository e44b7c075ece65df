from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithms.advantages import gae
from align.algorithms.episodes import Episode, make_episodes
from align.config.ppo_settings import KlSettings, PpoSettings
from rollouts.trajectory import Request, RoleOutputs, Trajectory

PLAIN = PpoSettings(gamma=1.0, gae_lambda=1.0, whiten_advantages=False)


def trajectory(length: int, ended: bool = True) -> Trajectory:
    return Trajectory.from_tokens(
        Request("p", (5, 6), seed=0), tuple(range(10, 10 + length)), torch.zeros(length), ended, version=3
    )


def scored(length: int, score: float, kl: float = 0.0, value: float = 0.0, last: float = 0.0) -> RoleOutputs:
    values = torch.full((length + 1,), value)
    values[-1] = last
    return RoleOutputs(torch.full((length,), kl - 1.0), torch.full((length,), -1.0), values, score)


def one(ended: bool, ppo: PpoSettings, said: RoleOutputs, coefficient: float = 0.0) -> Episode:
    (episode,) = make_episodes([trajectory(len(said.logprobs), ended)], [said], ppo, coefficient)
    return episode


def test_ended_response_is_scored_and_terminal() -> None:
    episode = one(True, PLAIN, scored(3, score=2.0, last=100.0))
    assert episode.returns.tolist() == [2.0, 2.0, 2.0]


def test_cut_response_is_scored_terminal_and_penalised() -> None:
    ppo = PLAIN.model_copy(update={"truncation_penalty": 0.5})
    assert one(False, ppo, scored(3, score=2.0, last=100.0)).returns.tolist() == [1.5, 1.5, 1.5]


def test_ended_response_has_no_penalty() -> None:
    ppo = PLAIN.model_copy(update={"truncation_penalty": 0.5})
    assert one(True, ppo, scored(3, score=2.0)).returns.tolist() == [2.0, 2.0, 2.0]


def test_cut_response_is_bootstrapped_and_not_scored() -> None:
    ppo = PLAIN.model_copy(update={"on_truncation": "bootstrap"})
    assert one(False, ppo, scored(3, score=2.0, last=100.0)).returns.tolist() == [100.0, 100.0, 100.0]


def test_ended_response_is_never_bootstrapped() -> None:
    ppo = PLAIN.model_copy(update={"on_truncation": "bootstrap"})
    assert one(True, ppo, scored(3, score=2.0, last=100.0)).returns.tolist() == [2.0, 2.0, 2.0]


def test_bootstrapped_response_still_pays_for_its_kl() -> None:
    ppo = PLAIN.model_copy(update={"on_truncation": "bootstrap"})
    episode = one(False, ppo, scored(2, score=2.0, kl=0.5, last=10.0), coefficient=2.0)
    torch.testing.assert_close(episode.returns, torch.tensor([8.0, 9.0]))


def test_penalty_on_what_is_not_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="truncation_penalty"):
        PpoSettings(on_truncation="bootstrap", truncation_penalty=1.0)


def test_score_without_bootstrap_may_be_nan_where_it_is_not_used() -> None:
    ppo = PLAIN.model_copy(update={"on_truncation": "bootstrap"})
    assert one(False, ppo, scored(2, score=float("nan"), last=1.0)).returns.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.10653066)])
def test_kl_in_the_reward_uses_the_estimator(estimator: str, kl: float) -> None:
    ppo = PLAIN.model_copy(update={"kl": KlSettings(estimator=estimator)})
    episode = one(True, ppo, scored(2, score=0.0, kl=0.5), coefficient=2.0)
    torch.testing.assert_close(episode.returns, torch.tensor([-4 * kl, -2 * kl]))


def test_kl_in_the_loss_is_not_in_the_reward_as_well() -> None:
    ppo = PLAIN.model_copy(update={"kl": KlSettings(where="loss", estimator="k3")})
    assert one(True, ppo, scored(2, score=1.0, kl=0.5), coefficient=2.0).returns.tolist() == [1.0, 1.0]


def test_scoring_record_is_left_as_it_was() -> None:
    said = scored(2, score=1.0, last=7.0)
    one(True, PLAIN, said, coefficient=1.0)
    assert said.values.tolist() == [0.0, 0.0, 7.0]


def test_old_values_are_those_before_each_token() -> None:
    said = RoleOutputs(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 2.0, 3.0]), 0.0)
    assert one(True, PLAIN, said).old_values.tolist() == [1.0, 2.0]


ROWS = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.floats(-3, 3), st.floats(-1, 1)), min_size=2, max_size=6)


@given(ROWS)
def test_advantages_are_whitened_over_the_whole_batch(rows: list[tuple[int, bool, float, float]]) -> None:
    trajectories = [trajectory(length, ended) for length, ended, _, _ in rows]
    said = [scored(length, score + index, kl=0.1, value=value) for index, (length, _, score, value) in enumerate(rows)]
    raw = make_episodes(trajectories, said, PLAIN, 0.3)
    white = make_episodes(trajectories, said, PLAIN.model_copy(update={"whiten_advantages": True}), 0.3)
    together = torch.cat([episode.advantages for episode in raw]).double()
    if float(together.std(correction=0)) > 1e-2:
        expected = (together - together.mean()) / together.std(correction=0)
        actual = torch.cat([episode.advantages for episode in white]).double()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@given(ROWS)
def test_returns_are_not_whitened(rows: list[tuple[int, bool, float, float]]) -> None:
    ppo = PpoSettings(gamma=0.9, gae_lambda=0.8, whiten_advantages=True)
    trajectories = [trajectory(length, ended) for length, ended, _, _ in rows]
    said = [scored(length, score, value=value, last=9.0) for length, _, score, value in rows]
    for episode, record in zip(make_episodes(trajectories, said, ppo, 0.0), said):
        rewards = torch.zeros(len(record.logprobs))
        rewards[-1] = record.score
        values = torch.cat([record.values[:-1], torch.zeros(1)])
        torch.testing.assert_close(episode.returns, gae(rewards, values, 0.9, 0.8)[1])


def test_each_row_keeps_its_own_numbers() -> None:
    trajectories = [trajectory(2), trajectory(3)]
    first, second = make_episodes(trajectories, [scored(2, 1.0), scored(3, 5.0)], PLAIN, 0.0)
    assert first.advantages.tolist() == [1.0, 1.0]
    assert second.advantages.tolist() == [5.0, 5.0, 5.0]
    assert (first.length, second.length) == (4, 5)


def rows(scores: list[float], ppo: PpoSettings, lengths: tuple[int, ...] = (3, 1, 2, 4)) -> list[Episode]:
    said = [scored(length, score) for length, score in zip(lengths, scores)]
    return make_episodes([trajectory(length) for length in lengths], said, ppo, 0.0)


def without_critic(length: int, score: float, kl: float) -> RoleOutputs:
    return RoleOutputs(torch.full((length,), kl - 1.0), torch.full((length,), -1.0), torch.empty(0), score)


def test_rloo_gives_all_tokens_of_a_response_its_lead_over_the_others() -> None:
    made = rows([1.0, 3.0, 5.0, 5.0], PpoSettings(batch_size=4, samples_per_prompt=2, estimator="rloo"))
    assert [e.advantages.tolist() for e in made] == [[-2.0] * 3, [2.0], [0.0] * 2, [0.0] * 4]


def test_grpo_standardises_within_a_prompt() -> None:
    made = rows([1.0, 3.0, 5.0, 5.0], PpoSettings(batch_size=4, samples_per_prompt=2, estimator="grpo"))
    assert [e.advantages.tolist() for e in made] == [
        pytest.approx([-1 / 1.0001] * 3),
        pytest.approx([1 / 1.0001]),
        [0.0] * 2,
        [0.0] * 4,
    ]


def test_reinforce_pp_whitens_rewards_to_go_and_pays_the_kl_token_by_token() -> None:
    ppo = PpoSettings(estimator="reinforce++", whiten_advantages=False)
    (episode,) = make_episodes([trajectory(3)], [without_critic(3, 2.0, 0.5)], ppo, 1.0)
    assert episode.advantages.tolist() == [0.5, 1.0, 1.5]
    made = rows([1.0, 3.0, 5.0, 5.0], PpoSettings(estimator="reinforce++"))
    together = torch.cat([e.advantages for e in made])
    assert float(together.mean()) == pytest.approx(0, abs=1e-6)
    assert float(together.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_estimators_without_a_critic_need_no_values(estimator: str) -> None:
    ppo = PpoSettings(batch_size=2, minibatches=1, samples_per_prompt=2, estimator=estimator)
    made = make_episodes(
        [trajectory(2), trajectory(3)], [without_critic(2, 0.0, 0.1), without_critic(3, 1.0, 0.1)], ppo, 0.1
    )
    assert [len(e.advantages) for e in made] == [2, 3]
    assert [len(e.returns) + len(e.old_values) for e in made] == [0, 0]


def test_kl_in_the_reward_lowers_the_total_that_rloo_compares() -> None:
    ppo = PpoSettings(batch_size=2, minibatches=1, samples_per_prompt=2, estimator="rloo")
    said = [without_critic(2, 1.0, 0.0), without_critic(2, 1.0, 0.5)]
    made = make_episodes([trajectory(2), trajectory(2)], said, ppo, coefficient=1.0)
    assert [e.advantages.tolist() for e in made] == [[1.0, 1.0], [-1.0, -1.0]]


def test_length_penalty_is_paid_a_token() -> None:
    ppo = PLAIN.model_copy(update={"length_penalty": 0.25})
    assert one(True, ppo, scored(4, score=2.0)).returns.tolist() == [1.0] * 4


def test_whitened_rewards_scale_the_returns() -> None:
    plain, scaled = (
        rows([1.0, 3.0, 5.0, 7.0], PLAIN.model_copy(update={"whiten_rewards": whiten}), lengths=(1, 1, 1, 1))
        for whiten in (False, True)
    )
    returns = torch.cat([e.returns for e in scaled])
    assert float(returns.mean()) == pytest.approx(4.0)
    assert float(returns.std(correction=0)) == pytest.approx(1.0)
    assert float(torch.cat([e.returns for e in plain]).std(correction=0)) > 2


def test_importance_weights_are_the_ratio_of_learner_to_sampler_and_capped() -> None:
    said = RoleOutputs(torch.tensor([0.0, -1.0, -0.5]), torch.zeros(3), torch.zeros(4), 1.0)
    row = trajectory(3)
    sampler = torch.tensor([-2.0, -1.0, -0.25])
    row = Trajectory.from_tokens(row.request, row.response_ids, sampler, True, 3)
    (plain,), (weighed,) = (
        make_episodes([row], [said], PLAIN.model_copy(update={"importance_ratio_cap": cap}), 0.0) for cap in (None, 2.0)
    )
    ratios = weighed.advantages / plain.advantages
    torch.testing.assert_close(ratios, torch.tensor([2.0, 1.0, 0.7788008]))
    assert torch.equal(weighed.returns, plain.returns)


def test_a_mean_over_sequences_weighs_each_of_them_alike() -> None:
    made = rows([0.0] * 4, PLAIN.model_copy(update={"loss_aggregation": "sequence_mean"}))
    assert [e.weight * len(e.response_ids) for e in made] == pytest.approx([1.0] * 4)
    assert {e.weight for e in rows([0.0] * 4, PLAIN)} == {1.0}


STEPS = torch.tensor([0.0, 1.0, 0.0, -0.5])


def with_steps(score: float, kl: float = 0.0) -> RoleOutputs:
    """A response of four tokens whose score contains step rewards of 0.5 in total."""
    return replace(scored(4, score, kl), step_rewards=STEPS)


def test_step_rewards_are_paid_at_their_tokens_and_the_rest_of_the_score_at_the_end() -> None:
    episode = one(True, PLAIN, with_steps(score=2.5, kl=0.25), coefficient=2.0)
    assert episode.returns.tolist() == [0.5, 1.0, 0.5, 1.0]  # rewards -0.5, 0.5, -0.5, and -0.5 - 0.5 + 2


def test_a_response_that_is_bootstrapped_keeps_its_step_rewards() -> None:
    ppo = PLAIN.model_copy(update={"on_truncation": "bootstrap"})
    assert one(False, ppo, with_steps(score=2.5)).returns.tolist() == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_group_estimators_see_the_total_alone(estimator: str) -> None:
    ppo = PpoSettings(estimator=estimator, samples_per_prompt=2, whiten_advantages=False)
    trajectories = [trajectory(4), trajectory(4)]
    without = make_episodes(trajectories, [scored(4, 2.5), scored(4, 1.0)], ppo, 0.0)
    with_them = make_episodes(trajectories, [with_steps(2.5), with_steps(1.0)], ppo, 0.0)
    for episode, other in zip(with_them, without, strict=True):
        torch.testing.assert_close(episode.advantages, other.advantages)


def test_reinforce_pp_gives_each_token_the_rewards_that_follow_it() -> None:
    ppo = PpoSettings(estimator="reinforce++", gamma=0.5, whiten_advantages=False)
    said = replace(with_steps(score=2.5), values=torch.empty(0))
    (episode,) = make_episodes([trajectory(4)], [said], ppo, 0.0)
    assert episode.advantages.tolist() == [0.5 + 1.5 / 8, 1 + 1.5 / 4, 1.5 / 2, 1.5]  # rewards 0, 1, 0, -0.5 + 2
