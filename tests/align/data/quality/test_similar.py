"""Near copies are those that a comparison of all pairs finds."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.quality.similar import near_copies
from align.data.quality.words import count_words, normalised, words_of

WORDS = ("few", "plain", "words", "that", "make", "texts", "which", "differ", "here", "there", "but", "not", "much")


def jaccard(first: str, second: str) -> float:
    """The definition, word pair by word pair."""
    pairs = []
    for text in (first, second):
        words = words_of(text)
        pairs.append({(words[i], words[i + 1]) for i in range(len(words) - 1)})
    return len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_near_copies_are_those_of_a_comparison_of_all_pairs(seed: int) -> None:
    random = Random(seed)
    texts: list[str] = []
    for _ in range(8):
        words = random.choices(WORDS, k=random.randint(12, 40))
        for _ in range(random.randint(1, 2)):
            texts.append(" ".join(words))
            words[random.randrange(len(words))] = "changed"
    found = near_copies([(text,) for text in texts])
    for later, text in enumerate(texts):
        similar = {earlier for earlier in range(later) if jaccard(texts[earlier], text) >= 0.8}
        assert (later in found) == bool(similar)
        assert not similar or found[later] in similar


def test_each_part_must_be_similar_and_numbers_equal() -> None:
    text = " ".join(WORDS)
    other = " ".join(reversed(WORDS))
    assert near_copies([(text, other), (text, text), (text,), (text, other.upper())]) == {3: 0}
    assert near_copies([(f"{text} 7",), (f"{text} 8",), (f"7, {text}",)]) == {2: 0}
    assert near_copies([]) == {}
    assert near_copies([("",), ("!",), ("",)]) == {2: 0}


def test_a_short_part_may_differ_a_little_where_a_long_one_is_the_same() -> None:
    long = " ".join(WORDS)
    response = "it is as blue as the sea was when we saw it"
    changed = "it is as blue as the sea was when we left it"
    other = "no one knows of what colour it was"
    assert near_copies([(long, response), (long, changed), (long, other)]) == {1: 0}


def test_a_hundred_copies_are_found_beside_others() -> None:
    random = Random(0)
    others = [(" ".join(random.choices(WORDS, k=30)) + f" {index}",) for index in range(300)]
    copied = ("something else entirely, of which there are very many copies in this one file",)
    found = near_copies([copied, *others, *[copied] * 60])
    assert found == {301 + index: 0 for index in range(60)}


def test_words_are_the_same_in_ascii_and_beyond() -> None:
    assert words_of("Don't STOP_here, it's 3.5!") == ["dont", "stop", "here", "its", "3", "5"]
    assert words_of("Don’t STOP_here, café's 3.5!") == ["dont", "stop", "here", "cafés", "3", "5"]
    assert words_of("你好 ok") == ["你", "好", "ok"]
    assert normalised(" ?! ") == "?!"
    assert (count_words("one two-three, four"), count_words("你好。"), count_words(" ")) == (3, 2, 0)
