"""What the benchmarks count."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from policies.methods.build import make_trunk
from policies.schema import PolicySettings
from tests.integration.tiny_run import ENVIRONMENT

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import operations

    yield operations
    sys.modules.pop("operations")


def test_operations_of_an_update_are_those_that_torch_counts(operations, tiny_model: Path) -> None:
    # torch counts no attention but one by products of its own
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    trunk = make_trunk(base, PolicySettings(rank=4), ("policy",))
    trunk.use_module_forwards()  # torch counts no product that is added in place
    trunk.train_only("policy")
    trunk.switch("policy")
    prompt, response = 5, 7
    ids = torch.arange(prompt + response).unsqueeze(0)
    embedded = trunk.causal.get_input_embeddings()(
        ids
    ).requires_grad_()  # so that the first layer's gradient counts too
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
    masked = 3 * 2 * shape.attention * (prompt + response) ** 2  # half of the square of attention, which torch counts
    needed = operations.update_operations(shape, [(prompt, response)], critic_forward=False)
    assert counter.get_total_flops() == needed + masked


def test_attention_is_counted_half_and_three_times(operations) -> None:
    shape = operations.Shape(linear=0, adapter=0, attention=8, head=0)
    assert operations.update_operations(shape, [(3, 7)], critic_forward=True) == 2 * 3 * (4 * 10**2 * 8) / 2


def test_the_rate_is_measured_around_each_epoch_but_those_of_the_first_update(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"stages": ["ppo"], "reward": {"terms": {"short": {"kind": "length", "max_tokens": 6, "window": 4}}}}
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps(settings))
    line = [sys.executable, str(BENCHMARKS / "share.py"), str(file)]
    ended = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=200)
    epochs = json.loads(ended.stdout.splitlines()[-1])
    assert len(epochs) == (settings["ppo"]["steps"] - 1) * settings["ppo"]["epochs"]
    assert all(0 < epoch["update_per_s"] < epoch["matrix_per_s"] for epoch in epochs)
