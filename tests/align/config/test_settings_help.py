import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console

from align.config.settings_help import experiment_schema, settings_help
from policies.errors import UserError
from tests.documents import ROOT, setting_names


def shown(name: str | None, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(settings_help(name))
    return capture.get()


def test_a_section_has_types_defaults_and_descriptions() -> None:
    text = shown("ppo.kl")
    assert text.startswith("ppo.kl: The KL penalty to the reference policy.\n")
    assert "coefficient" in text
    assert "number ≥ 0" in text
    assert "weight of the penalty; with a target, its initial value" in text
    assert "`" not in text


def test_the_top_level_lists_all_sections() -> None:
    assert all(section in shown(None) for section in ("model", "policy", "data", "sft", "reward", "ppo", "learner"))


def test_a_single_setting_is_a_row_of_its_section() -> None:
    lines = [line for line in shown("learner.ranks").splitlines() if line.strip()]
    assert len(lines) == 3
    assert lines[-1].split()[0] == "ranks"


def test_a_section_that_has_kinds_shows_all_of_them() -> None:
    assert shown("reward.terms.NAME").count("{kind: ") > 2


@pytest.mark.parametrize("width", [60, 80])
def test_no_text_is_cut_on_a_narrow_terminal(width: int) -> None:
    words = {word for line in shown("rollouts", width).splitlines() for word in line.split()}
    assert "…" not in "".join(words)
    assert {"max_new_tokens", "straggler_factor"} <= words


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lerner.ranks", "did you mean learner.ranks?"), ("zzzz", "`align settings` lists the sections")],
)
def test_an_unknown_name_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UserError, match="is neither a section nor a setting") as caught:
        settings_help(name)
    assert hint in str(caught.value)


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*/*.yaml")), ids=lambda file: file.parent.name)
def test_the_schema_has_every_key_of_an_experiment(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    wrong = list(jsonschema.Draft202012Validator(experiment_schema()).iter_errors(values))
    # A file may leave to what it includes what is required, and refer to other settings where numbers are expected.
    assert [error.message for error in wrong if error.validator == "additionalProperties"] == []


def test_the_schema_refuses_what_does_not_exist() -> None:
    validator = jsonschema.Draft202012Validator(experiment_schema())
    messages = [error.message for error in validator.iter_errors({"name": "a", "ppo": {"clipp": 1}})]
    assert any("'clipp' was unexpected" in message for message in messages)


def test_the_schema_has_every_setting() -> None:
    text = json.dumps(experiment_schema())
    assert all(f'"{name.rpartition(".")[2]}"' in text for name in setting_names())


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_the_command_answers_at_once(option: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "align", option]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
