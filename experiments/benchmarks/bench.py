"""PPO here against TRL's, side by side on this machine: episodes and tokens a second, memory, and where time goes.

    python experiments/benchmarks/bench.py --model MODEL --sft runs/reviews/sft --prompts PROMPTS.jsonl

Each round runs the yardstick and then ours, as processes of their own, on the same model, prompts, lengths and threads.
Ratios are taken within a round; the table gives their median, lowest and highest over the rounds. All figures go to
`results.json`, where cases that are not run this time stay as they are.
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
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from operations import shape_of, update_operations
from peer import make_peer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.runtime.seeds import seed_for
from policies.device import fast_dtype
from policies.export import export_merged
from policies.files.base_model import load_base
from policies.heads import ScalarHead
from policies.methods.build import make_trunk
from policies.schema import ModelSettings, PolicySettings
from rewards.model import REWARD_ROLE, RewardModel

HERE = Path(__file__).parent
PEER = HERE / ".venv-trl"
TRL = "1.12.0"
"""The last release with PPO."""
RANK, EPOCHS, BATCH, UPDATES = 16, 4, 32, 5
MEASURED = 3
"""Updates of which the share of the matrix-product rate is measured, in a run of its own."""
POLICY = PolicySettings(rank=RANK, alpha=2 * RANK)
GROWN = 1.005
"""Growth of the resident set size at which memory is looked at closely."""
PARTS = ("rollout", "score", "update", "sync", "between")


@dataclass(frozen=True)
class Workload:
    """What both sides are given. model: the base as it is, its SFT model, or random weights of a size."""

    model: str
    response: int


@dataclass(frozen=True)
class Variant:
    """How ours is set up."""

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
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--sft", type=Path, required=True, help="the sft/ folder of a run of experiments/reviews")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name holds this, such as A-7m or head-float32")
    parser.add_argument("--to", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    refuse_missing(parser, arguments.model, arguments.sft, arguments.prompts)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the yardstick is on the CPU, and so are both sides
    peer = make_peer(PEER, TRL)
    results: dict[str, Any] = json.loads(arguments.to.read_text()) if arguments.to.exists() else {}
    measured = machine(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name, workload in WORKLOADS.items():
            variants = VARIANTS | (RAY if name == "A-30m" else {})
            wanted = {
                f"{name}-{v}": variant
                for v, variant in variants.items()
                if arguments.only in f"{name}-{v}" and variant.dtype in ("float32", fast_dtype())
            }
            if not wanted:
                continue
            model = make_model(workload.model, arguments, Path(folder) / name)
            rounds: dict[str, list[dict[str, Any]]] = {case: [] for case in wanted}
            for _ in range(arguments.rounds):
                theirs = run_peer(peer, model, workload, arguments)
                print(
                    f"{name} trl: {theirs['episodes_per_s']:.2f} episodes/s, {theirs['memory_mb']:.0f} MB", flush=True
                )
                for case, variant in wanted.items():
                    ours = run_ours(model, workload, variant, arguments)
                    if not variant.workers:
                        ours["epochs"] = run_measured(model, workload, variant, arguments)
                    rounds[case].append({"ours": ours, "theirs": theirs})
                    ratio = ours["episodes_per_s"] / theirs["episodes_per_s"]
                    print(f"{case}: {ours['episodes_per_s']:.2f} episodes/s, × {ratio:.2f}", flush=True)
            for case, pairs in rounds.items():
                results[case] = {
                    "machine": measured,
                    "episodes_ratio": spread(pairs, "episodes_per_s"),
                    "tokens_ratio": spread(pairs, "tokens_per_s"),
                    "memory_ratio": spread(pairs, "memory_mb"),
                    "rounds": pairs,
                }
            arguments.to.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def refuse_missing(parser: argparse.ArgumentParser, *given: Path) -> None:
    """End with status 2 where one of the files or folders is not there."""
    for path in given:
        if not path.exists():
            parser.error(f"{path} does not exist")


def make_model(kind: str, arguments: argparse.Namespace, to: Path) -> Path:
    """The folder of the workload's model: the base, its SFT model merged, or a random one of WIDTHxLAYERS."""
    if kind == "base":
        return arguments.model
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if kind == "sft":
        export_merged(ModelSettings(path=str(arguments.model)), POLICY, arguments.sft, tokenizer, to)
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
    """The yardstick's figures."""
    settings = {"model": model, "prompts": arguments.prompts, "batch": BATCH, "updates": UPDATES, "epochs": EPOCHS}
    settings |= {"response": workload.response, "rank": RANK, "threads": arguments.threads}
    line = [str(python), str(HERE / "trl_ppo.py")]
    output, memory = watched([*line, *(f"--{name}={value}" for name, value in settings.items())])
    return figures(**json.loads(output.strip().splitlines()[-1]), memory=memory)


def run_ours(model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Our figures, by a whole run of the command, as a user would run it; on a GPU where one can be seen."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_experiment(Path(folder), model, workload, variant, arguments, UPDATES + 1)
        _, memory = watched([sys.executable, "-m", "align", "run", str(file)])
        lines = [json.loads(line) for line in (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step" in line][1:]
    seconds = [line["time/step"] + line["time/between"] for line in steps]
    found = figures(seconds, [line["rollout/tokens"] for line in steps], memory)
    parts = {part: median(line[f"time/{part}"] for line in steps) for part in PARTS}
    prompts = sum(line["rollout/prompt_tokens"] for line in steps) / len(steps) / BATCH
    responses = [line["rollout/tokens"] / BATCH for line in steps]
    shape = shape_of(model, RANK)
    needed = median(
        EPOCHS * BATCH * update_operations(shape, [(prompts, each)], variant.critic == "adapter") for each in responses
    )
    return found | {"parts": parts, "update_operations_per_s": needed / parts["update"]}


def run_measured(
    model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """What `share.py` prints, of a run of its own: to measure takes time."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_experiment(Path(folder), model, workload, variant, arguments, MEASURED + 1)
        output, _ = watched([sys.executable, str(HERE / "share.py"), str(file)])
    epochs: list[dict[str, float]] = json.loads(output.splitlines()[-1])
    return epochs


def write_experiment(
    folder: Path, model: Path, workload: Workload, variant: Variant, arguments: argparse.Namespace, steps: int
) -> Path:
    """The experiment file of a run `bench` in a folder, with a reward model beside it."""
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
    """A reward model of ours with random weights, on the same trunk: what TRL's side has too."""
    base = load_base(ModelSettings(path=str(model)))
    trunk = make_trunk(base, POLICY, (REWARD_ROLE,))
    generator = torch.Generator().manual_seed(seed_for(0, "reward head"))
    RewardModel(trunk, [ScalarHead(trunk.width, generator)]).save(to)


def watched(command: list[str]) -> tuple[str, float]:
    """Run a command. Returns what it printed and the most memory that it and its children had at one time, in MB.

    Memory is proportional set size, in which a page that processes share counts once. To read it holds the process up,
    so that it is read only where the resident set size, which costs nothing, has grown.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        resident = 0.0
        root = psutil.Process(process.pid)
        while not done.wait(0.25):
            try:
                family = [root, *root.children(recursive=True)]
                now = sum(child.memory_info().rss for child in family)
                if now > GROWN * resident:
                    resident, peak = now, max(peak, sum(share_of(child) for child in family))
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


def share_of(process: psutil.Process) -> float:
    """Proportional set size in bytes; 0 of a process that has gone."""
    try:
        return float(process.memory_full_info().pss)
    except psutil.Error:
        return 0.0


def figures(seconds: list[float], tokens: list[float], memory: float) -> dict[str, Any]:
    """The figures of one run from the seconds and response tokens of its updates."""
    middle = median(seconds)
    return {
        "episodes_per_s": BATCH / middle,
        "tokens_per_s": median(count / time for count, time in zip(tokens, seconds, strict=True)),
        "memory_mb": memory,
        "seconds": seconds,
        "tokens": tokens,
    }


def spread(pairs: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Ours over theirs: median, lowest and highest of the rounds."""
    ratios = [pair["ours"][name] / pair["theirs"][name] for pair in pairs]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    torch.set_num_threads(threads)
    return {
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "measured": time.strftime("%Y-%m-%d"),
    }


def table(results: dict[str, Any]) -> str:
    """One line a case, in Markdown."""
    lines = [
        "| case | rounds | episodes/s, ours over TRL's | tokens/s | memory | "
        "update's share of the matrix-product rate, GFLOP/s | rollout · score · update · rest, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in results.items():
        ratios = [found[f"{name}_ratio"] for name in ("episodes", "tokens", "memory")]
        cells = [f"{r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})" for r in ratios]
        ours = [pair["ours"] for pair in found["rounds"]]
        epochs = [epoch for run in ours for epoch in run.get("epochs", ())]
        parts = {part: median(run["parts"][part] for run in ours) for part in PARTS}
        rest = parts["sync"] + parts["between"]
        times = " · ".join(f"{parts[part]:.2f}" for part in PARTS[:3])
        lines.append(f"| {case} | {len(ours)} | {' | '.join(cells)} | {share(epochs)} | {times} · {rest:.2f} |")
    return "\n".join(lines)


def share(epochs: list[dict[str, float]]) -> str:
    """Median, lowest and highest of the epochs, of the median rate; nothing where none was measured."""
    if not epochs:
        return ""
    shares = [epoch["update_per_s"] / epoch["matrix_per_s"] for epoch in epochs]
    rate = median(epoch["matrix_per_s"] for epoch in epochs) / 1e9
    return f"{median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of {rate:,.0f}"


if __name__ == "__main__":
    main()
