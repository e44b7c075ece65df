"""`align choose` looks at data by itself, and the experiments that it writes can be planned and run."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.choice import recipes, starting
from align.choice.choose import choose
from align.choice.facts import RowKind, TaskName
from align.choice.recipes import Recipe
from align.choice.starting import experiment_text, recipe_fits, starting_experiment
from align.choice.survey import Machine, Survey, survey_data
from align.cli import app
from align.config.load import load_experiment
from align.config.schema import Experiment
from align.stages.launch import plan_run
from policies.errors import UserError
from tests.integration.tiny_run import run_in_process, write_rows

LARGE = Machine(100e9, has_gpu=False)
COUNT = 24
"""Rows of each file."""


def rows_of(kind: RowKind) -> list[dict[str, Any]]:
    """Rows of a kind, each different."""
    prompts = [f"User: {number} cats Assistant:" for number in range(COUNT)]
    columns: dict[RowKind, Any] = {
        "labels": lambda n: {"text": f"{n} dogs", "label": ("few", "many")[n % 2]},
        "demonstrations": lambda n: {"prompt": prompts[n], "completion": f" {n} mats."},
        "texts": lambda n: {"text": f"{n} cats sat on {n} mats. " * 3},
        "preferences": lambda n: {"prompt": prompts[n], "chosen": f" {n}.", "rejected": " no."},
        "verdicts": lambda n: {"prompt": prompts[n], "response": f" {n}.", "rating": n % 2},
        "ratings": lambda n: {"prompt": prompts[n], "response": f" {n}.", "rating": n % 5},
        "prompts": lambda n: {"prompt": prompts[n]},
        "answers": lambda n: {"prompt": prompts[n], "answer": str(n)},
    }
    return [columns[kind](number) for number in range(COUNT)]


@pytest.fixture
def files(tmp_path: Path) -> dict[RowKind, Path]:
    """A file of each kind of rows."""
    kinds: list[RowKind] = ["labels", "demonstrations", "texts", "preferences"]
    kinds += ["verdicts", "ratings", "prompts", "answers"]
    return {kind: Path(write_rows(tmp_path / f"{kind}.jsonl", rows_of(kind))) for kind in kinds}


RECIPES = {name: value for name, value in vars(recipes).items() if isinstance(value, Recipe)}
SHORT = {
    "sft": {"epochs": 1},
    "classify": {"epochs": 1},
    "rollouts": {"max_new_tokens": 4},
    "ppo": {"steps": 1, "batch_size": 8, "minibatches": 1, "epochs": 1},
    "evaluation": {"prompts": 2},
    "reward": {"normalise": 2},
    "tracking": {"wandb": "disabled"},
    "cluster": {"threads": 1},
}
"""Settings by which the experiments run in seconds."""


def written(recipe: Recipe, survey: Survey, model: Path, folder: Path) -> Experiment:
    """The experiment of a recipe, from its file."""
    values, is_fitting = starting_experiment(recipe, survey, "start", str(model), LARGE)
    assert is_fitting
    file = folder / "start.yaml"
    file.write_text(experiment_text(values, "a comment"))
    return load_experiment(file, [f"runs={folder / 'runs'}"])


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_can_be_planned(name: str, files: dict[RowKind, Path], tiny_model: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    survey = survey_data([files[kinds[0]] for kinds in recipe.sources.values()], {})
    experiment = written(recipe, survey, tiny_model, tmp_path)
    plan = dict(plan_run(experiment).lines)
    assert plan["stages"] == " → ".join(recipe.stages)
    assert "skipped rows" not in plan


@pytest.mark.parametrize("name", ["LINEAR_PROBE", "SOFT_PROMPT", "KTO", "RATED_RLHF", "CHECKED"])
def test_an_experiment_runs(name: str, files: dict[RowKind, Path], tiny_model: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    survey = survey_data([files[kinds[0]] for kinds in recipe.sources.values()], {})
    settings = written(recipe, survey, tiny_model, tmp_path).model_dump(mode="json")
    for section, values in SHORT.items():
        settings[section] |= values
    run = run_in_process(settings)
    assert (run / "evaluation.json").is_file()
    assert json.loads((run / "evaluation.json").read_text())["seconds"].keys() == set(recipe.stages)


def test_sft_comes_first_where_there_are_demonstrations(files: dict[RowKind, Path], tiny_model: Path) -> None:
    survey = survey_data([files["preferences"], files["demonstrations"]], {})
    values, _ = starting_experiment(recipes.DPO_PAIRS, survey, "start", str(tiny_model), LARGE)
    assert values["stages"] == ["sft", "dpo"]
    assert values["data"]["demonstrations"] == str(files["demonstrations"])


def test_limits_of_tokens_are_what_the_rows_need(tiny_model: Path, tmp_path: Path) -> None:
    long = rows_of("demonstrations")
    long[3]["completion"] = " mat" * 300
    survey = survey_data([Path(write_rows(tmp_path / "long.jsonl", long))], {})
    values, _ = starting_experiment(recipes.ADAPTER, survey, "start", str(tiny_model), LARGE)
    experiment = Experiment.model_validate(values | {"runs": str(tmp_path / "runs")})
    assert 300 < experiment.sft.max_tokens < 2048
    assert experiment.sft.max_tokens % 64 == 0
    assert experiment.data.on_bad_row == "error"
    long[3]["completion"] = " mat" * 3000
    survey = survey_data([Path(write_rows(tmp_path / "longer.jsonl", long))], {})
    values, _ = starting_experiment(recipes.ADAPTER, survey, "start", str(tiny_model), LARGE)
    assert values["data"]["on_bad_row"] == "skip"
    assert values["sft"]["max_tokens"] == 64


def test_four_bits_are_taken_where_only_they_fit(
    files: dict[RowKind, Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = survey_data([files["demonstrations"]], {})
    monkeypatch.setattr(starting, "fits", lambda experiment, machine: experiment.policy.method == "qlora")
    values, is_fitting = starting_experiment(recipes.ADAPTER, survey, "start", str(tiny_model), LARGE)
    assert values["policy"]["method"] == "qlora"
    assert is_fitting


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_machine_that_is_too_small_is_noticed(has_gpu: bool, files: dict[RowKind, Path], tiny_model: Path) -> None:
    survey = survey_data([files["demonstrations"]], {})
    machine = Machine(50_000, has_gpu)
    _, is_fitting = starting_experiment(recipes.ADAPTER, survey, "start", str(tiny_model), machine)
    assert not is_fitting
    assert not recipe_fits(recipes.FULL, str(tiny_model), machine)
    assert recipe_fits(recipes.FULL, str(tiny_model), LARGE)


def test_files_are_counted_by_what_their_rows_are(files: dict[RowKind, Path], tiny_model: Path) -> None:
    survey = survey_data(list(files.values()), {})
    assert survey.rows == dict.fromkeys(files, COUNT)
    assert survey.classes == 2
    assert survey.numeric_answers
    from policies.files.base_model import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    assert survey.text_tokens(str(tiny_model)) == sum(len(tokenizer.encode(row["text"])) for row in rows_of("texts"))


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["4", "1,200"], "number"),
        (["so\n#### 7", "8"], "number"),
        (["in 1984", "4"], "exact"),
        (["yes", "no"], "exact"),
    ],
)
def test_answers_that_are_numbers_are_compared_as_numbers(answers: list[str], kind: str, tmp_path: Path) -> None:
    rows = [{"question": f"{answer}?", "answer": answer} for answer in answers]
    survey = survey_data([Path(write_rows(tmp_path / "rows.jsonl", rows))], {"prompt": "question"})
    assert survey.answer_term == {"kind": kind}
    assert survey.sources["answers"].columns == {"prompt": "question"}


def test_labels_with_a_decimal_point_are_no_classes(tmp_path: Path) -> None:
    rows = [{"text": f"{number} cats", "label": number / 2} for number in range(5)]
    assert survey_data([Path(write_rows(tmp_path / "rows.jsonl", rows))], {}).classes == 0


def test_rows_of_no_kind_are_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "why?", "solution": "so"}])
    with pytest.raises(UserError, match=r"rows.jsonl: it is not recognised .* columns: question, solution"):
        survey_data([Path(rows)], {})


def test_the_command_writes_the_experiment_and_says_why(
    files: dict[RowKind, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["choose", "--task", "classify", "--data", str(files["labels"]), "--model", str(tiny_model)]
    result = CliRunner().invoke(app, [*command, "--to", "first.yaml", "--json"], catch_exceptions=False)
    record = json.loads(result.stdout)
    assert record["technique"] == "prompting"
    assert record["experiment"] == "alternative"
    assert record["facts"]["rows"] == {"labels": COUNT}
    assert "arXiv:2103.08493" in record["source"]
    experiment = load_experiment(tmp_path / "first.yaml")
    assert experiment.name == "first"
    assert [list(line) for line in plan_run(experiment).lines] == record["plan"]
    assert "technique: prompting" in (tmp_path / "first.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "translate"], "--task translate: expected one of classify, respond"),
        (["--to", "experiment.json"], "a file that ends in .yaml was expected"),
        (["--to", "taken.yaml"], "taken.yaml already exists"),
        (["--to", "no/where.yaml"], "the folder no does not exist"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(
            app, ["choose", "--task", "facts", "--data", "a", "--model", "m", *arguments], catch_exceptions=False
        )
    assert (tmp_path / "taken.yaml").read_text() == "name: mine\n"


@pytest.mark.parametrize(("task", "kind"), [("classify", "labels"), ("prefer", "preferences")])
def test_too_little_data_writes_nothing(task: TaskName, kind: RowKind, tiny_model: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "one.jsonl", rows_of(kind)[:1])
    with pytest.raises(UserError, match=f"data.{kind}"):
        choose(task, [Path(file)], str(tiny_model), name="few", columns={}, gpu_gigabytes=None)
