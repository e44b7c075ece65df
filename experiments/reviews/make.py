"""Turn labelled review sentences into the data of this experiment: demonstrations, pairs and prompts.

    python experiments/reviews/make.py --sentences SENTENCES --to runs/reviews/data

SENTENCES is a data file or a hub data set whose rows have `text` and `label`, 1 for a positive sentence and 0 for a
negative one. A tenth of each label is held out of all training data. A prompt is the first words of a sentence; the
reward model learns to prefer positive sentences.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.schema import SourceSettings
from align.data.readers import read_rows
from policies.errors import UserError

START = "review:"
PROMPT_WORDS = 4
"""Words of a sentence that become its prompt."""
HELDOUT_SHARE = 0.1
HELDOUT_ROUNDS = 5
"""Negative sentences that each held-out positive sentence is compared with."""
HUB_SENTENCES = "cornell-movie-review-data/rotten_tomatoes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sentences",
        default=default_sentences(),
        help="data file or hub data set with `text` and `label`; default: reviews/sentences.jsonl in $ALIGN_DATA, "
        f"or else {HUB_SENTENCES} from the hub",
    )
    parser.add_argument("--to", type=Path, required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        sentences = [row.values for row in read_rows(SourceSettings(path=arguments.sentences))]
    except UserError as error:
        print(f"--sentences or ALIGN_DATA: {error}", file=sys.stderr)
        sys.exit(2)
    write(make(sentences, random.Random(arguments.seed)), arguments.to)


def default_sentences() -> str:
    """The file in the folder that ALIGN_DATA names, or a data set on the hub."""
    folder = os.environ.get("ALIGN_DATA")
    return f"{folder}/reviews/sentences.jsonl" if folder else HUB_SENTENCES


def make(sentences: Sequence[Mapping[str, Any]], rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """The rows of every file by its name, from sentences with `text` and `label`."""
    train: dict[int, list[str]] = {}
    heldout: dict[int, list[str]] = {}
    for label in (0, 1):
        texts = sorted({row["text"] for row in sentences if row["label"] == label})
        rng.shuffle(texts)
        count = round(len(texts) * HELDOUT_SHARE)
        heldout[label] = texts[:count]
        train[label] = texts[count:]
    train_texts = train[0] + train[1]
    heldout_texts = heldout[0] + heldout[1]
    rng.shuffle(train_texts)
    rng.shuffle(heldout_texts)
    demonstrations = [split_sentence(text) for text in train_texts if is_long_enough(text)]
    heldout_sentences = [split_sentence(text) for text in heldout_texts if is_long_enough(text)]
    return {
        "demonstrations": demonstrations,
        "pairs": make_pairs(train[1], train[0], 1, rng),
        "pairs_heldout": make_pairs(heldout[1], heldout[0], HELDOUT_ROUNDS, rng),
        "prompts": only_prompts(demonstrations),
        "prompts_heldout": only_prompts(heldout_sentences),
    }


def only_prompts(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without their completions."""
    return [{"prompt": row["prompt"]} for row in rows]


def is_long_enough(text: str) -> bool:
    """Whether a sentence has words beyond its prompt."""
    return len(text.split()) > PROMPT_WORDS


def split_sentence(text: str) -> dict[str, str]:
    """The first words as the prompt, the rest as the completion."""
    words = text.split()
    prompt = " ".join([START, *words[:PROMPT_WORDS]])
    return {"prompt": prompt, "completion": " " + " ".join(words[PROMPT_WORDS:])}


def make_pairs(positive: list[str], negative: list[str], rounds: int, rng: random.Random) -> list[dict[str, str]]:
    """In every round, each positive sentence with another randomly drawn negative one."""
    pairs = []
    for _ in range(rounds):
        drawn = rng.sample(negative, len(negative))
        for good, bad in zip(positive, drawn, strict=False):
            pairs.append({"prompt": START, "chosen": f" {good}", "rejected": f" {bad}"})
    return pairs


def write(files: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """Write each file as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
