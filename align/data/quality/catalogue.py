"""All checks: what each finds, when that is a problem, and what to do.

`python -m align.data.quality.catalogue` prints the table in docs/data-check.md.
"""

from align.data.quality.characters import find_control_tokens, find_odd_characters
from align.data.quality.check import DataCheck
from align.data.quality.corpus import Corpus
from align.data.quality.duplicates import find_echoes, find_exact_duplicates, find_heldout_overlap, find_near_duplicates
from align.data.quality.endings import find_cut_off
from align.data.quality.judgements import find_contradictions, find_label_imbalance, find_length_bias
from align.data.quality.lengths import find_outlier_lengths
from align.data.quality.rendering import find_template_failures
from align.data.quality.structure import find_empty_fields, find_equal_pairs, find_turn_order, find_unreadable


def _needs_preferences(corpus: Corpus) -> str | None:
    return None if corpus.kind == "preferences" else "for preferences"


def _needs_responses(corpus: Corpus) -> str | None:
    return "prompts have no responses" if corpus.kind == "prompts" else None


def _needs_model(corpus: Corpus) -> str | None:
    return None if corpus.encoder else "needs --model"


def _needs_heldout(corpus: Corpus) -> str | None:
    return None if corpus.heldout is not None else "needs --heldout"


CHECKS = (
    DataCheck(
        kind="exact-duplicates",
        finds="rows whose texts and preference are those of an earlier row, whatever their other columns are",
        problem_when="always",
        advice="`drop-exact-duplicates` keeps the first of each",
        find=find_exact_duplicates,
    ),
    DataCheck(
        kind="near-duplicates",
        finds="rows that differ from an earlier one in case, punctuation or few words: a Jaccard similarity of 0.8 of "
        "the pairs of adjacent words (0.6 in the prompt and in each response alone), and the same numbers",
        problem_when="at least 0.2 % of the rows",
        advice="`drop-near-duplicates` keeps the first of each",
        find=find_near_duplicates,
    ),
    DataCheck(
        kind="empty-fields",
        finds="a column of the row's form, a message or a response without text",
        problem_when="always",
        advice="`drop-empty` drops the rows",
        find=find_empty_fields,
    ),
    DataCheck(
        kind="cut-off-texts",
        finds="responses, or prompts where there are no others, that end in a part of a word, a function word, a comma "
        "or something opened; prose without the end, of a sentence or by a token, that at least 80 % have; the longest "
        "texts where fewer have an end; and many of one greatest length",
        problem_when="at least 3 and a third of them end so, or in a word that seldom ends a sentence; or many "
        "are of one length",
        advice="raise the limit of what wrote them, or `drop-cut-off`",
        find=find_cut_off,
    ),
    DataCheck(
        kind="odd-characters",
        finds="mojibake, U+FFFD, control, invisible and private characters, halves of surrogate pairs",
        problem_when="always",
        advice="`normalise-unicode` mends all but U+FFFD; `drop-odd-characters` drops the rows",
        find=find_odd_characters,
    ),
    DataCheck(
        kind="control-tokens",
        finds="the text of a special token: of the tokenizer with `--model`, and of widespread models, such as "
        "`<|im_end|>`, `</s>` and `[INST]`",
        problem_when="fewer than 80 % of the rows have one; otherwise a chat template has rendered them, and "
        "`data.special_tokens` should be `control`",
        advice="`strip-control-tokens` removes them",
        find=find_control_tokens,
    ),
    DataCheck(
        kind="chat-template-failures",
        finds="messages on which the model's chat template fails, or of which it drops a part: the text of a message "
        "by the system, the user or the assistant is not whole in what it renders, white space aside",
        problem_when="always",
        advice="mend the messages, or give the tokenizer a chat template that renders them",
        find=find_template_failures,
        missing=_needs_model,
    ),
    DataCheck(
        kind="heldout-overlap",
        finds="rows whose prompt, or first message by the user, is in a file of `--heldout`, "
        "compared as near duplicates are",
        problem_when="always",
        advice="`drop-heldout-overlap` drops the rows",
        find=find_heldout_overlap,
        missing=_needs_heldout,
    ),
    DataCheck(
        kind="label-imbalance",
        finds="the shares of the values of `label`, `rating`, `best` and `tie`",
        problem_when="one value has at least 80 %, or ties are at least half of the rows",
        advice="collect more of the others, or weigh them; of labels that are all alike nothing is learned",
        find=find_label_imbalance,
    ),
    DataCheck(
        kind="equal-pairs",
        finds="two responses of a comparison that are the same, white space aside",
        problem_when="always",
        advice="`drop-equal-pairs` drops the rows",
        find=find_equal_pairs,
        missing=_needs_preferences,
    ),
    DataCheck(
        kind="contradicting-rankings",
        finds="rows that order the same responses to the same prompt in opposite ways, or in a circle",
        problem_when="always",
        advice="decide which are right, or `drop-contradictions`",
        find=find_contradictions,
        missing=_needs_preferences,
    ),
    DataCheck(
        kind="length-bias",
        finds="how often the longer response is preferred, the best one compared with the last; for ratings, their "
        "rank correlation with lengths",
        problem_when="the 95 % interval is above 60 % or below 40 %; of a correlation, beyond 0.3",
        advice="add pairs in which the other one is better, or give PPO a term of the kind `length`",
        find=find_length_bias,
        missing=_needs_preferences,
    ),
    DataCheck(
        kind="unreadable-rows",
        finds="rows that a run would refuse, for reasons that no other check names; and, of columns that align does "
        "not read, those that fewer than 5 % of the rows of a file have, lack or have in another type",
        problem_when="always",
        advice="mend the rows, or `drop-unreadable`; `--column` renames columns",
        find=find_unreadable,
    ),
    DataCheck(
        kind="outlier-lengths",
        finds="rows longer than the limit; and a prompt or response beyond the quartiles by three interquartile "
        "ranges of the logarithm of the length, and by a factor of 4, or of 20 where it is short",
        problem_when="always",
        advice="`limit-length` drops what is longer than `--max-length`, and `drop-outlier-lengths` both",
        find=find_outlier_lengths,
    ),
    DataCheck(
        kind="turn-order",
        finds="two turns of one speaker in a row, a system message that is not first, a conversation that begins or "
        "ends with the wrong speaker, missing and unknown roles; also in transcripts of HH-RLHF",
        problem_when="always",
        advice="mend the conversations, or `drop-turn-order`",
        find=find_turn_order,
    ),
    DataCheck(
        kind="echoed-prompts",
        finds="responses of six words or more that begin with their prompt, or are in it",
        problem_when="at least 5 % of the rows",
        advice="cut the prompt off where generated text was stored with it",
        find=find_echoes,
        missing=_needs_responses,
    ),
)
"""All checks, in the order in which they are listed."""


def checks_table() -> str:
    """The checks as a table in Markdown."""
    lines = ["| kind | what it finds | a problem | what to do |", "|---|---|---|---|"]
    lines += [f"| `{check.kind}` | {check.finds} | {check.problem_when} | {check.advice} |" for check in CHECKS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(checks_table(), end="")
