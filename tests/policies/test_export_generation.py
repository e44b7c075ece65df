"""What an export says about generation, whatever the base model's own files say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from policies.build import build_trunk
from policies.export import export_adapter, export_merged, export_reward
from policies.files.adapters import save_adapter, save_head
from policies.files.base_model import load_tokenizer
from policies.files.generation import valid_generation
from policies.heads import ScalarHead
from policies.schema import ModelSettings, PolicySettings

LORA = PolicySettings(rank=4, alpha=8)
FULL = PolicySettings(method="full")
INCONSISTENT: dict[str, dict[str, Any]] = {
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "sampling against do_sample": {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7},
    "beams without num_beams": {"length_penalty": 0.5, "early_stopping": True},
    "outputs that are not returned": {"output_scores": True, "pad_token_id": -1},
}
EXPECTED: dict[str, dict[str, Any]] = {
    "sampling without do_sample": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "sampling against do_sample": {"do_sample": False, "max_new_tokens": 7},
    "beams without num_beams": {},
    "outputs that are not returned": {},
}
NAMES = ("do_sample", "temperature", "top_p", "max_new_tokens", "length_penalty", "early_stopping", "output_scores")


def base_with(tiny_model: Path, folder: Path, file: str, values: dict[str, Any]) -> ModelSettings:
    """A copy of the tiny model with values in `config.json` or `generation_config.json`."""
    shutil.copytree(tiny_model, folder)
    path = folder / file
    content = json.loads(path.read_text()) if file == "config.json" else {"eos_token_id": 1}
    path.write_text(json.dumps(content | values))
    return ModelSettings(path=str(folder))


def trained(model: ModelSettings, policy: PolicySettings, role: str, folder: Path) -> Path:
    """The folder of an adapter, and a head, away from where they start."""
    trunk = build_trunk(model, policy, (role,))
    generator = torch.Generator().manual_seed(1)
    weights = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in trunk.read_adapter(role).items()}
    save_adapter(folder, weights, policy, model.path)
    save_head(folder, ScalarHead(trunk.width, generator).state_dict())
    return folder


def written(folder: Path) -> dict[str, Any]:
    """The exported generation config without what transformers adds."""
    GenerationConfig.from_pretrained(folder).validate(strict=True)
    values = json.loads((folder / "generation_config.json").read_text())
    return {name: values[name] for name in NAMES if name in values}


@pytest.mark.parametrize("policy", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("kind", INCONSISTENT)
def test_a_merged_model_has_a_valid_generation_config(
    kind: str, policy: PolicySettings, tiny_model: Path, tmp_path: Path
) -> None:
    model = base_with(tiny_model, tmp_path / "base", "generation_config.json", INCONSISTENT[kind])
    source = trained(model, policy, "policy", tmp_path / "policy")
    export_merged(model, policy, source, load_tokenizer(model.path), tmp_path / "out")
    assert written(tmp_path / "out") == EXPECTED[kind]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_an_adapter_has_a_valid_generation_config(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    model = base_with(tiny_model, tmp_path / "base", "generation_config.json", INCONSISTENT[kind])
    source = trained(model, LORA, "policy", tmp_path / "policy")
    export_adapter(model, LORA, source, load_tokenizer(model.path), tmp_path / "out")
    assert written(tmp_path / "out") == EXPECTED[kind]


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_a_reward_model_is_exported_without_a_generation_config(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    model = base_with(tiny_model, tmp_path / "base", "generation_config.json", INCONSISTENT[kind])
    source = trained(model, LORA, "reward", tmp_path / "reward")
    export_reward(model, LORA, source, load_tokenizer(model.path), tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_settings_of_generation_in_the_models_config_move_to_the_generation_config(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = base_with(tiny_model, tmp_path / "base", "config.json", {"temperature": 0.6, "max_new_tokens": 7})
    (tmp_path / "base" / "generation_config.json").unlink()
    expected = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 7}
    for policy in (LORA, FULL):
        source = trained(model, policy, "policy", tmp_path / f"{policy.method}-policy")
        export_merged(model, policy, source, load_tokenizer(model.path), tmp_path / policy.method)
        assert written(tmp_path / policy.method) == expected
    source = trained(model, LORA, "reward", tmp_path / "reward")
    export_reward(model, LORA, source, load_tokenizer(model.path), tmp_path / "classifier")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sampling without do_sample", "`do_sample` is true, because `temperature: 0.6`, `top_p: 0.9` would have no"),
        ("sampling against do_sample", "`temperature: 0.6`, `top_p: 0.9` left out"),
        ("beams without num_beams", "`early_stopping: True`, `length_penalty: 0.5` left out"),
        ("outputs that are not returned", "`output_scores: True`, `pad_token_id: -1` left out"),
    ],
)
def test_what_is_changed_is_said(kind: str, said: str, tiny_model: Path, tmp_path: Path) -> None:
    model = base_with(tiny_model, tmp_path / "base", "generation_config.json", INCONSISTENT[kind])
    (change,) = valid_generation(model.path).changes
    assert change.startswith(said)


@pytest.mark.parametrize(
    "values", [{}, {"do_sample": True, "temperature": 0.6, "top_k": 20}, {"num_beams": 3, "length_penalty": 0.5}]
)
def test_a_valid_config_stays_as_it_is(values: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    model = base_with(tiny_model, tmp_path / "base", "generation_config.json", values)
    config, changes = valid_generation(model.path)
    assert not changes
    assert {name: getattr(config, name) for name in values} == values
    assert config.eos_token_id == 1
