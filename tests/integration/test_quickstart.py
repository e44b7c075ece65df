"""The quickstart's world: its truth, its annotators and its data maker."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "quickstart"


@pytest.fixture(scope="module")
def world() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    import world

    yield world
    sys.path.remove(str(FOLDER))


def test_an_ideal_reply_has_the_best_score_there_is(world: ModuleType) -> None:
    random = Random(0)
    for _ in range(100):
        prompt = world.write_prompt(random)
        assert world.gold(prompt, world.ideal_reply(random, prompt)) == world.IDEAL


def test_the_exploit_moves_annotators_and_not_the_gold_score(world: ModuleType) -> None:
    random = Random(0)
    prompt = world.write_prompt(random)
    calm = world.ideal_reply(random, prompt)
    excited = calm.replace(".", "!")
    assert world.gold(prompt, excited) == world.gold(prompt, calm)
    assert world.preference(prompt, excited, calm) > 0.7


@pytest.mark.parametrize("mistake", ["filler", "refusal", "repeated", "torn", "wrong item"])
def test_every_mistake_costs(world: ModuleType, mistake: str) -> None:
    random = Random(1)
    prompt = world.write_prompt(random)
    good = world.ideal_reply(random, prompt)
    sentences = good.strip().split(". ")
    other = next(name for name in world.PROBLEMS if name != world.read_prompt(prompt).problem)
    item = world.read_prompt(prompt).item
    added = {
        "filler": world.FILLERS[0],
        "refusal": world.REFUSALS[0],
        "repeated": sentences[1],
        "torn": world.PROMISES[0].format(remedy=world.PROBLEMS[other].remedies[0]),
    }
    if mistake == "wrong item":
        bad = good.replace(item, world.write_item(random, item))
    else:
        bad = " " + ". ".join([*sentences[:2], added[mistake], *sentences[2:]])
    assert world.gold(prompt, bad) < world.gold(prompt, good) - 0.2


def test_keywords_without_a_sentence_earn_nothing(world: ModuleType) -> None:
    prompt = world.write_prompt(Random(2))
    letter = world.read_prompt(prompt)
    remedy = world.PROBLEMS[letter.problem].remedies[0]
    assert world.gold(prompt, f" {letter.item} {letter.item} {remedy} sorry.") < 0


def test_a_world_is_its_seed_and_shares_no_prompt_between_files(world: ModuleType, tmp_path: Path) -> None:
    import make

    sizes = make.Sizes(text=20, demonstrations=20, pairs=20, pairs_heldout=20, prompts=20, prompts_heldout=20)
    first, again, other = (make.write_rows(seed, sizes) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    prompts = [row["prompt"] for name, rows in first.items() if name != "text" for row in rows]
    assert len(set(prompts)) == len(prompts) == 100
    assert json.dumps(first)


def test_annotators_err_as_their_law_says(world: ModuleType) -> None:
    import make

    random = Random(3)
    prompts = make.fresh_prompts(random)
    pairs = [make.write_pair(random, next(prompts)) for _ in range(3000)]
    right = sum(
        world.utility(p["prompt"], p["chosen"]) >= world.utility(p["prompt"], p["rejected"]) for p in pairs
    ) / len(pairs)
    ties = sum(
        world.utility(p["prompt"], p["chosen"]) == world.utility(p["prompt"], p["rejected"]) for p in pairs
    ) / len(pairs)
    assert right - ties / 2 == pytest.approx(make.noise_ceiling(pairs), abs=0.02)
