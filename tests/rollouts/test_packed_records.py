"""What scoring sends and returns travels as a few large arrays and arrives bit for bit."""

import pickle
from dataclasses import replace

import pytest
import torch

from rollouts.packed_records import OutputBatch, PromptAndResponse, TokenBatch, TrajectoryBatch
from rollouts.trajectory import Request, RoleOutputs, Trajectory
from tests.random_episodes import assert_same_bits

TEXT = "a prompt as the user wrote it"


def random_trajectories(count: int, tokens: int, seed: int = 0) -> list[Trajectory]:
    """Trajectories of up to `tokens` tokens of prompt and as many of response, which may be empty."""
    noise = torch.Generator().manual_seed(seed)
    trajectories = []
    for number in range(count):
        prompt, response = torch.randint(0, tokens, (2,), generator=noise).tolist()
        ids = torch.randint(0, 2**31 - 1, (prompt + response,), generator=noise).tolist()
        request = Request(TEXT, tuple(ids[:prompt]), number, {"column": TEXT})
        trajectory = Trajectory.from_tokens(request, ids[prompt:], torch.randn(response), True, 3)
        trajectories.append(trajectory)
    return trajectories


def random_outputs(count: int, tokens: int, critic: bool = True, heads: int = 2, seed: int = 0) -> list[RoleOutputs]:
    """Role outputs of responses of up to `tokens` tokens."""
    noise = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> torch.Tensor:
        return torch.randn(length, generator=noise).exp().pow(9)

    outputs = []
    for _ in range(count):
        length = int(torch.randint(0, tokens, (), generator=noise))
        output = RoleOutputs(
            logprobs=drawn(length),
            reference_logprobs=drawn(length),
            values=drawn(length + 1 if critic else 0),
            score=float(drawn(1)),
            reward_outputs=drawn(heads),
            notes={"note": 1.5},
        )
        outputs.append(output)
    return outputs


def assert_arrives(outputs: list[RoleOutputs]) -> None:
    arrived = pickle.loads(pickle.dumps(OutputBatch(outputs), protocol=5))
    assert_same_bits(arrived, outputs)
    for output in arrived:
        for tensor in (value for value in vars(output).values() if isinstance(value, torch.Tensor)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_inserted_tokens_arrive_with_their_trajectories() -> None:
    trajectories = random_trajectories(6, 9)
    trajectories[2] = trajectories[2].with_inserted((4, 5)).with_inserted((6,))
    arrived = pickle.loads(pickle.dumps(TrajectoryBatch(trajectories), protocol=5))
    assert [trajectory.inserted for trajectory in arrived] == [trajectory.inserted for trajectory in trajectories]
    assert arrived[2].response_ids == trajectories[2].response_ids


def test_scores_of_tokens_arrive_bit_for_bit() -> None:
    outputs = random_outputs(5, 9)
    assert_arrives([replace(output, token_scores=output.logprobs.neg()) for output in outputs])


def test_step_rewards_arrive_bit_for_bit() -> None:
    outputs = random_outputs(5, 9)
    assert_arrives([replace(output, step_rewards=output.logprobs.neg().exp()) for output in outputs])


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_role_outputs_arrive_bit_for_bit_and_own_their_storage(seed: int, critic: bool) -> None:
    assert_arrives(random_outputs(seed, 3 + 10 * (seed % 3), critic, heads=seed % 3, seed=seed))


def test_not_a_number_and_signed_zero_survive() -> None:
    row = torch.tensor([float("nan"), -0.0, float("-inf")])
    assert_arrives([RoleOutputs(row, row, row, float("nan"), row, {}, row, row)])


@pytest.mark.parametrize("seed", range(10))
def test_trajectories_arrive_bit_for_bit_and_own_their_storage(seed: int) -> None:
    trajectories = []
    for trajectory in random_trajectories(seed, 3 + 10 * (seed % 3), seed):
        continued = replace(trajectory.request, partial_response=trajectory)
        trajectories += [trajectory, Trajectory.from_tokens(continued, [5, 6], torch.randn(2), False, 4)]
    arrived = pickle.loads(pickle.dumps(TrajectoryBatch(trajectories), protocol=5))
    assert_same_bits(arrived, trajectories)
    for trajectory in arrived:
        logprobs = trajectory.sampler_logprobs
        assert logprobs.untyped_storage().nbytes() == logprobs.nbytes


@pytest.mark.parametrize("seed", range(10))
def test_the_tokens_of_trajectories_arrive_and_nothing_else(seed: int) -> None:
    trajectories = random_trajectories(seed, 3 + 10 * (seed % 3), seed)
    pickled = pickle.dumps(TokenBatch(trajectories), protocol=5)
    assert pickle.loads(pickled) == [PromptAndResponse(t.prompt_ids, t.response_ids) for t in trajectories]
    assert [tokens.total_length for tokens in pickle.loads(pickled)] == [t.total_length for t in trajectories]
    assert TEXT.encode() not in pickled


def test_batches_are_lists_within_a_process() -> None:
    trajectories = random_trajectories(3, 9)
    outputs = random_outputs(3, 9)
    assert all(mine is other for mine, other in zip(TrajectoryBatch(trajectories), trajectories, strict=True))
    assert all(mine is other for mine, other in zip(TokenBatch(trajectories), trajectories, strict=True))
    assert all(mine is other for mine, other in zip(OutputBatch(outputs), outputs, strict=True))


@pytest.mark.parametrize("count", [16, 128, 1024])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_pickled_size_is_that_of_the_tensors(count: int, tokens: int) -> None:
    trajectories = random_trajectories(count, tokens)
    ids = sum(4 * trajectory.total_length for trajectory in trajectories)
    assert len(pickle.dumps(TokenBatch(trajectories), protocol=5)) <= 1.2 * ids + 4096
    texts = count * 300
    with_logprobs = sum(4 * (trajectory.total_length + trajectory.length) for trajectory in trajectories)
    assert len(pickle.dumps(TrajectoryBatch(trajectories), protocol=5)) <= 1.2 * with_logprobs + texts + 4096
    outputs = random_outputs(count, tokens)
    data = sum(4 * (len(o.logprobs) + len(o.reference_logprobs) + len(o.values) + 2) for o in outputs)
    assert len(pickle.dumps(OutputBatch(outputs), protocol=5)) <= 1.2 * data + 4096
