from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies.batching import collate, collate_shared_prompts, length_buckets, shares

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=7)
ROWS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6)
LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(ROWS)
def test_indices_point_at_their_own_sequence(rows: list[tuple[list[int], list[int]]]) -> None:
    prompts, responses = zip(*rows)
    batch = collate(prompts, responses)
    flat = batch.ids.tolist()
    places = [i for split in batch.split(batch.predictors) for i in split.tolist()]
    expected = [token for prompt, response in rows for token in [*prompt, *response][len(prompt) - 1 : -1]]
    assert [flat[place] for place in places] == expected
    assert batch.response_ids.tolist() == [token for response in responses for token in response]
    assert [row.tolist() for row in batch.ids.split(list(batch.lengths))] == [[*p, *r] for p, r in rows]
    assert batch.last.tolist() == [sum(len(p) + len(r) for p, r in rows[: i + 1]) - 1 for i in range(len(rows))]
    assert batch.response_lengths == tuple(map(len, responses))


def test_the_next_position_holds_the_token_that_is_predicted() -> None:
    batch = collate([[1, 2], [3]], [[4, 5], [6, 7, 8]])
    assert batch.ids.tolist() == [1, 2, 4, 5, 3, 6, 7, 8]
    assert batch.predictors.tolist() == [1, 2, 4, 5, 6]
    assert batch.ids[batch.predictors + 1].tolist() == batch.response_ids.tolist() == [4, 5, 6, 7, 8]
    assert batch.last.tolist() == [3, 7]


def test_split_gives_each_sequence_its_own() -> None:
    batch = collate([[1], [1]], [[3], [3, 4]])
    assert [part.tolist() for part in batch.split(torch.tensor([1.0, 2.0, 3.0]))] == [[1.0], [2.0, 3.0]]


def test_each_prompt_needs_a_response() -> None:
    with pytest.raises(ValueError, match="shorter"):
        collate([[1], [2]], [[3]])


@given(LENGTHS, st.integers(1, 120))
def test_buckets_cover_every_sequence_once(lengths: list[int], tokens: int) -> None:
    for padded in (True, False):
        assert sorted(i for group in length_buckets(lengths, tokens, padded) for i in group) == list(
            range(len(lengths))
        )


@given(LENGTHS, st.integers(1, 120))
def test_buckets_keep_the_token_budget_with_padding_counted(lengths: list[int], tokens: int) -> None:
    for group in length_buckets(lengths, tokens):
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= tokens


@given(LENGTHS, st.integers(1, 120))
def test_buckets_without_padding_are_as_full_as_the_budget_allows(lengths: list[int], tokens: int) -> None:
    groups = length_buckets(lengths, tokens, padded=False)
    filled = [sum(lengths[i] for i in group) for group in groups]
    assert all(len(group) == 1 or total <= tokens for group, total in zip(groups, filled))
    assert all(total + lengths[following[0]] > tokens for total, following in zip(filled, groups[1:]))


@given(LENGTHS, st.integers(1, 120))
def test_buckets_are_as_full_as_the_budget_allows(lengths: list[int], tokens: int) -> None:
    groups = length_buckets(lengths, tokens)
    for group, following in pairwise(groups):
        assert lengths[following[0]] * (len(group) + 1) > tokens


@given(st.integers(0, 100), st.integers(1, 20))
def test_shares_are_even_runs_that_cover_all(count: int, parts: int) -> None:
    runs = list(shares(count, parts))
    assert [i for run in runs for i in run] == list(range(count))
    assert len(runs) == parts
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@given(st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=5))
def test_a_response_attends_to_its_prompt_and_itself_alone(rows: list[tuple[list[int], list[int], list[int]]]) -> None:
    prompts = [prompt for prompt, *_ in rows]
    responses_of = [list(responses) for _, *responses in rows]
    batch = collate_shared_prompts(prompts, responses_of)
    last = iter(batch.last.tolist())
    width = batch.ids.shape[1]
    flat, positions = batch.ids.flatten().tolist(), batch.positions.flatten().tolist()
    for index, (prompt, responses) in enumerate(zip(prompts, responses_of)):
        for response in responses:
            query = next(last) - index * width
            visible = [index * width + k for k in batch.attention_mask[index, 0, query].nonzero().flatten().tolist()]
            assert [flat[k] for k in visible] == [*prompt, *response]
            assert [positions[k] for k in visible] == list(range(len(prompt) + len(response)))
