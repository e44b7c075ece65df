"""The operations of a run, by the names that torch dispatches: those without a deterministic form on a GPU are named.

Simulated: the run is on the CPU, and what a GPU refuses is torch's own list (`torch.use_deterministic_algorithms`).
"""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integration.tiny_run import make_settings, run_in_process, write_rows

REFUSED = {
    "nll_loss",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "histc",
    "kthvalue",
    "put_",
    "grid_sampler_2d_backward",
    "_embedding_bag_backward",
    "reflection_pad1d_backward",
    "upsample_linear1d_backward",
}
"""Operations that raise on a GPU under `deterministic`, whatever their arguments."""
REFUSED_FOR_FLOATS = {"cumsum", "cumsum_", "cumprod"}
"""Operations that raise for floating-point numbers alone."""
ON_THE_HOST = ("align/algorithms/", "rewards/rankings.py", "rewards/diagnostics.py", "align/data/")
"""Code whose tensors are on the CPU wherever the model is."""


class Recorder(TorchDispatchMode):
    """Notes where operations are called that a GPU refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.refused: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        on_floats = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() if args else False
        if name in REFUSED or (name in REFUSED_FOR_FLOATS and on_floats):
            stack = "".join(traceback.format_stack(limit=30))
            if not any(folder in stack for folder in ON_THE_HOST):
                self.refused.setdefault(name, stack)
        return func(*args, **(kwargs or {}))


def test_the_recorder_sees_a_sum_that_a_gpu_refuses() -> None:
    with Recorder() as recorder:
        torch.ones(3).cumsum(0)
        torch.ones(3, dtype=torch.long).cumsum(0)
    assert list(recorder.refused) == ["cumsum"]


@pytest.mark.parametrize("kind", ["pairs", "rankings", "ratings"])
def test_a_run_uses_no_operation_that_a_gpu_refuses(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["ppo"] = {"steps": 1, "batch_size": 4, "epochs": 1, "entropy_coefficient": 0.01, "ptx_coefficient": 0.1}
    settings["evaluation"] = {"prompts": 2}
    rows: list[dict[str, Any]] = []
    for n in range(20):
        prompt = f"User: two {n} Assistant:"
        if kind == "rankings":
            rows.append({"prompt": prompt, "responses": [" a.", " b c.", " d."], "ranks": [1, 2, 2 + n % 2]})
        if kind == "ratings":
            rows.append({"prompt": prompt, "response": f" a {n}.", "rating": 1 + n % 5})
    if rows:
        settings["data"]["preferences"] = write_rows(tmp_path / "other.jsonl", rows)
    if kind == "ratings":
        settings["reward"] |= {"ratings": "ordinal"}
    with Recorder() as recorder:
        run_in_process(settings)
    assert recorder.calls["mm"] > 0
    assert not recorder.refused, "\n".join(recorder.refused.values())
