"""The command `align` with a fault: the sampler keeps the weights that it had before the first update."""

from unittest.mock import patch

from align.cli import main
from policies.trunk import AdapterWeights
from rollouts.transformers_engine import TransformersEngine

load_adapter = TransformersEngine.load_adapter
first: list[AdapterWeights] = []
"""The weights of version 0."""


def load_stale(engine: TransformersEngine, version: int, weights: AdapterWeights) -> str:
    """Load the weights, but those of version 0 instead of later ones."""
    if version == 0:
        first.append({name: tensor.clone() for name, tensor in weights.items()})
    return load_adapter(engine, version, first[-1] if version > 0 else weights)


if __name__ == "__main__":
    with patch.object(TransformersEngine, "load_adapter", load_stale):
        main()
