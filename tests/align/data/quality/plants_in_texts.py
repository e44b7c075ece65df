"""Faults inside texts: cut-off responses, characters, control tokens and lengths."""

import base64
import json
import random
import re
from collections import Counter
from itertools import chain

from tests.align.data.quality.clean_files import Row
from tests.align.data.quality.plant import Files, Locations, Plant
from tests.align.data.quality.text_writer import TextWriter

PIECE = re.compile(r"\s?\w{1,4}|\s?[^\w\s]|\s")
"""About what a token is."""


def prose(row: Row) -> bool:
    """Whether a completion is prose of at least three sentences in English, without a list or code at its end."""
    text = row["completion"]
    return len(text.split()) > 40 and text.endswith((".", "!")) and "\n" not in text


def after_pieces(text: str, count: int) -> str:
    return "".join(PIECE.findall(text)[:count])


def longer_than(row: Row, pieces: int) -> bool:
    """Whether a completion is longer, and ends within a sentence where it is cut."""
    text = row["completion"]
    return len(PIECE.findall(text)) > pieces and after_pieces(text, pieces)[-1].isalpha()


def max_tokens_of_a_generator(files: Files) -> Locations:
    """As if a generator had stopped after 90 tokens; an eighth of the responses is longer."""
    chosen = files.some(50, lambda row: prose(row) and longer_than(row, 90))
    for index in chosen:
        files.rows[index]["completion"] = after_pieces(files.rows[index]["completion"], 90)
    return chosen


def max_tokens_that_cuts_half_of_them(files: Files) -> Locations:
    """As if a generator had stopped after 64 tokens, whatever the text: half of the responses are longer."""
    cut = [i for i, row in enumerate(files.rows) if longer_than(row, 64)]
    for row in files.rows:
        row["completion"] = after_pieces(row["completion"], 64)
    assert 150 < len(cut) < 300, len(cut)
    return cut


def column_of_255_characters(files: Files) -> Locations:
    cut = [i for i, row in enumerate(files.rows) if len(row["completion"]) > 255]
    for index in cut:
        files.rows[index]["completion"] = files.rows[index]["completion"][:255]
    return cut


def last_sentence_is_half(files: Files) -> Locations:
    chosen = files.some(24, prose)
    for index in chosen:
        sentences = files.rows[index]["completion"].split(". ")
        words = sentences[-1].split(" ")
        files.rows[index]["completion"] = ". ".join([*sentences[:-1], " ".join(words[: max(2, len(words) // 2)])])
    return chosen


def end_of_turn_is_missing(files: Files) -> Locations:
    """All responses end in a token, except those that were cut."""
    chosen = files.some(20, prose)
    for index, row in enumerate(files.rows):
        if index in chosen:
            row["completion"] = row["completion"][: len(row["completion"]) // 2 + 3].rstrip(". ")
        else:
            row["completion"] += "<|im_end|>"
    return chosen


ODD_PIECES = {
    "latin_1": ("cafÃ©", "Ã¼ber", "â€™", "â€œso â€”", "Â£3", "naÃ¯ve", "ðŸ™‚"),
    "cyrillic": ("ÐŸÑ€Ð¸Ð²ÐµÑ‚",),
    "twice": ("ÃƒÂ©t",),
    "invisible": ("\u200b", "\ufeff", "\u2060", "\u00ad", "\u202e", "\u2066x"),
    "replaced": ("\ufffd", "caf\ufffd", "\ufffd\ufffd"),
    "control": ("\x00", "\x08", "\x1b[31m", "\x92", "\x0c\x07"),
    "private": ("\uf0b7", "\ue000"),
}


def into_the_middle(text: str, piece: str) -> str:
    words = text.split(" ")
    middle = len(words) // 2
    return " ".join([*words[:middle], f"{words[middle]}{piece}", *words[middle + 1 :]])


def odd(files: Files, column: str, *names: str) -> Locations:
    """Puts each piece of the named sets into a row of its own."""
    pieces = list(chain.from_iterable(ODD_PIECES[name] for name in names))
    chosen = files.some(len(pieces))
    for index, piece in zip(chosen, pieces):
        files.rows[index][column] = into_the_middle(files.rows[index][column], f" {piece}")
    return chosen


def utf_8_read_as_latin_1(files: Files) -> Locations:
    return odd(files, "completion", "latin_1", "cyrillic", "twice")


def invisible_characters(files: Files) -> Locations:
    return odd(files, "prompt", "invisible")


def joiners_between_latin_letters(files: Files) -> Locations:
    """As web pages have them, against copying: no emoji, Persian or Hindi word is spelt so."""
    chosen = files.some(2, lambda row: row["prompt"].isascii())
    for index, joiner in zip(chosen, ("\u200d", "\u200c")):
        files.rows[index]["chosen"] = f"It is of{joiner}ten useful to wait. {files.rows[index]['chosen']}"
    return chosen


def replacement_and_control_characters(files: Files) -> Locations:
    return odd(files, "rejected", "replaced", "control", "private")


def half_a_surrogate_pair(files: Files) -> Locations:
    chosen = files.some(2)
    for index in chosen:
        files.rows[index]["completion"] += " \ud83d"
        files.rows[index] = json.dumps(files.rows[index])
    return chosen


CONTROL_TOKENS = {
    "chatml": ("<|im_start|>assistant\nYes.", "<|im_end|>"),
    "llama": ("</s>", "[/INST]", "<<SYS>>", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>", "<|eot|>"),
    "gemma": ("<start_of_turn>model\n", "<end_of_turn>", "<eos>"),
    "others": (
        "<|endoftext|>",
        "<|end|>",
        "<|assistant|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜>",
        "<|return|>",
        "<|fim_middle|>",
        "<|begin_of_text|>",
        "[gMASK]",
        "<|message|>",
    ),
}


def tokens(files: Files, *names: str) -> Locations:
    """Ends one response in each token of the named families."""
    written = list(chain.from_iterable(CONTROL_TOKENS[name] for name in names))
    chosen = files.some(len(written))
    for index, token in zip(chosen, written):
        files.rows[index]["completion"] += token
    return chosen


def end_of_turn_of_chatml(files: Files) -> Locations:
    return tokens(files, "chatml")


def markers_of_llama_and_mistral(files: Files) -> Locations:
    return tokens(files, "llama")


def turns_of_gemma(files: Files) -> Locations:
    return tokens(files, "gemma")


def tokens_of_other_families(files: Files) -> Locations:
    return tokens(files, "others")


def pad_token_of_the_tokenizer(files: Files) -> Locations:
    chosen = files.some(3)
    for index in chosen:
        files.rows[index]["prompt"] += " <|filler|><|filler|>"
    return chosen


def a_whole_book_in_one_row(files: Files) -> Locations:
    index = files.some(1)[0]
    files.rows[index]["completion"] = TextWriter(5).sentences(1500)
    return [index]


def log_file_in_the_prompt(files: Files) -> Locations:
    index = files.some(1)[0]
    lines = (f"2026-03-{n % 28 + 1:02} 12:{n % 60:02} worker {n} sent {n * 37} bytes" for n in range(600))
    files.rows[index]["prompt"] = "What is wrong?\n\n" + "\n".join(lines)
    return [index]


def picture_in_base64(files: Files) -> Locations:
    index = files.some(1)[0]
    picture = base64.b64encode(random.Random(1).randbytes(60_000)).decode()
    files.rows[index]["completion"] = f"Here it is: ![plot](data:image/png;base64,{picture})."
    return [index]


def a_response_of_one_letter(files: Files) -> Locations:
    chosen = files.some(2)
    for index, text in zip(chosen, ("B", "k.")):
        files.rows[index]["rejected"] = text
    return chosen


def longer_than_the_limit(files: Files) -> Locations:
    """Long, but not by so much that they are outliers among the others."""
    chosen = files.some(3)
    for index in chosen:
        files.rows[index]["completion"] = " ".join(TextWriter(index).sentences(60).split(" ")[:430]) + "."
    return chosen


def put_longer(files: Files, longer: str, shorter: str, share: float) -> None:
    """Makes the response of a column the longer one in a share of the pairs whose prompts come once."""
    counts = Counter(row["prompt"] for row in files.rows)
    for row in files.rows:
        if counts[row["prompt"]] == 1:
            texts = sorted((row["chosen"], row["rejected"]), key=lambda text: -len(text.split()))
            names = (longer, shorter) if files.rng.random() < share else (shorter, longer)
            row |= dict(zip(names, texts))


def chosen_is_longer(files: Files) -> None:
    put_longer(files, "chosen", "rejected", 0.75)


def chosen_is_shorter(files: Files) -> None:
    put_longer(files, "chosen", "rejected", 0.25)


def ratings_follow_the_length(files: Files) -> None:
    for row in files.rows:
        words = len(row["response"].split())
        row["rating"] = min(5, max(1, round(words / 20 + files.rng.gauss(0, 0.8))))


def rankings_by_length(files: Files) -> None:
    for row in files.rows:
        if files.rng.random() < 0.7:
            by_length = sorted(row["responses"], key=lambda text: -len(text.split()))
            row["ranks"] = [by_length.index(response) + 1 for response in row["responses"]]


PLANTS: list[Plant] = [
    Plant("cut-off-texts", max_tokens_of_a_generator, "completion", among=True),
    Plant("cut-off-texts", max_tokens_that_cuts_half_of_them, "completion", among=True),
    Plant("cut-off-texts", column_of_255_characters, "completion", among=True),
    Plant("cut-off-texts", last_sentence_is_half, "completion", among=True),
    Plant("cut-off-texts", end_of_turn_is_missing, "completion", among=True),
    Plant("odd-characters", utf_8_read_as_latin_1, "completion"),
    Plant("odd-characters", invisible_characters, "prompt"),
    Plant("odd-characters", joiners_between_latin_letters, "pair"),
    Plant("odd-characters", replacement_and_control_characters, "pair"),
    Plant("odd-characters", half_a_surrogate_pair, "completion"),
    Plant("control-tokens", end_of_turn_of_chatml, "completion"),
    Plant("control-tokens", markers_of_llama_and_mistral, "completion"),
    Plant("control-tokens", turns_of_gemma, "completion"),
    Plant("control-tokens", tokens_of_other_families, "completion"),
    Plant("control-tokens", pad_token_of_the_tokenizer, "completion", template="chatml"),
    Plant("outlier-lengths", a_whole_book_in_one_row, "completion"),
    Plant("outlier-lengths", log_file_in_the_prompt, "pair"),
    Plant("outlier-lengths", picture_in_base64, "completion"),
    Plant("outlier-lengths", a_response_of_one_letter, "pair"),
    Plant("outlier-lengths", longer_than_the_limit, "completion", options=("--max-length", "400")),
    Plant("length-bias", chosen_is_longer, "pair"),
    Plant("length-bias", chosen_is_shorter, "pair"),
    Plant("length-bias", ratings_follow_the_length, "rating"),
    Plant("length-bias", rankings_by_length, "ranking"),
]
