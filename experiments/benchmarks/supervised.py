"""Compare SFT and DPO here and in TRL on this machine: tokens per second at equal held-out loss.

    python experiments/benchmarks/supervised.py --model MODEL --data DATA

DATA is a folder with gsm8k/train.jsonl (`question`, `answer`) and hh/harmless.jsonl (`chosen`, `rejected`). Each round
runs both sides in turn, in separate processes, on the same rows with the same threads; TRL's SFT with packing and
without, of which the faster counts. Tokens are those of the rows; the time is that of training and, for DPO, of the
reference's log-probabilities, without loading and tokenizing. Held-out losses are computed here for both sides. The
figures go to `supervised.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from inputs import add_model, require_model, require_paths
from peer import make_peer

HERE = Path(__file__).parent
PEER = HERE / ".venv-trl-supervised"
TRL = "1.16.0"
RANK, BETA = 16, 0.1
MAX_TOKENS = 512
RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class Case:
    """What both sides train: task `sft` or `dpo`, method `lora` or `full`."""

    task: str
    method: str


CASES = {
    "sft-lora": Case("sft", "lora"),
    "sft-full": Case("sft", "full"),
    "dpo-lora": Case("dpo", "lora"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALIGN_DATA"), help="default: $ALIGN_DATA")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, default=HERE / "supervised.json")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_job(json.loads(arguments.job))))
        return
    require_model(parser, arguments.model)
    if arguments.data is None:
        parser.error("data are needed: give their folder as --data or as ALIGN_DATA")
    require_paths(parser, arguments.data / "gsm8k" / "train.jsonl", arguments.data / "hh" / "harmless.jsonl")
    peer = make_peer(PEER, TRL)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if arguments.only in name:
            results[name] = compare(name, case, peer, arguments)
            print(f"{name}: {summary(results[name])}", flush=True)
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def compare(name: str, case: Case, peer: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn; the figures of each round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(case.task, arguments, folder)
        rounds = []
        for number in range(arguments.rounds):
            figures = {"ours": run_ours(job_of(case, arguments, folder, "ours"))}
            for packing in [True, False] if case.task == "sft" else [False]:
                side = f"trl, {'packed' if packing else 'unpacked'}"
                figures[side] = run_trl(peer, job_of(case, arguments, folder, side.replace(", ", "-"), packing))
            rounds.append(figures)
            print(f"{name}, round {number + 1}: {json.dumps(figures)}", flush=True)
    ratios = []
    for figures in rounds:
        theirs = max(figures[side]["tokens_per_s"] for side in figures if side != "ours")
        ratios.append(figures["ours"]["tokens_per_s"] / theirs)
    return {"ratio": [median(ratios), min(ratios), max(ratios)], "rounds": rounds}


def summary(result: dict[str, Any]) -> str:
    middle, low, high = result["ratio"]
    last = result["rounds"][-1]
    losses = ", ".join(f"{side} {figures['heldout_loss']:.4f}" for side, figures in last.items())
    return f"{middle:.2f} times as fast as TRL ({low:.2f} to {high:.2f}); held-out loss: {losses}"


def write_rows(task: str, arguments: argparse.Namespace, folder: Path) -> None:
    """Write the training rows and the held-out ones."""
    if task == "sft":
        lines = (arguments.data / "gsm8k" / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        written = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows]
    else:
        written = [pair_of(json.loads(line)) for line in (arguments.data / "hh" / "harmless.jsonl").open()]
    written = [row for row in written if fits(row)]
    for name, part in {"rows": written[: arguments.rows], "heldout": written[-200:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def pair_of(row: dict[str, str]) -> dict[str, str]:
    """A pair with its prompt, which both transcripts begin with."""
    common = os.path.commonprefix([row["chosen"], row["rejected"]])  # noqa: RUF071  # of texts
    end = common.rfind("\n\nAssistant:") + len("\n\nAssistant:")
    return {"prompt": row["chosen"][:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][end:]}


def fits(row: dict[str, str]) -> bool:
    """Whether a row has a response, or two, and is short enough for both sides to keep it whole."""
    prompt, *responses = row.values()
    return len(prompt) + max(map(len, responses)) < 1.4 * MAX_TOKENS and all(text.strip() for text in responses)


def job_of(case: Case, arguments: argparse.Namespace, folder: Path, side: str, packing: bool = False) -> dict[str, Any]:
    return asdict(case) | {
        "model": str(arguments.model),
        "rows": str(folder / "rows.jsonl"),
        "heldout": str(folder / "heldout.jsonl"),
        "to": str(folder / side),
        "threads": arguments.threads,
        "batch": arguments.batch,
        "packing": packing,
        "packed_batch": max(1, round(arguments.batch * 0.45)),  # rows of GSM8K fill so much of 512 tokens
        "max_tokens": MAX_TOKENS,
        "rank": RANK,
        "beta": BETA,
        "learning_rate": RATES[case.method],
    }


def run_ours(job: dict[str, Any]) -> dict[str, float]:
    """Train by this library, and compute the held-out loss of the result, each in a process of its own."""
    figures = call(job | {"trained": None})
    return call(job | {"trained": job["to"], "by": "align"}) | figures


def run_trl(peer: Path, job: dict[str, Any]) -> dict[str, float]:
    """Train by TRL, and compute the held-out loss of the result here."""
    command = [str(peer), str(HERE / "trl_supervised.py")]
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    measured = call(job | {"trained": job["to"], "by": "trl"})
    return {**measured, **figures, "tokens_per_s": measured["tokens"] / figures["seconds"]}


def call(job: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- The process that trains or evaluates ---------------------------------------------------------------------------


def run_job(job: dict[str, Any]) -> dict[str, float]:
    """Train, or load what one side has trained and compute its held-out loss."""
    import deepspeed  # noqa: F401  # its import is no part of the training
    import torch

    from align.config.schema import Experiment
    from align.data.datasets import read_datasets
    from align.learner.group import LocalRank
    from align.supervised.learner import SupervisedLearners, build_learner
    from policies.files.base_model import load_tokenizer

    torch.set_num_threads(job["threads"])
    experiment = Experiment.model_validate(settings_of(job))
    datasets = read_datasets(experiment, load_tokenizer(job["model"]), None)
    if not job["trained"]:  # the held-out loss is computed afterwards, for both sides alike
        datasets.demonstrations_heldout = datasets.demonstrations_heldout[:1]
        datasets.preferences_heldout = datasets.preferences_heldout[:1]
    blueprint = blueprint_of(job, experiment, datasets)
    settings = getattr(experiment, job["task"])
    examples = datasets.demonstrations if job["task"] == "sft" else datasets.preferences
    tokens = sum(example.length for example in examples)
    objective = blueprint.build()
    started = time.perf_counter()
    learners = SupervisedLearners(
        LocalRank(lambda: build_learner(lambda: objective, settings, zero=0, seed=0, gradient_checkpointing=False))
    )
    if job["trained"]:
        if not is_base(job):
            load_adapter_of(job, experiment, learners)
        return {"tokens": tokens, "heldout_loss": learners.heldout_metrics()["heldout_loss"]}
    before = time.perf_counter() - started  # the optimizer, and the reference of DPO
    figures = fit_all(job, experiment, learners, [example.length for example in examples])
    seconds = before + figures["seconds"]
    return figures | {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """The experiment, in which full weights that TRL has trained are the base."""
    source = "demonstrations" if job["task"] == "sft" else "preferences"
    policy = {"method": "full"} if job["method"] == "full" else {"rank": job["rank"], "alpha": 2 * job["rank"]}
    own = {"batch_size": job["batch"], "learning_rate": job["learning_rate"], "max_tokens": job["max_tokens"]}
    own["warmup"] = 0.0
    if job["task"] == "dpo":
        own["beta"] = job["beta"]
    return {
        "name": "benchmark",
        "stages": [job["task"]],
        "model": {"path": job["trained"] if is_base(job) else job["model"], "dtype": "float32"},
        "policy": policy,
        "data": {source: job["rows"], f"{source}_heldout": job["heldout"]},
        job["task"]: own,
    }


def is_base(job: dict[str, Any]) -> bool:
    """Whether what was trained is a complete model, as TRL saves full weights."""
    return bool(job["trained"]) and job["method"] == "full" and job["by"] == "trl"


def blueprint_of(job: dict[str, Any], experiment: Any, datasets: Any) -> Any:
    from align.supervised.dpo_objective import DpoBlueprint
    from align.supervised.sft_objective import SftBlueprint

    if job["task"] == "sft":
        return SftBlueprint(
            model=experiment.model,
            policy=experiment.policy,
            seed=0,
            examples=datasets.demonstrations,
            heldout=datasets.demonstrations_heldout,
            settings=experiment.sft,
        )
    return DpoBlueprint(
        model=experiment.model,
        policy=experiment.policy,
        seed=0,
        sft=None,
        examples=datasets.preferences,
        heldout=datasets.preferences_heldout,
        settings=experiment.dpo,
    )


def load_adapter_of(job: dict[str, Any], experiment: Any, learners: Any) -> None:
    """Move the trained role from where it starts to where training has left it; the reference of DPO stays."""
    from policies.files.adapters import load_adapter

    module = learners.ranks.learner.objective.module
    module.trunk.write_adapter(module.role, load_adapter(job["trained"], experiment.policy))


def fit_all(job: dict[str, Any], experiment: Any, learners: Any, lengths: list[int]) -> dict[str, float]:
    from align.runs.tracking import Tracker
    from align.runtime.signals import StopRequest
    from align.supervised.fit import FitContext, fit, fitted_weights
    from policies.files.adapters import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        context = FitContext(
            stage=job["task"],
            metric_group=job["task"],
            checkpoints=Path(folder) / "checkpoints",
            keep=1,
            seed=0,
            tracker=Tracker(Path(folder)),
            stop=StopRequest(),
            policy=experiment.policy,
            base=job["model"],
        )
        started = time.perf_counter()
        result = fit(learners, lengths, getattr(experiment, job["task"]), context)
        seconds = time.perf_counter() - started
        role = learners.ranks.learner.objective.module.role
        adapter = fitted_weights(context, [role], []).adapters[role]
    save_adapter(Path(job["to"]), adapter, experiment.policy, job["model"])
    return {"steps": result.steps, "seconds": seconds}


if __name__ == "__main__":
    main()
