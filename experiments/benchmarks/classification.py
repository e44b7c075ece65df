"""Compare three ways to train a classifier with a logistic regression on bags of words.

    python experiments/benchmarks/classification.py --to runs/classification

Labels review sentences, positive or negative: by a linear probe on the base model's hidden states, by the last layers
with a head, by LoRA with a head, and by scikit-learn's logistic regression on the counts of words. All have the same
training and held-out rows. Prints a table with accuracies, their 95 % intervals and CPU seconds, and writes
`classification.json`. The seconds are those of the whole command, evaluation and start included.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inputs import add_model, require_model, require_paths
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rewards.diagnostics import wilson

METHODS: dict[str, dict[str, Any]] = {
    "head only (linear probe)": {"classify": {"trains": "head", "learning_rate": 1e-2, "epochs": 4}},
    "last 2 layers, head": {
        "policy": {"method": "top_layers", "layers": 2},
        "classify": {"learning_rate": 5e-4, "epochs": 2},
    },
    "LoRA of rank 16, head": {"policy": {"method": "lora"}, "classify": {"learning_rate": 5e-4, "epochs": 2}},
}
BASELINE = "logistic regression on bags of words"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--sentences", type=Path, default=default_sentences(), help="JSONL with `text` and `label`")
    parser.add_argument("--to", type=Path, required=True, help="folder of the data and the runs")
    parser.add_argument("--rows", type=int, help="training rows; default: all that are not held out")
    parser.add_argument("--heldout", type=int, default=1200, help="held-out rows")
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    if arguments.sentences is None:
        parser.error("sentences are needed: give --sentences, or reviews/sentences.jsonl in the folder $ALIGN_DATA")
    require_paths(parser, arguments.sentences)
    rows = [json.loads(line) for line in arguments.sentences.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    heldout = rows[: arguments.heldout]
    train = rows[arguments.heldout :][: arguments.rows]
    arguments.to.mkdir(parents=True, exist_ok=True)
    data = {"labels": write(train, arguments.to), "labels_heldout": write(heldout, arguments.to, "heldout")}
    results = {BASELINE: words(train, heldout)}
    print_row(BASELINE, results[BASELINE], len(train), len(heldout))
    for number, (name, settings) in enumerate(METHODS.items()):
        results[name] = classify(arguments, f"classifier-{number}", data, settings)
        print_row(name, results[name])
    file = arguments.to / "classification.json"
    file.write_text(json.dumps({"train": len(train), "heldout": len(heldout), "results": results}, indent=2) + "\n")


def default_sentences() -> Path | None:
    """The file in the folder that ALIGN_DATA names."""
    folder = os.environ.get("ALIGN_DATA")
    return Path(folder) / "reviews" / "sentences.jsonl" if folder else None


def write(rows: Sequence[dict[str, Any]], folder: Path, name: str = "train") -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def words(train: Sequence[dict[str, Any]], heldout: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and CPU seconds of a logistic regression on the counts of words."""
    started = time.process_time()
    counts = CountVectorizer()
    model = LogisticRegression(max_iter=1000)
    model.fit(counts.fit_transform(row["text"] for row in train), [row["label"] for row in train])
    predicted = model.predict(counts.transform(row["text"] for row in heldout))
    right = sum(guess == row["label"] for guess, row in zip(predicted, heldout, strict=True))
    accuracy = wilson(right / len(heldout), len(heldout))
    seconds = time.process_time() - started
    return {
        "accuracy": accuracy.accuracy,
        "accuracy_low": accuracy.accuracy_low,
        "accuracy_high": accuracy.accuracy_high,
        "cpu_seconds": seconds,
    }


def classify(
    arguments: argparse.Namespace, name: str, data: dict[str, str], settings: dict[str, Any]
) -> dict[str, float]:
    """Accuracy and CPU seconds of a run of the stage `classify`."""
    experiment = {
        "name": name,
        "runs": str(arguments.to),
        "stages": ["classify"],
        "model": {"path": str(arguments.model), "dtype": "float32"},
        "data": data,
        "tracking": {"wandb": "disabled"},
        "cluster": {"threads": 1},
    }
    file = arguments.to / f"{name}.yaml"
    file.write_text(json.dumps(experiment | settings))  # JSON is YAML
    run = subprocess.Popen([sys.executable, "-m", "align", "run", str(file), "--replace"], stdout=sys.stderr)
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{name}: align run ended with {os.waitstatus_to_exitcode(status)}")
    figures = json.loads((arguments.to / name / "evaluation.json").read_text())["classifier"]
    accuracy = {key: figures[key] for key in ("accuracy", "accuracy_low", "accuracy_high")}
    return accuracy | {"cpu_seconds": usage.ru_utime + usage.ru_stime}


def print_row(name: str, result: dict[str, float], train: int = 0, heldout: int = 0) -> None:
    """A row of the table in Markdown; its head first where the numbers of rows are given."""
    if train:
        print(f"| {train:,} training rows, {heldout:,} held out | accuracy, 95 % interval | CPU seconds |")
        print("|---|---|---|")
    interval = f"{result['accuracy_low']:.1%} to {result['accuracy_high']:.1%}"
    print(f"| {name} | {result['accuracy']:.1%} ({interval}) | {result['cpu_seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
