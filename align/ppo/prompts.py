"""Which prompts and demonstrations a step trains on, in which order, and with which random numbers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from align.config.ppo_settings import PpoSettings
from align.data.examples import TokenizedDemonstration
from align.runtime.seeds import permutation, seed_for
from rollouts.trajectory import Request


class PromptStream:
    """All prompts in random order, epoch after epoch. The batch of a step depends on the step alone."""

    def __init__(self, prompts: Sequence[Request], batch_size: int, samples_per_prompt: int, seed: int) -> None:
        """Set up the stream.

        Args:
            prompts: All training prompts.
            batch_size: Requests per step.
            samples_per_prompt: Requests per prompt, adjacent to each other.
            seed: Seed of the run.
        """
        self.prompts = prompts
        self.batch_size = batch_size
        self.samples_per_prompt = samples_per_prompt
        self.seed = seed
        # A batch may span two epochs, so two orders are kept.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(len(prompts), seed, "prompts", epoch))

    def requests(self, step: int) -> list[Request]:
        """The requests of a step, each with its own seed."""
        first = step * self.batch_size
        requests = []
        for number in range(first, first + self.batch_size):
            prompt = self._prompt(number // self.samples_per_prompt)
            requests.append(replace(prompt, seed=seed_for(self.seed, "rollout", number)))
        return requests

    def _prompt(self, number: int) -> Request:
        """The prompt at this position of the stream."""
        epoch, position = divmod(number, len(self.prompts))
        return self.prompts[self._order(epoch)[position]]


def minibatch_orders(ppo: PpoSettings, seed: int, step: int) -> list[list[list[int]]]:
    """For each epoch, for each minibatch, the indices of its episodes: each once per epoch, in random order."""
    size = ppo.batch_size // ppo.minibatches
    orders = []
    for epoch in range(ppo.epochs):
        order = permutation(ppo.batch_size, seed, "minibatch", step, epoch)
        orders.append([order[start : start + size] for start in range(0, ppo.batch_size, size)])
    return orders


def demonstration_batches(
    demonstrations: Sequence[TokenizedDemonstration], ppo: PpoSettings, seed: int, step: int
) -> list[list[TokenizedDemonstration]]:
    """For each optimizer step of a PPO step, as many demonstrations as a minibatch has episodes; empty without ptx.

    They are in random order, and none repeats before all have been used.
    """
    if not ppo.ptx_coefficient:
        return []
    size = ppo.batch_size // ppo.minibatches
    order = permutation(len(demonstrations), seed, "demonstrations", step)
    batches = []
    for start in range(0, ppo.epochs * ppo.minibatches * size, size):
        positions = range(start, start + size)
        batches.append([demonstrations[order[position % len(demonstrations)]] for position in positions])
    return batches
