"""Check that memory, open files and processes do not grow over many PPO steps.

    python experiments/benchmarks/soak.py --minutes 20

Runs PPO in the quickstart's environment with two rollout workers and two learner ranks at ZeRO 2, an evaluation every
ten steps, a checkpoint every five and W&B offline. Every two seconds, memory and open files of each process are
sampled. The first third is warm-up. To the rest, a line is fitted to each process's own memory (USS); its rise is
reported beside its value at the start. Exits with status 1 if a process grew by more than GROWTH and a megabyte, opened
more files, or did not live from warm-up to end. Writes `soak.json`.
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
INTERVAL = 2.0
"""Seconds between samples."""
WARMUP_SHARE = 1 / 3
GROWTH = 0.02
"""Largest rise of a process's memory after warm-up, relative to its start, that is not called growth."""
SETTINGS = [
    "ppo.steps=1000000",
    "ppo.batch_size=32",
    "ppo.minibatches=2",
    "rollouts.max_new_tokens=24",
    "rollouts.chunk_size=8",
    "rollouts.workers=2",
    "learner.ranks=2",
    "learner.zero=2",
    "cluster.threads=1",
    "evaluation.every=10",
    "evaluation.prompts=32",
    "evaluation.best_of=0",
    "checkpoint.every=5",
    "tracking.wandb=offline",
]


@dataclass(frozen=True)
class Sample:
    """A process at one moment."""

    at: float
    """Seconds since the first sample."""
    memory: int
    """Bytes of its own memory."""
    files: int
    """Open files."""


@dataclass(frozen=True)
class Trend:
    """A process over the time after warm-up."""

    name: str
    megabytes: float
    """At the start, by the fitted line."""
    added: float
    """Megabytes by which the fitted line rises."""
    share: float
    """`added` relative to `megabytes`."""
    files: tuple[float, float]
    """Mean number of open files in the first and in the last third."""
    throughout: bool
    """Whether the process lived all the time."""

    @property
    def grew(self) -> bool:
        """Whether the process leaks memory or files, or did not live all the time."""
        leaks = self.share > GROWTH and self.added > 1.0
        return leaks or self.files[1] > self.files[0] + 1 or not self.throughout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--to", type=Path, default=HERE / "soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps, samples = soak(Path(folder), 60 * arguments.minutes)
    end = max(process_samples[-1].at for process_samples in samples.values())
    trends: list[Trend] = []
    for name, process_samples in sorted(samples.items()):
        if process_samples[-1].at > WARMUP_SHARE * end:
            trends.append(trend_of(name, process_samples, end))
    grown = [trend.name for trend in trends if trend.grew]
    results = {"minutes": arguments.minutes, "steps": steps, "processes": [asdict(trend) for trend in trends]}
    print(f"{steps} steps")
    for trend in trends:
        files = f"files {trend.files[0]:.1f} {trend.files[1]:.1f}" + ("" if trend.throughout else ", started or ended")
        memory = f"{trend.megabytes:10.1f} MB {trend.added:+8.2f} MB {trend.share:+8.2%}"
        print(f"{trend.name:32}{memory}  {files}")
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")
    if grown:
        sys.exit(f"processes that grew, started or ended: {', '.join(grown)}")


def soak(folder: Path, seconds: float) -> tuple[int, dict[str, list[Sample]]]:
    """Run PPO for this time. Returns the number of finished steps and the samples of each process."""
    environment = folder / "soak" / "environment"
    subprocess.run([sys.executable, QUICKSTART / "make.py", "--to", environment], check=True)
    command = [sys.executable, "-m", "align", "run", str(QUICKSTART / "experiment.yaml")]
    paths = ["name=soak", f"runs={folder}", f"model.path={environment / 'base'}"]
    files = {
        "demonstrations": "demonstrations",
        "preferences": "pairs",
        "preferences_heldout": "pairs_heldout",
        "prompts": "prompts",
        "prompts_heldout": "prompts_heldout",
    }
    paths += [f"data.{source}={environment / file}.jsonl" for source, file in files.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *paths, *SETTINGS], stdout=log, stderr=subprocess.STDOUT)
        metrics = folder / "soak" / "metrics.jsonl"
        try:
            while steps_in(metrics) < 3:
                if process.poll() is not None:
                    sys.exit((folder / "log").read_text()[-3000:])
                time.sleep(INTERVAL)
            samples = watch(process, seconds)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        return steps_in(metrics), samples


def steps_in(metrics: Path) -> int:
    """The number of finished PPO steps."""
    return metrics.read_text().count('"policy/loss"') if metrics.is_file() else 0


def watch(process: subprocess.Popen[bytes], seconds: float) -> dict[str, list[Sample]]:
    """Sample the process and all its descendants until the time is over."""
    start = time.monotonic()
    samples: dict[str, list[Sample]] = defaultdict(list)
    names: dict[int, str] = {process.pid: "controller"}  # as first seen, since Ray renames its processes by task
    controller = psutil.Process(process.pid)
    while (at := time.monotonic() - start) < seconds and process.poll() is None:
        for member in (controller, *controller.children(recursive=True)):
            try:
                name = names.setdefault(member.pid, member.name())
                sample = Sample(at, member.memory_full_info().uss, member.num_fds())
            except psutil.Error:
                continue  # it has just ended
            samples[f"{name} {member.pid}"].append(sample)
        time.sleep(INTERVAL)
    return dict(samples)


def trend_of(name: str, samples: list[Sample], end: float) -> Trend:
    """The trend of a process between warm-up and end."""
    warm = [sample for sample in samples if sample.at >= WARMUP_SHARE * end]
    seconds = [sample.at for sample in warm]
    megabytes = [sample.memory / 1e6 for sample in warm]
    slope = 0.0
    first = megabytes[0]
    if len(warm) > 1:
        slope, intercept = linear_regression(seconds, megabytes)
        first = intercept + slope * seconds[0]
    added = slope * (seconds[-1] - seconds[0])
    files = [sample.files for sample in warm]
    third = max(1, len(warm) // 3)
    return Trend(
        name=name,
        megabytes=first,
        added=added,
        share=added / first,
        files=(mean(files[:third]), mean(files[-third:])),
        throughout=samples[0].at < WARMUP_SHARE * end and samples[-1].at > end - 5 * INTERVAL,
    )


if __name__ == "__main__":
    main()
