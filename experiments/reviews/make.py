"""Cuts labelled review sentences into the data of this experiment: demonstrations, pairs and prompts.

    python experiments/reviews/make.py --sentences SENTENCES.jsonl --to runs/reviews/data

A row of SENTENCES has `text` and `label`, 1 for a positive sentence and 0 for a negative one. A tenth of each label is
held out of everything that is trained. A prompt is the first words of a sentence; the reward model learns to put a
positive sentence above a negative one.
"""

import argparse
import json
import random
import sys
from pathlib import Path

START = "review:"
WORDS = 4
"""Words of a sentence that make its prompt."""
HELDOUT = 0.1
ROUNDS = 5
"""Negatives that each held-out positive is set against."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=Path, required=True, help="JSONL with `text` and `label`")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.sentences.is_file():
        sys.exit(f"{arguments.sentences} does not exist: --sentences is a JSONL file with `text` and `label`")
    rows = [json.loads(line) for line in arguments.sentences.read_text().splitlines()]
    write(make(rows, random.Random(arguments.seed)), arguments.to)


def make(rows: list[dict], rng: random.Random) -> dict[str, list[dict]]:
    """All files by name. rows: `text` and `label`."""
    train, heldout = {}, {}
    for label in (0, 1):
        texts = sorted({row["text"] for row in rows if row["label"] == label})
        rng.shuffle(texts)
        cut = round(len(texts) * HELDOUT)
        heldout[label], train[label] = texts[:cut], texts[cut:]
    everything, unseen = train[0] + train[1], heldout[0] + heldout[1]
    rng.shuffle(everything)
    rng.shuffle(unseen)
    return {
        "demonstrations": [cut_sentence(text) for text in everything if long_enough(text)],
        "pairs": pairs(train[1], train[0], 1, rng),
        "pairs_heldout": pairs(heldout[1], heldout[0], ROUNDS, rng),
        "prompts": [{"prompt": cut_sentence(text)["prompt"]} for text in everything if long_enough(text)],
        "prompts_heldout": [{"prompt": cut_sentence(text)["prompt"]} for text in unseen if long_enough(text)],
    }


def long_enough(text: str) -> bool:
    return len(text.split()) > WORDS


def cut_sentence(text: str) -> dict[str, str]:
    """The first words as the prompt, the rest as the completion."""
    words = text.split()
    return {"prompt": " ".join([START, *words[:WORDS]]), "completion": " " + " ".join(words[WORDS:])}


def pairs(positive: list[str], negative: list[str], rounds: int, rng: random.Random) -> list[dict[str, str]]:
    """Each positive sentence against a negative one drawn at random, in every round another."""
    return [
        {"prompt": START, "chosen": " " + good, "rejected": " " + bad}
        for _ in range(rounds)
        for good, bad in zip(positive, rng.sample(negative, len(negative)), strict=False)
    ]


def write(files: dict[str, list[dict]], folder: Path) -> None:
    """One JSONL file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
