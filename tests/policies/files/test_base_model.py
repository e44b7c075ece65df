import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from policies.errors import UserError
from policies.files.base_model import check_model_folder, load_base, load_model_config, load_tokenizer, stop_ids
from policies.files.quantization import four_bits
from policies.schema import ModelSettings, PolicySettings


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def settings(folder: Path, dtype: str = "float32") -> ModelSettings:
    return ModelSettings(path=str(folder), dtype=dtype)


def test_base_is_frozen_and_in_evaluation_mode(tiny_model: Path) -> None:
    base = load_base(settings(tiny_model))
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_has_the_dtype_of_the_settings(tiny_model: Path, dtype: str) -> None:
    assert {p.dtype for p in load_base(settings(tiny_model, dtype)).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, check_model_folder])
@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_missing_folder_is_named(load: Callable[[str], object], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist"):
        load(name)


def test_a_missing_folder_in_an_existing_one_is_not_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="models/tiny does not exist"):
        check_model_folder("models/tiny")


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
def test_a_hub_name_is_left_to_the_hub(name: str) -> None:
    check_model_folder(name)


def test_a_hub_name_that_cannot_be_reached_is_a_user_error() -> None:
    for load in (load_tokenizer, load_model_config, lambda path: load_base(ModelSettings(path=path))):
        with pytest.raises(UserError, match="no-such-owner/no-such-model"):
            load("no-such-owner/no-such-model")


def test_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_base(settings(folder))


def test_missing_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no tokenizer: save it there with tokenizer\.save_pretrained"):
        load_tokenizer(str(folder))
    check_model_folder(str(folder), needs_tokenizer=False)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(settings(folder))


def test_unreadable_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be"):
        load_base(settings(folder))


@pytest.mark.parametrize("size", [0, 50, -10])
def test_damaged_weights_are_a_user_error(folder: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(settings(folder))


def test_a_damaged_tokenizer_is_a_user_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_eos_is_refused(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>")
    bare.save_pretrained(folder)
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(str(folder))


def test_responses_stop_at_the_tokenizer_s_eos_and_at_the_model_s_own(tiny_model: Path) -> None:
    model = load_base(settings(tiny_model))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for configured, expected in ((None, {1}), (7, {1, 7}), ([7, 8], {1, 7, 8})):
        model.generation_config = GenerationConfig(eos_token_id=configured)
        assert stop_ids(model.generation_config, tokenizer) == expected
    model.generation_config = None
    assert stop_ids(model.generation_config, tokenizer) == {1}


@pytest.mark.parametrize(
    ("native", "policy", "dtype"),
    [
        (True, PolicySettings(), torch.bfloat16),
        (False, PolicySettings(), torch.float32),
        (True, PolicySettings(method="full"), torch.float32),
    ],
)
def test_the_default_dtype_follows_the_device_and_the_method(
    tiny_model: Path, native: bool, policy: PolicySettings, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    assert load_base(ModelSettings(path=str(tiny_model)), policy).dtype == dtype


@pytest.mark.parametrize("native", [True, False])
def test_four_bit_weights_are_multiplied_in_the_default_dtype(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    computed = four_bits(ModelSettings(path="m"), PolicySettings(method="qlora")).bnb_4bit_compute_dtype
    assert computed == (torch.bfloat16 if native else torch.float32)


def test_training_in_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match=r"gradients below 6e-8 vanish .* use bfloat16, or float32"):
        ModelSettings.model_validate({"path": "m", "dtype": "float16"})
