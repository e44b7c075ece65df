"""Every method of adaptation through all stages, and out of the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from align.cli import app
from align.config.load import load_experiment
from policies.errors import UserError
from policies.files.adapters import PROMPT, load_adapter
from policies.files.prompt_table import read_task
from tests.integration.tiny_run import make_settings, run_in_process

METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora", "rank": 2, "alpha": 4, "init": "loftq", "lora_plus": 4},
    "bitfit": {"method": "bitfit"},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 3, "encoder_width": 8},
    "pissa": {"rank": 2, "alpha": 4, "init": "pissa"},
    "dora": {"rank": 2, "alpha": 4, "dora": True},
    "adalora": {"method": "adalora", "rank": 2, "alpha": 4},
    "loha": {"method": "loha", "rank": 2, "alpha": 4},
    "lokr": {"method": "lokr", "rank": 2, "alpha": 4},
    "oft": {"method": "oft", "block_size": 8},
    "vera": {"method": "vera", "rank": 8},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck", "bottleneck": 4},
    "adamix": {"method": "adamix", "bottleneck": 4},
    "compacter": {"method": "compacter", "bottleneck": 4, "kronecker_terms": 2},
    "layer_norm": {"method": "layer_norm"},
    "top_layers": {"method": "top_layers"},
    "feature": {"method": "feature"},
    "prompt_tuning": {"method": "prompt_tuning", "virtual_tokens": 3},
    "intrinsic_prompt": {"method": "intrinsic_prompt", "virtual_tokens": 3, "intrinsic_dimension": 4},
    "prefix_tuning": {"method": "prefix_tuning", "virtual_tokens": 3},
}
QUICK = ("qlora", "bitfit", "p_tuning")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in METHODS])
def test_a_run_trains_by_the_method_and_is_exported(name: str, tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"policy": METHODS[name]}
    settings["sft"]["learning_rate"] = settings["reward"]["learning_rate"] = 1e-2
    settings["learner"] |= {"policy_learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    run = run_in_process(settings)
    policy = load_experiment(run / "config.yaml").policy
    sft, trained = load_adapter(run / "sft", policy), load_adapter(run / "policy", policy)
    assert sft.keys() == trained.keys()
    assert any(not torch.equal(sft[key], trained[key]) for key in sft)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["rollout/mismatch_mean"] for line in metrics if "rollout/mismatch_mean" in line]
    assert max(gaps) < 1e-4

    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(run), "--to", str(out)])
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    assert f"base_model: {tiny_model}" in card
    assert "| KL, nats per sequence |" in card
    if policy.spec.prompt_kind is not None:
        table = tmp_path / "prompts.safetensors"
        assert CliRunner().invoke(app, ["export", str(run), "--to", str(table), "--task", "one"]).exit_code == 0
        assert torch.equal(read_task(f"{table}#one"), trained[PROMPT])
    for mixed_up in (["--merge", "--reward"], ["--dtype", "bfloat16"], ["--member", "0"]):
        result = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "no"), *mixed_up])
        assert isinstance(result.exception, UserError)
        assert not (tmp_path / "no").exists()
    if policy.spec.merges_at_export:
        merged = tmp_path / "merged"
        result = CliRunner().invoke(app, ["export", str(run), "--to", str(merged), "--merge", "--dtype", "bfloat16"])
        assert result.exit_code == 0, result.output
        assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
