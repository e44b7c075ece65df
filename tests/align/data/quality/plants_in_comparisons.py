"""Faults of what annotators say: labels that are nearly all alike, equal responses and contradictions."""

from tests.align.data.quality.clean_files import Row
from tests.align.data.quality.plant import Files, Locations, Plant


def nearly_all_ratings_are_five(files: Files) -> None:
    for row in files.rows:
        if files.rng.random() < 0.9:
            row["rating"] = 5


def first_response_is_always_the_best(files: Files) -> None:
    for row in files.rows:
        row["best"] = 0


def most_pairs_are_ties(files: Files) -> None:
    for row in files.rows:
        row["tie"] = files.rng.random() < 0.65


def nearly_all_labels_are_positive(files: Files) -> None:
    for row in files.rows:
        row["label"] = int(files.rng.random() < 0.93)


def response_twice_in_a_pair(files: Files) -> Locations:
    chosen = files.some(3, lambda row: not row["tie"])
    for index in chosen:
        files.rows[index]["rejected"] = files.rows[index]["chosen"]
    return chosen


def transcripts_equal_but_for_white_space(files: Files) -> Locations:
    chosen = files.some(2)
    for index in chosen:
        before, turn, response = files.rows[index]["chosen"].rpartition("\n\nAssistant:")
        files.rows[index]["rejected"] = before + turn + response.replace(". ", ".  ") + " \n"
    return chosen


def response_twice_in_a_ranking(files: Files) -> Locations:
    chosen = files.some(2, lambda row: len(row["responses"]) > 2 and len(set(row["ranks"])) == len(row["ranks"]))
    for index in chosen:
        files.rows[index]["responses"][2] = files.rows[index]["responses"][0]
    return chosen


def same_reply_in_a_pair_of_messages(files: Files) -> Locations:
    chosen = files.some(2)
    for index in chosen:
        files.rows[index]["rejected"] = files.rows[index]["chosen"]
    return chosen


def pair_the_other_way_round(files: Files) -> Locations:
    row = files.rows[40]
    files.rows[40]["tie"] = False
    files.rows[333] = files.copy_of(40, chosen=row["rejected"], rejected=row["chosen"])
    return [40, 333]


def ranking_the_other_way_round(files: Files) -> Locations:
    index = files.some(1, lambda row: len(row["responses"]) == 4 and len(set(row["ranks"])) == 4)[0]
    other = (index + 150) % len(files.rows)
    files.rows[other] = files.copy_of(index, ranks=[5 - rank for rank in files.rows[index]["ranks"]])
    return [index, other]


def pair_against_a_ranking(files: Files) -> Locations:
    index = files.some(1, lambda row: len(row.get("responses", [])) == 3 and len(set(row["ranks"])) == 3)[0]
    ranking = files.rows[index]
    best, _, worst = (ranking["responses"][ranking["ranks"].index(rank)] for rank in (1, 2, 3))
    other = (index + 200) % len(files.rows)
    files.rows[other] = pair_row(ranking["prompt"], chosen=worst, rejected=best)
    return [index, other]


def pair_row(prompt: str, chosen: str, rejected: str) -> Row:
    return {"id": "new", "prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": False, "source": "batch 1"}


def circle_of_three_pairs(files: Files) -> Locations:
    prompt = "Which of the three is the best opening for a letter to the council about the lamp?"
    first, second, third = (
        "Dear Sir or Madam, good day.",
        "To whom it may concern: hello.",
        "Hey you over there, listen!",
    )
    for index, (chosen, rejected) in zip((20, 180, 310), ((first, second), (second, third), (third, first))):
        files.rows[index] = pair_row(prompt, chosen, rejected)
    return [20, 180, 310]


PLANTS: list[Plant] = [
    Plant("label-imbalance", nearly_all_ratings_are_five, "rating"),
    Plant("label-imbalance", first_response_is_always_the_best, "choice"),
    Plant("label-imbalance", most_pairs_are_ties, "pair"),
    Plant("label-imbalance", nearly_all_labels_are_positive, "text"),
    Plant("equal-pairs", response_twice_in_a_pair, "pair"),
    Plant("equal-pairs", transcripts_equal_but_for_white_space, "transcripts"),
    Plant("equal-pairs", response_twice_in_a_ranking, "ranking"),
    Plant("equal-pairs", same_reply_in_a_pair_of_messages, "message_pair"),
    Plant("contradicting-rankings", pair_the_other_way_round, "pair"),
    Plant("contradicting-rankings", ranking_the_other_way_round, "ranking"),
    Plant("contradicting-rankings", pair_against_a_ranking, "mixed"),
    Plant("contradicting-rankings", circle_of_three_pairs, "pair"),
]
