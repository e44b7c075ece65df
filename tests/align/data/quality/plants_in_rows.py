"""Faults of whole rows: copies, empty fields, prompts that are held out, and rows that cannot be read."""

import json

from tests.align.data.quality.clean_files import Row, clean_rows
from tests.align.data.quality.plant import SECOND, Files, Locations, Plant


def file_concatenated_twice(files: Files) -> Locations:
    count = len(files.rows)
    files.rows += files.rows
    return range(count, 2 * count)


def single_row_again_far_away(files: Files) -> Locations:
    files.rows[377] = files.copy_of(3)
    return [377]


def same_prompt_with_keys_in_another_order(files: Files) -> Locations:
    for original, index in ((0, 120), (57, 121), (200, 399)):
        files.rows[index] = dict(reversed(files.copy_of(original).items()))
    return [120, 121, 399]


def conversation_again_in_a_second_file(files: Files) -> Locations:
    files.second = [*clean_rows("messages", 12, 50), files.copy_of(9), files.copy_of(10)]
    return [f"{SECOND}:51", f"{SECOND}:52"]


def long_response(row: Row) -> bool:
    return row["prompt"].isascii() and len(row["chosen"].split()) > 40


def other_case_and_punctuation(files: Files) -> Locations:
    originals = files.some(20, lambda row: row["prompt"].isascii() and len(row["prompt"].split()) > 8)
    copies = [350, 351, 352, 353]
    for original, index in zip((i for i in originals if i < 350), copies):
        files.rows[index] = files.copy_of(original, prompt=files.rows[original]["prompt"].upper().rstrip("?.") + "!!")
    return copies


def one_word_changed(files: Files) -> Locations:
    originals = [i for i in files.some(12, long_response) if i < 300][:3]
    copies = [390, 391, 392]
    for original, index in zip(originals, copies):
        words = files.rows[original]["chosen"].split(" ")
        words[20] = "nevertheless"
        files.rows[index] = files.copy_of(original, chosen=" ".join(words))
    return copies


def line_breaks_and_double_spaces(files: Files) -> Locations:
    originals = [i for i in files.some(20, lambda row: len(row["completion"].split()) > 20) if i < 300][:2]
    for original, index in zip(originals, (380, 381)):
        row = files.rows[original]
        text = row["completion"].replace(". ", ".\n").replace(" the ", "  the ")
        files.rows[index] = files.copy_of(original, completion=text, prompt=f" {row['prompt']}\n")
    return [380, 381]


def response_with_a_polite_opening(files: Files) -> Locations:
    originals = [i for i in files.some(20, lambda row: len(row["completion"].split()) > 40) if i < 300][:2]
    for original, index in zip(originals, (383, 384)):
        files.rows[index] = files.copy_of(original, completion=f"Certainly! {files.rows[original]['completion']}")
    return [383, 384]


def empty_completion(files: Files) -> Locations:
    chosen = files.some(3)
    for index, value in zip(chosen, ("", None, "  \n\t ")):
        files.rows[index]["completion"] = value
    return chosen


def rejected_response_of_white_space(files: Files) -> Locations:
    chosen = files.some(2)
    files.rows[chosen[0]]["rejected"] = " \u00a0\n"
    files.rows[chosen[1]]["rejected"] = None
    return chosen


def empty_message_and_empty_item(files: Files) -> Locations:
    chosen = files.some(2)
    files.rows[chosen[0]]["messages"][-1]["content"] = ""
    files.rows[chosen[1]]["messages"] = []
    return chosen


def one_empty_response_of_a_ranking(files: Files) -> Locations:
    chosen = files.some(2)
    for index in chosen:
        files.rows[index]["responses"][1] = ""
    return chosen


def empty_prompt(files: Files) -> Locations:
    chosen = files.some(2)
    for index in chosen:
        files.rows[index]["prompt"] = " "
    return chosen


def heldout_prompts(files: Files) -> list[Row]:
    """Prompts that are in no file yet."""
    return clean_rows("prompt", 77, 60)


def heldout_prompt_verbatim(files: Files) -> Locations:
    files.heldout = heldout_prompts(files)
    chosen = files.some(5)
    for index, heldout in zip(chosen, files.heldout[20:]):
        files.rows[index]["prompt"] = heldout["prompt"]
    return chosen


def heldout_prompt_in_other_case(files: Files) -> Locations:
    files.heldout = [row for row in heldout_prompts(files) if row["prompt"].isascii()]
    chosen = files.some(3)
    for index, heldout in zip(chosen, files.heldout):
        files.rows[index]["prompt"] = heldout["prompt"].lower().rstrip("?.!")
    return chosen


def heldout_prompt_as_the_first_message(files: Files) -> Locations:
    files.heldout = heldout_prompts(files)
    chosen = files.some(2, lambda row: len(row["messages"]) > 3 and row["messages"][0]["role"] == "user")
    for index, heldout in zip(chosen, files.heldout):
        files.rows[index]["messages"][0]["content"] = heldout["prompt"]
    return chosen


def heldout_prompt_in_a_transcript(files: Files) -> Locations:
    files.heldout = heldout_prompts(files)
    chosen = files.some(2)
    for index, heldout in zip(chosen, files.heldout):
        files.rows[index]["chosen"] = f"\n\nHuman: {heldout['prompt']}\n\nAssistant: Yes, certainly, by tomorrow."
        files.rows[index]["rejected"] = f"\n\nHuman: {heldout['prompt']}\n\nAssistant: No, not today, I am afraid."
    return chosen


def last_line_cut_off(files: Files) -> Locations:
    files.rows[-1] = json.dumps(files.rows[-1])[:-40]
    return [len(files.rows) - 1]


def values_of_a_wrong_type(files: Files) -> Locations:
    chosen = files.some(3)
    for index, value in zip(chosen, ("very good", [3], "5/5")):
        files.rows[index]["rating"] = value
    return chosen


def impossible_ranks_and_json_of_other_kinds(files: Files) -> Locations:
    chosen = files.some(4)
    files.rows[chosen[0]]["ranks"].append(9)
    files.rows[chosen[1]] = '["a list", "in place of a row"]'
    files.rows[chosen[2]] = '{"prompt": "Twice?", "prompt": "Yes.", "responses": ["A b.", "C d."], "ranks": [1, 2]}'
    files.rows[chosen[3]]["responses"] = "['one', 'two']"
    return chosen


def misspelt_column(files: Files) -> Locations:
    chosen = files.some(3)
    for index in chosen:
        files.rows[index]["reponse"] = files.rows[index].pop("response")
    return chosen


def score_of_some_rows_is_text(files: Files) -> Locations:
    for row in files.rows:
        row["score"] = round(files.rng.random(), 3)
    chosen = files.some(4)
    for index in chosen:
        files.rows[index]["score"] = "n/a"
    return chosen


PLANTS: list[Plant] = [
    Plant("exact-duplicates", file_concatenated_twice, "completion"),
    Plant("exact-duplicates", single_row_again_far_away, "transcripts"),
    Plant("exact-duplicates", same_prompt_with_keys_in_another_order, "prompt"),
    Plant("exact-duplicates", conversation_again_in_a_second_file, "messages"),
    Plant("near-duplicates", other_case_and_punctuation, "prompt"),
    Plant("near-duplicates", one_word_changed, "pair"),
    Plant("near-duplicates", line_breaks_and_double_spaces, "completion"),
    Plant("near-duplicates", response_with_a_polite_opening, "completion"),
    Plant("empty-fields", empty_completion, "completion"),
    Plant("empty-fields", rejected_response_of_white_space, "pair"),
    Plant("empty-fields", empty_message_and_empty_item, "messages"),
    Plant("empty-fields", one_empty_response_of_a_ranking, "ranking"),
    Plant("empty-fields", empty_prompt, "prompt"),
    Plant("heldout-overlap", heldout_prompt_verbatim, "completion"),
    Plant("heldout-overlap", heldout_prompt_in_other_case, "pair"),
    Plant("heldout-overlap", heldout_prompt_as_the_first_message, "messages"),
    Plant("heldout-overlap", heldout_prompt_in_a_transcript, "transcripts"),
    Plant("unreadable-rows", last_line_cut_off, "completion"),
    Plant("unreadable-rows", values_of_a_wrong_type, "rating"),
    Plant("unreadable-rows", impossible_ranks_and_json_of_other_kinds, "ranking"),
    Plant("unreadable-rows", misspelt_column, "rating"),
    Plant("unreadable-rows", score_of_some_rows_is_text, "prompt"),
]
