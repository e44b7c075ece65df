"""How many floating-point operations an update needs, and how many a second this machine does in matrix products."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Shape:
    """What counts of a Llama with a LoRA adapter on all its linear layers.

    linear: numbers in the weights of all linear layers but the head; adapter: numbers in one adapter;
    attention: layers × width of the queries; head: width × vocabulary.
    """

    linear: int
    adapter: int
    attention: int
    head: int


def shape_of(model: Path, rank: int) -> Shape:
    """Sizes of a Llama with an adapter of a rank, counted on the meta device."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        blocks = [m for m in causal.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return Shape(
        linear=sum(block.weight.numel() for block in blocks),
        adapter=sum(rank * (block.in_features + block.out_features) for block in blocks),
        attention=config.num_hidden_layers * width,
        head=config.hidden_size * config.vocab_size,
    )


def update_operations(shape: Shape, episodes: Iterable[tuple[int, int]], critic_forward: bool) -> float:
    """Operations of one pass of PPO over episodes of (prompt tokens, response tokens), forward and backward.

    A product of frozen weights costs 2 operations a number forward and 2 for the gradient of its input; an adapter's
    2 more for its own gradient; attention is causal, so half of its square counts, and its backward pass is twice the
    forward. The head is at response positions alone. critic_forward: whether the critic has a pass of its own.
    """
    total = 0.0
    for prompt, response in episodes:
        tokens = prompt + response
        trunk = tokens * (4 * shape.linear + 6 * shape.adapter) + 3 * 2 * shape.attention * tokens**2
        total += trunk * (2 if critic_forward else 1) + response * 4 * shape.head
    return total


def matrix_rate(dtype: torch.dtype, device: str = "cpu", width: int = 512, rounds: int = 30) -> float:
    """Operations a second of products of 2048 × width by width × width: the median of several rounds."""
    left, right = torch.randn(2048, width, device=device).to(dtype), torch.randn(width, width, device=device).to(dtype)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(8):
            left @ right
        finish()
        seconds.append((time.perf_counter() - start) / 8)
    return 2 * 2048 * width * width / sorted(seconds)[rounds // 2]
