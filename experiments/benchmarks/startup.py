"""CPU seconds until the command has answered: its help, a mistake in the file, and a plan.

    make quickstart
    python experiments/benchmarks/startup.py --experiment experiments/quickstart/experiment.yaml

Each is the median of several runs, user and system time of the process with its children, and the limit it should stay
under. Measure on a machine that does nothing else: a busy one adds a quarter and more.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

LIMITS = {"help": 0.5, "mistake": 1.5, "plan": 7.0}
"""CPU seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", type=Path, required=True, help="an experiment file whose model and data exist")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.experiment.is_file():
        parser.error(f"--experiment {arguments.experiment} does not exist")
    commands = {
        "help": (["--help"], 0),
        "mistake": (["plan", str(arguments.experiment), "polcy.rank=3"], 2),
        "plan": (["plan", str(arguments.experiment)], 0),
    }
    for name, (line, status) in commands.items():
        seconds = sorted(cpu_seconds(line, status) for _ in range(arguments.rounds))
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        print(f"{name}: {median(seconds):.2f} s of CPU ({spread}); limit {LIMITS[name]} s")


def cpu_seconds(line: list[str], status: int) -> float:
    """User and system seconds of one `align`. Exits where it does not end with this status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-m", "align", *line], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode != status:
        sys.exit(f"align {' '.join(line)} ended with {ended.returncode}, not {status}: {ended.stderr.strip()}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
