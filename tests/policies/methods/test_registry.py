"""The registry of methods: what it holds, the tables that it makes, and a method that is one added file."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from policies.method_spec import NO, YES, Support, methods, supporting
from policies.method_tables import compatibility_table, methods_table
from policies.schema import PolicySettings
from policies.trunk import Trunk
from tests.integration.tiny_run import make_settings

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "methods.md"
PACKAGES = ("align", "policies", "rewards", "rollouts")

SCALED_EMBEDDINGS = '''"""A learned scale of each dimension of the token embeddings, for each role."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.method_spec import MethodSpec
from policies.trunk import Trunk

SPEC = MethodSpec(
    name="scaled_embeddings",
    trains="scales of the token embeddings",
    source="this test",
    trunk="policies.methods.scaled_embeddings:ScaledEmbeddingsTrunk",
    peft_type="SCALED_EMBEDDINGS",
    below_float32=True,
)


class ScaledEmbeddingsTrunk(Trunk):
    def _build(self, base: PreTrainedModel) -> None:
        self.scales = nn.ParameterDict({role: nn.Parameter(torch.ones(self.width)) for role in self.roles})
        base.get_input_embeddings().register_forward_hook(self._scale)

    def _scale(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        return embeddings * self.scales[self._role] if self._role in self.roles else embeddings

    def switch(self, role: str) -> None:
        self._role = role

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return {"scale": self.scales[role]}
'''


def test_every_reference_of_a_spec_leads_to_code() -> None:
    for spec in methods().values():
        assert issubclass(spec.load_trunk(), Trunk), spec.name
        if spec.in_peft:
            assert callable(spec.load_peft_config()), spec.name


def test_a_method_reads_only_settings_that_exist() -> None:
    names = PolicySettings.model_fields.keys()
    for spec in methods().values():
        assert names >= set(spec.reads), spec.name
        for support in (spec.vllm, spec.zero3, spec.merges_for_sampling, spec.scales):
            assert set(spec.reads) >= set(support.without), spec.name


def test_a_method_shares_the_base_or_is_saved_as_a_model() -> None:
    for spec in methods().values():
        assert spec.shares_base == bool(spec.peft_type), spec.name


def test_every_setting_is_read_by_a_method() -> None:
    read = {name for spec in methods().values() for name in spec.reads}
    assert read == PolicySettings.model_fields.keys() - {"method"}


def test_settings_are_validated_without_importing_torch() -> None:
    code = (
        "import sys; from policies.schema import PolicySettings; PolicySettings(method='prefix_tuning')\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_method_is_told_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=f"expected one of {', '.join(methods())}"):
        PolicySettings(method="lore")


def test_a_condition_is_checked_and_named() -> None:
    support = Support(True, without=("dora", "init"))
    assert support.condition == "without dora and init"
    assert support.allows(PolicySettings(rank=2))
    assert not support.allows(PolicySettings(dora=True))
    assert not support.allows(PolicySettings(init="pissa"))
    assert YES.allows(PolicySettings(dora=True))
    assert not NO.allows(PolicySettings())
    assert supporting("zero3") == "adamix, bottleneck, full or lora without dora and init"
    assert supporting("vllm") == "lora without dora"


@pytest.mark.parametrize("table", [methods_table, compatibility_table])
def test_the_docs_have_the_tables_of_the_registry(table: Callable[[], str]) -> None:
    assert f"\n\n{table()}\n\n" in DOCS.read_text(encoding="utf-8"), (
        f"{DOCS}: the table differs from the registry; replace it with what `python -m policies.method_tables` prints"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the four packages with one file more: a method that they have never heard of."""
    folder = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "policies" / "methods" / "scaled_embeddings.py").write_text(SCALED_EMBEDDINGS)
    return folder


def command(tree: Path, *arguments: str) -> str:
    """What a module of the copy prints, run as a command."""
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
    process = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
def test_a_method_is_one_added_file(tree: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["policy"] = {"method": "scaled_embeddings"}
    settings["rollouts"] |= {"workers": 1}
    settings["learner"] |= {"ranks": 1, "policy_learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    settings["sft"]["learning_rate"] = 1e-2
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings))

    tables = command(tree, "policies.method_tables")
    assert "| `scaled_embeddings` | scales of the token embeddings | | this test |" in tables
    assert "| `scaled_embeddings` | yes | no | no | no | no | no | yes | yes | `policies` |" in tables
    plan = command(tree, "align", "plan", str(experiment))
    assert "each update sends 128 B" in plan  # 32 scales in float32
    assert "scaled_embeddings: scales of the token embeddings" in plan
    command(tree, "align", "run", str(experiment))

    run = tmp_path / "runs" / "tiny"
    start = torch.ones(32)  # [H]
    (after_sft,) = load_file(run / "sft" / "adapter_model.safetensors").values()
    (after_ppo,) = load_file(run / "policy" / "adapter_model.safetensors").values()
    assert not torch.equal(after_sft, start)
    assert not torch.equal(after_ppo, after_sft)
