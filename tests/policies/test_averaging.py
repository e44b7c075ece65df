import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from align.cli import app
from policies.averaging import average_adapters
from policies.build import build_trunk
from policies.errors import UserError
from policies.files.adapters import CONFIG, load_adapter, load_head, save_adapter, save_head
from policies.schema import ModelSettings, PolicySettings

Adapters = tuple[list[Path], list[dict[str, Tensor]]]

LORA = PolicySettings(rank=2, alpha=4)
FULL = PolicySettings(method="full")


@pytest.fixture
def adapters(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Adapters:
    """The folders of three different adapters, each with a head, and their weights."""
    settings: PolicySettings = getattr(request, "param", LORA)
    first = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",)).read_adapter("policy")
    folders: list[Path] = []
    saved: list[dict[str, Tensor]] = []
    for member in range(3):
        weights = {name: tensor + 0.1 * member for name, tensor in first.items()}
        folder = tmp_path / str(member)
        save_adapter(folder, weights, settings, str(tiny_model))
        save_head(folder, {"weight": torch.full((1, 4), float(member)), "bias": torch.tensor([2.0 * member])})
        folders.append(folder)
        saved.append(weights)
    return folders, saved


@pytest.mark.parametrize(("adapters", "settings"), [(LORA, LORA), (FULL, FULL)], indirect=["adapters"])
def test_every_parameter_is_averaged(adapters: Adapters, settings: PolicySettings, tmp_path: Path) -> None:
    folders, saved = adapters
    average_adapters(folders, [1.0, 1.0, 2.0], tmp_path / "mean")
    mean = load_adapter(tmp_path / "mean", settings)
    assert mean.keys() == saved[0].keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (saved[0][name] + saved[1][name] + 2 * saved[2][name]) / 4)
    assert float(load_head(tmp_path / "mean")["bias"]) == 2.5


def test_the_mean_of_equal_adapters_is_that_adapter_bit_for_bit(adapters: Adapters, tmp_path: Path) -> None:
    average_adapters([adapters[0][1]] * 3, [0.2, 0.3, 0.7], tmp_path / "mean")
    mean = load_adapter(tmp_path / "mean", LORA)
    assert all(torch.equal(mean[name], tensor) for name, tensor in adapters[1][1].items())


def test_adapters_of_different_kinds_are_refused_by_name(adapters: Adapters, tiny_model: Path, tmp_path: Path) -> None:
    one, two, _ = adapters[0]
    config = json.loads((two / CONFIG).read_text())
    (two / CONFIG).write_text(json.dumps(config | {"lora_alpha": 9}))
    with pytest.raises(UserError, match=r"lora_alpha is 9, but 4\.0 in"):
        average_adapters([one, two], [1, 1], tmp_path / "mean")
    (two / CONFIG).write_text(json.dumps({"peft_type": "BITFIT"}))
    with pytest.raises(UserError, match="peft_type is 'BITFIT', but 'LORA' in"):
        average_adapters([one, two], [1, 1], tmp_path / "mean")
    (two / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    average_adapters([one, two], [1, 1], tmp_path / "same")
    (two / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors does not exist"):
        average_adapters([one, two], [1, 1], tmp_path / "mean")
    with pytest.raises(UserError, match="nowhere"):
        average_adapters([one, tmp_path / "nowhere"], [1, 1], tmp_path / "mean")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        average_adapters([tmp_path / "nowhere", one], [1, 1], tmp_path / "mean")


def test_the_command_averages_all_files_of_tensors(adapters: Adapters, tmp_path: Path) -> None:
    """A reward model may have heads of named attributes besides that of the overall score."""
    folders = [str(folder) for folder in adapters[0]]
    for member, folder in enumerate(folders):
        save_file({"kind": torch.tensor([float(member)])}, Path(folder) / "attributes.safetensors")

    def command(*more: str) -> Result:
        return CliRunner().invoke(app, ["average", *folders, "--to", str(tmp_path / "mean"), *more])

    for weights in (["1", "2"], ["1", "2", "0"], ["1", "2", "nan"]):
        options: list[str] = []
        for weight in weights:
            options += ["--weight", weight]
        error = command(*options).exception
        assert isinstance(error, UserError)
        assert "expected 3 positive weights, one for each adapter" in str(error)
        assert not (tmp_path / "mean").exists()
    assert command("--weight", "1", "--weight", "1", "--weight", "2").exit_code == 0
    assert float(load_file(tmp_path / "mean" / "attributes.safetensors")["kind"]) == 1.25
    assert "already exists" in str(command().exception)
