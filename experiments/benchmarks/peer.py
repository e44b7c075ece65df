"""A separate virtual environment with TRL, for the other side of a benchmark."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_peer(folder: Path, version: str) -> Path:
    """The interpreter of an environment with this version of TRL, which is created if it is missing."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing TRL {version} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, f"trl=={version}", "transformers", "peft", "datasets", "accelerate"], check=True)
        (folder / ".installed").touch()
    return python
