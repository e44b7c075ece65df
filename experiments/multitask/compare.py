"""Compare one model that is fine-tuned on three tasks at once with one for each task.

    python experiments/multitask/compare.py --data DATA

DATA, or the folder that ALIGN_DATA names, has `gsm8k/train.jsonl`, `reviews/sentences.jsonl` and `hh/harmless.jsonl`.
Runs experiment.yaml with all datasets of its mixture and with each alone, prints the table of the README, and writes
`results.json`: the perplexity of the held-out completions under the base model and under both fine-tuned ones.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import align

HERE = Path(__file__).parent
DATA = Path("runs/multitask/data")
TASKS = ("problems", "reviews", "dialogues")
SENTIMENTS = ("negative", "positive")
TURN = "\n\nAssistant:"
"""What the assistant's turns of a dialogue begin with."""

Perplexities = dict[str, dict[str, float]]
"""By model, the perplexity and the ends of its interval."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("ALIGN_DATA") or None,
        help="folder with gsm8k/, reviews/ and hh/; default: $ALIGN_DATA",
    )
    parser.add_argument("--rows", type=int, default=1000, help="training rows of each task")
    parser.add_argument("--heldout", type=int, default=300, help="held-out rows of each task")
    parser.add_argument("--to", type=Path, default=HERE, help="folder for results.json")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name a folder by --data or ALIGN_DATA")
    make(arguments.data, arguments.rows, arguments.heldout)
    try:
        results = compare()
    except align.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (arguments.to / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


def make(data: Path, rows: int, heldout: int) -> None:
    """Write the rows of each task: prompts and completions."""
    problems = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in read(data / "gsm8k" / "train.jsonl")
    ]
    reviews = [
        {"prompt": f"Review: {row['text']}\nThe review is", "completion": f" {SENTIMENTS[row['label']]}."}
        for row in read(data / "reviews" / "sentences.jsonl")
    ]
    dialogues = [last_turn(row["chosen"]) for row in read(data / "hh" / "harmless.jsonl")]
    DATA.mkdir(parents=True, exist_ok=True)
    for name, task in zip(TASKS, (problems, reviews, dialogues), strict=True):
        random.Random(0).shuffle(task)
        write(name, task[heldout:][:rows])
        write(f"{name}_heldout", task[:heldout])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def last_turn(dialogue: str) -> dict[str, str]:
    """A dialogue up to the assistant's last turn, and this turn."""
    end = dialogue.rfind(TURN) + len(TURN)
    return {"prompt": dialogue[:end].lstrip("\n"), "completion": dialogue[end:]}


def compare() -> dict[str, Perplexities]:
    """By task, the perplexities of the base model, of the model of this task, and of the model of all tasks."""
    together = held_out(TASKS)
    results: dict[str, Perplexities] = {}
    for task in TASKS:
        alone = held_out([task])[task]
        results[task] = {"base": alone["base"], "alone": alone["sft"], "together": together[task]["sft"]}
        print(task, {name: round(own["perplexity"], 3) for name, own in results[task].items()}, flush=True)
    return results


def held_out(tasks: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Fine-tune on some tasks. By task and model, the figures of the perplexity of its held-out completions."""
    removed = [f"~data.mixture.{task}" for task in TASKS if task not in tasks]
    overrides = [f"name={'-'.join(tasks)}", *removed]
    run = align.run(align.load_experiment(HERE / "experiment.yaml", overrides), replace=True)
    section = run.measure_perplexity()
    return {name: figures["models"] for name, figures in section["heldout"].items()}


def table(results: Mapping[str, Perplexities]) -> list[str]:
    """Perplexities with their 95 % intervals."""
    lines = ["| held-out completions | base model | trained on this task | trained on all three |", "|---|---|---|---|"]
    for task, models in results.items():
        cells = [cell(models[name]) for name in ("base", "alone", "together")]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def cell(figures: Mapping[str, float]) -> str:
    low, high = figures["perplexity_low"], figures["perplexity_high"]
    return f"{figures['perplexity']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
