"""Records of a rollout on their way to another process: a few large arrays instead of many small objects.

Within a process the batches are lists of the records themselves, and nothing is packed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollouts.ragged import Ragged
from rollouts.trajectory import RoleOutputs, ScoredTokens

OUTPUT_COLUMNS = ("logprobs", "reference_logprobs", "values", "reward_outputs", "shortfalls", "logit_spacings")
"""The tensors of `RoleOutputs`."""


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
        scores = np.array([output.score for output in self], dtype=np.float64)
        notes = [output.notes for output in self]
        return _unpack_outputs, (columns, scores, notes)


def _unpack_outputs(
    columns: dict[str, Ragged], scores: NDArray[np.float64], notes: Sequence[dict[str, float]]
) -> OutputBatch:
    outputs = OutputBatch()
    for i, score in enumerate(scores.tolist()):
        tensors = {name: column.tensor(i) for name, column in columns.items()}
        outputs.append(RoleOutputs(**tensors, score=score, notes=notes[i]))
    return outputs
