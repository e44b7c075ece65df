"""Floating-point operations that an update needs, and those per second that this machine reaches in matrix products."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with a LoRA adapter on all its linear layers."""

    linear: int
    """Parameters of all linear layers but the LM head."""
    adapter: int
    """Parameters of one adapter."""
    attention: int
    """Layers × width of the queries."""
    head: int
    """Hidden size × vocabulary."""


def shape_of(model: Path, rank: int) -> Shape:
    """Sizes of a Llama with an adapter of this rank, counted on the meta device."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        blocks = [m for m in causal.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = sum(block.weight.numel() for block in blocks)
    adapter = sum(rank * (block.in_features + block.out_features) for block in blocks)
    return Shape(
        linear=linear,
        adapter=adapter,
        attention=config.num_hidden_layers * heads * head_dim,
        head=config.hidden_size * config.vocab_size,
    )


def update_operations(shape: Shape, episodes: Iterable[tuple[int, int]], critic_forward: bool) -> float:
    """Operations of one PPO epoch over episodes, forward and backward.

    Per token, a frozen weight costs 2 operations forward and 2 for the gradient of its input; an adapter's weight
    costs 2 more for its own gradient. Attention is causal, so half of its square counts, and its backward pass costs
    twice its forward pass. The LM head is computed at response positions only.

    Args:
        shape: Sizes of the model.
        episodes: Numbers of prompt and response tokens.
        critic_forward: Whether the critic needs a forward pass of its own.
    """
    total = 0.0
    for prompt, response in episodes:
        tokens = prompt + response
        base = tokens * (4 * shape.linear + 6 * shape.adapter) + 3 * 2 * shape.attention * tokens**2
        total += base * (2 if critic_forward else 1) + response * 4 * shape.head
    return total


def matrix_rate(dtype: torch.dtype, device: str = "cpu", width: int = 512, rounds: int = 30) -> float:
    """Operations per second of products of 2048 × width by width × width: the median over the rounds."""
    left = torch.randn(2048, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(8):
            left @ right
        finish()
        seconds.append((time.perf_counter() - start) / 8)
    return 2 * 2048 * width * width / sorted(seconds)[rounds // 2]
