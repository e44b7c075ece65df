"""Each fault that `align data check` names, planted in clean files as it happens to people; and the clean files."""

import json
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from align.cli import app
from tests.align.data.quality import plants_in_comparisons, plants_in_messages, plants_in_rows, plants_in_texts
from tests.align.data.quality.clean_files import FORMS, ROWS, clean_rows
from tests.align.data.quality.plant import MAIN, Plant, write_rows
from tests.outside_data import outside_data
from tests.random_models import save_llama

PLANTS = (
    *plants_in_rows.PLANTS,
    *plants_in_texts.PLANTS,
    *plants_in_comparisons.PLANTS,
    *plants_in_messages.PLANTS,
)
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """The folder of a model whose tokenizer has a chat template, by the template's name, and a padding token."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<|filler|>"
            )
            tokenizer.chat_template = plants_in_messages.TEMPLATES[name]
            made[name] = save_llama(
                tmp_path_factory.mktemp("model"),
                tokenizer,
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=2,
                max_position_embeddings=100_000,
            )
        return made[name]

    return model


def checked(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """The object that the command prints about files in a folder; its exit status says whether there is a problem."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, ["data", "check", *arguments, "--locations", "1000", "--json"])
    finally:
        os.chdir(before)
    assert result.exit_code in (0, 1), f"{result.output}\n{result.exception!r}"
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (report["problems"] > 0)
    return report


def problems(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["kind"]: finding for finding in report["findings"] if finding["severity"] == "problem"}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found_where_it_is_and_no_other(
    plant: Plant, tmp_path: Path, models: Callable[[str], Path]
) -> None:
    arguments, locations = plant.write(tmp_path)
    if plant.template is not None:
        arguments += ["--model", str(models(plant.template))]
    found = problems(checked(tmp_path, [*arguments, *plant.options]))
    assert {kind: finding["found"] for kind, finding in found.items()}.keys() == {plant.kind, *plant.also}
    if locations is None:
        return
    listed = set(found[plant.kind]["locations"])
    assert locations <= listed, f"not located: {sorted(locations - listed)}"
    assert plant.among or listed == locations


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_clean_file_has_no_problem(form: str, seed: int, tmp_path: Path) -> None:
    write_rows(tmp_path / MAIN, clean_rows(form, seed))
    found = problems(checked(tmp_path, [MAIN]))
    assert not found, {kind: (finding["found"], finding["locations"][:5]) for kind, finding in found.items()}


@pytest.mark.parametrize("form", ["completion", "messages", "message_pair", "prompt_messages"])
def test_a_clean_file_has_no_problem_with_a_model_and_other_prompts_held_out(
    form: str, tmp_path: Path, models: Callable[[str], Path]
) -> None:
    write_rows(tmp_path / MAIN, clean_rows(form, 3))
    write_rows(tmp_path / "heldout.jsonl", clean_rows("prompt", 4))
    found = problems(checked(tmp_path, [MAIN, "--model", str(models("chatml")), "--heldout", "heldout.jsonl"]))
    assert not found, {kind: (finding["found"], finding["locations"][:5]) for kind, finding in found.items()}


@pytest.mark.parametrize("columns", [["prompt=question", "completion=answer"], ["prompt=question"]])
def test_real_problems_and_their_solutions_have_no_problem(columns: list[str], tmp_path: Path) -> None:
    lines = outside_data("gsm8k/train.jsonl").read_text().splitlines()
    write_rows(tmp_path / MAIN, lines[:ROWS])
    kind = "demonstrations" if len(columns) == 2 else "prompts"
    options = chain.from_iterable(("--column", column) for column in columns)
    assert not problems(checked(tmp_path, [MAIN, "--kind", kind, *options]))


def test_every_fault_is_planted_in_at_least_three_ways() -> None:
    kinds = [plant.kind for plant in PLANTS]
    assert len(set(kinds)) == 15
    assert min(kinds.count(kind) for kind in kinds) >= 3
