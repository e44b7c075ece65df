"""Pickles and code planted wherever a library might run them: they are refused or ignored, and never run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.config.schema import Experiment
from align.runs.checkpoint import checkpoints, seal
from align.runs.folder import begin_run, folder_of
from align.runtime.signals import Interrupted, StopRequest
from align.stages.pipeline import load_datasets, run_stages
from policies.errors import UserError
from policies.files.adapters import load_adapter, load_head
from policies.files.base_model import load_base, load_generation_config, load_model_config, load_tokenizer
from policies.files.prompt_table import read_task
from policies.schema import ModelSettings, PolicySettings
from rewards.classifier import Classifier
from rewards.model import read_heads
from tests.fuzz.harm import refusal
from tests.integration.tiny_run import make_settings

POLICY = PolicySettings(rank=2, alpha=4)


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-was-run"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def plant(path: Path, marker: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(1), "x": Planted(marker)}, path)


def base(folder: Path) -> object:
    return load_base(ModelSettings(path=str(folder)))


def classifier(folder: Path) -> object:
    return Classifier(str(folder))


def test_a_planted_pickle_runs_where_it_is_loaded(tmp_path: Path, marker: Path) -> None:
    plant(tmp_path / "x", marker)
    torch.load(tmp_path / "x", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("load", [base, classifier])
def test_weights_that_are_a_pickle_are_refused(load: Callable[[Path], object], model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", marker)
    with pytest.raises(UserError, match=r"no model\.safetensors; other weight files.*save it with save_pretrained"):
        load(model)
    assert not marker.exists()


@pytest.mark.parametrize("load", [base, classifier])
def test_a_pickle_that_is_named_safetensors_is_refused(
    load: Callable[[Path], object], model: Path, marker: Path
) -> None:
    plant(model / "model.safetensors", marker)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(model)
    assert not marker.exists()


@pytest.mark.parametrize("load", [base, classifier])
@pytest.mark.parametrize("name", ["weights.bin", "../weights.safetensors", "/etc/x.safetensors", 3, "x.bin.index.json"])
def test_other_files_that_the_config_names_are_refused(
    load: Callable[[Path], object], name: Any, model: Path, marker: Path
) -> None:
    plant(model / "weights.bin", marker)
    plant(model.parent / "weights.safetensors", marker)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(UserError, match="transformers_weights"):
        load(model)
    assert not marker.exists()


@pytest.mark.parametrize("load", [base, classifier])
@pytest.mark.parametrize("name", ["weights.bin", "../weights.safetensors", None])
def test_other_files_that_an_index_names_are_refused(
    load: Callable[[Path], object], name: Any, model: Path, marker: Path
) -> None:
    plant(model / "weights.bin", marker)
    plant(model.parent / "weights.safetensors", marker)
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: .* is not a \.safetensors file in the same folder"):
        load(model)
    assert not marker.exists()


def test_an_adapter_beside_the_weights_is_refused(model: Path, marker: Path) -> None:
    """transformers would load the model that it names, with its weights on top."""
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model)}))
    plant(model / "adapter_model.bin", marker)
    with pytest.raises(UserError, match="adapter_config"):
        base(model)
    assert not marker.exists()


READERS: dict[str, Callable[[Path], object]] = {
    "adapter_model.bin": lambda folder: load_adapter(folder, POLICY),
    "adapter_model.safetensors": lambda folder: load_adapter(folder, POLICY),
    "model.safetensors": lambda folder: load_adapter(folder, PolicySettings(method="full")),
    "pytorch_model.bin": lambda folder: load_adapter(folder, PolicySettings(method="full")),
    "head.safetensors": load_head,
    "head.bin": load_head,
    "attributes.safetensors": lambda folder: read_heads(folder, {"helpful": 1.0}),
    "table.safetensors": lambda folder: read_task(f"{folder}/table.safetensors#task"),
}


@pytest.mark.parametrize("name", READERS)
def test_adapters_heads_and_tables_that_are_pickles_are_refused(name: str, tmp_path: Path, marker: Path) -> None:
    plant(tmp_path / "planted" / name, marker)
    (tmp_path / "planted" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    with pytest.raises(UserError, match="planted"):
        READERS[name](tmp_path / "planted")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt"])
def test_tokenizers_that_are_pickles_are_refused(name: str, model: Path, marker: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    plant(model / name, marker)
    with pytest.raises(UserError, match=r"tokenizer of .*model"):
        load_tokenizer(str(model))
    assert not marker.exists()


CODE = "import pathlib\npathlib.Path({marker!r}).mkdir()\n"


@pytest.mark.parametrize(
    "load", [base, lambda p: load_tokenizer(str(p)), lambda p: load_model_config(str(p)), classifier]
)
@pytest.mark.parametrize("family", ["planted", "llama"])
def test_code_in_a_models_folder_is_never_run(
    load: Callable[[Path], object], family: str, model: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user prompted to allow it."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    (model / "planted.py").write_text(CODE.format(marker=str(marker)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    kinds = ("Config", "ModelForCausalLM", "ModelForSequenceClassification")
    names = {f"Auto{kind}": f"planted.Planted{kind}" for kind in kinds}
    for file, more in (
        ("config.json", {"model_type": family, "auto_map": names}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.Tokenizer", None]}, "tokenizer_class": "X"}),
    ):
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | more))
    if family == "planted":
        with pytest.raises(UserError, match="code from its own folder, which is never run here"):
            load(model)
    else:
        load_generation_config(str(model))
        message = refusal(lambda: load(model))
        assert message is None or str(model) in message
    assert not marker.exists()


STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="session")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By stage, a run that was stopped after one of its steps: the folder of runs, and the settings."""
    runs = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(stage)
        settings = make_settings(tiny_model, folder)
        experiment = Experiment.model_validate(settings)
        run = folder_of(experiment)
        stop = StopRequest(requested=True)
        begin_run(run, experiment)
        while not checkpoints(run.checkpoints(stage)):
            with pytest.raises(Interrupted):
                run_stages(experiment, run, load_datasets(experiment), stop)
        runs[stage] = (Path(experiment.runs), settings)
    return runs


def resume(stopped: tuple[Path, dict[str, Any]], tmp_path: Path, harm: Callable[[Path], None], stage: str) -> None:
    """Damage the last checkpoint of a copy, write a matching manifest, and resume for a step."""
    runs, settings = stopped
    copied = Path(shutil.copytree(runs, tmp_path / "runs"))
    experiment = Experiment.model_validate(settings | {"runs": str(copied)})
    last = checkpoints(folder_of(experiment).checkpoints(stage))[-1]
    harm(last)
    seal(last)
    stop = StopRequest(requested=True)
    run_stages(experiment, folder_of(experiment), load_datasets(experiment), stop)


PICKLES = (
    "optimizer-0.pt",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model.bin",
    "reference/adapter_model.bin",
    "reference/head.bin",
)
"""The names under which Torch, transformers, PEFT and DeepSpeed keep pickles."""


@pytest.mark.slow
def test_the_libraries_own_pickles_are_neither_written_nor_read(
    stopped: dict[str, Any], tmp_path: Path, marker: Path
) -> None:
    def harm(checkpoint: Path) -> None:
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        for name in PICKLES:
            plant(checkpoint / name, marker)

    with pytest.raises(Interrupted):
        resume(stopped["sft"], tmp_path, harm, "sft")
    assert not marker.exists()


def _wider(path: Path) -> None:
    save_file({name: torch.zeros(*tensor.shape, 2) for name, tensor in load_file(path).items()}, path)


def _other_names(path: Path) -> None:
    save_file({f"7.{name}": tensor for name, tensor in load_file(path).items()}, path)


CHECKPOINT_FILES = [
    ("sft", "optimizer-0.safetensors"),
    ("sft", "state.json"),
    ("sft", "reference/adapter_model.safetensors"),
    ("sft", "reference/adapter_config.json"),
    ("reward", "optimizer-0.safetensors"),
    ("reward", "reward/head.safetensors"),
    ("ppo", "optimizer-0.safetensors"),
    ("ppo", "state.json"),
    ("ppo", "policy/adapter_model.safetensors"),
    ("ppo", "policy/adapter_config.json"),
    ("ppo", "critic/head.safetensors"),
]


@pytest.mark.parametrize(("stage", "name"), CHECKPOINT_FILES)
@pytest.mark.parametrize("how", ["pickle", "wider", "other names", "gone"])
def test_any_damaged_file_of_a_checkpoint_is_refused(
    stopped: dict[str, Any], tmp_path: Path, marker: Path, stage: str, name: str, how: str
) -> None:
    def harm(checkpoint: Path) -> None:
        if how == "pickle":
            plant(checkpoint / name, marker)
        elif how == "gone":
            (checkpoint / name).unlink()
        elif name.endswith(".json"):
            (checkpoint / name).write_text("[]" if how == "wider" else '{"x": 1}')
        else:
            (_wider if how == "wider" else _other_names)(checkpoint / name)

    with pytest.raises(UserError, match=r"step-|adapter|optimizer|head"):
        resume(stopped[stage], tmp_path, harm, stage)
    assert not marker.exists()
