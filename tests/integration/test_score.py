"""`align score`, and comparisons of runs: responses are scored as `TrainedRun.score` scores them."""

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import align as library
from align.cli import app
from align.config.judge_settings import JudgeSettings
from align.evaluation.policy import HeldoutPlan
from align.outputs.judges import make_judge
from align.outputs.run_comparison import compare_runs
from align.outputs.trained_run import TrainedRun
from align.stages.pipeline import load_datasets
from align.stages.reward import load_models
from policies.text.tokenization import decode_response
from rollouts.engine import Sampling
from tests.integration.tiny_run import WORDS, make_settings, run_in_process, write_rows
from tests.rewards.servers import serving

PROMPT = "User: two cat mat dog Assistant:"
TERMS = {
    "model": {"kind": "model", "weight": 0.5, "clip": [-1.0, 1.0]},
    "same": {"kind": "exact", "column": "answer"},
}
ROWS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "response": " red dog.", "answer": "Red dog.", "id": 7},
    {"prompt": PROMPT, "completion": " long blue door.", "answer": "two"},
    {"prompt": PROMPT, "response": "", "answer": "three"},
]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run whose reward has two terms."""
    folder = tmp_path_factory.mktemp("scoring")
    settings = make_settings(tiny_model, folder) | {"stages": ["sft", "reward"]}
    settings["reward"] |= {"terms": TERMS}
    prompts = [{"prompt": f"User: {word} Assistant:", "answer": "red"} for word in WORDS]
    settings["data"]["prompts"] = write_rows(folder / "prompts.jsonl", prompts)
    return library.open_run(run_in_process(settings))


def score(trained: TrainedRun, file: str, *options: object) -> Result:
    return CliRunner().invoke(app, ["score", str(trained.path), file, *map(str, options)])


def test_each_row_is_written_with_its_score_and_terms(trained: TrainedRun, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    to = tmp_path / "scored.jsonl"
    result = score(trained, file, "--to", to, "--json")
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in to.read_text().splitlines()]
    responses = [row.get("response", row.get("completion")) for row in ROWS]
    expected = trained.score([PROMPT] * 3, responses, [{"answer": row["answer"]} for row in ROWS])  # type: ignore[arg-type]
    model = trained.score_by_model([PROMPT] * 3, responses)  # type: ignore[arg-type]
    for row, before, total, raw in zip(written, ROWS, expected, model, strict=True):
        assert {name: value for name, value in row.items() if name not in ("score", "terms")} == before
        assert row["score"] == pytest.approx(total)
        assert row["terms"]["model"] == pytest.approx(min(max(raw, -1), 1))
        assert row["score"] == pytest.approx(0.5 * row["terms"]["model"] + row["terms"]["same"])
    assert [row["terms"]["same"] for row in written] == [1, 0, 0]
    summary = json.loads(result.stdout)
    scores = torch.tensor(expected, dtype=torch.float64)
    assert summary["count"] == 3
    assert summary["mean"] == pytest.approx(float(scores.mean()))
    assert summary["std"] == pytest.approx(float(scores.std(correction=0)))


def test_the_reward_model_alone_gives_the_scores_of_its_heads(trained: TrainedRun, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPT, "response": " red dog."}, {"prompt": PROMPT, "response": " mat."}]
    to = tmp_path / "scored.jsonl"
    result = score(trained, write_rows(tmp_path / "rows.jsonl", rows), "--reward-model", "--to", to)
    assert result.exit_code == 0, result.output
    (model,) = load_models(trained.experiment, trained.folder.reward)
    exchanges = [trained.encoder.exchange(row["prompt"], row["response"]) for row in rows]
    expected = model.score([e.prompt_ids for e in exchanges], [e.response_ids for e in exchanges], 128)
    written = [json.loads(line) for line in to.read_text().splitlines()]
    assert [row["score"] for row in written] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all("terms" not in row for row in written)


def test_an_existing_file_is_kept_unless_it_may_be_replaced(trained: TrainedRun, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    to = tmp_path / "scored.jsonl"
    to.write_text("mine")
    refused = score(trained, file, "--to", to)
    assert "already exists: choose a new file, or add --replace" in str(refused.exception)
    assert to.read_text() == "mine"
    assert score(trained, file, "--to", to, "--replace").exit_code == 0
    assert len(to.read_text().splitlines()) == 3
    again = score(trained, str(to), "--to", tmp_path / "again.jsonl")
    assert "its own `score` is replaced" in again.stderr
    assert "its own `terms` is replaced" in again.stderr
    assert os.listdir(tmp_path).count(".again.jsonl.writing") == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": PROMPT, "response": " a."}, "no `answer`, which reward.terms.same reads"),
        ({"prompt": PROMPT, "answer": "a"}, "no `response` and no `completion`"),
        ({"prompt": PROMPT, "response": " a </s>", "answer": "a"}, "special token '</s>'"),
        ({"prompt": PROMPT, "response": " word" * 2500, "answer": "a"}, "more than the model's context length, 2048"),
        ({"messages": [{"role": "user", "content": "a"}]}, "a prompt and, last, a reply by the assistant"),
        ({"prompt": PROMPT, "response": 3, "answer": "a"}, "`response` is a number"),
    ],
)
def test_a_row_that_cannot_be_scored_is_told_with_its_line(
    trained: TrainedRun, tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    message = str(score(trained, file, "--to", tmp_path / "scored.jsonl").exception)
    assert f"{file}:2: " in message
    assert problem in message
    assert "on_bad_row" not in message
    assert not (tmp_path / "scored.jsonl").exists()


def test_a_reward_without_a_model_cannot_score_by_it(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft"]}
    settings["reward"] = {"terms": {"same": TERMS["same"]}}
    trained = library.open_run(run_in_process(settings))
    result = score(trained, write_rows(tmp_path / "rows.jsonl", ROWS[:1]), "--reward-model")
    assert "has no term of kind model" in str(result.exception)


@pytest.fixture
def other(trained: TrainedRun) -> TrainedRun:
    """The same models under another name."""
    folder = trained.path.parent / "other"
    if not folder.exists():
        shutil.copytree(trained.path, folder)
    return library.open_run(folder)


def with_prompts(trained: TrainedRun) -> TrainedRun:
    """The run as one that evaluates its policy, which is still its SFT model."""
    return library.open_run(trained.path, ["stages=[sft, reward, ppo]"])


def test_a_run_ties_with_a_copy_of_itself(trained: TrainedRun, other: TrainedRun) -> None:
    facts = compare_runs(with_prompts(trained), other)
    assert json.loads((trained.path / "comparisons" / "other.json").read_text()) == facts
    policy = facts["policy"]
    assert policy["win_rate"] == 0.5
    assert policy["score_gain"] == 0
    assert "length_controlled_win_rate" not in policy  # the lengths do not differ
    assert policy["score_mean"] == facts["against"]["score_mean"]


@pytest.fixture
def changed(trained: TrainedRun, tmp_path: Path) -> TrainedRun:
    """A copy of the run with another SFT model."""
    folder = tmp_path / "changed"
    shutil.copytree(trained.path, folder)
    file = folder / "sft" / "adapter_model.safetensors"
    pick = torch.Generator().manual_seed(0)
    weights = {name: tensor + torch.randn(tensor.shape, generator=pick) for name, tensor in load_file(file).items()}
    save_file(weights, file)
    return library.open_run(folder)


def test_a_judge_over_http_compares_every_pair_in_both_orders(trained: TrainedRun, changed: TrainedRun) -> None:
    """The judge is simulated: it prefers more letters, or fewer where the criterion says so."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        (message,) = body["messages"]
        first, second = re.findall(r"<response_[ab]>\n(.*?)\n</response_[ab]>", message["content"], re.DOTALL)
        better = "A" if len(first) > len(second) else "B"
        if "brief" in message["content"]:
            better = "B" if better == "A" else "A"
        verdict = "C" if len(first) == len(second) else better
        return 200, {"choices": [{"message": {"content": f"[[{verdict}]]"}}]}

    rubric = "{more: {description: more, weight: 2}, less: {description: brief}}"
    with serving() as server:
        server.reply = reply
        judge = f"evaluation.judge={{url: {server.url}, model: simulated, rubric: {rubric}}}"
        run = library.open_run(trained.path, ["stages=[sft, reward, ppo]", judge])
        facts = compare_runs(run, changed)
        server.reply = lambda body: (401, {})
        with pytest.raises(library.UserError, match=r"evaluation.judge: simulated at http.*401"):
            compare_runs(run, changed)
    prompts = load_datasets(run.experiment).prompts_heldout
    sampling = Sampling(1.0, 6)
    (requests,) = HeldoutPlan(prompts, sampling, run.experiment.evaluation.seed).draws()
    wins = []
    for one, other in zip(run.sample(requests, sampling), changed.sample(requests, sampling), strict=True):
        ours = len(decode_response(run.tokenizer, one.response_ids))
        theirs = len(decode_response(run.tokenizer, other.response_ids))
        wins.append(0.5 * (ours == theirs) + (ours > theirs))
    more = fmean(wins)
    assert more != 0.5
    assert facts["judge"]["criteria"]["more"]["win_rate"] == pytest.approx(more)
    assert facts["judge"]["win_rate"] == pytest.approx((2 * more + 1 - more) / 3)
    assert facts["judge"]["agreement"] == 1
    assert facts["judge"]["model"] == "simulated"
    asked = [body["messages"][0]["content"] for _, body, _ in server.requests[: 2 * 2 * len(prompts)]]
    assert len(set(asked)) == 2 * 2 * len(prompts)


def test_a_judge_that_is_loaded_replies_greedily(tiny_model: Path) -> None:
    replies = make_judge(JudgeSettings(model=str(tiny_model), max_tokens=5))
    causal = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = ["The cat sat on", "name a colour"]
    expected = []
    for message in messages:
        ids = tokenizer(message, return_tensors="pt").input_ids
        generated = causal.generate(ids, max_new_tokens=5, do_sample=False)
        expected.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    assert replies(messages) == expected
    with pytest.raises(library.UserError, match=r"evaluation.judge: message 1"):
        replies(["long " * 2048])


def test_a_run_whose_prompts_become_other_tokens_is_refused(trained: TrainedRun, other: TrainedRun) -> None:
    other.tokenizer.add_tokens(["two"])
    with pytest.raises(library.UserError, match="tokenizers of their base models have different vocabularies"):
        compare_runs(with_prompts(trained), other)
