"""What the scripts beside this one share: the check of the run that they start from, and a rerun of its PPO."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def require_run(run: Path) -> None:
    """Exit with status 2 and a message if the folder does not hold a run."""
    if not (run / "config.yaml").is_file():
        print(f"{run}/config.yaml does not exist: run `make quickstart` first", file=sys.stderr)
        raise SystemExit(2)


def rerun_ppo(run: Path, to: Path, name: str, settings: Mapping[str, object], stage: str = "ppo") -> dict[str, float]:
    """Run PPO as the run `to`/`name` with changed settings, unless that run is already finished.

    Args:
        run: Folder of the finished run that provides the SFT model, the reward model and the other settings.
        to: Folder of the new runs.
        name: Name of the new run.
        settings: Values by dotted key.
        stage: The stage that trains the policy, `ppo` or `dpo`.

    Returns:
        The policy's results from the new run's evaluation.
    """
    folder = to / name
    if not (folder / "evaluation.json").is_file():
        changed: dict[str, object] = {
            "name": name,
            "runs": to,
            "stages": f"[{stage}]",
            "sft.adapter": run / "sft",
            "reward.model": run / "reward",
            **settings,
        }
        overrides = [f"{key}={value}" for key, value in changed.items()]
        command = [sys.executable, "-m", "align", "run", str(run / "config.yaml"), "--replace", *overrides]
        subprocess.run(command, check=True)
    policy: dict[str, float] = json.loads((folder / "evaluation.json").read_text())["policy"]
    return policy
