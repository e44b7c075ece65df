"""The engine on transformers: it runs wherever torch runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.files.adapters import tensor_digests, weights_digest
from policies.files.base_model import load_tokenizer, stop_ids
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rollouts.decoding import Decoder
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.stop_strings import StopStrings
from rollouts.trajectory import Request, Trajectory

SAMPLER_ROLE = "sampler"
"""The engine's own adapter on the trunk, so that it may share the trunk with a learner."""


REFILL, LEAVE = 4, 8
"""Prompts come in when one row in so many is free, and rows that have ended leave when one in so many has: each time,
the keys and values of all rows are copied."""


class TransformersEngine:
    """Decodes up to `rows` requests at a time; rows that have ended leave, and those that wait come in."""

    def __init__(
        self,
        trunk: Trunk,
        stop_ids: frozenset[int],
        rows: int,
        merge: bool = True,
        stop_strings: StopStrings | None = None,
    ) -> None:
        """merge: decode with the adapter merged into a copy of the weights."""
        self.trunk = trunk
        self.merge = merge
        self.stop_ids, self.stop_strings = stop_ids, stop_strings
        self.rows = rows
        self.version = 0
        self._unmerged = False

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Copy the weights into the engine's adapter. Returns the fingerprint of the adapter as it now is."""
        self.trunk.write_adapter(SAMPLER_ROLE, weights)
        self._unmerged = self.merge
        self.version = version
        return weights_digest(tensor_digests(self.trunk.adapter(SAMPLER_ROLE)))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling, role: str = SAMPLER_ROLE) -> list[Trajectory]:
        """One trajectory a request, in their order; `role` other than the engine's own serves evaluation."""
        if self._unmerged and role == SAMPLER_ROLE:
            self.trunk.merge(SAMPLER_ROLE)
            self._unmerged = False
        self.trunk.switch(role)
        prompts = [request.prompt_ids + request.partial_response_ids for request in requests]
        responses = [
            Response(_uniforms(r.seed, sampling.max_new_tokens), sampling.limit(r), list(r.partial_response_ids))
            for r in requests
        ]
        # Longest first: prompts that come in together are of about one length, those of one group beside each other.
        waiting = sorted(range(len(requests)), key=lambda i: len(prompts[i]))
        while waiting:
            self._run(prompts, responses, waiting, Decoder(self.trunk, role), sampling.temperature)
        return [
            Trajectory.from_tokens(
                request, r.tokens[len(request.partial_response_ids) :], r.logprobs, self._ends(r.tokens), self.version
            )
            for request, r in zip(requests, responses, strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence["Response"],
        waiting: list[int],
        decoder: Decoder,
        temperature: float,
    ) -> None:
        """Decode what is waiting; where the decoder takes in rows only all at once, as much as fits."""
        rows: list[int] = []
        logits = torch.empty(0)
        while rows or waiting:
            free = self.rows - len(rows)
            if waiting and (not rows or (decoder.joins and free * REFILL >= self.rows)):
                new = [waiting.pop() for _ in range(min(free, len(waiting)))]
                entered = decoder.enter([prompts[i] for i in new])
                logits = torch.cat([logits, entered]) if rows else entered
                rows += new
            uniforms = torch.stack([responses[i].next_uniform() for i in rows])
            chosen, logprobs = draw(logits, uniforms.to(logits.device), temperature)
            for i, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
                if not responses[i].done:
                    responses[i].add(token, logprob, self._ends)
            going = [place for place, i in enumerate(rows) if not responses[i].done]
            if (len(rows) - len(going)) * LEAVE >= len(rows):
                rows = [rows[place] for place in going]
                if not rows and not decoder.joins:
                    return
                decoder.keep(going)
                chosen = chosen[going]
            if rows:
                logits = decoder.step(chosen, [not responses[i].done for i in rows])

    def _ends(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self.stop_ids or (self.stop_strings is not None and self.stop_strings(tokens))


@dataclass
class Response:
    """One being made. uniforms: `[max_new_tokens]` float64, what its tokens are drawn by. limit: tokens at which it is
    done, at the latest. logprobs: of the tokens that were drawn here, which may be the last of `tokens` only.

    A row that is done stays in the batch for a while; what is drawn for it then is left out.
    """

    uniforms: Tensor
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False

    def next_uniform(self) -> Tensor:
        return self.uniforms[min(len(self.tokens), len(self.uniforms) - 1)]

    def add(self, token: int, logprob: float, ends: Callable[[Sequence[int]], bool]) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.done = ends(self.tokens) or len(self.tokens) == self.limit


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverting the distribution function at a given number.

    logits: `[B, V]`; uniforms: `[B]` float64 in [0, 1). Returns tokens `[B]` int64 and their log-probabilities `[B]`
    float32. Temperature 0 takes the most likely token.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        # Scaled by the total, so that rounding in the sum can never leave the last token without its share.
        targets = uniforms.unsqueeze(-1) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def make_transformers_engine(
    trunk: Trunk, tokenizer: PreTrainedTokenizerBase, rollouts: RolloutSettings
) -> TransformersEngine:
    """An engine on this trunk, which may be shared."""
    stop_strings = StopStrings(rollouts.stop, tokenizer) if rollouts.stop else None
    return TransformersEngine(
        trunk, stop_ids(trunk.causal.generation_config, tokenizer), rollouts.max_num_seqs, rollouts.merge, stop_strings
    )


def build_transformers_engine(
    model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings
) -> TransformersEngine:
    """An engine on a trunk of its own."""
    return make_transformers_engine(build_trunk(model, policy, (SAMPLER_ROLE,)), load_tokenizer(model.path), rollouts)


def _uniforms(seed: int, steps: int) -> Tensor:
    """Numbers `[steps]` float64 that depend on the seed alone."""
    return torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
