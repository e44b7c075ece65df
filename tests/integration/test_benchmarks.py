"""What the benchmarks count, and their messages."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from policies.build import make_trunk
from policies.schema import PolicySettings
from tests.integration.tiny_run import ENVIRONMENT

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("operations")
    sys.modules.pop("operations")


def test_operations_of_an_update_are_those_that_torch_counts(operations: ModuleType, tiny_model: Path) -> None:
    # torch counts attention only where it consists of matrix products
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    trunk.use_module_forwards()  # torch does not count products that are added in place
    trunk.train_only("policy")
    trunk.switch("policy")
    prompt, response = 5, 7
    ids = torch.arange(prompt + response).unsqueeze(0)
    embedded = trunk.causal.get_input_embeddings()(ids)
    embedded.requires_grad_()  # so that the gradient of the first layer's input counts, too
    with FlopCounterMode(display=False) as counter:
        states = trunk.states(inputs_embeds=embedded, use_cache=False)
        trunk.head(states[0, prompt - 1 : -1], "policy").sum().backward()
    linear = [m for m in trunk.causal.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    frozen = [m for m in linear if not m.weight.requires_grad]
    shape = operations.Shape(
        linear=sum(m.weight.numel() for m in frozen),
        adapter=sum(m.weight.numel() for m in linear) - sum(m.weight.numel() for m in frozen),
        attention=trunk.causal.config.num_hidden_layers * trunk.width,
        head=trunk.causal.get_output_embeddings().weight.numel(),
    )
    masked = 3 * 2 * shape.attention * (prompt + response) ** 2  # the masked half of attention, which torch counts
    needed = operations.update_operations(shape, [(prompt, response)], critic_forward=False)
    assert counter.get_total_flops() == needed + masked


def test_attention_is_counted_half_and_three_times(operations: ModuleType) -> None:
    shape = operations.Shape(linear=0, adapter=0, attention=8, head=0)
    assert operations.update_operations(shape, [(3, 7)], critic_forward=True) == 2 * 3 * (4 * 10**2 * 8) / 2


@pytest.mark.slow
def test_the_rate_is_measured_around_each_epoch_except_in_the_first_update(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"stages": ["ppo"], "reward": {"terms": {"short": {"kind": "length", "max_tokens": 6, "window": 4}}}}
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, str(BENCHMARKS / "share.py"), str(file)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=200)
    epochs = json.loads(ended.stdout.splitlines()[-1])
    assert len(epochs) == (settings["ppo"]["steps"] - 1) * settings["ppo"]["epochs"]
    assert all(0 < epoch["update_per_s"] < epoch["matrix_per_s"] for epoch in epochs)


@pytest.mark.slow
def test_this_librarys_side_of_the_benchmark_of_reward_models_times_each_step(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a b", "chosen": "c d", "rejected": "e"}
    file.write_text((json.dumps(pair) + "\n") * 6)
    script = BENCHMARKS.parent / "reward_models" / "ours_reward.py"
    command = [sys.executable, str(script), "--model", str(tiny_model), "--preferences", str(file), "--batch", "2"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=200)
    seconds = json.loads(ended.stdout.splitlines()[-1])["seconds"]
    assert len(seconds) == 3 - 1
    assert all(second > 0 for second in seconds)


@pytest.mark.slow
def test_supervised_steps_of_a_checkout_are_compared_with_themselves() -> None:
    root = BENCHMARKS.parents[1]
    command = [sys.executable, str(BENCHMARKS / "supervised_steps.py"), "--other", str(root)]
    command += ["--only", "sft-1m", "--epochs", "1"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=600)
    line = ended.stdout.splitlines()[-1]
    found = re.search(r"^sft-1m: ratio (\S+) .* mean loss of the last epoch (\S+), other (\S+)$", line)
    assert found is not None
    assert float(found[1]) > 0
    assert found[2] == found[3]


@pytest.mark.slow
def test_what_the_controller_sends_and_receives_grows_with_the_batch(tmp_path: Path) -> None:
    file = tmp_path / "controller.json"
    command = [sys.executable, str(BENCHMARKS / "controller.py"), "--to", str(file)]
    command += ["--sizes", "64", "128", "--tokens", "1024", "--repeats", "1"]
    subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True, timeout=200)
    results = json.loads(file.read_text())
    prompt, response = 512, 512
    update = 4 * (prompt + response) + 5 * 4 * response
    score = 4 * (prompt + response) + 3 * 4 * response
    for count in (64, 128):
        sent = results[str(count)]["bytes"]
        assert count * update <= sent["update packed and sent"] <= 1.1 * count * update + 16 * 4096
        assert count * score <= sent["scoring sent and received"] <= 1.1 * count * score + 32 * 4096
        assert all(seconds >= 0 for seconds in results[str(count)]["seconds"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "reason"), [("", "a model is needed: give"), ("missing", "missing does not exist")])
def test_a_missing_model_is_one_message(model: str, reason: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "mixed.py")]
    environment = ENVIRONMENT | {"ALIGN_MODEL": model}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"mixed.py: error: {reason}")


@pytest.mark.parametrize(
    ("model", "reason"),
    [("", "MODEL is not set: give MODEL=FOLDER or set ALIGN_MODEL"), ("nowhere", "nowhere: the folder does not exist")],
)
def test_the_target_bench_says_what_it_needs(model: str, reason: str) -> None:
    command = ["make", "--silent", "model-given", f"MODEL={model}"]
    ended = subprocess.run(command, cwd=BENCHMARKS.parents[1], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert reason in ended.stderr
