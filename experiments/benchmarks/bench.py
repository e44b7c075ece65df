"""Compare PPO here and in TRL on this machine: episodes and tokens per second, memory, and time by phase.

    python experiments/benchmarks/bench.py --model MODEL --sft runs/reviews/sft --prompts PROMPTS.jsonl

Each round runs TRL and then this library in separate processes, with the same model, prompts, lengths and threads.
Ratios are taken within a round; the table gives their median, minimum and maximum over the rounds. All figures are
written to `results.json`, which keeps the figures of cases that are not run this time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from inputs import add_model, require_model, require_paths
from operations import shape_of, update_operations
from peer import make_peer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.runtime.seeds import seed_for
from policies.build import make_trunk
from policies.device import fast_dtype
from policies.export import export_merged
from policies.files.base_model import load_base
from policies.heads import ScalarHead
from policies.schema import ModelSettings, PolicySettings
from rewards.model import REWARD_ROLE, RewardModel

HERE = Path(__file__).parent
PEER = HERE / ".venv-trl"
TRL = "1.12.0"
"""The last release with PPO."""
RANK, EPOCHS, BATCH, UPDATES = 16, 4, 32, 5
MEASURED_UPDATES = 3
"""Updates for which the share of the matrix-product rate is measured, in a separate run."""
POLICY = PolicySettings(rank=RANK, alpha=2 * RANK)
GROWTH_BETWEEN_READINGS = 1.005
"""Growth of the resident set size at which the proportional set size is read."""
PARTS = ("rollout", "score", "update", "sync", "between")


@dataclass(frozen=True)
class Workload:
    """What both sides run. model: `base`, `sft` or WIDTHxLAYERS of random weights; response: most tokens."""

    model: str
    response: int


@dataclass(frozen=True)
class Variant:
    """How this library is configured."""

    critic: str = "adapter"
    dtype: str = "float32"
    workers: int = 0
    ranks: int = 0


WORKLOADS = {"A-7m": Workload("base", 64), "A-30m": Workload("512x8", 64), "B-7m": Workload("sft", 128)}
VARIANTS = {
    "adapter-float32": Variant(),
    "adapter-bfloat16": Variant(dtype="bfloat16"),
    "head-float32": Variant("head"),
    "head-bfloat16": Variant("head", "bfloat16"),
}
RAY = {"adapter-float32-ray": Variant(workers=1, ranks=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--sft", type=Path, required=True, help="folder sft/ of a run of experiments/reviews")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run only cases whose name contains this, such as A-7m")
    parser.add_argument("--to", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    require_model(parser, arguments.model)
    require_paths(parser, arguments.sft, arguments.prompts)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TRL runs on the CPU here, so both sides do
    peer = make_peer(PEER, TRL)
    results: dict[str, Any] = json.loads(arguments.to.read_text()) if arguments.to.exists() else {}
    machine_facts = machine(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name, workload in WORKLOADS.items():
            cases = cases_of(name, arguments.only)
            if not cases:
                continue
            model = make_model(workload.model, arguments, Path(folder) / name)
            rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
            for _ in range(arguments.rounds):
                trl = run_peer(peer, model, workload, arguments)
                trl_episodes = trl["episodes_per_s"]
                print(f"{name} trl: {trl_episodes:.2f} episodes/s, {trl['memory_mb']:.0f} MB", flush=True)
                for case, variant in cases.items():
                    ours = run_ours(model, workload, variant, arguments)
                    if not variant.workers:
                        ours["epochs"] = run_measured(model, workload, variant, arguments)
                    rounds[case].append({"ours": ours, "theirs": trl})
                    ratio = ours["episodes_per_s"] / trl_episodes
                    print(f"{case}: {ours['episodes_per_s']:.2f} episodes/s, × {ratio:.2f}", flush=True)
            for case, pairs in rounds.items():
                results[case] = {
                    "machine": machine_facts,
                    "episodes_ratio": spread(pairs, "episodes_per_s"),
                    "tokens_ratio": spread(pairs, "tokens_per_s"),
                    "memory_ratio": spread(pairs, "memory_mb"),
                    "rounds": pairs,
                }
            arguments.to.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def cases_of(workload: str, only: str) -> dict[str, Variant]:
    """The variants of a workload by case name: those that match `only`, in a dtype in which this machine is fast."""
    variants = VARIANTS | (RAY if workload == "A-30m" else {})
    cases: dict[str, Variant] = {}
    for name, variant in variants.items():
        case = f"{workload}-{name}"
        if only in case and variant.dtype in ("float32", fast_dtype()):
            cases[case] = variant
    return cases


def make_model(kind: str, arguments: argparse.Namespace, to: Path) -> Path:
    """The folder of the workload's model: the base, the SFT model merged, or random weights of WIDTHxLAYERS."""
    if kind == "base":
        return arguments.model
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if kind == "sft":
        export_merged(ModelSettings(path=str(arguments.model), dtype="float32"), POLICY, arguments.sft, tokenizer, to)
        return to
    width, layers = map(int, kind.split("x"))
    heads = max(8, width // 128)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        arguments.model,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def run_peer(python: Path, model: Path, workload: Workload, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run TRL, and return its figures."""
    settings = {"model": model, "prompts": arguments.prompts, "batch": BATCH, "updates": UPDATES, "epochs": EPOCHS}
    settings |= {"response": workload.response, "rank": RANK, "threads": arguments.threads}
    options = [f"--{name}={value}" for name, value in settings.items()]
    output, memory = run_and_watch([str(python), str(HERE / "trl_ppo.py"), *options])
    return figures(**json.loads(output.strip().splitlines()[-1]), memory=memory)


def run_ours(model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command `align` as a user would, on a GPU if one is visible, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_experiment(Path(folder), model, workload, variant, arguments, UPDATES + 1)
        _, memory = run_and_watch([sys.executable, "-m", "align", "run", str(file)])
        lines = [json.loads(line) for line in (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step" in line][1:]
    seconds = [line["time/step"] + line["time/between"] for line in steps]
    tokens = [line["rollout/tokens"] for line in steps]
    parts: dict[str, float] = {}
    for part in PARTS:
        parts[part] = median(line[f"time/{part}"] for line in steps)
    prompts = sum(line["rollout/prompt_tokens"] for line in steps) / len(steps) / BATCH
    shape = shape_of(model, RANK)
    critic_forward = variant.critic == "adapter"
    operations = []
    for count in tokens:
        per_episode = update_operations(shape, [(prompts, count / BATCH)], critic_forward)
        operations.append(EPOCHS * BATCH * per_episode)
    update_rate = median(operations) / parts["update"]
    return figures(seconds, tokens, memory) | {"parts": parts, "update_operations_per_s": update_rate}


def run_measured(
    model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """What `share.py` prints about a separate run, because measuring takes time."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_experiment(Path(folder), model, workload, variant, arguments, MEASURED_UPDATES + 1)
        output, _ = run_and_watch([sys.executable, str(HERE / "share.py"), str(file)])
    epochs: list[dict[str, float]] = json.loads(output.splitlines()[-1])
    return epochs


def write_experiment(
    folder: Path, model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace, steps: int
) -> Path:
    """Write a reward model and the experiment file of a run `bench` into a folder. Returns the file."""
    write_reward(model, folder / "reward")
    experiment = {
        "name": "bench",
        "runs": str(folder),
        "stages": ["ppo"],
        "model": {"path": str(model), "dtype": variant.dtype},
        "policy": {"rank": RANK, "alpha": 2 * RANK},
        "data": {"prompts": str(arguments.prompts)},
        "reward": {"model": f"{folder}/reward"},
        "rollouts": {"max_new_tokens": workload.response, "workers": variant.workers, "max_num_seqs": BATCH},
        "ppo": {
            "steps": steps,
            "batch_size": BATCH,
            "epochs": EPOCHS,
            "minibatches": 1,
            "critic": {"kind": variant.critic},
        },
        "learner": {"ranks": variant.ranks},
        "evaluation": {"prompts": 1},
        "cluster": {"threads": arguments.threads},
    }
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(experiment))  # JSON is YAML
    return file


def write_reward(model: Path, to: Path) -> None:
    """Write a reward model with random weights on the same base model, which is what TRL's side has too."""
    base = load_base(ModelSettings(path=str(model), dtype="float32"))
    trunk = make_trunk(base, POLICY, (REWARD_ROLE,))
    generator = torch.Generator().manual_seed(seed_for(0, "reward head"))
    RewardModel(trunk, [ScalarHead(trunk.width, generator)]).save(to)


def run_and_watch(command: list[str]) -> tuple[str, float]:
    """Run a command. Returns its standard output and the peak memory in MB of the process and its children together.

    Memory is the proportional set size, in which pages shared by processes count once. Reading it stalls the process,
    so it is read only when the resident set size, which is cheap to read, has grown.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        resident = 0.0
        root = psutil.Process(process.pid)
        while not done.wait(0.25):
            try:
                family = [root, *root.children(recursive=True)]
                now = sum(child.memory_info().rss for child in family)
                if now > GROWTH_BETWEEN_READINGS * resident:
                    resident = now
                    peak = max(peak, sum(proportional_set_size(child) for child in family))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-4000:]}")
    return output, peak / 2**20


def proportional_set_size(process: psutil.Process) -> float:
    """In bytes; 0 if the process has ended."""
    try:
        return float(process.memory_full_info().pss)
    except psutil.Error:
        return 0.0


def figures(seconds: list[float], tokens: list[float], memory: float) -> dict[str, Any]:
    """The figures of one run, from the seconds and response tokens of its updates."""
    middle = median(seconds)
    return {
        "episodes_per_s": BATCH / middle,
        "tokens_per_s": median(count / time for count, time in zip(tokens, seconds, strict=True)),
        "memory_mb": memory,
        "seconds": seconds,
        "tokens": tokens,
    }


def spread(pairs: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Ours over theirs: median, minimum and maximum over the rounds."""
    ratios = [pair["ours"][name] / pair["theirs"][name] for pair in pairs]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def machine(threads: int) -> dict[str, Any]:
    """A description of the machine."""
    torch.set_num_threads(threads)
    return {
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d"),
    }


def table(results: dict[str, Any]) -> str:
    """One row per case, in Markdown."""
    lines = [
        "| case | rounds | episodes/s, ours over TRL's | tokens/s | memory | "
        "update's share of the matrix-product rate, GFLOP/s | rollout · score · update · rest, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, result in results.items():
        ratios = [result[f"{name}_ratio"] for name in ("episodes", "tokens", "memory")]
        cells = [f"{r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})" for r in ratios]
        ours = [pair["ours"] for pair in result["rounds"]]
        epochs = list(chain.from_iterable(run.get("epochs", ()) for run in ours))
        parts: dict[str, float] = {}
        for part in PARTS:
            parts[part] = median(run["parts"][part] for run in ours)
        rest = parts["sync"] + parts["between"]
        times = " · ".join(f"{parts[part]:.2f}" for part in PARTS[:3])
        lines.append(f"| {case} | {len(ours)} | {' | '.join(cells)} | {share(epochs)} | {times} · {rest:.2f} |")
    return "\n".join(lines)


def share(epochs: list[dict[str, float]]) -> str:
    """Median, minimum and maximum over the epochs, and the median rate; empty if none was measured."""
    if not epochs:
        return ""
    shares = [epoch["update_per_s"] / epoch["matrix_per_s"] for epoch in epochs]
    rate = median(epoch["matrix_per_s"] for epoch in epochs) / 1e9
    return f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of {rate:,.0f}"


if __name__ == "__main__":
    main()
