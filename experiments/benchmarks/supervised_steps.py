"""CPU seconds of the training steps of SFT and of reward models, in this checkout over another one.

    git worktree add ../before COMMIT
    python experiments/benchmarks/supervised_steps.py --other ../before

Each side is a process that trains on the same synthetic rows with the same random Llama, by the packages of its own
checkout. The sides take a few steps in turn, so that both see the same machine. An epoch has the same batches on both
sides, in another order where the checkouts shuffle differently, so steps are compared epoch by epoch: the ratio is that
of their median CPU seconds, threads included, as median, minimum and maximum over all epochs but the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "experiments" / "quickstart"))
LAYERS = {"1m": (128, 4), "7m": (256, 8)}
"""Width and number of layers of the models."""
CASES = ("sft", "pairs", "rankings")
BATCH = 16
BATCHES = 20
"""Batches in an epoch: few enough that they are sorted by length all together, and are thus the same in any order."""
TURN = 5
"""Steps that a side takes in turn."""
ROWS = BATCH * BATCHES
RESPONSES = 4
"""Responses of a ranking."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--epochs", type=int, default=6, help=f"measured epochs of {BATCHES} steps")
    parser.add_argument("--only", default="", help="run only cases whose name contains this, such as sft-1m")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not (arguments.other / "align").is_dir():
        parser.error(f"--other {arguments.other} is not a checkout of this repository")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        for size in LAYERS:
            write_model(Path(folder), size)
            for kind in CASES:
                if arguments.only in f"{kind}-{size}":
                    print(f"{kind}-{size}: {compare(arguments, Path(folder), kind, size)}", flush=True)


# --- The parent -----------------------------------------------------------------------------------------------------


def write_rows(folder: Path) -> None:
    """Write demonstrations, pairs and rankings of the quickstart's synthetic environment."""
    import make
    import synthetic

    random = Random(0)
    prompts = make.unique_prompts(random)
    rows: dict[str, list[Any]] = {kind: [] for kind in CASES}
    for _ in range(ROWS):
        prompt = next(prompts)
        rows["sft"].append(make.write_demonstration(random, prompt))
        rows["pairs"].append(make.write_pair(random, prompt))
        responses = [synthetic.write_reply(random, prompt, synthetic.COMPARISONS) for _ in range(RESPONSES)]
        utilities = [synthetic.USUAL.utility(prompt, response) for response in responses]
        ranks = [1 + sorted(utilities, reverse=True).index(utility) for utility in utilities]
        rows["rankings"].append({"prompt": prompt, "responses": responses, "ranks": ranks})
    for kind in CASES:
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))


def write_model(folder: Path, size: str) -> None:
    """Write a Llama with random weights, and its tokenizer."""
    import make
    import torch
    from transformers import LlamaForCausalLM

    lines = (folder / "sft.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    torch.manual_seed(0)
    tokenizer = make.train_tokenizer([row["prompt"] + row["completion"] for row in rows])
    config = make.new_model(tokenizer).config
    config.hidden_size, config.num_hidden_layers = LAYERS[size]
    config.intermediate_size = config.hidden_size * 13 // 4
    config.head_dim = config.hidden_size // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(folder / size)
    tokenizer.save_pretrained(folder / size)


def compare(arguments: argparse.Namespace, folder: Path, kind: str, size: str) -> str:
    """Train on both sides in turn. Returns a line of their figures."""
    case = Case(folder, kind, size, arguments.threads)
    with Side(ROOT, "this", case) as ours, Side(arguments.other.resolve(), "other", case) as other:
        for _ in range((arguments.epochs + 1) * BATCHES // TURN):
            ours.take_steps()
            other.take_steps()
    ratios = [a / b for a, b in zip(ours.medians()[1:], other.medians()[1:], strict=True)]
    milliseconds = [1e3 * median(side.medians()[1:]) for side in (ours, other)]
    losses = [sum(side.losses[-BATCHES:]) / BATCHES for side in (ours, other)]
    return (
        f"ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
        f"{milliseconds[0]:.1f} over {milliseconds[1]:.1f} ms; "
        f"mean loss of the last epoch {losses[0]:.4f}, other {losses[1]:.4f}"
    )


@dataclass(frozen=True)
class Case:
    """What both sides train: a kind of data with a size of model, both in a folder."""

    folder: Path
    kind: str
    size: str
    threads: int

    def write_experiment(self, name: str) -> Path:
        """Write the experiment of a side. Returns the file."""
        stage, rows = ("sft", "demonstrations") if self.kind == "sft" else ("reward", "preferences")
        experiment = {
            "name": name,
            "runs": str(self.folder / f"{self.kind}-{self.size}"),
            "stages": [stage],
            "model": {"path": f"{self.folder}/{self.size}", "dtype": "float32"},
            "policy": {"rank": 16, "alpha": 32},
            "data": {rows: f"{self.folder}/{self.kind}.jsonl"},
            stage: {"batch_size": BATCH, "epochs": 10**4, "checkpoint_every": 10**6},
            "cluster": {"threads": self.threads},
        }
        file = self.folder / f"{self.kind}-{self.size}-{name}.yaml"
        file.write_text(json.dumps(experiment))  # JSON is YAML
        return file


class Side:
    """A process that trains with the packages of a checkout, a few steps whenever it is asked to."""

    def __init__(self, checkout: Path, name: str, case: Case) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        file = case.write_experiment(name)
        self.errors = file.with_suffix(".log")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": str(checkout)},
            )
        loaded = Path(self._receive()["align"])
        if not loaded.is_relative_to(checkout):
            raise SystemExit(f"{loaded} is not of {checkout}")

    def take_steps(self) -> None:
        """Take `TURN` steps."""
        self._stream("stdin").write("go\n")
        self._stream("stdin").flush()
        for _ in range(TURN):
            step = self._receive()
            self.seconds.append(step["seconds"])
            self.losses.append(step["loss"])

    def medians(self) -> list[float]:
        """The median CPU seconds of a step, by epoch."""
        starts = range(0, len(self.seconds), BATCHES)
        return [median(self.seconds[start : start + BATCHES]) for start in starts]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _receive(self) -> dict[str, Any]:
        line = self._stream("stdout").readline()
        if not line:
            raise SystemExit(f"a side has ended:\n{self.errors.read_text()[-4000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    def _stream(self, name: str) -> IO[str]:
        stream: IO[str] = getattr(self.process, name)
        return stream


# --- A side ---------------------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """Reports each step in place of the run's tracker, and waits for its turn every few steps."""

    answers: IO[str]
    steps: int = 0
    started: float = field(default_factory=time.process_time)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        losses = [value for name, value in metrics.items() if name.endswith("/loss")]
        if not losses:
            return
        self.send({"seconds": time.process_time() - self.started, "loss": losses[0]})
        self.steps += 1
        if self.steps % TURN == 0:
            self.wait()
        self.started = time.process_time()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message to the parent."""
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """Wait until the parent asks for steps."""
        sys.stdin.readline()


def serve(experiment: str) -> None:
    """Run an experiment in turns."""
    import align
    from align.runs.tracking import Tracker

    turns = Turns(os.fdopen(os.dup(1), "w"))
    sys.stdout = sys.stderr
    Tracker.log = lambda tracker, *arguments: turns.log(*arguments)  # type: ignore[method-assign]
    turns.send({"align": align.__file__})
    turns.wait()
    align.run(align.load_experiment(experiment))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
