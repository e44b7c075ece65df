from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment, SftSettings
from align.data.datasets import Datasets, read_datasets, split_heldout
from align.data.examples import Parser, demonstration_parser, preference_parser, request_parser
from policies.errors import UserError
from policies.text.encoder import TextEncoder
from rewards.schema import RewardSettings
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request
from tests.integration.tiny_run import make_settings, write_rows

PROMPT = "User: name a colour."
DEMONSTRATION = {"prompt": PROMPT, "completion": " blue"}
PAIR = {"prompt": PROMPT, "chosen": " blue", "rejected": " blue, and so is red"}


def make(model: Path, folder: Path, **data: Any) -> Experiment:
    settings = make_settings(model, folder)
    return Experiment.model_validate(settings | {"data": settings["data"] | data})


def read(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, max_positions: int | None = None) -> Datasets:
    return read_datasets(experiment, tokenizer, max_positions)


def requests(tokenizer: PreTrainedTokenizerBase, limit: int, max_positions: int | None) -> Parser[Request]:
    settings = RolloutSettings(max_prompt_tokens=limit, max_new_tokens=8)
    return request_parser(TextEncoder(tokenizer), settings, max_positions)


def tokens(tokenizer: PreTrainedTokenizerBase, *texts: str) -> int:
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def test_a_demonstration_may_fill_the_limit_and_no_more(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    length = tokens(tiny_tokenizer, PROMPT, " blue") + 1
    encoder = TextEncoder(tiny_tokenizer)
    example = demonstration_parser(encoder, SftSettings(max_tokens=length), None)(DEMONSTRATION)
    assert example.ids[-1] == tiny_tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"{length} tokens are more than sft.max_tokens, {length - 1}"):
        demonstration_parser(encoder, SftSettings(max_tokens=length - 1), None)(DEMONSTRATION)


@pytest.mark.parametrize("pair", [PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}])
def test_the_longer_side_of_a_pair_may_fill_the_limit(
    tiny_tokenizer: PreTrainedTokenizerBase, pair: Mapping[str, Any]
) -> None:
    length = tokens(tiny_tokenizer, PROMPT, PAIR["rejected"]) + 1
    preference_parser(TextEncoder(tiny_tokenizer), RewardSettings(max_tokens=length), None)(pair)
    with pytest.raises(ValueError, match=f"{length} tokens are more than reward.max_tokens, {length - 1}"):
        preference_parser(TextEncoder(tiny_tokenizer), RewardSettings(max_tokens=length - 1), None)(pair)


def test_an_attribute_that_has_no_weight_is_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    kind = PAIR | {"attribute": "kind"}
    encoder = TextEncoder(tiny_tokenizer)
    parse = preference_parser(encoder, RewardSettings(attributes={"kind": 1.0}), None)
    assert parse(kind).example.attribute == "kind"
    with pytest.raises(ValueError, match=r"attribute 'kind' is not in reward.attributes \(true\)"):
        preference_parser(encoder, RewardSettings(attributes={"true": 1.0}), None)(kind)


def test_a_prompt_may_fill_its_limit_and_no_more(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    length = tokens(tiny_tokenizer, PROMPT)
    row = {"prompt": PROMPT, "answer": 1}
    request = requests(tiny_tokenizer, length, max_positions=None)(row)
    assert (request.prompt, len(request.prompt_ids), request.columns) == (PROMPT, length, {"answer": 1})
    with pytest.raises(ValueError, match=r"more than rollouts\.max_prompt_tokens"):
        requests(tiny_tokenizer, length - 1, max_positions=None)(row)


def test_prompt_and_response_fit_the_context(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    length = tokens(tiny_tokenizer, PROMPT)
    requests(tiny_tokenizer, 256, max_positions=length + 8)({"prompt": PROMPT})
    with pytest.raises(ValueError, match=r"the model's context length less rollouts\.max_new_tokens"):
        requests(tiny_tokenizer, 256, max_positions=length + 7)({"prompt": PROMPT})


def test_a_row_that_is_too_long_is_reported_or_skipped(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"two {n}"} for n in range(9)]
    path = write_rows(tmp_path / "long.jsonl", [rows[0], {"prompt": "two " * 300}, *rows[1:]])
    with pytest.raises(UserError, match=r"data\.prompts: .*long\.jsonl:2: .* rollouts\.max_prompt_tokens, 256"):
        read(make(tiny_model, tmp_path, prompts=path), tiny_tokenizer)
    datasets = read(make(tiny_model, tmp_path, prompts=path, on_bad_row="skip"), tiny_tokenizer)
    assert len(datasets.prompts) + len(datasets.prompts_heldout) == 9
    assert [(source, len(why)) for source, why in datasets.skipped.items()] == [("prompts", 1)]


@pytest.mark.parametrize(
    ("source", "other_columns"),
    [
        ("demonstrations", {"completion": " a{n}"}),
        ("preferences", {"chosen": " a{n}", "rejected": " b{n}"}),
        ("prompts", {"id": "{n}"}),
    ],
)
def test_the_heldout_rows_never_share_a_prompt_with_the_others(
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    source: str,
    other_columns: dict[str, str],
) -> None:
    rows = []
    for n in range(40):
        filled = {name: text.format(n=n) for name, text in other_columns.items()}
        rows.append({"prompt": f"p{n % 10}"} | filled)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    datasets = read(make(tiny_model, tmp_path, **{source: path, "heldout_share": 0.3}), tiny_tokenizer)
    trained = {tuple(row.prompt_ids) for row in getattr(datasets, source)}
    heldout = {tuple(row.prompt_ids) for row in getattr(datasets, f"{source}_heldout")}
    assert trained
    assert heldout
    assert not trained & heldout


def test_a_heldout_source_is_used_and_nothing_is_split_off(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "heldout.jsonl", [{"prompt": "User: red?"}, {"prompt": "User: blue?"}])
    datasets = read(make(tiny_model, tmp_path, prompts_heldout=path), tiny_tokenizer)
    assert [request.prompt for request in datasets.prompts_heldout] == ["User: red?", "User: blue?"]
    assert len(datasets.prompts) == 40


@given(keys=st.lists(st.integers(0, 20), min_size=2), share=st.floats(0.05, 0.9), seed=st.integers(0, 9))
def test_a_split_loses_nothing_and_keeps_equal_keys_together(keys: list[int], share: float, seed: int) -> None:
    items = list(enumerate(keys))
    if len(set(keys)) == 1:
        with pytest.raises(ValueError, match="1 different prompt cannot be split"):
            split_heldout(items, share, seed, key=lambda item: item[1])
        return
    try:
        train, heldout = split_heldout(items, share, seed, key=lambda item: item[1])
    except ValueError:
        assert round(len(set(keys)) * share) >= len(set(keys))
        return
    assert sorted(train + heldout) == items
    assert not {key for _, key in train} & {key for _, key in heldout}
    assert (train, heldout) == split_heldout(items, share, seed, key=lambda item: item[1])
    assert len({key for _, key in heldout}) == max(1, round(len(set(keys)) * share))
