"""Brings real feedback of several kinds into the forms that a reward model is trained on.

    python experiments/feedback/make.py --data ../shared/data --to runs/feedback/data

DATA holds `gsm8k/solutions.jsonl`, where each problem has solutions that are right or wrong, and
`reviews/sentences.jsonl`, sentences with a label. Writes rankings of solutions, right ones above wrong ones, and
sentences as ratings: the same sentences as those of experiments/reviews, which has them as pairs.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = "review:"
HELDOUT = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    ratings = [rated(row) for row in lines(arguments.data / "reviews" / "sentences.jsonl")]
    random.Random(0).shuffle(ratings)
    cut = round(len(ratings) * HELDOUT)
    files = {
        "solutions": [*rankings(lines(arguments.data / "gsm8k" / "solutions.jsonl"))],
        "ratings": ratings[cut:],
        "ratings_heldout": ratings[:cut],
    }
    for name, rows in files.items():
        (arguments.to / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{arguments.to / name}.jsonl: {len(rows)} rows")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rankings(problems: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A problem's solutions with ranks; those that are all right or all wrong say nothing."""
    for problem in problems:
        solutions = [value for value in problem.values() if isinstance(value, dict)]
        right = [bool(solution["is_correct"]) for solution in solutions]
        if len(set(right)) == 2:
            yield {
                "prompt": f"{problem['question']}\n",
                "responses": [solution["solution"] for solution in solutions],
                "ranks": [1 if correct else 2 for correct in right],
            }


def rated(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": START, "response": f" {row['text']}", "rating": row["label"]}


if __name__ == "__main__":
    main()
