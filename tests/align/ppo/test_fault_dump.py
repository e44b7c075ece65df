import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from align.algorithms.episodes import Episode
from align.ppo.fault_dump import write_fault_dump
from align.ppo.learner import StepCoefficients
from align.ppo.loop import Step
from rollouts.trajectory import Request, RoleOutputs, Trajectory


def test_a_batch_is_written_for_people(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = Trajectory.from_tokens(Request("Why?", (5, 6), 0), (7, 8), torch.zeros(2), True, 0)
    output = RoleOutputs(torch.zeros(2), torch.zeros(2), torch.zeros(3), float("inf"))
    numbers = [torch.arange(2.0) + i for i in range(5)]
    good = Episode(
        prompt_ids=(5, 6),
        response_ids=(7, 8),
        old_logprobs=numbers[0],
        reference_logprobs=numbers[1],
        advantages=numbers[2],
        returns=numbers[3],
        old_values=numbers[4],
    )
    bad = replace(good, old_values=torch.tensor([0.0, torch.nan]))
    step = Step(
        index=0,
        trajectories=[row, row],
        scored=[output, output],
        episodes=[good, bad],
        coefficients=StepCoefficients(0, 0, 0),
        kl_coefficient=0.1,
        logit_spacing=0.125,
        statistics={},
        seconds={},
    )
    write_fault_dump(tmp_path / "faults" / "step-1", step, tiny_tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "faults/step-1/episodes.jsonl").read_text().splitlines()]
    assert [r["finite"] for r in rows] == [True, False]
    assert (rows[0]["prompt"], rows[0]["response_ids"], rows[0]["score"]) == ("Why?", [7, 8], "inf")
    tensors = load_file(tmp_path / "faults/step-1/episodes.safetensors")
    assert torch.equal(tensors["0.advantages"], numbers[2])
    assert tensors["1.old_values"].isnan().tolist() == [False, True]
