"""RLHF on one frozen base model: supervised fine-tuning, a reward model, and PPO.

The names in `__all__` are the stable Python interface, described in docs/python.md. They are imported when they are
first used, so that `import align` and the command start fast.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from align.runtime.shadowing import hidden_package

if TYPE_CHECKING:
    from align.api import PpoSession, build_ppo, plan, resume, run
    from align.config.estimators import advantage_estimator
    from align.config.load import load_experiment
    from align.config.schema import Experiment
    from align.outputs.trained_run import TrainedRun, open_run
    from align.runtime.failures import Fault
    from policies.errors import UserError

__all__ = [
    "Experiment",
    "Fault",
    "PpoSession",
    "TrainedRun",
    "UserError",
    "advantage_estimator",
    "build_ppo",
    "load_experiment",
    "open_run",
    "plan",
    "resume",
    "run",
]

_MODULES = {
    "Experiment": "align.config.schema",
    "Fault": "align.runtime.failures",
    "PpoSession": "align.api",
    "TrainedRun": "align.outputs.trained_run",
    "UserError": "policies.errors",
    "advantage_estimator": "align.config.estimators",
    "build_ppo": "align.api",
    "load_experiment": "align.config.load",
    "open_run": "align.outputs.trained_run",
    "plan": "align.api",
    "resume": "align.api",
    "run": "align.api",
}

# While Python looks for the module of `python -m align`, argv begins with -m; then align.__main__ reports it.
if sys.argv[:1] != ["-m"] and (hidden := hidden_package()):
    raise ImportError(hidden)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
