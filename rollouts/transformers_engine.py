"""The engine on transformers, which runs wherever torch runs."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.build import build_trunk
from policies.files.adapters import tensor_digests, weights_digest
from policies.files.base_model import load_model_tokenizer, stop_ids
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rollouts.decoding import Decoder
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.stop_strings import StopStrings
from rollouts.trajectory import Request, Trajectory

SAMPLER_ROLE = "sampler"
"""The engine's own adapter on the trunk, so that it can share the trunk with a learner."""

REFILL_FRACTION = 1 / 4
"""Waiting requests are admitted only once this share of `max_num_seqs` is free, because each time the whole KV cache is
copied."""

REMOVE_FRACTION = 1 / 8
"""Finished sequences are removed only once they are this share of the batch, because each time the whole KV cache is
copied."""


PROBABILITY_UNITS = 2**53
"""Units in which probabilities are added: float64 has 53 bits of precision."""


class TransformersEngine:
    """Decodes up to `max_num_seqs` requests at a time with continuous batching."""

    def __init__(
        self,
        trunk: Trunk,
        stop_ids: frozenset[int],
        max_num_seqs: int,
        merge: bool = True,
        stop_strings: StopStrings | None = None,
    ) -> None:
        """Create an engine on a trunk that has an adapter named `SAMPLER_ROLE`.

        Args:
            trunk: The model, which the engine may share with a learner.
            stop_ids: Token ids that end a response.
            max_num_seqs: The most sequences that are decoded together.
            merge: Whether to decode with the adapter merged into a copy of the base weights.
            stop_strings: Strings that end a response, too.
        """
        self.trunk = trunk
        self.merge = merge
        self.stop_ids = stop_ids
        self.stop_strings = stop_strings
        # A recurrent state goes through the padding of a batch, which no mask hides from it.
        self.max_num_seqs = 1 if trunk.causal._is_stateful else max_num_seqs
        self.version = 0
        self._must_merge = False

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Copy the weights into the engine's adapter.

        Args:
            version: The version that new tokens carry.
            weights: The tensors of the adapter by name.

        Returns:
            The fingerprint of the adapter as it is now.
        """
        self.trunk.write_adapter(SAMPLER_ROLE, weights)
        self._must_merge = self.merge
        self.version = version
        return weights_digest(tensor_digests(self.trunk.adapter(SAMPLER_ROLE)))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling, role: str = SAMPLER_ROLE) -> list[Trajectory]:
        """Generate one response per request.

        Args:
            requests: The prompts, each with its own seed.
            sampling: How the responses are drawn.
            role: The role whose adapter to decode with; evaluation uses others than the engine's.

        Returns:
            One trajectory per request, in the same order.
        """
        self._use(role)
        responses = [Response.start(request, sampling) for request in requests]
        # Taken from the end: the longest come first, and those admitted together have similar lengths.
        waiting = sorted(responses, key=lambda response: len(response.prefix_ids))
        while waiting:
            for _ in self._decode(waiting, Decoder(self.trunk, role), sampling.temperature):
                pass
        return [self._trajectory(response) for response in responses]

    @torch.inference_mode()
    def stream(
        self, request: Request, sampling: Sampling, role: str = SAMPLER_ROLE
    ) -> Generator[int, None, Trajectory]:
        """Generate one response, token by token: the tokens that `generate` gives for this request alone.

        Args:
            request: The prompt with its seed.
            sampling: How the response is drawn.
            role: The role whose adapter to decode with.

        Yields:
            Each new token as soon as it is drawn; the next one is drawn when it is asked for.

        Returns:
            The trajectory.
        """
        self._use(role)
        response = Response.start(request, sampling)
        for _ in self._decode([response], Decoder(self.trunk, role), sampling.temperature):
            yield response.tokens[-1]
        return self._trajectory(response)

    def _use(self, role: str) -> None:
        """Decode with this role's adapter from now on, merged if it is the engine's own."""
        if self._must_merge and role == SAMPLER_ROLE:
            self.trunk.merge(SAMPLER_ROLE)
            self._must_merge = False
        self.trunk.switch(role)

    def _decode(self, waiting: list["Response"], decoder: Decoder, temperature: float) -> Iterator[None]:
        """Decode until nothing is waiting, or until the first batch is done where the decoder cannot add to one.

        Yields:
            None whenever each active response has been given a token.
        """
        active: list[Response] = []  # B responses
        logits = torch.empty(0)
        while active or waiting:
            if waiting and self._has_room(len(active), decoder):
                admitted = _take_last(waiting, self.max_num_seqs - len(active))
                new_logits = decoder.add([response.prefix_ids for response in admitted])  # [admitted, V]
                logits = torch.cat([logits, new_logits]) if active else new_logits  # [B, V]
                active += admitted

            tokens = self._sample(active, logits, temperature)  # [B]
            yield

            unfinished = [index for index, response in enumerate(active) if not response.finished]
            finished_count = len(active) - len(unfinished)
            if finished_count >= REMOVE_FRACTION * len(active):
                active = [active[index] for index in unfinished]
                if not active and not decoder.supports_joining:
                    return
                decoder.keep(unfinished)
                tokens = tokens[unfinished]  # [B]

            if active:
                logits = decoder.step(tokens, [not response.finished for response in active])  # [B, V]

    def _has_room(self, active: int, decoder: Decoder) -> bool:
        """Whether to admit waiting requests now."""
        if active == 0:
            return True
        free = self.max_num_seqs - active
        return decoder.supports_joining and free >= REFILL_FRACTION * self.max_num_seqs

    def _sample(self, active: Sequence["Response"], logits: Tensor, temperature: float) -> Tensor:
        """Draw the next token `[B]` of each active response from `[B, V]`, and record it in those not yet finished."""
        uniforms = torch.stack([response.next_uniform() for response in active])  # [B]
        tokens, logprobs = sample_tokens(logits, uniforms.to(logits.device), temperature)  # [B], [B]
        for response, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
            if not response.finished:
                response.append(token, logprob)
                response.finished = self._ends(response) or len(response.tokens) == response.limit
        return tokens

    def _trajectory(self, response: "Response") -> Trajectory:
        return Trajectory.from_tokens(
            response.request,
            tokens=response.new_tokens,
            logprobs=response.logprobs,
            ended=self._ends(response),
            version=self.version,
        )

    def _ends(self, response: "Response") -> bool:
        """Whether the last token of a response ends it."""
        tokens = response.tokens
        is_stopped = self.stop_strings is not None and self.stop_strings(tokens, response.turn_start)
        return tokens[-1] in self.stop_ids or is_stopped


@dataclass
class Response:
    """A response being generated.

    A finished one stays in the batch for a while; the tokens that are drawn for it then are ignored.

    Attributes:
        request: The request that it responds to.
        limit: The number of tokens at which it is finished at the latest.
        uniforms: `[max_new_tokens]` float64 in [0, 1): the random number with which each token is drawn.
        tokens: The tokens of the partial response, then the new ones.
        logprobs: The log-probabilities of the new tokens only.
        finished: Whether it has ended or reached the limit.
    """

    request: Request
    limit: int
    uniforms: Tensor
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def start(cls, request: Request, sampling: Sampling) -> "Response":
        """A response without new tokens yet."""
        return cls(
            request=request,
            limit=sampling.limit(request),
            uniforms=_uniforms(request.seed, sampling.max_new_tokens),
            tokens=list(request.partial_response_ids),
        )

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens to prefill: the prompt and the partial response."""
        return self.request.prompt_ids + self.request.partial_response_ids

    @property
    def turn_start(self) -> int:
        """The first token after the last one that the policy has not sampled."""
        partial = self.request.partial_response
        return partial.inserted[-1][1] if partial and partial.inserted else 0

    @property
    def new_tokens(self) -> list[int]:
        """The tokens that this engine has drawn."""
        return self.tokens[len(self.request.partial_response_ids) :]

    def next_uniform(self) -> Tensor:
        """The random number of the next token, a float64 scalar; a finished response may repeat its last one."""
        return self.uniforms[min(len(self.tokens), len(self.uniforms) - 1)]

    def append(self, token: int, logprob: float) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token per sequence by inverse transform sampling.

    Args:
        logits: `[B, V]`.
        uniforms: `[B]` float64 in [0, 1): the random number of each sequence.
        temperature: Divides the logits; 0 takes the most likely token.

    Returns:
        Tokens `[B]` int64, and their log-probabilities `[B]` float32 in nats at this temperature (at 1 where it is 0).
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # [B, V]
    if temperature == 0:
        tokens = logprobs.argmax(-1)  # [B]
    else:
        # Integers add up to the same in any order: CUDA has no deterministic cumulative sum of floating-point numbers.
        cumulative = (logprobs.double().exp() * PROBABILITY_UNITS).long().cumsum(-1)  # [B, V]
        total = cumulative[:, -1]  # [B]
        targets = (uniforms * total).long().minimum(total - 1)  # [B], in [0, total)
        tokens = torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)  # [B]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # reached where logits are not finite
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def make_transformers_engine(
    trunk: Trunk, tokenizer: PreTrainedTokenizerBase, rollouts: RolloutSettings
) -> TransformersEngine:
    """Create an engine on a given trunk, which may be shared."""
    stop_strings = StopStrings(rollouts.stop, tokenizer) if rollouts.stop else None
    return TransformersEngine(
        trunk=trunk,
        stop_ids=stop_ids(trunk.causal.generation_config, tokenizer),
        max_num_seqs=rollouts.max_num_seqs,
        merge=rollouts.merge,
        stop_strings=stop_strings,
    )


def build_transformers_engine(
    model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings
) -> TransformersEngine:
    """Load the base model, and create an engine on it."""
    trunk = build_trunk(model, policy, (SAMPLER_ROLE,))
    return make_transformers_engine(trunk, load_model_tokenizer(model), rollouts)


def _take_last(waiting: list[Response], count: int) -> list[Response]:
    """Remove up to `count` responses from the end of a list, the last one first."""
    return [waiting.pop() for _ in range(min(count, len(waiting)))]


def _uniforms(seed: int, steps: int) -> Tensor:
    """Random numbers `[steps]` float64 in [0, 1) that depend on the seed alone."""
    return torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
