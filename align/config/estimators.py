"""The advantage estimators and policy losses, and what each of them needs.

Validation, the learner and the documentation read these records. They refer to functions by strings,
`module:function`, because they are read before anything heavy is imported. Users refer to their own by
`FILE.py:function`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from policies.errors import UserError
from rewards.user_functions import check_parameters, describe_exception, load_function

Function = Callable[..., Any]
AnyFunction = TypeVar("AnyFunction", bound=Function)

READABLE = ("gamma", "gae_lambda")
"""Settings of PPO that only some estimators read."""


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator and what it needs.

    Attributes:
        name: The value of `ppo.estimator` that selects it.
        function: `module:function` or `FILE.py:function`, from an `EstimatorInput` to advantages and returns.
        has_critic: Whether it reads the values of a critic, which is then built and trained.
        min_samples: Minimum number of responses per prompt.
        whitens: Whether advantages are whitened over the batch where `ppo.whiten_advantages` is not set.
        kl_in_loss: Whether the KL is in the loss (k2) where `ppo.kl` sets neither place nor estimator; otherwise it is
            in the reward (k1). Within a group of equal scores, an estimator that divides by the standard deviation of
            the rewards would amplify the KL's noise.
        reads: Which of `READABLE` it reads; setting any other one is an error.
        summary: How it computes the advantage of a token, in a few words for the documentation.
        source: The paper.
    """

    name: str
    function: str
    has_critic: bool = False
    min_samples: int = 1
    whitens: bool = False
    kl_in_loss: bool = False
    reads: tuple[str, ...] = ()
    summary: str = ""
    source: str = ""


BUILT_IN_ESTIMATORS = (
    Estimator(
        name="gae",
        function="align.algorithms.estimators:estimate_gae",
        has_critic=True,
        whitens=True,
        reads=("gamma", "gae_lambda"),
        summary="generalized advantage estimation",
        source="Schulman et al. 2016",
    ),
    Estimator(
        name="rloo",
        function="align.algorithms.estimators:estimate_rloo",
        min_samples=2,
        summary="total reward minus the mean of the other samples of its prompt; the paper uses 2 and 4 samples",
        source="Ahmadian et al. 2024",
    ),
    Estimator(
        name="grpo",
        function="align.algorithms.estimators:estimate_grpo",
        min_samples=2,
        kl_in_loss=True,
        summary="total reward standardised within its prompt; the paper uses 64 samples, "
        "`loss_aggregation: sequence_mean` and `kl: {where: loss, estimator: k3}`",
        source="Shao et al. 2024",
    ),
    Estimator(
        name="reinforce++",
        function="align.algorithms.estimators:estimate_reinforce_plus_plus",
        whitens=True,
        reads=("gamma",),
        summary="rewards to go, which include the KL of each token",
        source="Hu 2025",
    ),
)

ESTIMATORS = {estimator.name: estimator for estimator in BUILT_IN_ESTIMATORS}

POLICY_LOSSES = {"clip": "align.algorithms.losses:clipped_surrogate"}
"""Built-in values of `ppo.policy_loss`, each with its function."""

USER_ARGUMENTS = {
    "ppo.estimator": ("batch",),
    "ppo.policy_loss": ("logprobs", "old_logprobs", "advantages", "ppo"),
}
"""The names of the arguments that a user's function gets, by the setting that names it."""


def advantage_estimator(
    has_critic: bool = False,
    min_samples: int = 1,
    whitens: bool = False,
    reads: tuple[str, ...] = (),
    kl_in_loss: bool = False,
) -> Callable[[AnyFunction], AnyFunction]:
    """Decorate a function of your own, for `ppo.estimator: FILE.py:function`, with what it needs.

    The function takes an `align.algorithms.estimators.EstimatorInput` and returns the advantages and the returns of
    each response. Without the decorator it needs nothing.

    Args:
        has_critic: Whether it reads `values`; a critic is then built, and trained on the returns.
        min_samples: Minimum number of responses per prompt.
        whitens: Whether advantages are whitened over the batch where `ppo.whiten_advantages` is not set.
        kl_in_loss: Whether the KL is in the loss, as k2, where `ppo.kl` sets neither place nor estimator.
        reads: Which of `gamma` and `gae_lambda` it reads; setting one that it does not read is an error.
    """
    unknown = sorted(set(reads) - set(READABLE))
    if unknown:
        raise UserError(f"advantage_estimator: reads: unknown setting {unknown[0]!r}; valid: {', '.join(READABLE)}")

    def decorate(function: AnyFunction) -> AnyFunction:
        _DECORATED[function] = Estimator(
            name=function.__name__,
            function=f"{function.__module__}:{function.__name__}",
            has_critic=has_critic,
            min_samples=min_samples,
            whitens=whitens,
            kl_in_loss=kl_in_loss,
            reads=tuple(reads),
        )
        return function

    return decorate


_DECORATED: dict[Function, Estimator] = {}


def find_estimator(name: str) -> Estimator:
    """The record of a built-in estimator, or of a user's, whose file is loaded.

    Raises:
        UserError: There is no such estimator.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = user_function(name, "ppo.estimator")
    record = _DECORATED.get(function, Estimator(name, name))
    return replace(record, name=name, function=name)


def is_user_function(name: str) -> bool:
    """Whether a value of `ppo.estimator` or `ppo.policy_loss` names a user's function."""
    return name not in ESTIMATORS and name not in POLICY_LOSSES


@cache
def user_function(where: str, key: str) -> Function:
    """Load a user's function, once per process.

    Args:
        where: `FILE.py:function` or `module:function`.
        key: The setting that names it, `ppo.estimator` or `ppo.policy_loss`.

    Raises:
        UserError: The file or the function does not exist or cannot be imported, or the function takes other arguments.
    """
    function: Function = load_function(where, key)
    check_parameters(function, USER_ARGUMENTS[key], where, key)
    return function


def call_user_function(function: Function, where: str, key: str, *arguments: Any) -> Any:
    """Call a user's function.

    Args:
        function: The function.
        where: `FILE.py:function` or `module:function`, for messages.
        key: The setting that names it, for messages.
        arguments: The arguments of the call.

    Raises:
        UserError: The function raised an exception or called `sys.exit`; the message has its file and line.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {where} {describe_exception(function, error)}") from error


def estimators_table() -> str:
    """A Markdown table of the built-in estimators, for docs/ppo.md."""
    lines = [
        "| `estimator` | advantage of a token | critic | reads | samples per prompt | whitened by default "
        "| KL by default | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for estimator in BUILT_IN_ESTIMATORS:
        reads = ", ".join(f"`{name}`" for name in estimator.reads) or "–"
        columns = (
            f"`{estimator.name}`",
            estimator.summary,
            "yes" if estimator.has_critic else "no",
            reads,
            f"≥ {estimator.min_samples}",
            "over the batch" if estimator.whitens else "no",
            "k2 in the loss" if estimator.kl_in_loss else "k1 in the reward",
            estimator.source,
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)
