"""Compare how much SFT by full weights, by LoRA and with replay forgets, over seeds.

    python experiments/forgetting/compare.py --data DATA

DATA, or the folder that ALIGN_DATA names, has `gsm8k/train.jsonl`, `reviews/reviews.jsonl.gz`,
`reviews/sentences.jsonl` and `hh/harmless.jsonl`. Runs experiment.yaml for each method and seed, prints the table of
the README, and writes `results.json` and `forgetting.png`.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

import align
from align.config.schema import SourceSettings
from align.data.readers import read_rows

HERE = Path(__file__).parent
RUNS = Path("runs/forgetting")
DATA = RUNS / "data"
REPLAY = "data.mixture.replay={path: [runs/forgetting/data/replay.jsonl]}"
METHODS: dict[str, list[str]] = {
    "full": ["policy.method=full", "sft.learning_rate=3e-4"],
    "lora": ["policy.method=lora", "policy.rank=16", "policy.alpha=32", "sft.learning_rate=3e-3"],
    "full-replay": ["policy.method=full", "sft.learning_rate=3e-4", REPLAY],
    "full-fast": ["policy.method=full", "sft.learning_rate=1.5e-3"],
}
"""Settings of each method besides those of experiment.yaml."""
LABELS = {
    "full": "full weights",
    "lora": "LoRA",
    "full-replay": "full weights, replay",
    "full-fast": "full weights, 5 × the rate",
}
MEASURED = ("gsm8k", "reviews", "sentences", "dialogues")
"""The new task, then the general texts; the replay has reviews and sentences, but no dialogues."""

Ratios = dict[str, dict[str, float]]
"""By text, `perplexity_ratio` and the ends of its interval."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("ALIGN_DATA") or None,
        help="folder with gsm8k/, reviews/ and hh/; default: $ALIGN_DATA",
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings per method")
    parser.add_argument("--to", type=Path, default=HERE, help="folder for results.json and forgetting.png")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name a folder by --data or ALIGN_DATA")
    try:
        make(arguments.data)
        results = {name: list(train(name, arguments.seeds)) for name in METHODS}
    except align.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (arguments.to / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, arguments.to / "forgetting.png")
    print("\n".join(table(results)))


def make(data: Path) -> None:
    """Write the training data, the replay and the texts that are measured, none of which is trained on."""
    rng = random.Random(0)
    problems = rows_of(data / "gsm8k" / "train.jsonl", rng)
    reviews = texts_of(data / "reviews" / "reviews.jsonl.gz", "text", rng)
    sentences = texts_of(data / "reviews" / "sentences.jsonl", "text", rng)
    dialogues = texts_of(data / "hh" / "harmless.jsonl", "chosen", rng)
    DATA.mkdir(parents=True, exist_ok=True)
    write("gsm8k", problems[:1000])
    write("gsm8k_heldout", problems[1000:1200])
    write("replay", sentences[200:260] + reviews[12:20])
    write("reviews", reviews[:12])
    write("sentences", sentences[:200])
    write("dialogues", dialogues[:40])


def rows_of(path: Path, rng: random.Random) -> list[dict[str, Any]]:
    """All rows in random order."""
    rows = [dict(row.values) for row in read_rows(SourceSettings(path=str(path)))]
    rng.shuffle(rows)
    return rows


def texts_of(path: Path, column: str, rng: random.Random) -> list[dict[str, Any]]:
    """The texts of a column as rows, in random order."""
    return [{"text": row[column]} for row in rows_of(path, rng)]


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(method: str, seeds: int) -> Iterator[Ratios]:
    """Train by a method with each seed. Yields the perplexity of the SFT model over that of the base."""
    for seed in range(seeds):
        run = trained(method, seed)
        section = run.evaluation["perplexity"]
        measured = section["heldout"] | section["texts"]
        ratios = {name: ratio_of(measured[name]["models"]["sft"]) for name in MEASURED}
        print(method, seed, {name: round(own["ratio"], 3) for name, own in ratios.items()}, flush=True)
        yield ratios


def trained(method: str, seed: int) -> align.TrainedRun:
    """The run of a method and a seed; one that is done is not repeated."""
    name = f"{method}-{seed}"
    if (RUNS / name / "evaluation.json").is_file():
        return align.open_run(RUNS / name)
    overrides = [f"name={name}", f"seed={seed}", *METHODS[method]]
    return align.run(align.load_experiment(HERE / "experiment.yaml", overrides), replace=True)


def ratio_of(figures: Mapping[str, float]) -> dict[str, float]:
    ends = {end: figures[f"perplexity_ratio_{end}"] for end in ("low", "high")}
    return {"ratio": figures["perplexity_ratio"], **ends}


def table(results: Mapping[str, Sequence[Ratios]]) -> Iterator[str]:
    """Mean over the seeds, ± their standard error."""
    yield "| method | " + " | ".join(MEASURED) + " |"
    yield "|---" * (len(MEASURED) + 1) + "|"
    for method, runs in results.items():
        cells = []
        for name in MEASURED:
            values = [run[name]["ratio"] for run in runs]
            error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{error}")
        yield f"| {LABELS[method]} | " + " | ".join(cells) + " |"


def draw(results: Mapping[str, Sequence[Ratios]], path: Path) -> None:
    """A panel for each general text: its perplexity ratio against that of the new task, a point per training."""
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(MEASURED) - 1)
    for axes, text in zip(panels, MEASURED[1:], strict=True):
        for method, runs in results.items():
            new = [run["gsm8k"]["ratio"] for run in runs]
            old = [run[text]["ratio"] for run in runs]
            below = [run[text]["ratio"] - run[text]["low"] for run in runs]
            above = [run[text]["high"] - run[text]["ratio"] for run in runs]
            axes.errorbar(new, old, yerr=[below, above], fmt="o", markersize=5, capsize=2, label=LABELS[method])
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.set(title=text, xlabel="GSM8K, perplexity over base", ylabel="perplexity over base")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
