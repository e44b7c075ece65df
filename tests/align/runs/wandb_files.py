"""Reads the files of W&B."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records_in_wandb(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in the files of a run that W&B has tracked offline."""
    records = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        records += [record[kind] for record in map(json.loads, lines) if record["type"] == kind]
    return records
