"""Several datasets of demonstrations that are trained on together."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from align.data.examples import TokenizedDemonstration
from align.runtime.seeds import seed_for


def mixture_sizes(sizes: Mapping[str, int], weights: Mapping[str, float], temperature: float) -> dict[str, int]:
    """How many examples of each dataset an epoch has, as many in all as the datasets have together.

    Dataset i has a share proportional to w_i · n_i^(1/T) (Raffel et al. 2020, "T5", section 3.5.2): as they are at
    weights of 1 and T = 1, alike as T grows.

    Args:
        sizes: n, the number of examples of each dataset.
        weights: w, the weight of each.
        temperature: T.

    Returns:
        The numbers, at least 1 each.
    """
    shares = {name: weights[name] * size ** (1 / temperature) for name, size in sizes.items()}
    total = sum(shares.values())
    everything = sum(sizes.values())
    return {name: max(1, round(everything * share / total)) for name, share in shares.items()}


def drawn(examples: Sequence[TokenizedDemonstration], count: int, seed: int, name: str) -> list[TokenizedDemonstration]:
    """That many examples of a dataset: as often as they fit in it all of them, and the rest at random.

    Args:
        examples: All examples of the dataset.
        count: How many are wanted.
        seed: Seed of the run.
        name: The name of the dataset, which its examples get.
    """
    rounds, rest = divmod(count, len(examples))
    remainder = random.Random(seed_for(seed, "mixture", name)).sample(range(len(examples)), rest)
    chosen = [*examples] * rounds + [examples[index] for index in sorted(remainder)]
    return [replace(example, dataset=name) for example in chosen]
