"""Measures the perplexity of texts and held-out demonstrations under the base model and the products of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.config.schema import Experiment
from align.data.datasets import Datasets, context_length
from align.data.documents import Document, heldout_documents
from align.evaluation.perplexity import BASE, ScoredDocuments, document_nats
from align.roles.build import SFT_ROLE
from align.runs.folder import RunFolder
from policies.build import build_trunk
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.files.base_model import load_tokenizer
from policies.trunk import Trunk

MEASURED_STAGES = ("sft", "dpo", "ppo")
"""The stages whose products are language models, in their order."""
UNNAMED = "demonstrations"
"""The name of held-out demonstrations that are not of a mixture."""


def measure_perplexity(experiment: Experiment, run: RunFolder, datasets: Datasets) -> dict[str, Any]:
    """The section `perplexity` of `evaluation.json`.

    Args:
        experiment: The run's settings.
        run: The run; the models are its base and the products of its stages so far.
        datasets: Its data, of which the texts of the evaluation and the held-out demonstrations are used.

    Returns:
        `window`, the tokens of a model's longest window; and by name the figures of the `texts` and of the `heldout`
        demonstrations, see `ScoredDocuments.figures`.

    Raises:
        UserError: There is nothing to measure on.
    """
    tokenizer = load_tokenizer(experiment.model.path)
    heldout = heldout_documents(datasets.demonstrations_heldout, tokenizer, UNNAMED)
    if not datasets.texts and not heldout:
        raise UserError(
            f"run {run.path} has no held-out demonstrations, because it trains no SFT model: name texts by "
            "--perplexity FILE, or set evaluation.texts"
        )
    window = window_tokens(experiment)
    nats: dict[str, dict[str, dict[str, Tensor]]] = {"texts": {}, "heldout": {}}
    for model, trunk, role in _models(experiment, run):
        for section, sets in (("texts", datasets.texts), ("heldout", heldout)):
            for name, documents in sets.items():
                measured = document_nats(trunk, role, documents, window, experiment.learner.tokens_per_microbatch)
                nats[section].setdefault(name, {})[model] = measured
    texts = {name: _figures(datasets.texts[name], by_model) for name, by_model in nats["texts"].items()}
    rows = {name: _figures(heldout[name], by_model) for name, by_model in nats["heldout"].items()}
    return {"window": window, "texts": texts, "heldout": rows}


def window_tokens(experiment: Experiment) -> int:
    """Tokens of the longest window: `evaluation.window`, or the model's context length where that is smaller."""
    positions = context_length(experiment)
    window = experiment.evaluation.window
    return window if positions is None else min(window, positions)


def _models(experiment: Experiment, run: RunFolder) -> Iterator[tuple[str, Trunk, str]]:
    """The base model, then each product in turn: its name, the trunk that holds it, and its role there.

    All use one trunk: a model is there until the next one is taken.
    """
    trunk = build_trunk(experiment.model, experiment.policy, (SFT_ROLE,))
    if not experiment.sft.residual_base:  # what an initialisation has left of a model is none by itself
        yield BASE, trunk, BASE  # first: in full fine-tuning, an adapter that is written replaces the base
    for stage in MEASURED_STAGES:
        if run.done(stage):
            trunk.write_adapter(SFT_ROLE, load_adapter(run.product(stage), experiment.policy))
            yield stage, trunk, SFT_ROLE


def _figures(documents: Sequence[Document], nats: Mapping[str, Tensor]) -> dict[str, Any]:
    """The figures of documents from their negative log-likelihood `[D]` by model."""
    tokens = [document.demonstration.trained_tokens for document in documents]
    sizes = [document.size for document in documents]
    scored = ScoredDocuments(
        nats=nats,
        tokens=torch.tensor(tokens, dtype=torch.float64),
        sizes=torch.tensor(sizes, dtype=torch.float64),
    )
    return scored.figures()
