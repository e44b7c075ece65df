"""Whether memory, open files and processes stay as they are over many steps.

    python experiments/benchmarks/soak.py --minutes 20

PPO on the quickstart's world with two rollout workers and two learner ranks at ZeRO 2, an evaluation every ten steps
and a checkpoint every five, W&B offline; each process is looked at every two seconds. The first third is warm-up. Over
the rest a line is fitted to each process's own memory (USS), and what it says was added from its begin to its end is
given beside the memory at the begin. Ends with 1 where that is more than GROWTH of it and than a megabyte, where open
files grew, or where processes came or went. Writes `soak.json`.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, mean

import psutil

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
EVERY = 2.0
WARM = 1 / 3
GROWTH = 0.02
SETTINGS = [
    *(
        "ppo.steps=1000000",
        "ppo.batch_size=32",
        "ppo.minibatches=2",
        "rollouts.max_new_tokens=24",
        "rollouts.chunk_size=8",
    ),
    *("rollouts.workers=2", "learner.ranks=2", "learner.zero=2", "cluster.threads=1"),
    *("evaluation.every=10", "evaluation.prompts=32", "evaluation.best_of=0", "checkpoint.every=5"),
    "tracking.wandb=offline",
]


@dataclass(frozen=True)
class Look:
    """One look at a process: seconds since the first, bytes of its own memory, open files."""

    at: float
    memory: int
    files: int


@dataclass(frozen=True)
class Verdict:
    """A process over the time after warm-up.

    added: megabytes that the fitted line rises by, `share` of the first. files: open in the first third and in the
    last, in the mean. throughout: whether it was there all the time.
    """

    name: str
    megabytes: float
    added: float
    share: float
    files: tuple[float, float]
    throughout: bool

    @property
    def grew(self) -> bool:
        """Whether it did what no process should."""
        more = self.share > GROWTH and self.added > 1.0
        return more or self.files[1] > self.files[0] + 1 or not self.throughout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--to", type=Path, default=HERE / "soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps, looks = soak(Path(folder), 60 * arguments.minutes)
    end = max(seen[-1].at for seen in looks.values())
    outputs = [judge(name, seen, end) for name, seen in sorted(looks.items()) if seen[-1].at > WARM * end]
    grown = [v.name for v in outputs if v.grew]
    results = {"minutes": arguments.minutes, "steps": steps, "processes": [asdict(v) for v in outputs]}
    print(f"{steps} steps")
    for v in outputs:
        files = f"files {v.files[0]:.1f} {v.files[1]:.1f}" + ("" if v.throughout else ", came or went")
        print(f"{v.name:32}{v.megabytes:10.1f} MB {v.added:+8.2f} MB {v.share:+8.2%}  {files}")
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")
    if grown:
        sys.exit(f"these grew: {', '.join(grown)}")


def soak(folder: Path, seconds: float) -> tuple[int, dict[str, list[Look]]]:
    """Run PPO for so long. Returns how many steps it did, and the looks at each process."""
    world = folder / "soak" / "world"
    subprocess.run([sys.executable, QUICKSTART / "make.py", "--to", world], check=True)
    command = [sys.executable, "-m", "align", "run", str(QUICKSTART / "experiment.yaml")]
    named = ["name=soak", f"runs={folder}", f"model.path={world / 'base'}"]
    data = ["demonstrations", "preferences", "preferences_heldout", "prompts", "prompts_heldout"]
    files = {"preferences": "pairs", "preferences_heldout": "pairs_heldout"}
    placed = [f"data.{name}={world / files.get(name, name)}.jsonl" for name in data]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *named, *placed, *SETTINGS], stdout=log, stderr=subprocess.STDOUT)
        metrics = folder / "soak" / "metrics.jsonl"
        try:
            while steps_in(metrics) < 3:
                if process.poll() is not None:
                    sys.exit((folder / "log").read_text()[-3000:])
                time.sleep(EVERY)
            looks = watch(process, seconds)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        return steps_in(metrics), looks


def steps_in(metrics: Path) -> int:
    """Steps of PPO that are done."""
    return metrics.read_text().count('"policy/loss"') if metrics.is_file() else 0


def watch(process: subprocess.Popen[bytes], seconds: float) -> dict[str, list[Look]]:
    """Look at the process and all below it until the time is over."""
    start, looks = time.monotonic(), defaultdict(list)
    names: dict[int, str] = {process.pid: "controller"}  # as first seen: Ray's say what they are at
    controller = psutil.Process(process.pid)
    while (at := time.monotonic() - start) < seconds and process.poll() is None:
        for each in (controller, *controller.children(recursive=True)):
            try:
                name = names.setdefault(each.pid, each.name())
                look = Look(at, each.memory_full_info().uss, each.num_fds())
            except psutil.Error:
                continue  # it has just ended
            looks[f"{name} {each.pid}"].append(look)
        time.sleep(EVERY)
    return dict(looks)


def judge(name: str, looks: list[Look], end: float) -> Verdict:
    """What became of a process between the warm-up and the end."""
    warm = [look for look in looks if look.at >= WARM * end]
    throughout = looks[0].at < WARM * end and looks[-1].at > end - 5 * EVERY
    if len(warm) < 2:
        return Verdict(name, warm[0].memory / 1e6, 0.0, 0.0, (warm[0].files, warm[0].files), throughout)
    slope, intercept = linear_regression([look.at for look in warm], [look.memory / 1e6 for look in warm])
    first, added = intercept + slope * warm[0].at, slope * (warm[-1].at - warm[0].at)
    third = max(1, len(warm) // 3)
    files = mean(look.files for look in warm[:third]), mean(look.files for look in warm[-third:])
    return Verdict(name, first, added, added / first, files, throughout)


if __name__ == "__main__":
    main()
