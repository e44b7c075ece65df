"""Labelled texts: their rows, their tokens, and what their labels mean."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from align.config.classify_settings import ClassifySettings
from align.config.schema import Experiment
from align.data.datasets import Datasets, read_datasets
from align.data.examples import labelled_text_parser
from align.data.labels import (
    Classes,
    Label,
    LabelledText,
    Numbers,
    describe_space,
    label_space,
    read_space,
    space_record,
    verbalizer_ids,
)
from policies.errors import UserError
from policies.text.encoder import TextEncoder
from policies.text.scoring import scoring_tokenizer
from tests.integration.tiny_run import write_rows
from tests.policies.text.layouts import LAYOUTS, make_tokenizer


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def read(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    train: list[dict[str, Any]],
    heldout: list[dict[str, Any]] | None = None,
    *,
    on_bad_row: str = "error",
    **classify: Any,
) -> Datasets:
    data: dict[str, Any] = {"labels": write_rows(folder / "train.jsonl", train), "on_bad_row": on_bad_row}
    if heldout is not None:
        data["labels_heldout"] = write_rows(folder / "heldout.jsonl", heldout)
    settings = {"name": "x", "model": {"path": "m"}, "stages": ["classify"], "data": data, "classify": classify}
    return read_datasets(Experiment.model_validate(settings), tokenizer, None)


@pytest.mark.parametrize(
    ("labels", "task", "space"),
    [
        (["b", "a", "b"], None, Classes(("a", "b"))),
        ([10, 9, 10], None, Classes((9, 10))),
        ([True, False, True], None, Classes(("false", "true"))),
        ([1.0, 3.0, 2, 2], None, Numbers(2.0, 0.5**0.5)),
        ([1, 3], "regression", Numbers(2.0, 1.0)),
        (["1.5", "2.5"], "regression", Numbers(2.0, 0.5)),  # as in CSV
        ([1.0, 3.0, 1.0], "classification", Classes((1, 3))),
    ],
)
def test_labels_decide_the_task(
    labels: list[Any], task: Any, space: Any, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    datasets = read(tiny_tokenizer, tmp_path, rows(*labels), rows(*labels), task=task)
    assert datasets.label_space == space
    assert (task is None and isinstance(space, Numbers)) == bool(datasets.notes)
    assert len(datasets.labels) == len(datasets.labels_heldout) == len(labels)


def test_targets_are_the_numbers_of_the_classes_and_standard_scores() -> None:
    def texts(*labels: Label) -> list[LabelledText]:
        return [LabelledText("", [1], label) for label in labels]

    assert Classes(("a", "b", "c")).targets(texts("c", "a", "b")) == [2, 0, 1]
    assert Classes((-1, 7)).targets(texts(7, -1)) == [1, 0]
    assert Numbers(2.0, 4.0).targets(texts(10.0, 2, -2.0)) == [2.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("labels", "task", "said"),
    [
        (["a", 1], None, "labels are both text, such as 'a', and numbers, such as 1: use one kind"),
        (["a", "a"], None, "all labels are 'a': a classifier needs two classes"),
        ([2.0, 2.0], None, "all labels are 2: there is nothing to learn"),
        (["0.5", "0.25", "1"], None, "no two rows have the same label: for numbers, set classify.task to regression"),
    ],
)
def test_labels_that_make_no_task_are_refused(labels: list[Label], task: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        label_space(labels, task)


@pytest.mark.parametrize(
    ("train", "heldout", "settings", "said"),
    [
        (["a", "b", "a"], ["a", "c"], {}, "heldout.jsonl:2: label 'c' is not one of the training labels: 'a', 'b'"),
        ([0, 1, 1], ["1"], {}, "heldout.jsonl:1: label '1' is not one of the training labels: 0, 1"),
        ([0.5, 1.5], [1, "x"], {}, "heldout.jsonl:2: label 'x' is text; a number was expected"),
        ([0, None, 1], None, {}, "train.jsonl:2: no `label`; the row has `text`, `label`"),
        ([0, [1], 1], None, {}, "train.jsonl:2: `label` is a list; text or a number was expected"),
        (["a", " ", "a"], None, {}, "train.jsonl:2: `label` is empty"),
        (
            [1, 0.5],
            None,
            {"task": "classification"},
            "train.jsonl:2: `label` is 0.5, which is no class: text or an integer",
        ),
        ([1, "x"], None, {"task": "regression"}, "train.jsonl:2: `label` is 'x'; a number was expected"),
        ([0, 1, 1], None, {"max_tokens": 2}, "classify.max_tokens, 2"),
        (["a", "a"], None, {}, "data.labels: all labels are 'a': a classifier needs two classes"),
    ],
)
def test_bad_labels_are_reported_with_file_and_line(
    train: list[Any],
    heldout: list[Any] | None,
    settings: dict[str, Any],
    said: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as error:
        read(tiny_tokenizer, tmp_path, rows(*train), None if heldout is None else rows(*heldout), **settings)
    assert said in str(error.value)


def test_a_held_out_row_of_an_unknown_class_may_be_skipped(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    datasets = read(tiny_tokenizer, tmp_path, rows("a", "b", "a"), rows("c", "b"), on_bad_row="skip")
    assert [text.label for text in datasets.labels_heldout] == ["b"]
    assert len(datasets.skipped["labels_heldout"]) == 1


def test_a_class_that_is_held_out_as_a_whole_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    refused = 0
    for place in range(11):  # the row that the split holds out is one of these
        train = rows(*["a", "b"] * 5)
        train.insert(place, {"text": "text c", "label": "c"})
        try:
            datasets = read(tiny_tokenizer, tmp_path, train)
            assert {text.label for text in datasets.labels_heldout} <= {text.label for text in datasets.labels}
        except UserError as error:
            refused += "all rows of class 'c' are among those held out" in str(error)
    assert refused == 1


def test_the_same_text_is_on_one_side_of_a_split(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train = [{"text": f"text {number % 5}", "label": number % 2} for number in range(40)]
    datasets = read(tiny_tokenizer, tmp_path, train)
    kept = {text.text for text in datasets.labels}
    assert not kept & {text.text for text in datasets.labels_heldout}


@pytest.mark.parametrize("kind", ["gpt 2", "llama 2", "qwen 2.5"])
def test_a_text_has_the_tokens_of_the_exported_tokenizer(kind: str) -> None:
    """They end where the tokenizer of an export ends, at the place that a sequence classifier reads."""
    tokenizer = make_tokenizer(LAYOUTS[kind])
    parse = labelled_text_parser(TextEncoder(tokenizer), ClassifySettings(), None)
    exported = scoring_tokenizer(tokenizer)
    for text in ("My lamp is broken.", "a", "It is new"):
        ids = parse({"text": text, "label": 0}).ids
        assert ids == exported(text)["input_ids"]
        assert ids == parse({"prompt": text, "label": 0}).ids
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["llama 2", "qwen 2.5"])
def test_messages_end_with_the_turn_of_the_assistant_or_ask_for_it(kind: str) -> None:
    tokenizer = make_tokenizer(LAYOUTS[kind])
    encoder = TextEncoder(tokenizer)
    parse = labelled_text_parser(encoder, ClassifySettings(), None)
    asked = [{"role": "user", "content": "My lamp is broken."}]
    answered = [*asked, {"role": "assistant", "content": "Is the bulb old?"}]
    assert parse({"prompt": asked, "label": 0}).ids == encoder.prompt(asked)
    ids = parse({"prompt": answered, "label": 0}).ids
    assert ids[-1] in encoder.end_ids
    assert ids == encoder.conversation(answered, "last").ids


@pytest.mark.parametrize("space", [Classes(("a", "b")), Classes((0, 1, 2)), Numbers(0.1, 1 / 3)])
def test_a_label_space_comes_back_from_json(space: Any) -> None:
    restored = read_space(json.loads(json.dumps(space_record(space))), "labels.json")
    assert restored == space
    if isinstance(space, Classes) and isinstance(restored, Classes):
        assert [type(label) for label in restored.labels] == [type(label) for label in space.labels]


def test_a_damaged_record_is_refused() -> None:
    for record in ({}, {"classes": 3}, {"regression": {"mean": "x"}}):
        with pytest.raises(UserError, match=r"labels.json is damaged"):
            read_space(record, "labels.json")


def test_the_plan_names_the_classes_with_their_shares() -> None:
    texts = [LabelledText("", [1], label) for label in ("a", "b", "b", "b")]
    assert describe_space(Classes(("a", "b")), texts) == "2 classes: a 25.0%, b 75.0%"
    many = Classes(tuple(range(20)))
    assert describe_space(many, [LabelledText("", [1], 3)]).endswith("11 0.0% and 8 more")
    assert "mean 0.1 and standard deviation 0.3333" in describe_space(Numbers(0.1, 1 / 3), [])


def test_verbalizers_are_tokens_in_the_order_of_the_classes(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    words = {"no": " two", "yes": " long"}
    ids = verbalizer_ids(words, Classes(("yes", "no")), tiny_tokenizer)
    assert ids is not None
    assert tiny_tokenizer.convert_ids_to_tokens(ids) == tiny_tokenizer.tokenize(" long two")
    assert verbalizer_ids({}, Classes(("yes", "no")), tiny_tokenizer) is None


@pytest.mark.parametrize(
    ("labels", "words", "problem"),
    [
        (["yes", "no"], {"yes": " two"}, "words for the classes 'yes'; the training labels are 'no', 'yes'"),
        (["yes", "no"], {"yes": " two", "no": " long two"}, "verbalizers.no: ' long two' is 2 tokens"),
        ([0.5, 1.5], {"0.5": "red"}, "the labels are numbers"),
    ],
)
def test_verbalizers_that_do_not_fit_the_labels_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, labels: list[Label], words: dict[str, str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        read(tiny_tokenizer, tmp_path, rows(*labels * 20), verbalizers=words)
