"""Which prompts and demonstrations a step trains on, in which order, and with which random numbers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from align.config.schema import PpoSettings
from align.data.datasets import TokenizedDemonstration
from align.runtime.seeds import permutation, seed_for
from rollouts.trajectory import Request


class PromptStream:
    """All prompts in random order, then all of them in another: a step's batch is a function of the step alone."""

    def __init__(self, prompts: Sequence[Request], batch: int, samples: int, seed: int) -> None:
        """samples: requests of each prompt, side by side; batch: requests in all."""
        self.prompts, self.batch, self.samples, self.seed = prompts, batch, samples, seed
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(len(prompts), seed, "prompts", epoch))

    def requests(self, step: int) -> list[Request]:
        """The requests of a step, each with a seed of its own."""
        first = step * self.batch
        return [
            replace(self.prompts[self._at(place // self.samples)], seed=seed_for(self.seed, "rollout", place))
            for place in range(first, first + self.batch)
        ]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self.prompts))
        return self._order(epoch)[index]


def minibatch_orders(batch: int, minibatches: int, epochs: int, seed: int, step: int) -> list[list[list[int]]]:
    """For each epoch, for each minibatch, the episodes in it: all episodes once an epoch, in random order."""
    size = batch // minibatches
    orders = [permutation(batch, seed, "minibatch", step, epoch) for epoch in range(epochs)]
    return [[order[start : start + size] for start in range(0, batch, size)] for order in orders]


def demonstration_batches(
    rows: Sequence[TokenizedDemonstration], ppo: PpoSettings, seed: int, step: int
) -> list[list[TokenizedDemonstration]]:
    """For each optimizer step of a step, as many demonstrations as a minibatch has episodes; none without `ptx`."""
    if not ppo.ptx_coefficient:
        return []
    size, order = ppo.batch_size // ppo.minibatches, permutation(len(rows), seed, "demonstrations", step)
    starts = range(0, ppo.epochs * ppo.minibatches * size, size)
    return [[rows[order[(start + i) % len(rows)]] for i in range(size)] for start in starts]
