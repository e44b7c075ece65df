"""Samples of responses: those of the first and the last step, or of reference and policy side by side."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any

LONGEST_TEXT = 1500
"""Characters of a text that a page shows."""
MOST_SAMPLES = 16
"""Samples, and pairs of samples, that a page shows: as many as a person reads."""
WORDS = re.compile(r"\s+|\w+\s*|[^\w\s]\s*")


@dataclass(frozen=True)
class Sample:
    """A response of a step.

    Attributes:
        step: The step.
        prompt: The prompt.
        response: The response.
        score: Its score; None where it is not finite.
        gold: Its gold score, where there is one.
    """

    step: int
    prompt: str
    response: str
    score: float | None
    gold: float | None = None


@dataclass(frozen=True)
class ResponsePair:
    """Two responses to one prompt.

    Attributes:
        prompt: The prompt.
        before: The earlier response, as HTML in which the words that it has alone are marked by `del`.
        after: The later one, with `ins`.
        before_label: Whose response the earlier one is.
        after_label: Whose response the later one is.
    """

    prompt: str
    before: str
    after: str
    before_label: str
    after_label: str


def first_and_last(lines: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The samples of the first and of the last step of PPO."""
    sampled = [line for line in lines if line["stage"] == "ppo" and "score" in line]
    if not sampled:
        return []
    steps = (sampled[0]["step"], sampled[-1]["step"])
    shown: list[Sample] = []
    for step in dict.fromkeys(steps):
        of_step = [line for line in sampled if line["step"] == step]
        shown += [_sample(line) for line in of_step[: MOST_SAMPLES // 2]]
    return shown


def _sample(line: Mapping[str, Any]) -> Sample:
    return Sample(
        step=line["step"],
        prompt=shortened(line["prompt"]),
        response=shortened(line["response"]),
        score=line["score"],
        gold=line.get("gold"),
    )


def pairs(lines: Sequence[Mapping[str, Any]]) -> list[ResponsePair]:
    """The reference's and the policy's responses to the prompts of the last evaluation that has recorded them.

    Without such, the responses to the prompts that the first and the last step of PPO have in common.
    """
    probes = [line for line in lines if line["stage"] == "ppo" and "reference" in line]
    if probes:
        last = probes[-1]["step"]
        label = f"policy of step {last}"
        newest = [line for line in probes if line["step"] == last]
        texts = [(line["prompt"], line["reference"], line["response"]) for line in newest]
        return [_pair(*text, "reference", label) for text in texts[:MOST_SAMPLES]]
    samples = first_and_last(lines)
    if not samples:
        return []
    first, last = samples[0].step, samples[-1].step
    earlier = {sample.prompt: sample.response for sample in samples if sample.step == first}
    later = [sample for sample in samples if sample.step == last and sample.prompt in earlier and first != last]
    common = [(sample.prompt, earlier[sample.prompt], sample.response) for sample in later]
    return [_pair(*text, f"step {first}", f"step {last}") for text in common]


def _pair(prompt: str, before: str, after: str, before_label: str, after_label: str) -> ResponsePair:
    marked_before, marked_after = marked_differences(shortened(before), shortened(after))
    return ResponsePair(shortened(prompt), marked_before, marked_after, before_label, after_label)


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def marked_differences(before: str, after: str) -> tuple[str, str]:
    """Two texts as HTML, in which words that only one of them has are marked by `del` and `ins`."""
    old = WORDS.findall(before)
    new = WORDS.findall(after)
    matcher = SequenceMatcher(a=old, b=new, autojunk=False)
    codes = matcher.get_opcodes()
    removed = [(words == "equal", old[start:end]) for words, start, end, _, _ in codes]
    added = [(words == "equal", new[start:end]) for words, _, _, start, end in codes]
    return "".join(_marked(removed, "del")), "".join(_marked(added, "ins"))


def _marked(parts: Sequence[tuple[bool, list[str]]], tag: str) -> Iterator[str]:
    for is_common, words in parts:
        text = escape("".join(words))
        if text:
            yield text if is_common else f"<{tag}>{text}</{tag}>"
