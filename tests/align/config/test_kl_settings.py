"""Where the KL is and by which estimator, where the settings leave it open."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.ppo_settings import KlSettings, PpoSettings

OWN = """
from align import advantage_estimator

def plain(batch): ...

@advantage_estimator(min_samples=2, kl_in_loss=True)
def grouped(batch): ...
"""


def resolved(of_advantages: str, /, **kl: Any) -> tuple[str | None, str | None]:
    ppo = PpoSettings.model_validate({"estimator": of_advantages, "samples_per_prompt": 2, "kl": kl})
    return ppo.kl.where, ppo.kl.estimator


@pytest.mark.parametrize("estimator", ["gae", "rloo", "reinforce++"])
def test_the_kl_is_k1_in_the_reward(estimator: str) -> None:
    assert resolved(estimator) == ("reward", "k1")
    assert resolved(estimator, estimator="k3") == ("reward", "k3")
    assert resolved(estimator, where="loss") == ("loss", "k2")


def test_under_grpo_it_is_k2_in_the_loss() -> None:
    assert resolved("grpo") == ("loss", "k2")
    assert resolved("grpo", coefficient=0.1) == ("loss", "k2")
    assert resolved("grpo", estimator="k3") == ("loss", "k3")


def test_explicit_settings_are_kept() -> None:
    assert resolved("grpo", where="reward") == ("reward", "k1")
    assert resolved("grpo", where="reward", estimator="k1") == ("reward", "k1")
    assert resolved("grpo", estimator="k1") == ("reward", "k1")
    assert resolved("gae", where="loss", estimator="k3") == ("loss", "k3")


def test_defaults_without_any_section() -> None:
    assert PpoSettings().kl == KlSettings(where="reward", estimator="k1")
    assert PpoSettings(estimator="grpo", samples_per_prompt=2).kl == KlSettings(where="loss", estimator="k2")


def test_what_was_resolved_is_written_and_read_back() -> None:
    written = PpoSettings(estimator="grpo", samples_per_prompt=2).model_dump(mode="json")
    assert (written["kl"]["where"], written["kl"]["estimator"]) == ("loss", "k2")
    assert PpoSettings.model_validate(written).model_dump(mode="json") == written
    written["kl"] |= {"where": "reward", "estimator": "k1"}  # as runs before this default have it
    assert PpoSettings.model_validate(written).kl.where == "reward"


def test_k1_in_the_loss_is_refused() -> None:
    with pytest.raises(ValidationError, match="k1 in the loss has a gradient of mean zero"):
        PpoSettings.model_validate({"kl": {"where": "loss", "estimator": "k1"}})


def test_an_estimator_of_ones_own_says_where_the_kl_is(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert resolved(f"{file}:plain") == ("reward", "k1")
    assert resolved(f"{file}:grouped") == ("loss", "k2")
