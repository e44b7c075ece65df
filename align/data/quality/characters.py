"""Characters that do not belong in a text, and control tokens."""

import re
from collections.abc import Callable

from align.data.quality.check import Flagged, flagged_by_reason, reasons_by_row
from align.data.quality.corpus import Corpus
from align.data.quality.rows import CheckedRow
from policies.text.columns import SURROGATE

RENDERED_SHARE = 0.8
"""Where so many rows have control tokens, a chat template has rendered them on purpose."""

CONTROL_CHARACTERS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
JOINER_IN_LATIN = "(?<=[\x21-\u024f])[\u200c\u200d](?=[\x21-\u024f])"
"""A zero-width joiner or non-joiner, which belong to emoji and to scripts such as Persian."""
INVISIBLE = "[\u00ad\u180e\u200b\u202a-\u202e\u2060-\u2069\ufeff]|" + JOINER_IN_LATIN
PRIVATE = "[\ue000-\uf8ff\ufff0-\ufffb\ufffe\uffff]"
REPLACEMENT = "\ufffd"
_CONTINUED = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
"""A byte from 0x80 to 0xbf, read in Windows-1252 or Latin-1."""
MOJIBAKE = (
    f"[ÂÃ]{_CONTINUED}|â[€\x80]{_CONTINUED}?|ðŸ{_CONTINUED}{{2}}|ð\x9f{_CONTINUED}{{2}}"
    f"|(?:[ÄÅÎÏÐÑ]{_CONTINUED}){{2,}}"  # Latin Extended, Greek, Cyrillic
    f"|(?:[à-ï]{_CONTINUED}{{2}}){{2,}}"  # Chinese, Japanese, Korean
    "|ï¿½|ï»¿"  # the replacement character and the byte order mark
)
"""UTF-8 that was read in Windows-1252 or Latin-1, as `Ã©` for `é` and `â€™` for `’`."""

ODD = {
    "half of a surrogate pair": SURROGATE,
    "the replacement character U+FFFD": re.compile(REPLACEMENT),
    "mojibake": re.compile(MOJIBAKE),
    "control characters": re.compile(CONTROL_CHARACTERS),
    "invisible characters": re.compile(INVISIBLE),
    "private or unassigned characters": re.compile(PRIVATE),
}
"""What each kind of odd characters is called, worst first."""
MAY_BE_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u180e\u200b-\u200d\u202a-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff\ue000-\uf8ff\ufff0-\uffffÂÃðÄÅÎÏÐÑà-ï]"
)
"""A character with which odd ones begin; one set of characters is searched for in a fraction of the time."""

WELL_KNOWN = (
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[BOS]",
    "[EOS]",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[gMASK]",
    "<sop>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
"""Control tokens of widespread models; those that are spelled `<|name|>` are found whatever their name is."""
BETWEEN_BARS = r"<\|[A-Za-z][A-Za-z0-9_]*\|>"


def odd_characters(text: str) -> str | None:
    """The first kind of odd characters in a text; None where it has none."""
    if not MAY_BE_ODD.search(text):
        return None
    return next((name for name, pattern in ODD.items() if pattern.search(text)), None)


def odd_in_row(row: CheckedRow) -> str | None:
    """The odd characters of a row, with the column that they are in."""
    return _first(row, odd_characters)


def _first(row: CheckedRow, find: Callable[[str], str | None]) -> str | None:
    for name, text in row.texts():
        found = find(text)
        if found:
            return f"{found} in `{name}`"
    return None


def find_odd_characters(corpus: Corpus) -> Flagged | None:
    """Rows with odd characters."""
    return flagged_by_reason(reasons_by_row(corpus.rows, odd_in_row), "with odd characters")


def control_tokens(corpus: Corpus) -> re.Pattern[str]:
    """Finds the control tokens of the model's tokenizer, and those of widespread models."""
    return re.compile("|".join([*map(re.escape, _names_of_tokens(corpus)), BETWEEN_BARS]))


def _names_of_tokens(corpus: Corpus) -> list[str]:
    """The texts of control tokens, the longest first."""
    names: list[str] = [*WELL_KNOWN]
    if corpus.encoder:
        tokenizer = corpus.encoder.tokenizer
        names += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names += tokenizer.all_special_tokens
    return sorted({name for name in names if name.strip()}, key=len, reverse=True)


def find_control_tokens(corpus: Corpus) -> Flagged | None:
    """Rows with the text of a control token."""
    pattern = control_tokens(corpus)
    firsts = {name[0] for name in _names_of_tokens(corpus)}

    def token_in(text: str) -> str | None:
        if not any(first in text for first in firsts):
            return None  # most texts, in a fraction of the time
        found = pattern.search(text)
        return found.group() if found else None

    reasons = reasons_by_row(corpus.rows, lambda row: _first(row, token_in))
    is_rendered = len(reasons) >= RENDERED_SHARE * len(corpus.rows)
    return flagged_by_reason(reasons, "with control tokens", "fact" if is_rendered else "problem")
