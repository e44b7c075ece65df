"""Adapters that PEFT saves, by each of its initialisations, against PEFT's own log-probabilities."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from policies.averaging import average_adapters
from policies.build import build_trunk
from policies.errors import UserError
from policies.files.adapters import CONFIG, load_adapter
from policies.files.safe_reading import read_object
from policies.schema import ModelSettings, PolicySettings

POLICY = PolicySettings(rank=4, alpha=8)
IDS = torch.arange(40).reshape(2, 20) + 5
INITS_OF_A_CHANGED_BASE = ["pissa", "pissa_niter_4", "olora"]
INITS_OF_THE_BASE: list[Any] = [True, False, "gaussian", "eva", "orthogonal", "mica"]


def saved_by_peft(base: Path, folder: Path, init: str | bool, **options: Any) -> tuple[PreTrainedModel, Tensor]:
    """Save an adapter as PEFT does after some training. Returns PEFT's model, and its logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(folder / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        logits = model.eval()(input_ids=IDS).logits
    model.save_pretrained(folder / "adapter", **options)
    return model, logits


def logits_here(base: Path, weights: dict[str, Tensor], policy: PolicySettings) -> Tensor:
    trunk = build_trunk(ModelSettings(path=str(base), dtype="float32"), policy, ("policy",))
    trunk.write_adapter("policy", weights)
    with torch.no_grad():
        return trunk.head(trunk.hidden(IDS, "policy"), "policy")


@pytest.mark.parametrize("init", INITS_OF_THE_BASE)
def test_an_adapter_for_the_base_itself_has_peft_s_logits(tiny_model: Path, tmp_path: Path, init: str | bool) -> None:
    _, expected = saved_by_peft(tiny_model, tmp_path, init)
    weights = load_adapter(tmp_path / "adapter", POLICY)
    torch.testing.assert_close(logits_here(tiny_model, weights, POLICY), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", INITS_OF_A_CHANGED_BASE)
def test_an_adapter_for_a_changed_base_is_refused(tiny_model: Path, tmp_path: Path, init: str) -> None:
    saved_by_peft(tiny_model, tmp_path, init)
    message = rf"init_lora_weights is '{init}'.*path_initial_model_for_weight_conversion.*sft\.adapter_base: residual"
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path / "adapter", POLICY)
    with pytest.raises(UserError, match=rf"init_lora_weights is '{init}'"):
        average_adapters([tmp_path / "adapter", tmp_path / "adapter"], [1.0, 1.0], tmp_path / "mean")


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "PiSSA"])
def test_inits_that_cannot_be_made_here_are_refused_too(tiny_model: Path, tmp_path: Path, init: str) -> None:
    saved_by_peft(tiny_model, tmp_path, True)
    path = tmp_path / "adapter" / CONFIG
    path.write_text(path.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    with pytest.raises(UserError, match=rf"init_lora_weights is '{init}'"):
        load_adapter(tmp_path / "adapter", POLICY)


def test_tokens_that_switch_an_adapter_on_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    saved_by_peft(tiny_model, tmp_path, True)
    path = tmp_path / "adapter" / CONFIG
    path.write_text(path.read_text().replace('"alora_invocation_tokens": null', '"alora_invocation_tokens": [5]'))
    with pytest.raises(UserError, match=r"alora_invocation_tokens is set"):
        load_adapter(tmp_path / "adapter", POLICY)


def test_on_the_changed_base_it_has_peft_s_logits(tiny_model: Path, tmp_path: Path) -> None:
    model, expected = saved_by_peft(tiny_model, tmp_path, "pissa")
    residual = model.unload()
    shutil.copytree(tiny_model, tmp_path / "residual")
    residual.save_pretrained(tmp_path / "residual")
    weights = load_adapter(tmp_path / "adapter", POLICY, residual_base=True)
    torch.testing.assert_close(logits_here(tmp_path / "residual", weights, POLICY), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_converts_has_its_logits_on_the_base(tiny_model: Path, tmp_path: Path) -> None:
    initial = str(tmp_path / "initial")
    _, expected = saved_by_peft(tiny_model, tmp_path, "pissa", path_initial_model_for_weight_conversion=initial)
    policy = PolicySettings(rank=8, alpha=16)
    weights = load_adapter(tmp_path / "adapter", policy)
    torch.testing.assert_close(logits_here(tiny_model, weights, policy), expected, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_started_from_pissa_here_is_right_in_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    policy = PolicySettings(rank=4, alpha=8, init="pissa")
    trunk = build_trunk(ModelSettings(path=str(tiny_model), dtype="float32"), policy, ("policy",))
    trunk.initialise("policy")
    weights = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in trunk.read_adapter("policy").items()}
    trunk.write_adapter("policy", weights)
    trunk.save("policy", tmp_path / "saved")
    assert read_object(tmp_path / "saved" / CONFIG)["init_lora_weights"] is True
    with torch.no_grad():
        expected = trunk.head(trunk.hidden(IDS, "policy"), "policy")
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()(input_ids=IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert load_adapter(tmp_path / "saved", policy).keys() == weights.keys()


def test_an_adapter_with_nan_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trunk = build_trunk(ModelSettings(path=str(tiny_model), dtype="float32"), POLICY, ("policy",))
    weights = trunk.read_adapter("policy")
    name = min(weights)
    weights[name][0, 0] = float("nan")
    trunk.write_adapter("policy", weights)
    trunk.save("policy", tmp_path)
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinite numbers"):
        load_adapter(tmp_path, POLICY)
