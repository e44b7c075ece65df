"""Rows as tokens: which turns are trained, what fits the model, and what special tokens in texts mean."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from align.config.schema import Experiment, SftSettings, SourceSettings
from align.data.datasets import Datasets, context_length, read_datasets
from align.data.examples import (
    TokenizedDemonstration,
    TokenizedSteps,
    demonstration_parser,
    pieces_of,
    preference_parser,
    request_parser,
    step_parser,
    truncated,
)
from align.data.parsing import RowTooLong
from align.data.readers import read_rows
from align.roles.build import SFT_ROLE
from align.stages.pipeline import load_datasets
from align.supervised.objective import SupervisedModule
from align.supervised.sft_objective import SftObjective
from policies.build import build_trunk
from policies.errors import UserError
from policies.schema import ModelSettings, PolicySettings
from policies.text.encoder import TextEncoder
from rewards.schema import FitSettings, RewardSettings
from rewards.terms.process import ProcessTerm
from rollouts.schema import RolloutSettings
from tests.align.supervised.toy import local_learners
from tests.integration.tiny_run import make_settings, write_rows
from tests.policies.text.layouts import LAYOUTS, make_tokenizer

CONVERSATION = [
    {"role": "user", "content": "My lamp is broken."},
    {"role": "assistant", "content": "Is the bulb old?"},
    {"role": "user", "content": "No, it is new."},
    {"role": "assistant", "content": "Then check the fuse."},
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


@pytest.fixture(scope="module")
def chat() -> TextEncoder:
    return TextEncoder(make_tokenizer(LAYOUTS["qwen 2.5"]))


def trained_texts(encoder: TextEncoder, demonstration: TokenizedDemonstration) -> list[str]:
    return [encoder.tokenizer.decode(demonstration.ids[start:end]) for start, end in demonstration.turns]


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        ("all", ["Is the bulb old?<|im_end|>", "Then check the fuse.<|im_end|>"]),
        ("last", ["Then check the fuse.<|im_end|>"]),
    ],
)
def test_the_setting_says_which_turns_are_trained(chat: TextEncoder, turns: Any, texts: list[str]) -> None:
    parse = demonstration_parser(chat, SftSettings(turns=turns), None)
    assert trained_texts(chat, parse({"messages": CONVERSATION})) == texts


def test_a_completion_is_the_only_turn_that_is_trained(chat: TextEncoder) -> None:
    parse = demonstration_parser(chat, SftSettings(), None)
    row = {"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1:]}
    assert trained_texts(chat, parse(row)) == ["Then check the fuse.<|im_end|>"]


def test_turns_that_are_never_sampled_as_they_are_trained_are_refused() -> None:
    encoder = TextEncoder(make_tokenizer(LAYOUTS["qwen 3"]))
    with pytest.raises(ValueError, match=r"set sft\.turns to last"):
        demonstration_parser(encoder, SftSettings(), None)({"messages": CONVERSATION})
    last = demonstration_parser(encoder, SftSettings(turns="last"), None)({"messages": CONVERSATION})
    assert len(last.turns) == 1


@pytest.mark.parametrize("tools", [TOOLS, '[{"type": "function", "function": {"name": "look_up", "parameters": {}}}]'])
def test_tools_beside_messages_are_in_the_prompt_of_every_kind_of_row(chat: TextEncoder, tools: Any) -> None:
    prompt = {"prompt": CONVERSATION[:1], "tools": tools}
    request = request_parser(chat, RolloutSettings(), None)(prompt)
    demonstration = demonstration_parser(chat, SftSettings(), None)({"messages": CONVERSATION[:2], "tools": tools})
    pair = prompt | {"chosen": "Is the bulb old?", "rejected": "No."}
    preference = preference_parser(chat, RewardSettings(), None)(pair)
    assert "look_up" in chat.tokenizer.decode(request.prompt_ids)
    assert list(request.prompt_ids) == demonstration.prompt_ids == preference.prompt_ids
    assert request.columns == {"tools": tools}


@pytest.mark.parametrize(("tools", "reason"), [("call me", "`tools` is 'call me'"), ([1], r"`tools` is \[1\]")])
def test_tools_that_are_no_list_of_schemas_are_refused(chat: TextEncoder, tools: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        demonstration_parser(chat, SftSettings(), None)({"messages": CONVERSATION, "tools": tools})


def test_tools_beside_a_plain_text_are_refused_where_they_would_be_dropped(chat: TextEncoder) -> None:
    row = {"prompt": "a", "completion": "b", "tools": TOOLS}
    with pytest.raises(ValueError, match="`tools` needs messages"):
        demonstration_parser(chat, SftSettings(), None)(row)
    assert request_parser(chat, RolloutSettings(), None)({"prompt": "a", "tools": TOOLS}).columns == {"tools": TOOLS}


def test_the_loss_is_over_every_turn_and_nothing_else(tiny_model: Path) -> None:
    trunk = build_trunk(ModelSettings(path=str(tiny_model)), PolicySettings(), (SFT_ROLE,))
    ids = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    demonstrations = [TokenizedDemonstration(ids, [(2, 4), (7, 12)]), TokenizedDemonstration(ids[:5], [(1, 5)])]
    logprobs = torch.log_softmax(trunk.causal(torch.tensor([ids])).logits[0].double(), -1)
    expected = 0.0
    for token in (2, 3, 7, 8, 9, 10, 11, 1, 2, 3, 4):
        expected -= float(logprobs[token - 1, ids[token]])
    trunk.train_only(SFT_ROLE)
    objective = SftObjective(SupervisedModule(trunk, SFT_ROLE), demonstrations, demonstrations, SftSettings())
    with local_learners(lambda: objective, FitSettings()) as learners:
        assert learners.heldout_metrics()["heldout_loss"] == pytest.approx(expected / 11, rel=1e-5)
        assert learners.train([0, 1], 0, factor=1.0).metrics["loss"] == pytest.approx(expected / 11, rel=1e-5)
        assert learners.heldout_metrics()["heldout_loss"] < expected / 11


# Length


LONG = {"prompt": "two " * 100, "completion": "three"}


def read(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Datasets:
    return read_datasets(experiment, tokenizer, context_length(experiment))


def with_rows(model: Path, folder: Path, source: str, rows: list[dict[str, Any]], **settings: Any) -> Experiment:
    path = write_rows(folder / f"{source}-rows.jsonl", rows)
    base = make_settings(model, folder)
    return Experiment.model_validate(base | {"data": base["data"] | {source: path}} | settings)


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A GPT-2 with 48 positions, beyond which it fails."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=48, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("demonstrations", LONG),
        ("demonstrations", {"text": LONG["prompt"]}),
        ("preferences", {"prompt": LONG["prompt"], "chosen": "three", "rejected": "four"}),
        ("preferences", {"prompt": "two", "chosen": LONG["prompt"], "rejected": "four"}),
        ("prompts", {"prompt": LONG["prompt"]}),
    ],
)
def test_rows_that_the_model_has_no_positions_for_are_refused(
    small_gpt2: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, source: str, row: dict[str, Any]
) -> None:
    experiment = with_rows(small_gpt2, tmp_path, source, [row, row])
    with pytest.raises(UserError, match=rf"data\.{source}: .*:1: .* tokens are more than the model's context length"):
        read(experiment, tiny_tokenizer)


def test_a_soft_prompt_takes_positions(small_gpt2: Path, tmp_path: Path) -> None:
    settings = make_settings(small_gpt2, tmp_path)
    assert context_length(Experiment.model_validate(settings)) == 48
    settings["policy"] = {"method": "prompt_tuning", "virtual_tokens": 8}
    assert context_length(Experiment.model_validate(settings)) == 40


def test_the_message_says_which_limit_keeps_every_row(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "two " * count, "completion": "three"} for count in (60, 10, 90, 80)]
    experiment = with_rows(tiny_model, tmp_path, "demonstrations", rows, sft={"max_tokens": 50})
    longest = demonstration_parser(TextEncoder(tiny_tokenizer), SftSettings(max_tokens=10**6), None)(rows[2]).length
    with pytest.raises(UserError, match=rf"\nsft\.max_tokens={longest} keeps every row that is too long\n"):
        read(experiment, tiny_tokenizer)
    enough = experiment.model_copy(update={"sft": SftSettings(max_tokens=longest)})
    datasets = read(enough, tiny_tokenizer)
    assert len(datasets.demonstrations) + len(datasets.demonstrations_heldout) == 4


# Special tokens


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("demonstrations", {"prompt": "a</s>b", "completion": "c"}),
        ("demonstrations", {"prompt": "a", "completion": "c</s>d"}),
        ("demonstrations", {"text": "c</s>d"}),
        ("preferences", {"prompt": "a", "chosen": "c</s>d", "rejected": "e"}),
        ("preferences", {"prompt": "a", "responses": ["b", "c</s>d"], "ranks": [1, 2]}),
        ("prompts", {"prompt": "a</s>b"}),
    ],
)
def test_a_special_token_in_a_row_is_refused_by_name(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, source: str, row: dict[str, Any]
) -> None:
    experiment = with_rows(tiny_model, tmp_path, source, [row, row])
    with pytest.raises(UserError, match=r":1: the text contains the special token '</s>': set data\.special_tokens"):
        read(experiment, tiny_tokenizer)


@pytest.mark.parametrize("choice", ["control", "text"])
def test_special_tokens_in_rows_can_be_allowed_in_two_meanings(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, choice: str
) -> None:
    rows = [{"prompt": f"a</s>{n}", "completion": "c"} for n in range(4)]
    experiment = with_rows(tiny_model, tmp_path, "demonstrations", rows)
    allowed = experiment.model_copy(update={"data": experiment.data.model_copy(update={"special_tokens": choice})})
    eos = tiny_tokenizer.eos_token_id
    for demonstration in read(allowed, tiny_tokenizer).demonstrations:
        assert demonstration.prompt_ids.count(eos) == (choice == "control")
        assert demonstration.ids[-1] == eos


# Held-out rows


def test_demonstrations_that_share_a_prompt_have_a_heldout_source(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "Say a number:", "completion": f" {n}"} for n in range(9)]
    experiment = with_rows(tiny_model, tmp_path, "demonstrations", rows)
    with pytest.raises(UserError, match=r"1 different prompt cannot be split in two; set data\.demonstrations_heldout"):
        read(experiment, tiny_tokenizer)
    heldout = write_rows(tmp_path / "heldout.jsonl", rows[:2])
    data = experiment.data.model_copy(update={"demonstrations_heldout": SourceSettings(path=heldout)})
    chosen = experiment.model_copy(update={"data": data})
    datasets = read(chosen, tiny_tokenizer)
    assert (len(datasets.demonstrations), len(datasets.demonstrations_heldout)) == (9, 2)


@pytest.mark.parametrize(
    ("where", "ids", "turns"),
    [("end", range(6), [(2, 4)]), ("start", range(4, 10), [(3, 6)])],
)
def test_a_long_demonstration_is_cut_where_the_setting_says(
    where: Literal["start", "end"], ids: range, turns: list[tuple[int, int]]
) -> None:
    demonstration = TokenizedDemonstration(list(range(10)), [(2, 4), (7, 10)])
    cut = truncated(demonstration, 6, where)
    assert (cut.ids, cut.turns, cut.was_cut) == (list(ids), turns, True)


def test_the_first_token_that_is_left_predicts_and_is_not_trained() -> None:
    cut = truncated(TokenizedDemonstration(list(range(10)), [(2, 10)]), 4, "start")
    assert (cut.ids, cut.turns) == ([6, 7, 8, 9], [(1, 4)])


@pytest.mark.parametrize(("where", "turn"), [("end", (7, 10)), ("start", (1, 4))])
def test_a_demonstration_that_would_train_nothing_is_not_cut(
    where: Literal["start", "end"], turn: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"cuts off its {where}"):
        truncated(TokenizedDemonstration(list(range(10)), [turn]), 4, where)


def test_a_parser_cuts_rows_only_where_it_is_told_to(chat: TextEncoder) -> None:
    row = {"prompt": "a b c d e f g", "completion": "h i j k"}
    whole = demonstration_parser(chat, SftSettings(), None)(row)
    limit = whole.length - 2
    with pytest.raises(ValueError, match=r"more than sft\.max_tokens"):
        demonstration_parser(chat, SftSettings(max_tokens=limit), None)(row)
    cut = demonstration_parser(chat, SftSettings(max_tokens=limit, truncate="end"), None)(row)
    assert (cut.ids, cut.was_cut, whole.was_cut) == (whole.ids[:limit], True, False)


@given(length=st.integers(2, 60), tokens=st.integers(2, 70))
def test_pieces_of_a_text_train_each_of_its_tokens_once_after_the_one_before_it(length: int, tokens: int) -> None:
    whole = TokenizedDemonstration(list(range(length)), [(1, length)])
    pieces = pieces_of(whole, tokens)
    assert all(2 <= piece.length <= tokens or piece == whole for piece in pieces)
    trained = []
    for piece in pieces:
        for start, end in piece.turns:
            trained += [(piece.ids[i - 1], piece.ids[i]) for i in range(start, end)]
    assert trained == [(token - 1, token) for token in range(1, length)]


def test_only_texts_are_split(chat: TextEncoder) -> None:
    settings = SftSettings(max_tokens=6, truncate="split")
    parse = demonstration_parser(chat, settings, None)
    text = parse({"text": "a b c d e f g h i j"})
    assert text.length > 6
    assert len(pieces_of(text, 6)) > 1
    with pytest.raises(ValueError, match=r"more than sft\.max_tokens"):
        parse({"prompt": "a b c d e f g", "completion": "h i j k"})


def test_documents_are_rows_and_are_split_in_a_run(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["stages"] = ["sft"]
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.{'md' if number % 2 else 'txt'}").write_text("red cat " * (20 + number))
    settings["data"]["demonstrations"] = str(folder)
    settings["sft"] |= {"max_tokens": 16, "truncate": "split"}
    datasets = load_datasets(Experiment.model_validate(settings))
    assert max(example.length for example in datasets.demonstrations) == 16
    assert len(datasets.demonstrations) > 20
    settings["sft"]["truncate"] = None
    with pytest.raises(UserError, match=r"0\.txt: .* more than sft\.max_tokens, 16"):
        load_datasets(Experiment.model_validate(settings))


def test_documents_beside_tables_are_not_rows(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("About the data.")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert [row.values for row in read_rows(SourceSettings(path=str(tmp_path)))] == [{"text": "a"}]
    assert read_rows(SourceSettings(path=str(tmp_path / "README.md")))[0].values == {"text": "About the data."}


def steps_of(encoder: TextEncoder, values: dict[str, Any], separator: str = "\n") -> TokenizedSteps:
    term = ProcessTerm(kind="process", separator=separator)
    return step_parser(encoder, term, max_tokens=100, max_positions=None)(values)


@pytest.mark.parametrize("prompt", ["Is it new?", CONVERSATION[:1]])
def test_a_labelled_step_is_read_where_its_text_is_complete(chat: TextEncoder, prompt: Any) -> None:
    row = {"prompt": prompt, "steps": ["The bulb is 日.", "So, no. ", "Yes"], "labels": [1, None, 0.5]}
    example = steps_of(chat, row)
    decoded = [chat.tokenizer.decode(example.ids[example.prompt_length : end + 1]) for end in example.ends]
    assert [text.rstrip("\n") for text in decoded] == ["The bulb is 日.", "The bulb is 日.\nSo, no. \nYes"]
    before = [chat.tokenizer.decode(example.ids[example.prompt_length : end]) for end in example.ends]
    assert not before[0].startswith("The bulb is 日.")
    assert not before[1].endswith("Yes")
    assert example.labels == [1.0, 0.5]
    assert example.prompt_ids == chat.prompt(prompt)
    assert not example.has_inner_marks


def test_a_step_that_contains_the_separator_is_noted(chat: TextEncoder) -> None:
    row = {"prompt": "a", "steps": ["The bulb\n\nis new.", "Yes"], "labels": [1, 0]}
    assert steps_of(chat, row, "\n\n").has_inner_marks
    assert not steps_of(chat, row, "\n\n\n").has_inner_marks
    with pytest.raises(RowTooLong, match=r"more than reward\.max_tokens, 100"):
        steps_of(chat, row | {"prompt": "a " * 100})


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([3, 0], {"label_smoothing": 0.1}, "reward.label_smoothing has no effect where the labels of data.step_labels"),
        ([1], {}, r"data.step_labels: .*steps.jsonl:1: 1 `labels` for 2 `steps`"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(
    labels: list[float], settings: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{number}", "steps": ["a", "b"], "labels": labels} for number in range(20)]
    experiment = step_experiment(tiny_model, tmp_path, rows, settings)
    with pytest.raises(UserError, match=message):
        load_datasets(experiment)


def test_held_out_labels_are_of_the_kind_of_the_others(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}", "steps": ["a", "b"], "labels": [1, 0]} for number in range(20)]
    assert len(load_datasets(step_experiment(tiny_model, tmp_path, rows, {})).step_labels) == 18
    others = write_rows(tmp_path / "others.jsonl", [rows[0] | {"labels": [2, 0]}])
    experiment = step_experiment(tiny_model, tmp_path, rows, {}, step_labels_heldout=others)
    with pytest.raises(UserError, match=r"data\.step_labels_heldout has labels beyond 0 to 1"):
        load_datasets(experiment)


def test_a_source_of_the_other_kind_is_named(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["reward"]}
    settings["reward"]["terms"] = {"process": {"kind": "process"}}
    with pytest.raises(UserError, match=r"data.step_labels is not set, .* preferences is a term of kind model"):
        load_datasets(Experiment.model_validate(settings))
    del settings["reward"]["terms"]
    settings["data"]["step_labels"] = settings["data"].pop("preferences")
    with pytest.raises(UserError, match=r"data.preferences is not set, .*\{process: \{kind: process\}\}"):
        load_datasets(Experiment.model_validate(settings))


def step_experiment(
    model: Path, folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any], **sources: str
) -> Experiment:
    made = make_settings(model, folder) | {"stages": ["reward"]}
    made["data"] |= {"step_labels": write_rows(folder / "steps.jsonl", rows), **sources}
    made["reward"] = {"terms": {"process": {"kind": "process"}}} | settings
    return Experiment.model_validate(made)
