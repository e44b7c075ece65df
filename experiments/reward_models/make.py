"""Turn real human judgements of three kinds into preference data for reward models.

    python experiments/reward_models/make.py --to runs/reward_models/data

Writes `harmless.jsonl`, human pairs of transcripts (HH-RLHF); `ratings.jsonl` and `ratings_heldout.jsonl`, review
sentences with their label as a rating, the sentences that experiments/reviews uses in pairs; and `solutions.jsonl`,
rankings of four solutions to a problem, correct ones above wrong ones (GSM8K).

With --data or ALIGN_DATA, a folder with `hh/harmless.jsonl`, `reviews/sentences.jsonl` and `gsm8k/solutions.jsonl`,
everything comes from files. Without it, everything comes from the hub. The solutions of four models, `solutions.jsonl`
of github.com/openai/grade-school-math, are not there: in their place, the solution of a problem of `openai/gsm8k` is
ranked above those of three other problems.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.schema import SourceSettings
from align.data.readers import read_rows
from policies.errors import UserError, first_line

START = "review:"
HELDOUT_SHARE = 0.1
HUB_SENTENCES = "cornell-movie-review-data/rotten_tomatoes"
HUB_PAIRS = "Anthropic/hh-rlhf"
HUB_PAIRS_FOLDER = "harmless-base"
HUB_PROBLEMS = "openai/gsm8k"
RANKED_PROBLEMS = 544
"""As many rankings as the solutions of four models give."""

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("ALIGN_DATA") or None,
        help="folder with hh/, reviews/ and gsm8k/; default: $ALIGN_DATA, or else the hub",
    )
    parser.add_argument("--to", type=Path, required=True, help="output folder")
    arguments = parser.parse_args()
    try:
        files = from_folder(arguments.data) if arguments.data else from_hub()
    except UserError as error:
        print(f"--data or ALIGN_DATA: {error}", file=sys.stderr)
        sys.exit(2)
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = arguments.to / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


def from_folder(folder: Path) -> dict[str, Sequence[Row]]:
    """The rows of every file by its name, from local files."""
    problems = read(str(folder / "gsm8k" / "solutions.jsonl"))
    return {
        "harmless": read(str(folder / "hh" / "harmless.jsonl")),
        **split_ratings(read(str(folder / "reviews" / "sentences.jsonl"))),
        "solutions": list(rankings(problems)),
    }


def from_hub() -> dict[str, Sequence[Row]]:
    """The rows of every file by its name, from the hub."""
    print("no ALIGN_DATA: data from the hub", file=sys.stderr)
    problems = read(HUB_PROBLEMS, subset="main")
    return {
        "harmless": hub_pairs(),
        **split_ratings(read(HUB_SENTENCES)),
        "solutions": rankings_of_one_solution(problems[:RANKED_PROBLEMS]),
    }


def read(path: str, subset: str | None = None) -> list[Row]:
    """All rows of a file or a hub data set."""
    return [row.values for row in read_rows(SourceSettings(path=path, subset=subset))]


def hub_pairs() -> list[Row]:
    """The test split of the harmless transcripts, which lie in a folder of their data set."""
    from datasets import load_dataset

    try:
        return list(load_dataset(HUB_PAIRS, data_dir=HUB_PAIRS_FOLDER, split="test"))
    except Exception as error:  # no network or a wrong cache: each library below has exceptions of its own
        raise UserError(f"{HUB_PAIRS} cannot be loaded from the hub: {first_line(error)}") from None


def split_ratings(sentences: Iterable[Row]) -> dict[str, list[Row]]:
    """Sentences as ratings, a tenth of them held out."""
    ratings = [rating(row) for row in sentences]
    random.Random(0).shuffle(ratings)
    count = round(len(ratings) * HELDOUT_SHARE)
    return {"ratings": ratings[count:], "ratings_heldout": ratings[:count]}


def rating(sentence: Row) -> Row:
    """A review sentence with its label as a rating."""
    return {"prompt": START, "response": f" {sentence['text']}", "rating": sentence["label"]}


def rankings(problems: Iterable[Row]) -> Iterator[Row]:
    """A ranking per problem; problems whose solutions are all correct or all wrong are left out."""
    for problem in problems:
        solutions = [value for value in problem.values() if isinstance(value, dict)]
        correct = [bool(solution["is_correct"]) for solution in solutions]
        if len(set(correct)) == 2:
            responses = [solution["solution"] for solution in solutions]
            ranks = [1 if is_correct else 2 for is_correct in correct]
            yield {"prompt": f"{problem['question']}\n", "responses": responses, "ranks": ranks}


def rankings_of_one_solution(problems: Sequence[Row]) -> list[Row]:
    """A ranking per problem: its own solution above those of the three problems that follow it."""
    rows = []
    for i, problem in enumerate(problems):
        others = [problems[(i + step) % len(problems)]["answer"] for step in (1, 2, 3)]
        rows.append(
            {"prompt": f"{problem['question']}\n", "responses": [problem["answer"], *others], "ranks": [1, 2, 2, 2]}
        )
    return rows


if __name__ == "__main__":
    main()
