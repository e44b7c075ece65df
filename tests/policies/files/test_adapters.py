import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from policies.errors import UserError
from policies.files.adapters import (
    CONFIG,
    HEAD,
    WEIGHTS,
    load_adapter,
    load_head,
    save_adapter,
    save_head,
    tensor_digests,
    weights_digest,
)
from policies.schema import PolicySettings

SETTINGS = PolicySettings(rank=2, alpha=4.0)
ADAPTER = {"layer.lora_A.weight": torch.arange(6.0).reshape(2, 3), "layer.lora_B.weight": torch.ones(3, 2)}
SCALAR = {"weight": torch.arange(3.0), "bias": torch.ones(1)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "adapter"
    save_adapter(folder, ADAPTER, SETTINGS, "base")
    save_head(folder, SCALAR)
    return folder


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_adapter_and_head_come_back_bit_for_bit(saved: Path) -> None:
    for expected, loaded in ((ADAPTER, load_adapter(saved, SETTINGS)), (SCALAR, load_head(saved))):
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    save_adapter(tmp_path, {"t": torch.arange(6.0).reshape(2, 3).T}, SETTINGS, "base")
    assert load_adapter(tmp_path, SETTINGS)["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_config_is_peft_s_own(saved: Path) -> None:
    config = LoraConfig.from_pretrained(str(saved))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 4.0, "base")
    assert config.task_type == "CAUSAL_LM"


def test_without_a_head_there_is_no_head_file(tmp_path: Path) -> None:
    save_adapter(tmp_path, ADAPTER, SETTINGS, "base")
    assert not (tmp_path / HEAD).exists()
    with pytest.raises(UserError, match=f"has no {HEAD}"):
        load_head(tmp_path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_adapter(tmp_path / "nowhere", SETTINGS)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        load_adapter(saved, SETTINGS)


@pytest.mark.parametrize("text", [None, "{", ""])
def test_missing_or_unreadable_config_is_named(saved: Path, text: str | None) -> None:
    (saved / CONFIG).unlink()
    if text is not None:
        (saved / CONFIG).write_text(text)
    with pytest.raises(UserError, match=f"no readable {CONFIG}"):
        load_adapter(saved, SETTINGS)


@pytest.mark.parametrize("size", [0, 5, 100, -3])
def test_damaged_weights_are_named(saved: Path, size: int) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(UserError, match=f"{WEIGHTS} is damaged"):
        load_adapter(saved, SETTINGS)


def test_weights_that_are_not_safetensors_are_named(saved: Path) -> None:
    (saved / HEAD).write_bytes(b"\xff" * 400)
    with pytest.raises(UserError, match=f"{HEAD} is damaged"):
        load_head(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "policy.rank is 2"),
        ({"lora_alpha": 16}, "policy.alpha is 4.0"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ],
)
def test_an_adapter_that_is_not_as_the_settings_say_is_refused(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    edit(saved, **changes)
    with pytest.raises(UserError, match=message):
        load_adapter(saved, SETTINGS)


def test_the_digest_depends_on_bytes_names_and_shapes_but_not_on_order() -> None:
    first = weights_digest(tensor_digests(ADAPTER))
    assert weights_digest(tensor_digests(dict(reversed(ADAPTER.items())))) == first
    assert weights_digest(tensor_digests({name: tensor.clone() for name, tensor in ADAPTER.items()})) == first
    others = [
        {**ADAPTER, "layer.lora_B.weight": ADAPTER["layer.lora_B.weight"].index_fill(0, torch.tensor(0), 1.0000001)},
        {**ADAPTER, "layer.lora_B.weight": ADAPTER["layer.lora_B.weight"].T},
        {name.replace("layer", "other"): tensor for name, tensor in ADAPTER.items()},
        {name: tensor.to(torch.bfloat16) for name, tensor in ADAPTER.items()},
    ]
    assert len({first, *(weights_digest(tensor_digests(other)) for other in others)}) == 5
