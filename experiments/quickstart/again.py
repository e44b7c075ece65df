"""PPO once more, from the SFT and reward models of a run that is done."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def ppo_again(run: Path, to: Path, name: str, settings: Mapping[str, object]) -> dict[str, float]:
    """What the evaluation says of the policy of `to`/`name`, a run of PPO with these settings; one there is taken."""
    folder = to / name
    if not (folder / "evaluation.json").is_file():
        given = {
            "name": name,
            "runs": to,
            "stages": "[ppo]",
            "sft.adapter": run / "sft",
            "reward.model": run / "reward",
        }
        overrides = [f"{key}={value}" for key, value in (given | dict(settings)).items()]
        line = [sys.executable, "-m", "align", "run", str(run / "config.yaml"), "--replace", *overrides]
        subprocess.run(line, check=True)
    policy: dict[str, float] = json.loads((folder / "evaluation.json").read_text())["policy"]
    return policy
