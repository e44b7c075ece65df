"""The engine on transformers: it runs wherever torch runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from policies.adapters import fingerprint
from policies.loading import load_tokenizer, stop_ids
from policies.methods import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rollouts.attention import use_decoding_attention
from rollouts.cache import make_cache
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory

ROLE = "sampler"
"""The engine's own adapter on the trunk, so that it may share the trunk with a learner."""


class TransformersEngine:
    """Decodes up to `rows` requests at a time; rows that have ended leave the batch."""

    def __init__(self, trunk: Trunk, stop_ids: frozenset[int], rows: int, merge: bool = True) -> None:
        """merge: decode with the adapter merged into a copy of the weights."""
        use_decoding_attention(trunk.causal)
        self.trunk = trunk
        self.merge = merge
        self.stop_ids = stop_ids
        self.rows = rows
        self.version = 0

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Copy the weights into the engine's adapter. Returns the fingerprint of the adapter as it now is."""
        self.trunk.write_adapter(ROLE, weights)
        if self.merge:
            self.trunk.merge(ROLE)
        self.version = version
        return fingerprint(self.trunk.adapter(ROLE))

    def generate(self, requests: Sequence[Request], sampling: Sampling, role: str = ROLE) -> list[Trajectory]:
        """One trajectory a request, in their order; `role` other than the engine's own serves evaluation."""
        waves = [requests[start : start + self.rows] for start in range(0, len(requests), self.rows)]
        return [trajectory for wave in waves for trajectory in self._wave(wave, sampling, role)]

    @torch.inference_mode()
    def _wave(self, requests: Sequence[Request], sampling: Sampling, role: str) -> list[Trajectory]:
        self.trunk.switch(role)
        decoder = _Decoder(self.trunk, role, [request.prompt_ids for request in requests])
        uniforms = _uniforms([request.seed for request in requests], sampling.max_new_tokens)
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        alive = list(range(len(requests)))
        logits = decoder.prefill()
        for step in range(sampling.max_new_tokens):
            chosen, chosen_logprobs = draw(logits, uniforms[alive, step].to(logits.device), sampling.temperature)
            for row, token, logprob in zip(alive, chosen.tolist(), chosen_logprobs.tolist(), strict=True):
                tokens[row].append(token)
                logprobs[row].append(logprob)
            going = [place for place, row in enumerate(alive) if tokens[row][-1] not in self.stop_ids]
            if not going or step + 1 == sampling.max_new_tokens:
                break
            if len(going) < len(alive):
                alive = [alive[place] for place in going]
                decoder.keep(going)
                chosen = chosen[going]
            logits = decoder.step(chosen)
        return [
            Trajectory(request, tuple(ids), torch.tensor(values), ids[-1] in self.stop_ids, self.version)
            for request, ids, values in zip(requests, tokens, logprobs, strict=True)
        ]


class _Decoder:
    """The forward passes of one wave: left-padded prompts first, then one token a row at a time."""

    def __init__(self, trunk: Trunk, role: str, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        device = trunk.causal.device
        self.trunk, self.role = trunk, role
        self.ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = make_cache(trunk.causal.config)

    def prefill(self) -> Tensor:
        """Logits `[B, V]` of the token after each prompt."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(self.ids, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B, V]` of the token after these, `[B]`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens.unsqueeze(1), self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.mask.device))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.trunk.states(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return self.trunk.head(hidden[:, -1], self.role)


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


def build_engine(model: ModelSettings, policy: PolicySettings, rows: int, merge: bool = True) -> TransformersEngine:
    """An engine on a trunk of its own."""
    trunk = build_trunk(model, policy, (ROLE,))
    return TransformersEngine(trunk, stop_ids(trunk.causal, load_tokenizer(model.path)), rows, merge)


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """One row of `steps` numbers for each seed, `[B, steps]` float64: a row depends on its seed alone."""
    return torch.stack(
        [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
