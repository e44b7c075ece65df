"""Perplexity and bits per byte of documents, and how training has changed them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.data.documents import Document, windows
from align.data.examples import pack_demonstrations
from align.evaluation.intervals import ratio_interval
from align.supervised.objective import SupervisedModule
from align.supervised.response_logprobs import response_logprobs
from policies.trunk import Trunk

BASE = "base"
"""The name of the base model among the models of a run; a role without an adapter."""


@dataclass(frozen=True)
class ScoredDocuments:
    """The likelihood of D documents under several models.

    Attributes:
        nats: By model, the negative log-likelihood of each document `[D]` float64, in nats.
        tokens: Scored tokens of each document `[D]` float64.
        sizes: Bytes of each document `[D]` float64.
    """

    nats: Mapping[str, Tensor]
    tokens: Tensor
    sizes: Tensor

    def figures(self) -> dict[str, Any]:
        """Number of `documents`, `tokens` and `bytes`, and by name the figures of `models`.

        A model has its `perplexity`, `bits_per_byte` unless there are no bytes and, where the base model is another of
        them, `perplexity_ratio`: its perplexity over that of the base on the same documents. The ends of their
        intervals are `…_low` and `…_high`, unless there is one document.
        """
        models = {}
        for name, nats in self.nats.items():
            models[name] = perplexity_figures(nats, self.tokens, self.sizes)
            if name != BASE and BASE in self.nats:
                models[name] |= _perplexity("perplexity_ratio", nats - self.nats[BASE], self.tokens)
        counts = {"documents": len(self.tokens), "tokens": int(self.tokens.sum()), "bytes": int(self.sizes.sum())}
        return counts | {"models": models}


def perplexity_figures(nats: Tensor, tokens: Tensor, sizes: Tensor) -> dict[str, float]:
    """Perplexity, and bits per byte, with 95 % intervals over documents.

    The perplexity is exp(Σ nats / Σ tokens), that of all documents as one; bits per byte, Σ nats / (ln 2 · Σ bytes), do
    not depend on how a tokenizer divides the text.

    Args:
        nats: The negative log-likelihood of each document `[D]`, in nats.
        tokens: Scored tokens of each document `[D]`.
        sizes: Bytes of each document `[D]`.

    Returns:
        `perplexity` and `bits_per_byte`, each with `…_low` and `…_high` where there are several documents; without
        bits where there are no bytes.
    """
    figures = _perplexity("perplexity", nats, tokens)
    if float(sizes.sum()) == 0:
        return figures
    bits = nats / math.log(2)  # [D]
    figures["bits_per_byte"] = float(bits.sum() / sizes.sum())
    if ends := ratio_interval(bits, sizes):
        figures |= {"bits_per_byte_low": ends[0], "bits_per_byte_high": ends[1]}
    return figures


def _perplexity(name: str, nats: Tensor, tokens: Tensor) -> dict[str, float]:
    """exp(Σ nats / Σ tokens) under a name, with its interval, which is that of the exponent."""
    figures = {name: nats.sum() / tokens.sum()}
    if ends := ratio_interval(nats, tokens):
        figures |= {f"{name}_low": torch.tensor(ends[0]), f"{name}_high": torch.tensor(ends[1])}
    return {key: float(exponent.double().exp()) for key, exponent in figures.items()}


@torch.no_grad()
def document_nats(
    trunk: Trunk, role: str, documents: Sequence[Document], window: int, microbatch_tokens: int | None = None
) -> Tensor:
    """The negative log-likelihood of documents under a role of a trunk.

    Args:
        trunk: The model.
        role: The role whose adapter is used; a role without one: the base model.
        documents: D documents.
        window: Tokens of the longest window in which a document is read, see `windows`.
        microbatch_tokens: The most tokens of a forward pass; None: chosen for the device.

    Returns:
        `[D]` float64, in nats.
    """
    parts = []
    owners = []
    for number, document in enumerate(documents):
        pieces = windows(document.demonstration, window)
        parts += pieces
        owners += [number] * len(pieces)
    module = SupervisedModule(trunk, role, trains_adapter=False)
    nats = torch.zeros(len(documents), dtype=torch.float64)
    for indices in trunk.microbatches([part.length for part in parts], microbatch_tokens):
        batch = pack_demonstrations([parts[index] for index in indices]).to(trunk.causal.device)
        logprobs = response_logprobs(module, batch).cpu()  # [B]
        nats.index_add_(0, torch.tensor([owners[index] for index in indices]), -logprobs)
    return nats
