"""In supervised stages one norm, over all parameter groups, clips the gradient."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from align.runs.tracking import Tracker, read_lines
from align.runtime.signals import StopRequest
from align.supervised.fit import FitContext, FitTask, fit
from align.supervised.trainer import Objective, SkipNonFinite
from rewards.schema import FitSettings


class Linear(Objective):
    """A loss that is linear in A and B, with gradients of norm 3 and 40."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("lora_A", 9), ("lora_B", 16)):
            part = nn.Module()
            part.weight = nn.Parameter(torch.zeros(size))
            setattr(self, name, nn.ModuleDict({"policy": part}))

    def forward(self, labels: Tensor, num_items_in_batch: Any) -> dict[str, Tensor]:
        weights = dict(self.named_parameters())
        return {"loss": weights["lora_A.policy.weight"].sum() + 10 * weights["lora_B.policy.weight"].sum()}


@dataclass(frozen=True)
class Example:
    length: int = 1


@pytest.mark.parametrize("lora_plus", [None, 16.0])
def test_a_and_b_are_scaled_by_one_factor(
    lora_plus: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[float, float] = {}
    skip = SkipNonFinite.__call__

    def note(self: SkipNonFinite, optimizer: Optimizer, *arguments: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen[parameter.numel()] = float(parameter.grad.norm())
        skip(self, optimizer, *arguments)

    monkeypatch.setattr(SkipNonFinite, "__call__", note)
    task = FitTask(
        objective=Linear(),
        examples=[Example()],
        collate=lambda examples: {"labels": torch.zeros(len(examples))},
        split=lambda lengths, tokens: [list(range(len(lengths)))],
        heldout_loss=lambda: 0.0,
        metric_group="sft",
        lora_plus=lora_plus,
    )
    context = FitContext("sft", tmp_path / "checkpoints", 1, 0, Tracker(tmp_path, None), StopRequest())
    fit(task, FitSettings(batch_size=1, max_grad_norm=1.0), context)
    norm = math.hypot(3, 40)
    assert seen == pytest.approx({9: 3 / norm, 16: 40 / norm}, rel=1e-4)
    logged = [row["sft/gradient_norm"] for row in read_lines(tmp_path / "metrics.jsonl") if "sft/gradient_norm" in row]
    assert logged == pytest.approx([norm], rel=1e-5)
