"""Stage one: supervised fine-tuning on demonstrations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.data import parse_demonstration
from align.fit import StageContext, fit
from policies.adapters import save_adapter
from policies.batching import buckets, collate
from policies.encoding import encode_prompt, encode_response
from policies.logprobs import token_logprobs
from policies.trunk import Trunk
from rewards.schema import FitSettings

ROLE = "reference"
"""What the SFT model is to all later stages."""


@dataclass(frozen=True)
class Example:
    """A demonstration in tokens; the loss is on the response, EOS included."""

    prompt_ids: list[int]
    response_ids: list[int]


def example_parser(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Callable[[Mapping[str, Any]], Example]:
    """From a row to an example; the parser raises ValueError with the reason for people."""

    def parse(values: Mapping[str, Any]) -> Example:
        demonstration = parse_demonstration(values)
        example = Example(
            encode_prompt(tokenizer, demonstration.prompt), encode_response(tokenizer, demonstration.completion)
        )
        refuse_long(len(example.prompt_ids) + len(example.response_ids), max_tokens, "sft.max_tokens")
        return example

    return parse


def refuse_long(tokens: int, most: int, key: str) -> None:
    """Raise ValueError where a row has more tokens than `key` allows."""
    if tokens > most:
        raise ValueError(f"{tokens} tokens are more than {key}, {most}")


class Likelihood(nn.Module):
    """Negative log-likelihood of responses, in nats a response token of the whole batch."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, ids: Tensor, before: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> dict[str, Tensor]:
        """ids, before, labels: `ids`, `before` and `tokens` of a `Batch`."""
        states = self.trunk.hidden(ids, ROLE).flatten(0, 1)
        logprobs, _ = token_logprobs(states[before], labels, self.trunk.head, temperature=1.0)
        return {"loss": -logprobs.sum() / num_items_in_batch}


def train_sft(
    trunk: Trunk, train: Sequence[Example], heldout: Sequence[Example], settings: FitSettings, context: StageContext
) -> float:
    """Train the adapter `reference`. Returns the held-out loss, in nats a token."""
    trunk.train_only(ROLE)
    objective = Likelihood(trunk)
    steps = fit(objective, train, _tensors, settings, context, metrics="sft")
    loss = heldout_loss(objective, heldout)
    context.tracker.log(context.stage, steps, {"sft/heldout_loss": loss})
    return loss


def save_sft(trunk: Trunk, folder: Path) -> None:
    """Write the adapter in PEFT layout."""
    save_adapter(folder, trunk.read_adapter(ROLE), trunk.config)


@torch.no_grad()
def heldout_loss(objective: Likelihood, examples: Sequence[Example], tokens: int = 4096) -> float:
    """Mean negative log-likelihood of all response tokens, in nats; batches pad to at most `tokens` positions."""
    device, total = objective.trunk.causal.device, 0.0
    one = torch.ones((), device=device)
    for group in buckets([len(e.prompt_ids) + len(e.response_ids) for e in examples], tokens):
        batch = {name: tensor.to(device) for name, tensor in _tensors([examples[i] for i in group]).items()}
        total += float(objective(**batch, num_items_in_batch=one)["loss"])
    return total / sum(len(e.response_ids) for e in examples)


def _tensors(examples: list[Example]) -> dict[str, Tensor]:
    batch = collate([e.prompt_ids for e in examples], [e.response_ids for e in examples])
    return {"ids": batch.ids, "before": batch.before, "labels": batch.tokens}
