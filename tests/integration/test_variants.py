"""Whole runs by every estimator, kind of critic and method, with the options of PPO switched on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from policies.export import export_merged
from policies.files.base_model import load_tokenizer
from policies.schema import ModelSettings, PolicySettings
from rollouts.async_rollouts import PartialRollouts, TrajectoriesFuture
from rollouts.roster import Roster
from tests.integration.tiny_run import figures, make_settings, run_a_step_at_a_time, run_in_process

VARIANTS: dict[str, dict[str, Any]] = {
    "head": {"ppo": {"critic": {"kind": "head"}}},
    "model": {"ppo": {"critic": {"kind": "model"}}},
    "rloo": {"ppo": {"estimator": "rloo", "samples_per_prompt": 2}},
    "grpo": {"ppo": {"estimator": "grpo", "samples_per_prompt": 4, "kl": {"where": "loss", "estimator": "k3"}}},
    "reinforce++": {"ppo": {"estimator": "reinforce++", "loss_aggregation": "sequence_mean", "whiten_rewards": True}},
    "options": {
        "ppo": {
            "dual_clip": 3.0,
            "entropy_coefficient": 0.01,
            "importance_ratio_cap": 2.0,
            "max_mismatch": 0.1,
            "ptx_coefficient": 0.5,
            "target_kl": 0.5,
            "on_truncation": "bootstrap",
            "length_penalty": 0.01,
        }
    },
    "full": {"policy": {"method": "full"}},
    "ahead": {"rollouts": {"workers": 2, "chunk_size": 4, "max_staleness": 1}, "ppo": {"importance_ratio_cap": 2.0}},
}


def settings_of(name: str, model: Path, folder: Path) -> dict[str, Any]:
    settings = make_settings(model, folder)
    for section, changes in VARIANTS[name].items():
        settings[section] = changes if section == "policy" else settings[section] | changes
    return settings


FAST = ("options",)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_runs_to_its_end_and_resumes_bit_for_bit_after_a_stop(name: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = run_in_process(settings_of(name, tiny_model, tmp_path))
    rows = [row for row in figures(whole) if row["stage"] == "ppo" and "policy/loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(("value/loss" in row) == (name not in ("rloo", "grpo", "reinforce++")) for row in rows)
    assert all(("policy/ptx_loss" in row) == (name == "options") for row in rows)

    stopped = run_a_step_at_a_time(settings_of(name, tiny_model, tmp_path) | {"name": "stopped"})
    assert figures(stopped) == figures(whole)


@pytest.mark.slow
def test_unfinished_responses_continue_with_the_newest_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    add_chunk = Roster.add_chunk
    submit = PartialRollouts.submit

    def watched_add_chunk(self: Roster) -> None:
        seen.append("continued")
        add_chunk(self)

    def watched_submit(self: PartialRollouts, *arguments: Any) -> TrajectoriesFuture:
        seen.append("submitted")
        return submit(self, *arguments)

    monkeypatch.setattr(Roster, "add_chunk", watched_add_chunk)
    monkeypatch.setattr(PartialRollouts, "submit", watched_submit)
    settings = settings_of("ahead", tiny_model, tmp_path)
    settings["rollouts"] |= {"segment_tokens": 2}
    rows = [row for row in figures(run_in_process(settings)) if row["stage"] == "ppo" and "policy/loss" in row]
    staleness = [row["rollout/staleness"] for row in rows]
    assert staleness[0] == 0
    assert all(0 <= steps <= 1 for steps in staleness)
    assert seen.count("submitted") == 3
    assert seen.count("continued") >= 3


def test_a_fully_tuned_policy_is_a_model_that_transformers_loads(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("full", tiny_model, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    tokenizer = load_tokenizer(str(tiny_model))
    difference = export_merged(
        ModelSettings(path=str(tiny_model)),
        PolicySettings(method="full"),
        run / "policy",
        tokenizer,
        tmp_path / "exported",
    )
    assert difference < 1e-5
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "llama"
