"""Records of a rollout on their way to another process: a few large arrays instead of many small objects.

Within a process the batches are lists of the records themselves, and nothing is packed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.ragged import Ragged
from rollouts.trajectory import Request, RoleOutputs, ScoredTokens, Trajectory

OUTPUT_COLUMNS = (
    "logprobs",
    "reference_logprobs",
    "values",
    "reward_outputs",
    "token_scores",
    "shortfalls",
    "logit_spacings",
)
"""The tensors that all `RoleOutputs` have."""


class TrajectoryBatch(list[Trajectory]):
    """Trajectories whose tokens, log-probabilities and versions are pickled as a few large arrays."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        requests = [trajectory.request for trajectory in self]
        responses = Ragged.from_ids([trajectory.response_ids for trajectory in self])
        logprobs = Ragged.from_tensors([trajectory.sampler_logprobs for trajectory in self])
        ended = [trajectory.ended for trajectory in self]
        versions = [_runs(trajectory.versions) for trajectory in self]
        inserted = [trajectory.inserted for trajectory in self]
        return _unpack_trajectories, (requests, responses, logprobs, ended, versions, inserted)


def _runs(versions: Iterable[int]) -> list[tuple[int, int]]:
    """Each version and how many tokens in a row have it: few, because tokens are drawn in long segments."""
    return [(version, len(list(tokens))) for version, tokens in groupby(versions)]


def _flat(runs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The version of each token."""
    versions: tuple[int, ...] = ()
    for version, tokens in runs:
        versions += (version,) * tokens
    return versions


def _unpack_trajectories(
    requests: Sequence[Request],
    responses: Ragged,
    logprobs: Ragged,
    ended: Sequence[bool],
    versions: Sequence[Sequence[tuple[int, int]]],
    inserted: Sequence[tuple[tuple[int, int], ...]],
) -> TrajectoryBatch:
    trajectories = TrajectoryBatch()
    for i, request in enumerate(requests):
        trajectory = Trajectory(
            request=request,
            response_ids=responses.ids(i),
            sampler_logprobs=logprobs.tensor(i),
            ended=ended[i],
            versions=_flat(versions[i]),
            inserted=inserted[i],
        )
        trajectories.append(trajectory)
    return trajectories


@dataclass(frozen=True)
class PromptAndResponse:
    """The token ids of a prompt and its response: of a trajectory, what scoring needs."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def total_length(self) -> int:
        """The number of prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


class TokenBatch(list[ScoredTokens]):
    """Trajectories of which nothing but the token ids is pickled; they arrive as `PromptAndResponse`."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        prompts = Ragged.from_ids([tokens.prompt_ids for tokens in self])
        responses = Ragged.from_ids([tokens.response_ids for tokens in self])
        return _unpack_tokens, (prompts, responses)


def _unpack_tokens(prompts: Ragged, responses: Ragged) -> TokenBatch:
    return TokenBatch(map(PromptAndResponse, prompts.all_ids(), responses.all_ids()))


class OutputBatch(list[RoleOutputs]):
    """Role outputs that are pickled as one array per tensor; each tensor that arrives owns its storage."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        columns = {}
        for name in OUTPUT_COLUMNS:
            columns[name] = Ragged.from_tensors([getattr(output, name) for output in self])
        steps = [output.step_rewards for output in self if output.step_rewards is not None]
        step_rewards = Ragged.from_tensors(steps) if steps else None  # of all responses, or of none
        scores = np.array([output.score for output in self], dtype=np.float64)
        notes = [output.notes for output in self]
        return _unpack_outputs, (columns, step_rewards, scores, notes)


def _unpack_outputs(
    columns: dict[str, Ragged],
    step_rewards: Ragged | None,
    scores: NDArray[np.float64],
    notes: Sequence[dict[str, float]],
) -> OutputBatch:
    outputs = OutputBatch()
    for i, score in enumerate(scores.tolist()):
        tensors = {name: column.tensor(i) for name, column in columns.items()}
        steps = None if step_rewards is None else step_rewards.tensor(i)
        outputs.append(RoleOutputs(**tensors, score=score, notes=notes[i], step_rewards=steps))
    return outputs
