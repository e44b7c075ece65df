"""The quickstart's synthetic environment: its gold score, its annotators and its data."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "quickstart"


@pytest.fixture(scope="module")
def synthetic() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("synthetic")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def make(synthetic: ModuleType) -> ModuleType:
    return importlib.import_module("make")


def test_an_ideal_reply_has_the_highest_score(synthetic: ModuleType) -> None:
    random = Random(0)
    for _ in range(100):
        prompt = synthetic.write_prompt(random)
        assert synthetic.gold(prompt, synthetic.ideal_reply(random, prompt)) == synthetic.IDEAL


def test_the_exploit_moves_annotators_and_not_the_gold_score(synthetic: ModuleType) -> None:
    random = Random(0)
    prompt = synthetic.write_prompt(random)
    calm = synthetic.ideal_reply(random, prompt)
    excited = calm.replace(".", "!")
    assert synthetic.gold(prompt, excited) == synthetic.gold(prompt, calm)
    assert synthetic.USUAL.preference(prompt, excited, calm) > 0.7


def test_other_annotators_like_exclamation_marks_or_length_beyond_what_quality_is_worth(synthetic: ModuleType) -> None:
    random = Random(0)
    prompt = synthetic.write_prompt(random)
    good = synthetic.ideal_reply(random, prompt)
    excited = good.replace(".", "!!")
    long = good + "".join(f" {filler}." for filler in synthetic.FILLERS)
    assert synthetic.ANNOTATORS["excitable"].preference(prompt, excited, good) > 0.99
    assert (
        synthetic.ANNOTATORS["length"].preference(prompt, long, good)
        > 0.5
        > synthetic.USUAL.preference(prompt, long, good)
    )
    columns: list[dict[str, str]] = [{}, {}]
    (calm, shouted) = synthetic.strict_gold_scores([prompt, prompt], [good, excited], columns)
    assert calm == synthetic.IDEAL
    assert shouted == pytest.approx(calm - synthetic.EXPLOIT_COST * excited.count("!"))


@pytest.mark.parametrize("mistake", ["filler", "refusal", "repeated", "conflicting", "wrong item"])
def test_every_mistake_costs(synthetic: ModuleType, mistake: str) -> None:
    random = Random(1)
    prompt = synthetic.write_prompt(random)
    good = synthetic.ideal_reply(random, prompt)
    sentences = good.strip().split(". ")
    other = next(name for name in synthetic.PROBLEMS if name != synthetic.read_prompt(prompt).problem)
    item = synthetic.read_prompt(prompt).item
    added = {
        "filler": synthetic.FILLERS[0],
        "refusal": synthetic.REFUSALS[0],
        "repeated": sentences[1],
        "conflicting": synthetic.PROMISES[0].format(remedy=synthetic.PROBLEMS[other].remedies[0]),
    }
    if mistake == "wrong item":
        bad = good.replace(item, synthetic.write_item(random, item))
    else:
        bad = " " + ". ".join([*sentences[:2], added[mistake], *sentences[2:]])
    assert synthetic.gold(prompt, bad) < synthetic.gold(prompt, good) - 0.2


def test_keywords_without_a_sentence_earn_nothing(synthetic: ModuleType) -> None:
    prompt = synthetic.write_prompt(Random(2))
    letter = synthetic.read_prompt(prompt)
    remedy = synthetic.PROBLEMS[letter.problem].remedies[0]
    assert synthetic.gold(prompt, f" {letter.item} {letter.item} {remedy} sorry.") < 0


def test_the_data_depend_on_the_seed_alone_and_no_prompt_is_in_two_files(make: ModuleType) -> None:
    sizes = make.Sizes(text=20, demonstrations=20, pairs=20, pairs_heldout=20, prompts=20, prompts_heldout=20)
    first = make.write_rows(0, sizes)
    assert make.write_rows(0, sizes) == first
    assert make.write_rows(1, sizes) != first
    prompts = []
    for name, rows in first.items():
        if name != "text":
            prompts += [row["prompt"] for row in rows]
    assert len(set(prompts)) == len(prompts) == 100
    assert json.dumps(first)


def test_annotators_err_as_often_as_their_model_predicts(synthetic: ModuleType, make: ModuleType) -> None:
    random = Random(3)
    prompts = make.unique_prompts(random)
    pairs = [make.write_pair(random, next(prompts)) for _ in range(3000)]
    correct = 0.0
    for pair in pairs:
        chosen = synthetic.USUAL.utility(pair["prompt"], pair["chosen"])
        rejected = synthetic.USUAL.utility(pair["prompt"], pair["rejected"])
        correct += 0.5 if chosen == rejected else float(chosen > rejected)
    assert correct / len(pairs) == pytest.approx(make.noise_ceiling(pairs), abs=0.02)


def test_a_folder_that_is_up_to_date_is_left_alone(make: ModuleType, tmp_path: Path) -> None:
    identity = {"version": make.code_version(), "seed": 0, "sizes": {"text": 1}}
    assert not make.is_up_to_date(tmp_path, identity)
    (tmp_path / make.DESCRIPTION).write_text(json.dumps(identity | {"beta": 1.8}))
    assert make.is_up_to_date(tmp_path, identity)
    assert not make.is_up_to_date(tmp_path, identity | {"seed": 1})
