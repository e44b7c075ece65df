"""An environment that replies to responses, such as one that runs the tools they call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from policies.text.encoder import TextEncoder
from policies.text.tokenization import decode_response, prompt_text
from policies.trunk import AdapterWeights
from rewards.calls import Arguments, Caller, score_batch
from rewards.children.pool import FunctionPool
from rewards.children.source import FunctionSource
from rewards.terms.base import LONGEST_CALL
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, Trajectory

KEY = "rollouts.environment"


@dataclass(frozen=True)
class EnvironmentPool:
    """A pool whose responses continue after the replies of an environment.

    Where a response ends, by a stop string or an end token, the environment's function may reply: the tokens of the
    reply are appended, and the policy continues. The response is complete where the function returns None, and
    truncated where a reply leaves no room for a further token.

    Attributes:
        pool: Generates the policy's part of the responses.
        caller: Calls the function.
        encoder: Of the base model's tokenizer.
        name: The setting and the function, for messages.
    """

    pool: Pool
    caller: Caller
    encoder: TextEncoder
    name: str = KEY

    @property
    def peak_memory(self) -> int | None:
        """As of the pool that it uses."""
        return self.pool.peak_memory

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights from now on."""
        self.pool.load_adapter(version, weights)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request, in the same order, with the replies of the environment in it."""
        trajectories = self.pool.generate(requests, sampling)
        asked = [index for index, trajectory in enumerate(trajectories) if trajectory.ended]
        while continued := self._insert_replies(trajectories, asked, sampling.max_new_tokens):
            further = [_continuing(trajectories[index]) for index in continued]
            for index, trajectory in zip(continued, self.pool.generate(further, sampling), strict=True):
                trajectories[index] = trajectory
            asked = [index for index in continued if trajectories[index].ended]
        return trajectories

    def close(self) -> None:
        """End the processes of the function; the pool belongs to the caller."""
        self.caller.close()

    def _insert_replies(self, trajectories: list[Trajectory], asked: Sequence[int], limit: int) -> list[int]:
        """Append the replies to some of the responses, in place. Returns those that continue."""
        continued: list[int] = []
        for index, reply in zip(asked, self._replies([trajectories[index] for index in asked]), strict=True):
            trajectory = trajectories[index]
            if reply and trajectory.length + len(reply) < limit:
                trajectories[index] = trajectory.with_inserted(reply)
                continued.append(index)
            elif reply:
                trajectories[index] = replace(trajectory, ended=False)
        return continued

    def _replies(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """The tokens of the reply to each response; none where it is complete."""
        requests = [trajectory.request for trajectory in trajectories]
        prompts = [prompt_text(request.prompt) for request in requests]
        responses = [decode_response(self.encoder.tokenizer, trajectory.response_ids) for trajectory in trajectories]
        columns = [request.columns for request in requests]
        replies: list[str | None] = score_batch(
            self.caller, Arguments(prompts, responses, columns), name=self.name
        ).values
        return [self.encoder.continuation(reply) if reply else [] for reply in replies]


def _continuing(trajectory: Trajectory) -> Request:
    """The request to continue a response."""
    return replace(trajectory.request, partial_response=trajectory)


def environment_function(where: str) -> FunctionPool:
    """The process that calls the user's function, which starts at the first call."""
    return FunctionPool(FunctionSource(where, KEY, returns="replies"), timeout=LONGEST_CALL)


def in_environment(pool: Pool, where: str | None, tokenizer: PreTrainedTokenizerBase) -> Pool:
    """The pool, or the pool in the environment that the settings name.

    Args:
        pool: A pool.
        where: `rollouts.environment`.
        tokenizer: Tokenizer of the base model.
    """
    if where is None:
        return pool
    return EnvironmentPool(pool, environment_function(where), TextEncoder(tokenizer), f"{KEY}: {where}")
