"""The tie parameter of a real reward stage at its default settings."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import align.supervised.reward_objective
from rewards.objective import PreferenceLoss
from rewards.preferences import PreferenceExample, Ranking
from tests.integration.tiny_run import figures, make_settings, run_a_step_at_a_time, run_in_process, write_rows

STRICT = Ranking((1, 1))


def ranked(number: int, ties: int, responses: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows of two responses of which nothing says which is better; the first ones are ties."""
    rows = []
    for i in range(number):
        ranks = [1, 1] if i < ties else [1, 2]
        order = [*responses] if i % 2 else [*responses[::-1]]
        rows.append({"prompt": f"User: {i} Assistant:", "responses": order, "ranks": ranks})
    return rows


def stage_settings(model: Path, folder: Path, rankings: int, responses: tuple[str, str]) -> dict[str, Any]:
    """The reward stage on rankings of which 40 % are ties; 80 % of the held-out ones are."""
    settings = make_settings(model, folder)
    settings["stages"] = ["reward"]
    settings["reward"] = {"normalise": 0}
    settings["data"] = {
        "preferences": write_rows(folder / "rankings.jsonl", ranked(rankings, rankings * 4 // 10, responses)),
        "preferences_heldout": write_rows(folder / "heldout.jsonl", ranked(10, 8, responses)),
    }
    return settings


def optimum(differences: Tensor, is_tie: Tensor) -> float:
    """The most likely δ of Davidson's model for score differences `[N]`, where the derivative changes its sign."""

    def excess(delta: float) -> float:
        tied = delta / (delta + 2 * torch.cosh(differences / 2))  # probability of a tie
        return float((tied - is_tie).sum())

    low = 1e-3
    high = 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        if excess(middle) > 0:
            high = middle
        else:
            low = middle
    return low


@pytest.mark.parametrize("responses", [(" blue.", " blue."), (" blue.", " red.")], ids=["equal", "different"])
@pytest.mark.parametrize(("rankings", "start"), [(100, 0.874), (100, None), (1000, 0.4)])
def test_one_epoch_brings_the_tie_parameter_to_its_optimum(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    rankings: int,
    start: float | None,
    responses: tuple[str, str],
) -> None:
    losses: list[PreferenceLoss] = []
    differences: list[Tensor] = []
    ties: list[bool] = []

    class Loss(PreferenceLoss):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            if start is not None:
                torch.nn.init.constant_(self.ties.free, math.log(start))
            losses.append(self)

        def forward(self, scores: Tensor, examples: Sequence[PreferenceExample], smoothing: float = 0.0) -> Tensor:
            if torch.is_grad_enabled():
                differences.append((scores[0::2] - scores[1::2]).detach()[:, 0])
                ties.extend(example.preference != STRICT for example in examples)
            return super().forward(scores, examples, smoothing)

    monkeypatch.setattr(align.supervised.reward_objective, "PreferenceLoss", Loss)
    run_in_process(stage_settings(tiny_model, tmp_path, rankings, responses))
    (loss,) = losses
    best = optimum(torch.cat(differences), torch.tensor(ties).float())
    if responses[0] == responses[1]:
        assert best == pytest.approx(4 / 3)
    assert loss.ties()[1].exp().item() == pytest.approx(best, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lora_plus", [None, 4.0])
def test_a_resumed_stage_trains_the_tie_parameter_as_one_without_interruption(
    tmp_path: Path, tiny_model: Path, lora_plus: float | None
) -> None:
    runs = []
    for name, run in (("whole", run_in_process), ("parts", run_a_step_at_a_time)):
        folder = tmp_path / name
        folder.mkdir()
        settings = stage_settings(tiny_model, folder, 60, (" blue.", " red."))
        settings["policy"] |= {"lora_plus": lora_plus}
        settings["reward"] |= {"checkpoint_every": 1, "batch_size": 12, "evaluate_every": 1}
        runs.append(figures(run(settings)))
    assert runs[0] == runs[1]
