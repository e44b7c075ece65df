import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.evaluation.tables import evaluation_table
from align.report.page import PLOTS, draw, write_report

REFERENCE = {"score_mean": 0.125, "score_std": 1.0, "length_mean": 7.0, "distinct_2": 0.5, "eos_share": 0.25}
POLICY = REFERENCE | {"score_mean": 0.375, "win_rate": 0.625, "kl_per_sequence": 3.0, "kl_per_token": 0.5, "step": 40}
EVALUATION = {"reference": REFERENCE, "policy": POLICY, "prompts": 64}
REWARD_MODEL = {"reward_model": {"accuracy": 0.7012, "accuracy_low": 0.65, "accuracy_high": 0.75, "pairs": 1234}}
REWARD = next(plot for plot in PLOTS if plot.name == "reward")


def write_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(number: int, **figures: float | None) -> dict[str, Any]:
    return {"stage": "ppo", "step": number} | {name.replace("__", "/"): value for name, value in figures.items()}


def sample(number: int, prompt: str, response: str = "r", stage: str = "ppo") -> dict[str, Any]:
    return {"stage": stage, "step": number, "prompt": prompt, "response": response, "score": 1.5}


def page_of(run: Path, evaluation: dict[str, Any] | None = None) -> str:
    return write_report(run, evaluation or {}).read_text("utf-8")


def shown(evaluation: dict[str, Any]) -> str:
    """What the terminal shows, with single spaces."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(evaluation_table(evaluation))
    return re.sub(r" +", " ", capture.get())


def test_there_are_plots_of_what_was_logged_and_of_nothing_else(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", step(1, reward__mean=0.5, policy__loss=0.1), step(2, reward__mean=0.6))
    page = page_of(tmp_path)
    assert re.findall(r'src="([^"]+)"', page) == ["reward.png", "policy_loss.png"]
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"reward.png", "policy_loss.png"}
    assert (tmp_path / "report" / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_logged_nothing_has_a_page_without_plots(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "<img" not in page
    assert "PPO has not ended" in page


@pytest.mark.parametrize("row", [step(1, reward__mean=None), step(1), step(1, reward__mean=1.0) | {"stage": "sft"}])
def test_no_plot_of_nulls_or_of_another_stage(tmp_path: Path, row: dict[str, Any]) -> None:
    assert not draw(REWARD, [row], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_a_null_between_figures_is_left_out(tmp_path: Path) -> None:
    rows = [step(n, reward__mean=None if n == 2 else float(n)) for n in (1, 2, 3)]
    assert draw(REWARD, rows, tmp_path / "with.png")
    assert draw(REWARD, [rows[0], rows[2]], tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_prompts_and_responses_are_escaped(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", sample(1, "<script>alert(1)</script>", "a < b & c"))
    page = page_of(tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt; b &amp; c" in page


def test_the_name_of_the_folder_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "a<b>").mkdir()
    page = page_of(tmp_path / "a<b>")
    assert "a<b>" not in page
    assert "<h1>a&lt;b&gt;</h1>" in page


def test_samples_are_those_of_the_first_and_the_last_ppo_step(tmp_path: Path) -> None:
    rows = [sample(1, "zero", stage="sft"), sample(1, "one"), sample(2, "two"), sample(3, "three"), sample(3, "four")]
    write_lines(tmp_path / "samples.jsonl", *rows)
    page = page_of(tmp_path)
    assert [word for word in ("zero", "one", "two", "three", "four") if f">{word}<" in page] == ["one", "three", "four"]


def test_the_page_compares_policy_and_reference(tmp_path: Path) -> None:
    page = re.sub(r"<[^>]+>", "|", page_of(tmp_path, EVALUATION | REWARD_MODEL))
    assert "accuracy 70.1% on 1,234 held-out pairs, 95 % interval 65.0% to 75.0%" in page
    assert "|64 held-out prompts||reference||policy of step 40|" in page
    assert "|score, mean||0.125||0.375|" in page
    assert "|wins over the reference by score||||62.5%|" in page
    assert "gold" not in page


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", step(1, reward__mean=0.5))
    page_of(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", step(1, policy__loss=0.5))
    page_of(tmp_path)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "policy_loss.png"}


def test_the_table_has_the_models_side_by_side() -> None:
    text = shown(
        EVALUATION | REWARD_MODEL | {"best_of": {"n": 4, "score_mean": 0.875}, "seconds": {"sft": 1.4, "ppo": 90.0}}
    )
    assert "accuracy 70.1% on 1,234 held-out pairs (95 % interval 65.0% to 75.0%)" in text
    assert re.search(r"reference policy best of 4 ?\n", text)
    assert "score, mean 0.125 0.375 0.875" in text
    assert "time: sft 1 s ppo 90 s" in text
    assert "gold" not in text


def test_the_table_of_a_run_without_an_evaluation() -> None:
    assert shown({}) == "time: nothing ran\n"
