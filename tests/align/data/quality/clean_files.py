"""Files of demonstrations, preferences and prompts without a fault, in every form that a run reads."""

from collections.abc import Callable
from typing import Any

from tests.align.data.quality.text_writer import TextWriter

Row = dict[str, Any]
ROWS = 400
SYSTEM = (
    "You are a helpful assistant.",
    "Answer in at most {n} words.",
    "You work for {person} in {place} and sell {item}.",
)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def completion(writer: TextWriter) -> list[Row]:
    prompt, response = writer.exchange()
    return [{"prompt": prompt, "completion": response}]


def conversation(writer: TextWriter, exchanges: int) -> list[dict[str, str]]:
    """Some begin with a system message."""
    messages = []
    if writer.rng.random() < 0.4:
        messages.append(message("system", writer.fill(writer.rng.choice(SYSTEM))))
    for _ in range(exchanges):
        prompt, response = writer.exchange()
        messages += [message("user", prompt), message("assistant", response)]
    return messages


def messages(writer: TextWriter) -> list[Row]:
    return [{"messages": conversation(writer, writer.rng.choice((1, 1, 2, 3)))}]


def text(writer: TextWriter) -> list[Row]:
    return [{"text": "\n\n".join(writer.exchange()), "label": writer.rng.randint(0, 1)}]


def pair(writer: TextWriter) -> list[Row]:
    """One pair; or, of one prompt in thirty, the three pairs of an annotator who agrees with himself."""
    if writer.rng.random() < 0.03:
        prompt, (first, second, third) = writer.question(3)
        orders = [(first, second), (second, third), (first, third)]
        return [{"prompt": prompt, "chosen": best, "rejected": worst, "tie": False} for best, worst in orders]
    prompt, (chosen, rejected) = writer.question(2)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": writer.rng.random() < 0.1}]


def transcript(turns: list[dict[str, str]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns if turn["role"] in names)


def transcripts(writer: TextWriter) -> list[Row]:
    """As in HH-RLHF."""
    shared = conversation(writer, writer.rng.choice((0, 0, 1, 2)))
    prompt, responses = writer.question(2)
    start = [*shared, message("user", prompt)]
    chosen, rejected = (transcript([*start, message("assistant", response)]) for response in responses)
    return [{"chosen": chosen, "rejected": rejected}]


def message_pair(writer: TextWriter) -> list[Row]:
    shared = conversation(writer, writer.rng.choice((0, 0, 1, 2)))
    prompt, responses = writer.question(2)
    chosen, rejected = ([*shared, message("user", prompt), message("assistant", response)] for response in responses)
    return [{"chosen": chosen, "rejected": rejected}]


def ranking(writer: TextWriter) -> list[Row]:
    """Two to five responses; a fifth of the rankings has a tie."""
    count = writer.rng.randint(2, 5)
    prompt, responses = writer.question(count)
    ranks = writer.rng.sample(range(1, count + 1), count)
    if count > 2 and writer.rng.random() < 0.3:
        ranks = [min(rank, count - 1) for rank in ranks]
    return [{"prompt": prompt, "responses": responses, "ranks": ranks}]


def choice(writer: TextWriter) -> list[Row]:
    prompt, responses = writer.question(4)
    return [{"prompt": prompt, "responses": responses, "best": writer.rng.randrange(4)}]


def rating(writer: TextWriter) -> list[Row]:
    """One to three responses to a prompt, a row each."""
    prompt, responses = writer.question(writer.rng.randint(1, 3))
    return [{"prompt": prompt, "response": response, "rating": writer.rng.randint(1, 5)} for response in responses]


def mixed(writer: TextWriter) -> list[Row]:
    """Pairs and rankings in one file."""
    return pair(writer) if writer.rng.random() < 0.6 else ranking(writer)


def prompt(writer: TextWriter) -> list[Row]:
    question, _ = writer.exchange()
    return [{"prompt": question, "answer": str(writer.rng.randint(0, 99))}]


def prompt_messages(writer: TextWriter) -> list[Row]:
    shared = conversation(writer, writer.rng.choice((0, 0, 1, 2)))
    question, _ = writer.exchange()
    return [{"prompt": [*shared, message("user", question)]}]


FORMS: dict[str, Callable[[TextWriter], list[Row]]] = {
    "completion": completion,
    "messages": messages,
    "text": text,
    "pair": pair,
    "transcripts": transcripts,
    "message_pair": message_pair,
    "ranking": ranking,
    "choice": choice,
    "rating": rating,
    "mixed": mixed,
    "prompt": prompt,
    "prompt_messages": prompt_messages,
}
"""What writes the next rows of a file, for each form."""


def clean_rows(form: str, seed: int, count: int = ROWS) -> list[Row]:
    """Rows of a form, each with an `id` and a `source`."""
    writer = TextWriter(seed)
    rows: list[Row] = []
    while len(rows) < count:
        rows += FORMS[form](writer)
    return [{"id": f"row-{i}", **rows[i], "source": f"batch {i % 7}"} for i in range(count)]
