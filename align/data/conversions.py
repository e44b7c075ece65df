"""Rows of public data sets in align's columns: ShareGPT, Alpaca, UltraFeedback, and those with labels of steps.

Every function takes a row's values and raises ValueError with the reason where one of them is wrong.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from policies.text import columns
from policies.text.columns import Values
from policies.text.encoder import ASSISTANT
from policies.text.tokenization import Message

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""align's role of each value of `from`."""
SHEPHERD_MARK = "ки"
"""What ends a step in Math-Shepherd; its place has the label in `label`."""
SHEPHERD_START = "Step 1:"
SHEPHERD_LABELS = {"+": 1, "-": 0}
SCORES = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))
"""Columns with the scores of the two sides of a binarised comparison."""


def conversation(values: Values) -> list[Values]:
    """A demonstration of ShareGPT: `messages` in place of `conversations` and `system`."""
    messages = _with_system(values, _sharegpt_messages(values))
    return [_without(values, "conversations", "system") | {"messages": messages}]


def conversation_prompt(values: Values) -> list[Values]:
    """A prompt of ShareGPT: the conversation up to the assistant's last reply, which becomes `completion`."""
    messages = _with_system(values, _sharegpt_messages(values))
    others = _without(values, "conversations", "system")
    if messages[-1]["role"] != ASSISTANT:
        return [others | {"prompt": messages}]
    if len(messages) == 1:
        raise ValueError("`conversations` has nothing before the assistant's reply")
    return [others | {"prompt": messages[:-1], "completion": messages[-1]["content"]}]


def sharegpt_pair(values: Values) -> list[Values]:
    """A pair after a conversation; its sides are texts, or messages of `from` and `value`."""
    messages = _with_system(values, _sharegpt_messages(values))
    sides = {name: _side(values[name], name) for name in ("chosen", "rejected")}
    return [_without(values, "conversations", "system") | {"prompt": messages} | sides]


def instruction_and_reply(values: Values) -> list[Values]:
    """A demonstration of Alpaca: `prompt` and `completion` in place of `instruction`, `input` and `output`."""
    output = columns.text(values, "output")
    (row,) = instruction_prompt(values)
    return [_without(row, "output") | {"completion": output}]


def instruction_prompt(values: Values) -> list[Values]:
    """A row with `prompt` in place of `instruction` and `input`, except where the source's template has made one."""
    prompt = values["prompt"] if columns.has(values, "prompt") else _instruction_messages(values)
    return [_without(values, "instruction", "input", "system") | {"prompt": prompt}]


def is_binarised(values: Values) -> bool:
    """Whether both sides of a pair are conversations that contain the prompt, which or whose scores the row has."""
    chosen, rejected = values["chosen"], values["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1):
        return False
    return isinstance(values.get("prompt"), str) or any(columns.has(values, first) for first, _ in SCORES)


def binarised(values: Values) -> list[Values]:
    """A pair of UltraFeedback binarised: the prompt is in both conversations; equal scores are a tie."""
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        before = columns.messages(values["chosen"], "chosen")[:-1]
        if all(message["content"].strip() != prompt.strip() for message in before):
            raise ValueError("`prompt` is not among the messages of `chosen`")
    row = _without(values, "prompt")
    for better, worse in SCORES:
        if columns.has(values, better) and columns.has(values, worse):
            row |= _tie_of_scores(values, better, worse)
    return [row]


def ultrafeedback_ranking(values: Values) -> list[Values]:
    """A row of UltraFeedback: its completions in the order of their scores."""
    completions = _completions(values, fewest=2)
    scores = [_score(completion, f"completions[{i}]") for i, completion in enumerate(completions)]
    others = _without(values, "instruction", "completions")
    prompt = _instruction_messages(values)
    responses = [completion["response"] for completion in completions]
    return [others | {"prompt": prompt, "responses": responses, "ranks": [-score for score in scores]}]


def ultrafeedback_ratings(values: Values) -> list[Values]:
    """A row for each completion of UltraFeedback, rated by the attributes of its `annotations`."""
    others = _without(values, "instruction", "completions")
    prompt = _instruction_messages(values)
    rows: list[Values] = []
    for i, completion in enumerate(_completions(values, fewest=1)):
        ratings = _annotated_ratings(completion, f"completions[{i}]")
        rows.append(others | {"prompt": prompt, "response": completion["response"], "rating": ratings})
    return rows


def math_shepherd(values: Values) -> list[Values]:
    """A solution of Math-Shepherd (Wang et al. 2024): its steps, and their labels by hard estimation."""
    marked = columns.text(values, "input")
    labelled = columns.text(values, "label")
    problem, start, solution = marked.partition(SHEPHERD_START)
    if not start:
        raise ValueError(f"`input` has no {SHEPHERD_START!r}, at which the solution begins")
    *parts, rest = (start + solution).split(SHEPHERD_MARK)
    if rest.strip():
        raise ValueError(f"`input` does not end with {SHEPHERD_MARK!r}")
    labels: list[int] = []
    position = len(problem)
    for part in parts:
        position += len(part)
        label = labelled[position : position + 1]
        if label not in SHEPHERD_LABELS:
            raise ValueError(f"`label` has no + or - where step {len(labels) + 1} ends in `input`")
        labels.append(SHEPHERD_LABELS[label])
        position += len(label)
    steps = [part.strip() for part in parts]
    others = _without(values, "input", "label")
    return [others | {"prompt": problem.strip(), "steps": steps, "labels": labels, "complete": True}]


def prm800k(values: Values) -> list[Values]:
    """The solutions of a row of PRM800K (Lightman et al. 2023): that of the chosen steps, and one for each other step.

    Each completion is labelled in one of them, and a step that people wrote is right. Where none of the completions of
    a step was chosen, the solution ends before it.
    """
    problem = _prm800k_text(values["question"], "problem", "question")
    label = values["label"]
    steps = label.get("steps") if isinstance(label, Mapping) else None
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise ValueError("`label` has no list `steps` of objects")
    rows: list[Values] = []
    texts: list[str] = []
    labels: list[int | None] = []
    unlabelled: list[int | None] = []
    for number, step in enumerate(steps):
        name = f"label.steps[{number}]"
        completions = [_prm800k_completion(completion, name) for completion in step.get("completions") or []]
        chosen = step.get("chosen_completion")
        for index, (text, rating) in enumerate(completions):
            if index != chosen and rating is not None:
                rows.append({"prompt": problem, "steps": [*texts, text], "labels": [*unlabelled, rating]})
        human = step.get("human_completion")
        if isinstance(chosen, int) and 0 <= chosen < len(completions):
            text, rating = completions[chosen]
        elif human is not None:
            text, rating = _prm800k_text(human, "text", f"{name}.human_completion"), 1
        else:
            break
        texts.append(text)
        labels.append(rating)
        unlabelled.append(None)
    if any(rating is not None for rating in labels):
        is_complete = label.get("finish_reason") == "solution"
        rows.insert(0, {"prompt": problem, "steps": texts, "labels": labels, "complete": is_complete})
    if not rows:
        raise ValueError("no step has a rating")
    return rows


def processbench(values: Values) -> list[Values]:
    """A solution of ProcessBench (Zheng et al. 2024): labels up to its first wrong step."""
    steps = columns.items(values, "steps")
    first = columns.number(values, "label")
    if not isinstance(steps, list) or first not in range(-1, len(steps)):
        raise ValueError(f"`label` is {first:g}: the index of the first wrong one of `steps`, or -1, was expected")
    labels: list[int | None] = [1] * len(steps)
    if first >= 0:
        labels = [1] * int(first) + [0] + [None] * (len(steps) - int(first) - 1)
    others = _without(values, "problem", "steps", "label")
    return [others | {"prompt": columns.text(values, "problem"), "steps": steps, "labels": labels, "complete": True}]


def _prm800k_completion(completion: Any, name: str) -> tuple[str, int | None]:
    """Text and label of a completion of a step; None where it has no rating."""
    text = _prm800k_text(completion, "text", name)
    rating = completion.get("rating")
    if rating not in (-1, 0, 1, None):
        raise ValueError(f"`{name}` has the rating {columns.shown(rating)}; -1, 0 or 1 was expected")
    return text, None if rating is None else int(rating >= 0)


def _prm800k_text(value: Any, key: str, name: str) -> str:
    """A text in an object of a row."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` is {columns.kind(value)}; an object was expected")
    return columns.text({f"{name}.{key}": value.get(key)}, f"{name}.{key}")


def _without(values: Values, *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _sharegpt_messages(values: Values) -> list[Message]:
    listed = columns.items(values, "conversations")
    if not isinstance(listed, list) or not listed:
        found = "an empty list" if listed == [] else columns.kind(listed)
        raise ValueError(f"`conversations` is {found}; a list of messages was expected")
    return [_sharegpt_message(message, "conversations") for message in listed]


def _sharegpt_message(message: Any, name: str) -> Message:
    """A message of `from` and `value`, or of `role` and `content`; further keys are kept."""
    if not isinstance(message, Mapping):
        raise ValueError(f"`{name}` has {columns.kind(message)} where a message was expected")
    speaker = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise ValueError(f"`{name}` has a message without the text `from` or `value`: {columns.shown(message)}")
    if speaker not in SHAREGPT_ROLES:
        expected = ", ".join(SHAREGPT_ROLES)
        raise ValueError(f"`{name}` has a message from {columns.shown(speaker)}; expected one of {expected}")
    others = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    return others | {"role": SHAREGPT_ROLES[speaker], "content": content}


def _side(value: Any, name: str) -> str:
    """A side of a pair: text, a message, or a list of one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = _sharegpt_message(value, name)["content"]
    return columns.text({name: value}, name)


def _with_system(values: Values, messages: list[Message]) -> list[Message]:
    """The messages after the text of the column `system`, where it has any."""
    system = values.get("system")
    if system is None or system == "":
        return messages
    return [{"role": "system", "content": columns.text(values, "system")}, *messages]


def _instruction_messages(values: Values) -> list[Message]:
    instruction = columns.text(values, "instruction")
    addition = values.get("input")
    if addition is not None and not isinstance(addition, str):
        raise ValueError(f"`input` is {columns.kind(addition)}; text was expected")
    content = f"{instruction}\n\n{addition}" if addition and addition.strip() else instruction
    return _with_system(values, [{"role": "user", "content": content}])


def _tie_of_scores(values: Values, better: str, worse: str) -> dict[str, Any]:
    """The column `tie` where the scores of the two sides are equal."""
    first, second = columns.number(values, better), columns.number(values, worse)
    if first < second:
        raise ValueError(f"`{better}` is {first:g}, less than `{worse}`, {second:g}")
    return {"tie": True} if first == second else {}


def _completions(values: Values, fewest: int) -> list[Values]:
    listed = columns.items(values, "completions")
    if not isinstance(listed, list) or len(listed) < fewest:
        raise ValueError(f"`completions` is {columns.shown(listed)}; a list of {fewest} or more was expected")
    for i, completion in enumerate(listed):
        if not isinstance(completion, Mapping):
            raise ValueError(f"`completions[{i}]` is {columns.kind(completion)}; an object was expected")
        columns.text(completion, "response")
    return listed


def _score(completion: Values, name: str) -> float:
    if columns.has(completion, "overall_score"):
        return columns.number(completion, "overall_score")
    if columns.has(completion, "annotations"):
        return fmean(_annotated_ratings(completion, name).values())
    raise ValueError(f"`{name}` has neither `overall_score` nor `annotations`")


def _annotated_ratings(completion: Values, name: str) -> dict[str, float]:
    """The rating of each attribute; `annotations` hold a number, an object with `Rating`, or a list of one."""
    annotations = columns.present(completion, "annotations")
    if not isinstance(annotations, Mapping) or not annotations:
        raise ValueError(
            f"`annotations` of `{name}` are {columns.kind(annotations)}; ratings by attribute were expected"
        )
    ratings: dict[str, float] = {}
    for attribute, annotation in annotations.items():
        if isinstance(annotation, list) and len(annotation) == 1:
            annotation = annotation[0]
        rating = annotation.get("Rating") if isinstance(annotation, Mapping) else annotation
        label = f"{name}.annotations.{attribute}"
        ratings[attribute] = columns.number({label: rating}, label)
    return ratings
