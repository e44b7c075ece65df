import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from align.cli import app
from policies.averaging import average_adapters
from policies.errors import UserError
from policies.files.adapters import CONFIG, load_adapter, load_head, save_adapter, save_head
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings

Adapters = tuple[list[Path], list[dict[str, Tensor]]]

LORA, FULL = PolicySettings(rank=2, alpha=4), PolicySettings(method="full")


@pytest.fixture
def adapters(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path
) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Three that differ, each with a head, and what they hold."""
    settings: PolicySettings = getattr(request, "param", LORA)
    first = build_trunk(ModelSettings(path=str(tiny_model)), settings, ("policy",)).read_adapter("policy")
    folders, held = [], []
    for member in range(3):
        weights = {name: tensor + 0.1 * member for name, tensor in first.items()}
        folder = tmp_path / str(member)
        save_adapter(folder, weights, settings, str(tiny_model))
        save_head(folder, {"weight": torch.full((1, 4), float(member)), "bias": torch.tensor([2.0 * member])})
        folders.append(folder)
        held.append(weights)
    return folders, held


@pytest.mark.parametrize(("adapters", "settings"), [(LORA, LORA), (FULL, FULL)], indirect=["adapters"])
def test_the_mean_is_that_of_every_number(adapters: Adapters, settings: PolicySettings, tmp_path: Path) -> None:
    folders, held = adapters
    average_adapters(folders, [1.0, 1.0, 2.0], tmp_path / "mean")
    mean = load_adapter(tmp_path / "mean", settings)
    assert mean.keys() == held[0].keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (held[0][name] + held[1][name] + 2 * held[2][name]) / 4)
    assert float(load_head(tmp_path / "mean")["bias"]) == 2.5


def test_the_mean_of_one_thing_is_that_thing_bit_for_bit(adapters: Adapters, tmp_path: Path) -> None:
    average_adapters([adapters[0][1]] * 3, [0.2, 0.3, 0.7], tmp_path / "mean")
    mean = load_adapter(tmp_path / "mean", LORA)
    assert all(torch.equal(mean[name], tensor) for name, tensor in adapters[1][1].items())


def test_what_does_not_go_together_is_refused_by_name(adapters: Adapters, tiny_model: Path, tmp_path: Path) -> None:
    one, two, _ = adapters[0]
    config = json.loads((two / CONFIG).read_text())
    (two / CONFIG).write_text(json.dumps(config | {"lora_alpha": 9}))
    with pytest.raises(UserError, match=r"lora_alpha is 9, and 4\.0 in"):
        average_adapters([one, two], [1, 1], tmp_path / "mean")
    (two / CONFIG).write_text(json.dumps({"peft_type": "BITFIT"}))
    with pytest.raises(UserError, match="peft_type is 'BITFIT', and 'LORA' in"):
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


def test_all_files_of_tensors_are_averaged_by_the_command(adapters: Adapters, tmp_path: Path) -> None:
    """A reward model may have heads of named attributes beside the one of the whole score."""
    folders = [str(folder) for folder in adapters[0]]
    for member, folder in enumerate(folders):
        save_file({"kind": torch.tensor([float(member)])}, Path(folder) / "attributes.safetensors")

    def command(*more: str) -> Result:
        return CliRunner().invoke(app, ["average", *folders, "--to", str(tmp_path / "mean"), *more])

    for weights in (["1", "2"], ["1", "2", "0"], ["1", "2", "nan"]):
        said = command(*(part for weight in weights for part in ("--weight", weight))).exception
        assert isinstance(said, UserError)
        assert "one for each of the 3 adapters, above 0" in str(said)
        assert not (tmp_path / "mean").exists()
    assert command("--weight", "1", "--weight", "1", "--weight", "2").exit_code == 0
    assert float(load_file(tmp_path / "mean" / "attributes.safetensors")["kind"]) == 1.25
    assert "exists already" in str(command().exception)
