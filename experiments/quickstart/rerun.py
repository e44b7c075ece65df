"""Rerun PPO from the SFT and reward models of a finished run."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def rerun_ppo(run: Path, to: Path, name: str, settings: Mapping[str, object]) -> dict[str, float]:
    """Run PPO as the run `to`/`name` with changed settings, unless that run is already finished.

    Args:
        run: Folder of the finished run that provides the SFT model, the reward model and the other settings.
        to: Folder of the new runs.
        name: Name of the new run.
        settings: Values by dotted key.

    Returns:
        The figures of the policy from the new run's evaluation.
    """
    folder = to / name
    if not (folder / "evaluation.json").is_file():
        changed: dict[str, object] = {
            "name": name,
            "runs": to,
            "stages": "[ppo]",
            "sft.adapter": run / "sft",
            "reward.model": run / "reward",
            **settings,
        }
        overrides = [f"{key}={value}" for key, value in changed.items()]
        command = [sys.executable, "-m", "align", "run", str(run / "config.yaml"), "--replace", *overrides]
        subprocess.run(command, check=True)
    policy: dict[str, float] = json.loads((folder / "evaluation.json").read_text())["policy"]
    return policy
