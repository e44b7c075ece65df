"""Rows that say the same as an earlier one, exactly or nearly, and prompts that are held out."""

from collections.abc import Container, Hashable

from align.data.quality.check import FaultSeverity, Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.rows import Content, compared_text, spoken
from align.data.quality.similar import Parts, near_copies
from align.data.quality.words import normalised, words_of
from align.runtime.wording import counted

NEAR_SHARE = 0.002
"""Fewer near copies than this are in any text that people write."""
ECHO_SHARE = 0.05
"""Some responses quote; where so many do, prompts have got into the responses."""
BEGINNING = 80
"""Characters that hold the first two words."""
FEWEST_WORDS = 6
"""Shorter texts are in others by chance."""


def exact_copies(corpus: Corpus) -> dict[int, int]:
    """Rows that say what an earlier one says, with its index: the same texts, in the same order of preference."""
    first: dict[Hashable, int] = {}
    copies: dict[int, int] = {}
    for index, content in corpus.contents.items():
        earlier = first.setdefault(_key(content), index)
        if earlier != index:
            copies[index] = earlier
    return copies


def _key(content: Content) -> Hashable:
    prompt = content.prompt if isinstance(content.prompt, str) else repr(content.prompt)
    return prompt, content.responses, repr(content.preference), content.attribute, repr(content.tools)


def find_exact_duplicates(corpus: Corpus) -> Flagged | None:
    """Rows that say exactly what an earlier one says."""
    copies = exact_copies(corpus)
    if not copies:
        return None
    originals = counted(len(set(copies.values())), "row")
    return Flagged(sorted(copies), f"{counted(len(copies), 'row')} the same as {originals} before")


def find_near_duplicates(corpus: Corpus) -> Flagged | None:
    """Rows that are nearly as an earlier one."""
    copies = exact_copies(corpus)
    indices = [index for index in corpus.contents if index not in copies]
    parts = [_parts(corpus.contents[index]) for index in indices]
    found = {indices[later]: indices[earlier] for later, earlier in near_copies(parts).items()}
    if not found:
        return None
    later, earlier = min(found.items())
    example = f"{corpus.rows[later].where} and {corpus.rows[earlier].where}"
    is_common = len(found) >= NEAR_SHARE * len(corpus.rows)
    severity: FaultSeverity = "problem" if is_common else "fact"
    return Flagged(
        sorted(found), f"{counted(len(found), 'row')} nearly the same as one before, such as {example}", severity
    )


def _parts(content: Content) -> Parts:
    return spoken(content.prompt), *content.responses


def find_heldout_overlap(corpus: Corpus) -> Flagged | None:
    """Rows whose prompt, case, punctuation and small changes aside, is held out."""
    heldout = dict.fromkeys(normalised(text) for text in corpus.heldout or ())
    prompts = {index: compared_text(content) for index, content in corpus.contents.items()}
    same = {index for index, content in corpus.contents.items() if _is_held_out(content, heldout)}
    others = [index for index in prompts if index not in same]
    texts = [*heldout, *map(prompts.__getitem__, others)]
    copies = near_copies([(text,) for text in texts])
    near = {
        others[later - len(heldout)]
        for later, earlier in copies.items()
        if later >= len(heldout) and earlier < len(heldout)
    }
    if not same and not near:
        return None
    found = f"the prompts of {counted(len(same), 'row')} are held out, those of {len(near):,} more nearly"
    return Flagged(sorted(same | near), found)


def _is_held_out(content: Content, heldout: Container[str]) -> bool:
    """Whether the prompt, or the first message by the user, which may be trained too, is among held-out prompts."""
    first = next((each["content"] for each in content.messages or () if each["role"] == "user"), "")
    return normalised(compared_text(content)) in heldout or (bool(first) and normalised(first) in heldout)


def find_echoes(corpus: Corpus) -> Flagged | None:
    """Rows with a response that is in their prompt, or that begins with it."""
    rows = [index for index, content in corpus.contents.items() if _echoes(content)]
    if not rows:
        return None
    is_common = len(rows) >= ECHO_SHARE * len(corpus.rows)
    found = f"{counted(len(rows), 'row')} with a response that begins with the prompt, or is in it"
    return Flagged(rows, found, "problem" if is_common else "fact")


def _echoes(content: Content) -> bool:
    prompt = spoken(content.prompt)
    return any(_echoes_prompt(prompt, response) for response in content.responses)


def _echoes_prompt(prompt: str, response: str) -> bool:
    if len(response) > 2 * len(prompt) and words_of(prompt[:BEGINNING])[:2] != words_of(response[:BEGINNING])[:2]:
        return False  # too long to be in it, and begins otherwise
    prompt = normalised(prompt)
    response = normalised(response)
    shorter = min(prompt, response, key=len)
    return shorter.count(" ") + 1 >= FEWEST_WORDS and (response in prompt or response.startswith(prompt))
