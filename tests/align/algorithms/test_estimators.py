"""The registry of advantage estimators and policy losses, and functions of the user's own."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from align.algorithms.estimators import EstimatorInput, check_estimates, load_estimator
from align.algorithms.losses import clipped_surrogate, load_policy_loss
from align.config.estimators import (
    BUILT_IN_ESTIMATORS,
    POLICY_LOSSES,
    advantage_estimator,
    estimators_table,
    find_estimator,
)
from align.config.ppo_settings import CriticSettings, PpoSettings
from policies.errors import UserError

DOCUMENT = Path(__file__).parents[3] / "docs" / "ppo.md"

ESTIMATORS = """
import torch
from align import advantage_estimator

@advantage_estimator(min_samples=3, whitens=True, reads=("gamma",))
def decorated(batch):
    return [batch.gamma * rewards for rewards in batch.rewards], batch.values

@advantage_estimator(has_critic=True)
def with_critic(batch):
    return [values[:-1] for values in batch.values], [values[1:] for values in batch.values]

def plain(batch):
    return [torch.ones(len(rewards)) for rewards in batch.rewards], batch.values
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own_estimators.py"
    path.write_text(ESTIMATORS)
    return path


def batch_of(*lengths: int, with_values: bool = False) -> EstimatorInput:
    return EstimatorInput(
        rewards=[torch.ones(length) for length in lengths],
        values=[torch.zeros(length + 1 if with_values else 0) for length in lengths],
        gamma=0.5,
        gae_lambda=1.0,
        samples_per_prompt=len(lengths),
    )


def test_the_document_has_the_table_of_the_registry() -> None:
    assert estimators_table() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [estimator.name for estimator in BUILT_IN_ESTIMATORS])
def test_built_in_estimators_have_the_common_signature(name: str) -> None:
    batch = batch_of(2, 3, with_values=find_estimator(name).has_critic)
    advantages, returns = load_estimator(name)(batch)
    check_estimates(name, batch, advantages, returns)


def test_the_default_policy_loss_is_the_clipped_surrogate() -> None:
    assert load_policy_loss(PpoSettings().policy_loss) is clipped_surrogate
    assert list(POLICY_LOSSES) == ["clip"]


def test_a_decorator_says_what_an_estimator_needs(file: Path) -> None:
    ppo = PpoSettings(estimator=f"{file}:decorated", samples_per_prompt=4, gamma=0.5)
    assert (ppo.has_critic, ppo.active_critic, ppo.whitens_advantages) == (False, None, True)
    advantages, returns = load_estimator(ppo.estimator)(batch_of(2, 1))
    assert [tensor.tolist() for tensor in advantages] == [[0.5, 0.5], [0.5]]
    assert [len(tensor) for tensor in returns] == [0, 0]


def test_a_users_estimator_may_have_a_critic(file: Path) -> None:
    ppo = PpoSettings(estimator=f"{file}:with_critic", critic=CriticSettings(warmup=1), on_truncation="bootstrap")
    assert ppo.active_critic == CriticSettings(warmup=1)


def test_without_the_decorator_an_estimator_needs_nothing(file: Path) -> None:
    ppo = PpoSettings(estimator=f"{file}:plain")
    assert (ppo.has_critic, ppo.whitens_advantages, ppo.samples_per_prompt) == (False, False, 1)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("decorated", {}, "compares the samples of a prompt: set samples_per_prompt to 3 or more"),
        ("plain", {"gamma": 0.9}, "does not read gamma: remove it, or use gae or reinforce"),
        ("plain", {"gae_lambda": 0.9}, "does not read gae_lambda: remove it, or use gae"),
        ("plain", {"critic": {"warmup": 1}}, "has no critic: remove `critic`"),
        ("plain", {"on_truncation": "bootstrap"}, "needs a critic, and .*plain has none"),
    ],
)
def test_settings_that_a_users_estimator_does_not_read_are_refused(
    function: str, settings: dict[str, object], message: str, file: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoSettings.model_validate({"estimator": f"{file}:{function}", **settings})


@pytest.mark.parametrize("key", ["estimator", "policy_loss"])
def test_a_function_that_does_not_exist_is_refused_with_key_and_file(key: str, file: Path) -> None:
    with pytest.raises(ValidationError, match=rf"\n{key}\n .*own_estimators\.py has no function missing"):
        PpoSettings.model_validate({key: f"{file}:missing"})
    with pytest.raises(ValidationError, match=rf"\n{key}\n  file .*nowhere\.py does not exist"):
        PpoSettings.model_validate({key: f"{file.parent}/nowhere.py:f"})


@pytest.mark.parametrize(
    ("key", "message"),
    [("estimator", r"expected gae, rloo, grpo, reinforce\+\+ or FILE"), ("policy_loss", "expected clip or FILE")],
)
def test_an_unknown_name_is_refused_with_the_valid_ones(key: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoSettings.model_validate({key: "gea"})


def test_a_file_is_loaded_again_when_settings_are_validated_again(file: Path) -> None:
    assert not PpoSettings(estimator=f"{file}:plain").has_critic
    changed = ESTIMATORS.replace("def plain", "@advantage_estimator(has_critic=True)\ndef plain")
    file.write_text(changed + "\n# another size, so that no cached bytecode is used\n")
    assert PpoSettings(estimator=f"{file}:plain").has_critic


def test_a_setting_that_no_estimator_reads_cannot_be_declared() -> None:
    with pytest.raises(UserError, match="unknown setting 'lam'; valid: gamma, gae_lambda"):
        advantage_estimator(reads=("lam",))


def test_advantages_of_the_wrong_length_are_refused(file: Path) -> None:
    name = f"{file}:plain"
    batch = batch_of(2, 3)
    with pytest.raises(UserError, match=r"returned advantages of \[2\] numbers .* of 2; expected \[2, 3\]"):
        check_estimates(name, batch, [torch.zeros(2)], batch.values)
    with pytest.raises(UserError, match=r"returned returns of \[1, 0\] numbers .*; expected \[0, 0\]"):
        check_estimates(name, batch, batch.rewards, [torch.zeros(1), torch.zeros(0)])


def own_function(folder: Path, body: str, arguments: str) -> str:
    """Write a function to a file, with its body on line 5, and return its name."""
    path = folder / "est.py"
    path.write_text(f"import torch\n\n\ndef own({arguments}):\n    {body}\n")
    return f"{path}:own"


ONES = "[torch.ones(len(rewards)) for rewards in batch.rewards]"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"returned None; expected \(advantages, returns\), two lists with one tensor per response"),
        ("return torch.ones(2)", r"returned float32 \[2\]; expected \(advantages, returns\)"),
        (f"return {ONES}, batch.values, 1", r"returned \(\[float32 \[2\], .*\], 1\); expected \(advantages"),
        (f"return {{'a': {ONES}, 'r': batch.values}}", r"returned a dict with the keys \['a', 'r'\]; expected \(adv"),
        (
            "return [1.0, 2.0], batch.values",
            r"returned advantages that are \[1.0, 2.0\]; expected a list with one tensor",
        ),
        ("return torch.ones(2, 3), batch.values", r"returned advantages that are float32 \[2, 3\]; expected a list"),
        (f"return {ONES}[:1], batch.values", r"returned advantages of \[2\] numbers .* of 2; expected \[2, 3\]"),
        (
            "return [torch.ones(len(rewards), 1) for rewards in batch.rewards], batch.values",
            r"returned advantages that are \[float32 \[2, 1\], float32 \[3, 1\]\]; expected .*\[T\] float32",
        ),
        (
            "return [rewards.double() for rewards in batch.rewards], batch.values",
            r"returned advantages that are \[float64 \[2\], float64 \[3\]\]; expected .*\[T\] float32",
        ),
        (f"return {ONES}, {ONES}", r"returned returns of \[2, 3\] .* no critic: return batch\.values as the returns$"),
        (f"return {ONES}, None", r"returned returns that are None; .* no critic: return batch\.values as the returns$"),
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(.*/est\.py:5\)$"),
        ("return torch.zeros(2) @ torch.zeros(3)", r"raised RuntimeError: .* \(.*/est\.py:5\)$"),
    ],
)
def test_what_an_estimator_of_the_user_returns_is_checked(body: str, message: str, tmp_path: Path) -> None:
    name = own_function(tmp_path, body, "batch")
    with pytest.raises(UserError, match=rf"^ppo\.estimator: {name} {message}"):
        load_estimator(name)(batch_of(2, 3))


def test_returns_of_the_wrong_length_are_refused_with_a_critic(file: Path) -> None:
    batch = batch_of(2, 3, with_values=True)
    with pytest.raises(UserError, match=r"returned returns of \[3, 4\] numbers .*; expected \[2, 3\]$"):
        check_estimates(f"{file}:with_critic", batch, batch.rewards, batch.values)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("return None", "None"),
        ("return -advantages", r"float32 \[4\]"),
        ("return -advantages, None", r"\(float32 \[4\], None\)"),
        ("return (-advantages).mean(), advantages", r"\(float32 \[\], float32 \[4\]\)"),
        ("return -advantages, advantages[:3]", r"\(float32 \[4\], float32 \[3\]\)"),
        ("return advantages.double(), advantages", r"\(float64 \[4\], float32 \[4\]\)"),
        ("return advantages > 0, advantages", r"\(bool \[4\], float32 \[4\]\)"),
        ("return [0.5] * 4, [0.0] * 4", r"\(\[0.5, 0.5, 0.5, 0.5\], \[0.0, 0.0, 0.0, 0.0\]\)"),
    ],
)
def test_what_a_policy_loss_of_the_user_returns_is_checked(body: str, shown: str, tmp_path: Path) -> None:
    name = own_function(tmp_path, body, "logprobs, old_logprobs, advantages, ppo")
    with pytest.raises(
        UserError, match=rf"^ppo\.policy_loss: {name} returned {shown}; expected \(loss, clipped\), both \[P\]"
    ):
        load_policy_loss(name)(torch.zeros(4), torch.zeros(4), torch.ones(4), PpoSettings())


@pytest.mark.parametrize("flag", ["(advantages > 0).float()", "advantages > 0"])
def test_a_policy_loss_of_the_user_may_return_floats_or_booleans_for_the_clip(flag: str, tmp_path: Path) -> None:
    name = own_function(tmp_path, f"return -advantages, {flag}", "logprobs, old_logprobs, advantages, ppo")
    loss, clipped = load_policy_loss(name)(torch.zeros(4), torch.zeros(4), torch.ones(4), PpoSettings())
    assert (loss.tolist(), clipped.tolist()) == ([-1.0] * 4, [1.0] * 4)


def test_a_policy_loss_that_raises_is_named_with_the_last_line_in_its_file(tmp_path: Path) -> None:
    name = own_function(tmp_path, "return torch.cat([logprobs, ppo])", "logprobs, old_logprobs, advantages, ppo")
    with pytest.raises(UserError, match=rf"(?s)^ppo\.policy_loss: {name} raised TypeError: .* \(.*/est\.py:5\)$"):
        load_policy_loss(name)(torch.zeros(4), torch.zeros(4), torch.ones(4), PpoSettings())


def test_a_wrong_signature_is_refused_before_a_call_and_located_at_the_definition(tmp_path: Path) -> None:
    name = own_function(tmp_path, "return None", "")
    found = r"and it is own\(\): too many positional arguments \(.*/est\.py:4\)$"
    with pytest.raises(UserError, match=rf"^ppo\.estimator: {name} must take \(batch\), {found}"):
        find_estimator(name)
    arguments = r"\(logprobs, old_logprobs, advantages, ppo\)"
    with pytest.raises(ValidationError, match=rf"{name} must take {arguments}, {found[:-1]}"):
        PpoSettings(policy_loss=name)
