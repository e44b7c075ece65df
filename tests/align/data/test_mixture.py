import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from align.config.schema import DataSettings, Experiment, MixedSource, SftSettings, SourceSettings
from align.data.examples import TokenizedDemonstration
from align.data.mixture import drawn, mixture_sizes
from align.data.readers import read_rows
from align.stages.pipeline import load_datasets
from align.supervised.sft_objective import SftBlueprint
from policies.schema import ModelSettings, PolicySettings
from tests.align.supervised.small import demonstrations
from tests.align.supervised.toy import local_learners
from tests.integration.tiny_run import make_settings, write_rows

SIZES = {"small": 10, "large": 90}
EVEN = {"small": 1.0, "large": 1.0}


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        (EVEN, 1.0, {"small": 10, "large": 90}),
        (EVEN, 2.0, {"small": 25, "large": 75}),
        (EVEN, 1e9, {"small": 50, "large": 50}),
        ({"small": 9.0, "large": 1.0}, 1.0, {"small": 50, "large": 50}),
        ({"small": 1e-9, "large": 1.0}, 1.0, {"small": 1, "large": 100}),
    ],
)
def test_shares_follow_sizes_weights_and_temperature(
    weights: dict[str, float], temperature: float, expected: dict[str, int]
) -> None:
    assert mixture_sizes(SIZES, weights, temperature) == expected


@pytest.mark.parametrize("count", [3, 8, 21])
def test_examples_are_drawn_as_evenly_as_they_can_be(count: int) -> None:
    examples = demonstrations(8)
    chosen = drawn(examples, count, seed=0, name="reviews")
    assert len(chosen) == count
    assert {example.dataset for example in chosen} == {"reviews"}
    times = Counter(tuple(example.ids) for example in chosen)
    assert {times[tuple(example.ids)] for example in examples} <= {count // 8, count // 8 + 1}
    assert drawn(examples, count, seed=0, name="reviews") == chosen
    assert drawn(examples, 3, seed=1, name="reviews") != drawn(examples, 3, seed=0, name="reviews")


def test_the_loss_of_each_dataset_is_over_its_own_tokens(tiny_model: Path) -> None:
    examples = [*drawn(demonstrations(3), 3, 0, "one"), *drawn(demonstrations(2, seed=5), 2, 0, "two")]
    settings = SftSettings(tokens_per_microbatch=20)
    blueprint = SftBlueprint(
        ModelSettings(path=str(tiny_model)), PolicySettings(rank=2), 0, examples, examples[2:], settings
    )
    with local_learners(blueprint.build, settings) as learners:
        heldout = learners.heldout_metrics()
        metrics = learners.train(range(5), 0, 0.0).metrics
        of_one_alone = learners.train([0, 1], 1, 0.0).metrics
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)

    def expected(chosen: list[TokenizedDemonstration]) -> float:
        total, tokens = 0.0, 0
        for example in chosen:
            logprobs = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            for start, end in example.turns:
                total -= sum(float(logprobs[position - 1, example.ids[position]]) for position in range(start, end))
                tokens += end - start
        return total / tokens

    assert metrics["loss"] == pytest.approx(expected(examples), rel=1e-4)
    assert metrics["loss/one"] == pytest.approx(expected(examples[:3]), rel=1e-4)
    assert metrics["loss/two"] == pytest.approx(expected(examples[3:]), rel=1e-4)
    assert heldout["heldout_loss"] == pytest.approx(expected(examples[2:]), rel=1e-4)
    assert heldout["heldout_loss/one"] == pytest.approx(expected(examples[2:3]), rel=1e-4)
    assert "loss/two" not in of_one_alone


def test_datasets_have_their_own_columns_templates_limits_and_heldout_rows(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["stages"] = ["sft"]
    del settings["data"]["demonstrations"]
    questions = [{"question": f"red {number}", "answer": "cat"} for number in range(30)]
    settings["data"]["mixture"] = {
        "plain": {"path": write_rows(tmp_path / "plain.jsonl", [{"prompt": "dog", "completion": "two"}] * 4)},
        "questions": {
            "path": write_rows(tmp_path / "questions.jsonl", questions),
            "columns": {"prompt": "question", "completion": "answer"},
            "template": "Q: {prompt} A:",
            "limit": 20,
            "weight": 2,
        },
    }
    plain = settings["data"]["mixture"]["plain"]
    plain["heldout"] = write_rows(tmp_path / "heldout.jsonl", [{"prompt": "mat", "completion": "door"}])
    datasets = load_datasets(Experiment.model_validate(settings))
    assert Counter(example.dataset for example in datasets.demonstrations) == {"plain": 2, "questions": 20}
    assert Counter(example.dataset for example in datasets.demonstrations_heldout) == {"plain": 1, "questions": 2}


def read(folder: Path, rows: list[dict[str, Any]], template: str) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(SourceSettings(path=str(path), template=template))


def test_a_template_makes_the_prompt_from_columns(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"prompt": "2 + {2}", "hint": "add"}], "{{Q}} {prompt} ({hint})")
    assert row.values["prompt"] == "{Q} 2 + {2} (add)"


def test_rows_without_the_text_of_a_template_are_problems(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": "a"}]}, {"other": "b"}]
    assert [row.problem for row in read(tmp_path, rows, "Q: {prompt}")] == [
        "`template` needs the text `prompt`, which the row lacks"
    ] * 2


@pytest.mark.parametrize("template", ["no column", "{prompt.__class__}", "{prompt!r}", "{0}", "{prompt"])
def test_templates_that_name_no_column_or_more_are_refused(template: str) -> None:
    with pytest.raises(ValidationError):
        SourceSettings(path="a", template=template)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mixture": {"a": {"path": "a"}}, "demonstrations": "b"}, "takes the place"),
        ({"mixture_temperature": 2.0}, "no effect"),
        ({"mixture": {"a b": {"path": "a"}}}, "not a valid name"),
    ],
)
def test_mixtures_that_cannot_be_meant_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        DataSettings(**settings)


def test_a_source_of_a_mixture_may_be_a_path_alone() -> None:
    assert MixedSource.model_validate("a.jsonl") == MixedSource(path="a.jsonl")
