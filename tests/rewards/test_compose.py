import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.compose import Composition, RunningMoments, combine, spread
from rewards.constraint import ConstraintSettings
from rewards.terms.regex import RegexTerm


def term(**settings: Any) -> RegexTerm:
    return RegexTerm(kind="regex", pattern="x", **settings)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_terms_are_weighted_and_summed() -> None:
    composition = Composition({"one": term(weight=2.0), "two": term(weight=-0.5)})
    total, parts = composition.score({"one": doubles(1, 2), "two": doubles(4, 0)})
    assert total.tolist() == [0.0, 4.0]
    assert {name: part.tolist() for name, part in parts.items()} == {"one": [1.0, 2.0], "two": [4.0, 0.0]}


def test_clipping_comes_before_the_weight() -> None:
    total, _ = Composition({"one": term(weight=10.0, clip=(-1.0, 1.0))}).score({"one": doubles(-7, 0.5, 7)})
    assert total.tolist() == [-10.0, 5.0, 10.0]


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=9), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_values_together(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments.add(doubles(*batch))
    everything = doubles(*(value for batch in batches for value in batch))
    assert moments.mean == pytest.approx(float(everything.mean()), abs=1e-9)
    std = float(everything.std(correction=0))
    is_constant = std <= max(1e-8, 1e-6 * abs(float(everything.mean())))
    assert moments.std == pytest.approx(1.0 if is_constant else std, abs=1e-6)


def test_rounding_of_a_constant_term_is_not_scaled_up() -> None:
    """The same response has slightly different scores in batches of different shapes."""
    composition = Composition({"one": term(normalise="running")})
    rounded = torch.full((4,), 300.0) * (1 + torch.tensor([0.0, 1.2e-7, -1.2e-7, 6e-8]))
    total, _ = composition.score_and_update({"one": rounded})
    assert total.abs().max() < 1e-3


def test_a_term_is_normalised_by_what_was_seen_before_and_in_its_batch() -> None:
    composition = Composition({"one": term(normalise="running")})
    composition.score_and_update({"one": doubles(0, 2)})
    total, _ = composition.score_and_update({"one": doubles(4, 6)})
    seen = doubles(0, 2, 4, 6)
    torch.testing.assert_close(total, (seen[2:] - seen.mean()) / seen.std(correction=0))


def test_scoring_without_an_update_changes_nothing() -> None:
    composition = Composition({"one": term(normalise="running")})
    composition.score_and_update({"one": doubles(0, 2)})
    before = json.dumps(composition.state())
    composition.score({"one": doubles(50, 60)})
    assert json.dumps(composition.state()) == before


def test_a_state_stays_what_it_was_when_it_was_taken() -> None:
    composition = Composition({"one": term(normalise="running")})
    composition.score_and_update({"one": doubles(0, 2)})
    state = composition.state()
    before = json.dumps(state)
    composition.score_and_update({"one": doubles(50, 60)})
    assert json.dumps(state) == before != json.dumps(composition.state())


def test_a_term_is_normalised_by_sft_responses_once() -> None:
    composition = Composition({"one": term(normalise="sft"), "two": term()})
    assert composition.calibrated == ["one"]
    composition.calibrate({"one": doubles(1, 3), "two": doubles(9, 9)})
    for _ in range(2):
        total, _ = composition.score_and_update({"one": doubles(1, 3, 7), "two": doubles(0, 0, 0)})
        assert total.tolist() == [-1.0, 1.0, 5.0]


def test_the_multiplier_grows_while_the_cost_is_above_its_bound_and_falls_to_zero_below() -> None:
    constraint = ConstraintSettings(term="cost", at_most=0.5, rate=2.0)
    composition = Composition({"gain": term(), "cost": term()}, constraint)
    batch = {"gain": doubles(1, 1), "cost": doubles(1, 2)}
    first, _ = composition.score_and_update(batch)
    assert (first.tolist(), composition.multiplier) == ([1.0, 1.0], 2.0)
    second, _ = composition.score_and_update(batch)
    assert (second.tolist(), composition.multiplier) == ([(1 - 2) / 3, (1 - 4) / 3], 4.0)
    composition.score_and_update({"gain": doubles(1), "cost": doubles(-9)})
    assert composition.multiplier == 0.0


def test_the_state_is_restored_from_json() -> None:
    constraint = ConstraintSettings(term="cost", at_most=0.0)
    terms = {"gain": term(normalise="running"), "cost": term(normalise="sft")}
    one, other = Composition(terms, constraint), Composition(terms, constraint)
    one.calibrate({"cost": doubles(1, 2, 4)})
    one.score_and_update({"gain": doubles(0.1, 0.7), "cost": doubles(3.0, 1.0)})
    other.restore(json.loads(json.dumps(one.state())))
    batch = {"gain": doubles(5.5, 2.25), "cost": doubles(0.3, 8.0)}
    assert torch.equal(one.score_and_update(batch)[0], other.score_and_update(batch)[0])
    assert one.state() == other.state()


def test_an_ensembles_scores_in_one() -> None:
    members = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert combine(members, "mean").tolist() == [2.0, 2.0]
    assert combine(members, "minimum").tolist() == [1.0, 2.0]
    assert combine(members, "mean_minus_std", 0.5).tolist() == [1.5, 2.0]
    assert spread(members).tolist() == [1.0, 0.0]
