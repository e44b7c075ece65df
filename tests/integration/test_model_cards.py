"""The code in model cards, run by plain transformers and PEFT, gives what the run gives."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from typer.testing import CliRunner

from align.cli import app
from align.outputs.trained_run import TrainedRun, open_run
from policies.files.quantization import leave_packed
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Prompt
from tests.integration.tiny_run import make_settings, run_in_process
from tests.policies.text.layouts import LAYOUTS, make_tokenizer
from tests.random_models import save_llama

TEXTS: list[tuple[Prompt, str]] = [
    ("My lamp is broken.", " Is the bulb old?"),
    ("Name a colour: ", "Is it blue?"),  # a token could span the end of this prompt
    ("a", " No, it is new."),
    ("Thanks!\n", "\nGood bye."),
]
FIRST = [{"role": "user", "content": "My lamp is broken."}]
LONGER = [*FIRST, {"role": "assistant", "content": "Is the bulb old?"}, {"role": "user", "content": "No, it is new."}]
CONVERSATIONS: list[tuple[Prompt, str]] = [(FIRST, "Is the bulb old?"), (LONGER, "Then check the fuse."), (LONGER, "a")]
TOOLS = [{"type": "function", "function": {"name": "order_a_bulb", "parameters": {"type": "object"}}}]
FAST = ("no template", "qwen 2.5", "pad is eos")
SLOW = ("llama 2", "mistral", "gpt 2")


def base_of(kind: str, folder: Path) -> Path:
    """A random base model with the tokenizer of a family."""
    layout = LAYOUTS[kind if kind in LAYOUTS else "gpt 2"]
    tokenizer = make_tokenizer(layout)
    if kind == "no template":
        tokenizer.chat_template = None
    if kind == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
    return save_llama(
        folder,
        tokenizer,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module", params=[*FAST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run of SFT and reward model."""
    folder = tmp_path_factory.mktemp("cards")
    settings = make_settings(base_of(request.param, folder / "base"), folder)
    return open_run(run_in_process(settings | {"stages": ["sft", "reward"]}))


def export(trained: TrainedRun, to: Path, *options: str) -> str:
    """Export, and give the code of the model card, without its example."""
    result = CliRunner().invoke(app, ["export", str(trained.path), "--to", str(to), *options])
    assert result.exit_code == 0, result.exception
    (code,) = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), re.DOTALL)
    *lines, example = code.splitlines()
    assert isinstance(ast.parse(example).body[0], ast.Expr)
    return "\n".join(lines)


def call(code: str, function: str, arguments: list[tuple[Any, ...]], **options: Any) -> list[Any]:
    """The results of a function of a card, which imports nothing of this package."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert modules <= {"torch", "transformers", "peft"}
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    leave_packed(namespace["model"])  # a kernel of bitsandbytes for CPUs cannot multiply by weights as small as these
    return [namespace[function](*row, **options) for row in arguments]


def rows_of(trained: TrainedRun) -> list[tuple[Prompt, str]]:
    return TEXTS + CONVERSATIONS if trained.tokenizer.chat_template else TEXTS


def test_a_reward_models_card_scores_as_the_run_does(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(trained)
    expected = trained.score([prompt for prompt, _ in rows], [response for _, response in rows])
    code = export(trained, tmp_path / "out", "--reward")
    monkeypatch.chdir(tmp_path / "out")
    scores = call(code, "score", rows)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert min(abs(one - other) for one, other in zip(sorted(expected), sorted(expected)[1:], strict=False)) > 1e-3


def test_a_batch_padded_by_transformers_scores_as_the_run_does(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(trained, tmp_path / "out", "--reward")
    rows = [TEXTS[0], TEXTS[2]]
    expected = trained.score([prompt for prompt, _ in rows], [response for _, response in rows])
    code = (
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('.')\n"
        "model = AutoModelForSequenceClassification.from_pretrained('.')\n"
        "def batch(*texts):\n"
        "    return model(**tokenizer(list(texts), padding=True, return_tensors='pt')).logits[:, 0].tolist()"
    )
    monkeypatch.chdir(tmp_path / "out")
    (scores,) = call(code, "batch", [tuple(f"{prompt}{response}" for prompt, response in rows)])
    assert scores[0] - scores[1] == pytest.approx(expected[0] - expected[1], abs=1e-4)


@pytest.mark.parametrize("options", [("--merge",), ()], ids=["model", "adapter"])
def test_a_policys_card_responds_as_the_run_does(
    options: tuple[str, ...], trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt for prompt, _ in rows_of(trained)]
    expected = trained.generate(prompts, temperature=0.0, max_new_tokens=12)
    code = export(trained, tmp_path / "out", *options)
    monkeypatch.chdir(tmp_path / "out")
    responses = call(code, "respond", [(prompt,) for prompt in prompts], do_sample=False, max_new_tokens=12)
    assert responses == expected
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == TextEncoder(trained.tokenizer).end_ids


@pytest.mark.parametrize("trained", ["qwen 2.5"], indirect=True)
def test_a_policys_card_renders_tools_as_the_run_does(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = [FIRST, LONGER]
    expected = trained.generate(prompts, temperature=0.0, max_new_tokens=12, tools=[TOOLS, TOOLS])
    assert expected != trained.generate(prompts, temperature=0.0, max_new_tokens=12)
    code = export(trained, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    arguments = [(prompt, TOOLS) for prompt in prompts]
    assert call(code, "respond", arguments, do_sample=False, max_new_tokens=12) == expected


@pytest.mark.parametrize("trained", ["qwen 2.5"], indirect=True)
def test_a_reward_models_card_renders_tools_as_the_run_does(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt for prompt, _ in CONVERSATIONS]
    responses = [response for _, response in CONVERSATIONS]
    expected = trained.score(prompts, responses, [{"tools": TOOLS}] * len(prompts))
    assert expected != pytest.approx(trained.score(prompts, responses), abs=1e-3)
    code = export(trained, tmp_path / "out", "--reward")
    monkeypatch.chdir(tmp_path / "out")
    arguments = [(prompt, response, TOOLS) for prompt, response in CONVERSATIONS]
    assert call(code, "score", arguments) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        {"method": "qlora", "rank": 2},
        {"method": "ia3"},
        {"method": "prompt_tuning", "virtual_tokens": 3},
        {"method": "prefix_tuning", "virtual_tokens": 3},
    ],
    ids=lambda policy: str(policy["method"]),
)
def test_the_card_of_an_adapter_loads_it_by_every_kind_of_method(
    policy: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft"], "policy": policy}
    settings["sft"] |= {"learning_rate": 0.1}
    trained = open_run(run_in_process(settings))
    prompts: list[Prompt] = ["User: two Assistant:", "The cat"]
    expected = trained.generate(prompts, temperature=0.0, max_new_tokens=12)
    code = export(trained, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    responses = call(code, "respond", [(prompt,) for prompt in prompts], do_sample=False, max_new_tokens=12)
    assert responses == expected
