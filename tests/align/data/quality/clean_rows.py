"""Rows of every form without any fault, and files of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from align.data.commands import open_corpus
from align.data.quality.report import check_corpus, report_record

Row = dict[str, Any]

NOUNS = (
    "river",
    "garden",
    "engine",
    "letter",
    "market",
    "window",
    "captain",
    "library",
    "bridge",
    "harvest",
    "lantern",
)
VERBS = ("follows", "repairs", "describes", "avoids", "remembers", "builds", "paints", "studies", "carries", "finds")
ADJECTIVES = ("old", "quiet", "bright", "narrow", "broken", "gentle", "distant", "heavy", "careful", "sudden", "golden")


def question(random: Random) -> str:
    nouns = [random.choice(NOUNS) for _ in range(4)]
    verb = random.choice(VERBS)
    adjective = random.choice(ADJECTIVES)
    return f"Why does the {adjective} {nouns[0]} near the {nouns[1]} look for a {nouns[2]} when it {verb} a {nouns[3]}?"


def sentence(random: Random) -> str:
    subject = f"The {random.choice(ADJECTIVES)} {random.choice(NOUNS)}"
    clauses = [f"{random.choice(VERBS)} the {random.choice(NOUNS)}" for _ in range(random.randint(1, 3))]
    return f"{subject} {' and '.join(clauses)}."


def paragraph(random: Random, fewest: int = 2, most: int = 6) -> str:
    return " ".join(sentence(random) for _ in range(random.randint(fewest, most)))


def demonstration(random: Random) -> Row:
    return {"prompt": question(random), "completion": paragraph(random)}


def conversation(random: Random) -> Row:
    speakers = ("user", "assistant", "user", "assistant")
    texts = (question(random), paragraph(random), question(random), paragraph(random))
    return {"messages": [{"role": role, "content": text} for role, text in zip(speakers, texts, strict=True)]}


def sharegpt(random: Random) -> Row:
    names = {"user": "human", "assistant": "gpt"}
    messages = conversation(random)["messages"]
    return {"conversations": [{"from": names[each["role"]], "value": each["content"]} for each in messages]}


def alpaca(random: Random) -> Row:
    return {
        "instruction": question(random),
        "input": random.choice(["", sentence(random)]),
        "output": paragraph(random),
    }


def labelled(random: Random) -> Row:
    return {"text": paragraph(random), "label": random.randint(0, 1)}


def pair(random: Random) -> Row:
    return {"prompt": question(random), "chosen": paragraph(random), "rejected": paragraph(random)}


def transcripts(random: Random) -> Row:
    before = (
        f"\n\nHuman: {question(random)}\n\nAssistant: {paragraph(random)}\n\nHuman: {question(random)}\n\nAssistant:"
    )
    return {"chosen": f"{before} {paragraph(random)}", "rejected": f"{before} {paragraph(random)}"}


def ranking(random: Random) -> Row:
    responses = [paragraph(random) for _ in range(4)]
    return {"prompt": question(random), "responses": responses, "ranks": random.sample([1, 2, 3, 4], 4)}


def choice(random: Random) -> Row:
    responses = [paragraph(random) for _ in range(4)]
    return {"prompt": question(random), "responses": responses, "best": random.randrange(4)}


def rating(random: Random) -> Row:
    return {"prompt": question(random), "response": paragraph(random), "rating": random.randint(1, 5)}


def prompt(random: Random) -> Row:
    return {"prompt": question(random)}


MAKERS = (
    demonstration,
    conversation,
    sharegpt,
    alpaca,
    labelled,
    pair,
    transcripts,
    ranking,
    choice,
    rating,
    prompt,
)


def rows_of(make: Any, count: int = 150, seed: int = 0) -> list[Row]:
    random = Random(seed)
    return [make(random) for _ in range(count)]


def write_rows_to(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def checked(
    folder: Path,
    rows: Sequence[Any],
    heldout: Sequence[Row] = (),
    model: Path | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """The object of `align data check --json` about a file of these rows; a text is a line as it is."""
    file = write_rows_to(folder / "rows.jsonl", rows)
    heldout_files = [write_rows_to(folder / "heldout.jsonl", heldout)] if heldout else None
    corpus = open_corpus([file], None, None, heldout_files, model=model, max_length=max_length)
    return report_record(check_corpus(corpus), locations=1000)


def problems(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The lines of each problem."""
    found: dict[str, list[int]] = {}
    for finding in record["findings"]:
        if finding["severity"] == "problem":
            found[finding["kind"]] = [int(where.rpartition(":")[2]) for where in finding["locations"]]
    return found
