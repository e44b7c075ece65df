"""Runs whose allocator refuses large blocks: simulated, by a preloaded library in place of a full memory."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from align.config.load import load_experiment
from align.config.ppo_settings import PpoSettings
from align.config.schema import ClusterSettings, LearnerSettings
from align.ppo import learners as ppo_learners
from align.ppo.learner import PpoLearner
from align.ppo.learners import ray_learners
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint
from align.runs.record_files import EVENTS, read_lines
from policies.device import ActorOptions, ComputeSettings
from policies.schema import ModelSettings, PolicySettings
from tests.integration.tiny_run import COMMAND, ENVIRONMENT, figures, make_settings, write_rows

LIBRARY = Path(__file__).parent / "refuse_memory.c"
REFUSED_BYTES = 72_000
"""More than a block of what the tiny run's processes hold for good, less than one of its microbatches of 512 tokens."""
ROOMY = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
"""The environment of processes with memory enough."""
SECTIONS = {"sft": "sft", "reward": "reward", "ppo": "learner"}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes whose allocator refuses blocks of REFUSED_BYTES."""
    library = tmp_path_factory.mktemp("library") / "refuse_memory.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(LIBRARY), "-ldl"], check=True)
    return ROOMY | {"LD_PRELOAD": str(library), "REFUSED_BYTES": str(REFUSED_BYTES)}


def large_settings(model: Path, folder: Path) -> dict[str, Any]:
    """Settings under which a minibatch of every stage is one microbatch."""
    settings = make_settings(model, folder)
    for stage in ("sft", "reward"):
        settings[stage] |= {"batch_size": 24}
    settings["rollouts"] |= {"max_new_tokens": 16}
    settings["ppo"] |= {"batch_size": 32, "minibatches": 1}
    for section in SECTIONS.values():
        settings.setdefault(section, {})["tokens_per_microbatch"] = 512
    return settings


def run(settings: dict[str, Any], folder: Path, environment: dict[str, str]) -> tuple[Path, str]:
    """Run all stages of the settings in a process of its own. Returns the run's folder and what it wrote to stderr."""
    file = folder / f"{settings['name']}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return folder / "runs" / settings["name"], align(environment, "run", str(file))


def align(environment: dict[str, str], *arguments: str) -> str:
    """Run a command to its end. Returns what it wrote to stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def sizes(run: Path) -> dict[str, int | None]:
    """The size of the microbatches of each section, as the run has kept it."""
    experiment = load_experiment(run / "config.yaml")
    return {section: getattr(experiment, section).tokens_per_microbatch for section in SECTIONS.values()}


def halvings(run: Path) -> dict[str, int]:
    """How often memory ran out, by stage."""
    stages = [row["stage"] for row in read_lines(run / EVENTS) if row["event"] == "out of memory"]
    return {stage: stages.count(stage) for stage in SECTIONS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param({}, id="in process"),
        pytest.param({"ranks": 2, "zero": 2}, id="two ranks at ZeRO 2"),
    ],
)
@pytest.mark.timeout(1200)
def test_microbatches_are_halved_until_they_fit_and_stay_so(
    ranks: dict[str, int], tiny_model: Path, refusing: dict[str, str], tmp_path: Path
) -> None:
    settings = large_settings(tiny_model, tmp_path)
    for section in SECTIONS.values():
        settings[section] |= ranks
    refused, messages = run(settings | {"name": "refused"}, tmp_path, refusing)
    kept, halved = sizes(refused), halvings(refused)
    assert all(size is not None and size < 512 for size in kept.values())
    assert all(halved.values())
    for section in SECTIONS.values():
        assert f"resuming from the last checkpoint with {section}.tokens_per_microbatch {kept[section]}" in messages
    align(ROOMY, "resume", str(refused), "ppo.steps=4")
    assert sizes(refused) == kept
    assert halvings(refused) == halved
    # The figures are those of a run that had the smaller microbatches from the start.
    for section, size in kept.items():
        settings[section] |= {"tokens_per_microbatch": size}
    settings["ppo"] |= {"steps": 4}
    smaller, _ = run(settings | {"name": "smaller"}, tmp_path, ROOMY)
    assert figures(refused) == figures(smaller)


def test_a_sequence_that_does_not_fit_by_itself_ends_the_run(
    tiny_model: Path, refusing: dict[str, str], tmp_path: Path
) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft"]}
    long = [{"prompt": f"User: {count} Assistant:", "completion": " cat" * 150} for count in range(40)]
    write_rows(Path(settings["data"]["demonstrations"]), long)
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [*COMMAND, "run", str(file)]
    done = subprocess.run(command, env=refusing, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("stopped: rank 0 of the learner ran out of memory with a microbatch of ")
    assert "in 1 sequence: DefaultCPUAllocator: can't allocate memory" in last
    assert "model.gradient_checkpointing=true" in last
    *_, event = read_lines(Path(settings["runs"]) / "tiny" / EVENTS)
    assert (event["stage"], event["event"]) == ("sft", "fault")
    assert last == f"stopped: {event['text']}"


def build_with_less_memory_on_rank_1(*arguments: Any) -> PpoLearner:
    """As `build_ppo_learner`."""
    tokens = 4096 - 1024 * dist.get_rank()
    pytest.MonkeyPatch().setattr("policies.trunk.default_microbatch_tokens", lambda *_: tokens)
    return build_ppo_learner(*arguments)


build_ppo_learner = ppo_learners.build_ppo_learner


@pytest.mark.slow
def test_the_default_is_what_suits_the_rank_with_the_least_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo_learners, "build_ppo_learner", build_with_less_memory_on_rank_1)
    blueprint = Blueprint(ModelSettings(path=str(tiny_model)), PolicySettings(rank=4, alpha=8), 0, None)
    with ray_cluster(ClusterSettings(), 2):
        actors = [ActorOptions(ComputeSettings(1))] * 2
        learners = ray_learners(blueprint, PpoSettings(), LearnerSettings(ranks=2), 1.0, actors)
        assert learners.ranks.call(PpoLearner.tokens_per_microbatch) == [3072, 3072]
        learners.close()
