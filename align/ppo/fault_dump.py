"""Writes a batch on which the learner failed to files, for a person to inspect."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.ppo.loop import Step
from align.runtime.atomic_files import new_folder, write_text
from policies.files.writing import save_tensors
from policies.text.tokenization import decode_response, prompt_text

TENSORS = ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")


def write_fault_dump(folder: Path, step: Step, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the episodes of a step.

    `episodes.jsonl` has one line per episode, `episodes.safetensors` the tensors `N.NAME`, `[T]`, of the N-th line.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, (trajectory, outputs, episode) in enumerate(
        zip(step.trajectories, step.scored, step.episodes, strict=True)
    ):
        targets = {name: getattr(episode, name) for name in TENSORS}
        row = {
            "prompt": prompt_text(trajectory.request.prompt),
            "response": decode_response(tokenizer, trajectory.response_ids),
            "prompt_ids": trajectory.request.prompt_ids,
            "response_ids": trajectory.response_ids,
            "score": repr(outputs.score),
            "finite": all(bool(torch.isfinite(tensor).all()) for tensor in targets.values()),
        }
        rows.append(row)
        for name, tensor in targets.items():
            tensors[f"{number}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    with new_folder(folder) as temporary:
        write_text(temporary / "episodes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        save_tensors(tensors, temporary / "episodes.safetensors")
