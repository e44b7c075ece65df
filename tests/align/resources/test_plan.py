import copy
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from align.config.ppo_settings import KlSettings, PpoSettings
from align.config.schema import Experiment, SourceSettings
from align.config.stage import stage_names
from align.data.datasets import Datasets, read_datasets
from align.resources.memory import measure
from align.resources.plan import describe_placement, make_plan, plan_table, use_table
from policies.build import make_trunk
from policies.files.adapters import save_adapter
from policies.files.base_model import load_base
from policies.heads import ScalarHead
from policies.layers import native
from policies.schema import ModelSettings, PolicySettings
from tests.integration.tiny_run import make_settings, write_rows


@pytest.fixture
def experiment(tiny_model: Path, tmp_path: Path) -> Experiment:
    return Experiment.model_validate(make_settings(tiny_model, tmp_path))


@pytest.fixture
def datasets(experiment: Experiment, tiny_tokenizer: PreTrainedTokenizerBase) -> Datasets:
    return read_datasets(experiment, tiny_tokenizer, max_positions=2048)


def planned(experiment: Experiment, datasets: Datasets, *stages: str) -> dict[str, str]:
    return dict(make_plan(experiment, datasets, list(stages or stage_names())).lines)


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_has_as_many_parameters_as_the_real_model(tmp_path: Path, tied: bool) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **shape)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    real = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert measure(ModelSettings(path=str(tmp_path)), PolicySettings()).base == real


@pytest.mark.parametrize("policy", [PolicySettings(rank=3), PolicySettings(rank=8, targets=["q_proj", "down_proj"])])
def test_an_adapter_has_as_many_parameters_as_its_file(
    tiny_model: Path, tmp_path: Path, policy: PolicySettings
) -> None:
    model = ModelSettings(path=str(tiny_model))
    trunk = make_trunk(load_base(model), policy, ("policy",))
    save_adapter(tmp_path, trunk.read_adapter("policy"), trunk.settings, trunk.base)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert measure(model, policy).adapter == sum(tensor.numel() for tensor in saved.values())


def test_a_head_has_as_many_parameters_as_the_real_one(tiny_model: Path) -> None:
    sizes = measure(ModelSettings(path=str(tiny_model)), PolicySettings())
    assert sizes.head == sum(parameter.numel() for parameter in ScalarHead(32).parameters())


def test_a_missing_compiler_is_reported(
    experiment: Experiment, datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "kernels" not in planned(experiment, datasets)
    monkeypatch.setattr(native, "library", lambda: None)
    assert planned(experiment, datasets)["kernels"].startswith("none: no C++ compiler")


def test_the_examples_are_those_that_train(experiment: Experiment, datasets: Datasets) -> None:
    lines = planned(experiment, datasets)
    assert lines["sft"] == "36 demonstrations, 1 epoch in batches of up to 12: 3 optimizer steps"
    assert lines["reward"] == "36 preference examples, 1 epoch in batches of up to 12: 3 optimizer steps"
    assert lines["ppo"] == "3 steps of 8: 24 episodes from 36 prompts"
    assert lines["evaluation"] == "4 held-out prompts"


def test_columns_of_json_text_that_are_read_as_messages_are_named(
    experiment: Experiment, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    prompts = [[{"role": "user", "content": f"Hi {number}"}] for number in range(20)]
    path = write_rows(tmp_path / "chat.jsonl", [{"prompt": json.dumps(prompt)} for prompt in prompts])
    data = experiment.data.model_copy(update={"prompts": SourceSettings(path=path)})
    changed = experiment.model_copy(update={"data": data})
    datasets = read_datasets(changed, tokenizer, max_positions=2048)
    assert planned(changed, datasets)["data.prompts"] == "`prompt`, JSON text, is read as messages"
    assert not any(name.startswith("data.") for name in planned(experiment, Datasets()))


@pytest.mark.parametrize(("batch", "epochs", "steps"), [(36, 1, 1), (35, 1, 2), (12, 1.5, 5), (12, 0.1, 1), (10, 2, 8)])
def test_optimizer_steps_of_a_supervised_stage_round_up(
    experiment: Experiment, datasets: Datasets, batch: int, epochs: float, steps: int
) -> None:
    sft = experiment.sft.model_copy(update={"batch_size": batch, "epochs": epochs})
    planned_sft = planned(experiment.model_copy(update={"sft": sft}), datasets)["sft"]
    assert planned_sft.endswith(": 1 optimizer step" if steps == 1 else f": {steps} optimizer steps")


def test_updates_and_tokens_of_ppo(experiment: Experiment, datasets: Datasets) -> None:
    lines = planned(experiment, datasets)
    assert lines["updates"] == "2 epochs × 2 minibatches per step: 12 optimizer steps"
    assert lines["tokens"] == "at most 144 generated, 6 per response"


def test_the_kl_that_grpo_takes_by_itself_is_named(experiment: Experiment, datasets: Datasets) -> None:
    assert planned(experiment, datasets)["KL"] == "k1 in the reward, coefficient 0.05"
    grpo = PpoSettings(estimator="grpo", samples_per_prompt=4, kl=KlSettings(coefficient=0.1))
    changed = experiment.model_copy(update={"ppo": grpo})
    assert planned(changed, datasets)["KL"] == "k2 in the loss, coefficient 0.1"


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_base_model_takes_the_bytes_of_its_dtype(
    experiment: Experiment, datasets: Datasets, dtype: str, size: int
) -> None:
    model = experiment.model.model_copy(update={"dtype": dtype})
    base = measure(experiment.model, experiment.policy).base
    text = planned(experiment.model_copy(update={"model": model}), datasets)["base model"]
    assert f"{base * size / 1000:.3g} KB in one process" in text


@pytest.mark.parametrize(
    ("workers", "ranks", "where", "placement"),
    [
        (0, 0, "in one process", "this process, 1 thread"),
        (3, 0, "in each of 4 processes", "3 rollout workers, each with 1 CPU (SPREAD)"),
        (0, 2, "in each of 3 processes", "2 learner ranks, each with 1 CPU (PACK)"),
        (
            3,
            1,
            "in each of 4 processes",
            "1 learner rank with 1 CPU (PACK); 3 rollout workers, each with 1 CPU (SPREAD)",
        ),
    ],
)
def test_processes(
    experiment: Experiment, datasets: Datasets, workers: int, ranks: int, where: str, placement: str
) -> None:
    update = {
        "rollouts": experiment.rollouts.model_copy(update={"workers": workers}),
        "learner": experiment.learner.model_copy(update={"ranks": ranks}),
    }
    changed = experiment.model_copy(update=update)
    assert planned(changed, datasets)["base model"].endswith(where)
    assert describe_placement(changed, stage_names()).split("; on ")[0] == placement


def test_ranks_and_memory_of_a_supervised_stage(experiment: Experiment, datasets: Datasets) -> None:
    update = {
        "learner": experiment.learner.model_copy(update={"ranks": 2}),
        "sft": experiment.sft.model_copy(update={"zero": 3}),
        "reward": experiment.reward.model_copy(update={"ranks": 0}),
    }
    lines = planned(experiment.model_copy(update=update), datasets)
    one = planned(experiment, datasets)
    assert lines["sft"] == f"{one['sft']} on 2 learner ranks"
    assert lines["reward"] == one["reward"]
    assert lines["memory, reward: learner"] == one["memory, reward: learner"]
    assert "memory, sft: each of 2 ranks" in lines


def test_an_unset_microbatch_is_that_of_the_gpu_that_processes_are_compared_with(
    experiment: Experiment, datasets: Datasets
) -> None:
    for gpu_bytes, tokens in ((None, "2,048"), (1e6, "2,048"), (1e9, "16,384")):
        lines = dict(make_plan(experiment, datasets, ["sft"], gpu_bytes=gpu_bytes).lines)
        assert f"activations, {tokens} tokens per microbatch" in lines["memory, sft: learner"]


def test_only_the_remaining_stages_are_planned(experiment: Experiment, datasets: Datasets) -> None:
    assert planned(experiment, datasets, "reward").keys() == {
        "stages",
        "method",
        "dtype",
        "reward",
        "memory, reward: learner",
        "written to",
    }


def test_skipped_rows_are_counted(experiment: Experiment, datasets: Datasets) -> None:
    datasets.skipped["prompts"] = ["bad", "worse"]
    assert planned(experiment, datasets)["skipped rows"] == "2 of data.prompts"


def test_the_table_shows_every_line(experiment: Experiment, datasets: Datasets) -> None:
    out = StringIO()
    Console(file=out, width=300).print(plan_table(make_plan(experiment, datasets, stage_names())))
    assert "plan of tiny" in out.getvalue()
    assert all(f"{name}  " in out.getvalue() for name in planned(experiment, datasets))
    assert str(Path(experiment.runs) / "tiny") in out.getvalue()


def test_peaks_are_shown_beside_the_plan(experiment: Experiment, datasets: Datasets) -> None:
    out = StringIO()
    plan = make_plan(experiment, datasets, ["sft", "ppo"])
    Console(file=out, width=100).print(use_table(plan, {"sft": {"controller": 123_456_789}}))
    lines = [line.split() for line in out.getvalue().splitlines()]
    planned_bytes = dict(plan.lines)["memory, sft: learner"].partition(":")[0]
    assert lines == [["peak", "memory"], ["sft:", "learner", "123", "MB,", "planned", *planned_bytes.split()]]


def test_parameters_of_a_tiny_model_are_in_thousands(experiment: Experiment, datasets: Datasets) -> None:
    base = measure(experiment.model, experiment.policy).base
    assert planned(experiment, datasets)["base model"].startswith(f"{base / 1000:.1f} K parameters")
