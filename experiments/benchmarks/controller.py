"""Measure the controller's own work in a PPO step, by part, and how it grows with the batch.

    python experiments/benchmarks/controller.py

Simulated: there is no model and no network. Stubs take the place of rollout workers and learner ranks; they are not
measured. The controller's own code is real, and so is serialisation: all that is sent and received passes through a
local Ray object store. Seconds are processor seconds of all threads of the controller's process. Writes
`controller.json`.
"""

import argparse
import json
import pickle
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch

from align.algorithms import episodes
from align.algorithms.kl import FixedKl
from align.config.ppo_settings import PpoSettings
from align.config.schema import ClusterSettings, LearnerSettings
from align.learner.ray_ranks import RayRanks
from align.ppo import loop
from align.ppo.learners import PpoLearners
from align.ppo.loop import Ppo
from align.ppo.metrics import step_metrics
from align.ppo.mismatch import MismatchCheck
from align.ppo.objective import MAXIMA, STATISTICS
from align.ppo.prompts import PromptStream
from align.resources.ray_cluster import ray_cluster
from align.scoring.reward import Reward
from policies.device import ActorOptions, ComputeSettings
from policies.trunk import AdapterWeights
from rewards.compose import Composition
from rewards.terms.base import TermInput, TermScores
from rewards.terms.length import LengthTerm
from rollouts.async_rollouts import SynchronousRollouts
from rollouts.engine import Sampling
from rollouts.packed_records import OutputBatch, TrajectoryBatch
from rollouts.ray_pool import PoolSettings, RayPool
from rollouts.roster import WeightsVersion
from rollouts.trajectory import Request, RoleOutputs, ScoredTokens, Trajectory
from rollouts.worker import Reply

WORKERS = 64
CHUNK = 16
RANKS = 16
SIZES = (128, 256, 512, 1024)
TOKENS = 8192
PROMPT = 512
ADAPTER = {f"layer.{layer}": (1024, 256) for layer in range(32)}
"""Shapes of the adapter's tensors: 8.4 million parameters."""
PUT = ray.put
GET = ray.get
STUBS = "stubs"
WEIGHTS = "weights received, digested and sent"
POOL = "chunks handed out, trajectories received"
PARTS = {
    POOL: [(RayPool, "generate")],
    "scoring sent and received": [(PpoLearners, "score")],
    "rewards": [(Reward, "score_and_update")],
    "mismatch of the sampler": [(MismatchCheck, "__call__")],
    "advantages": [(episodes, "_estimate")],
    "episodes": [(loop, "make_episodes")],
    "update packed and sent": [(PpoLearners, "update")],
    WEIGHTS: [(RayPool, "load_adapter"), (PpoLearners, "policy_weights")],
}
METRICS = "metrics"
REST = "rest"


class Meter:
    """Processor seconds and bytes by part. What is measured within another part counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self.sizes: dict[Any, int] = {}
        """Of what the stubs have put, by reference."""
        self._parts: list[str] = []
        self._since = 0.0

    def clear(self) -> None:
        """Forget what has been measured."""
        self.seconds.clear()
        self.bytes.clear()
        self.sizes.clear()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a part."""
        self._charge()
        self._parts.append(part)
        yield
        self._charge()
        self._parts.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Measure a function whenever it is called."""
        function = getattr(owner, name)

        def measured(*arguments: Any, **named: Any) -> Any:
            with self(part):
                return function(*arguments, **named)

        setattr(owner, name, measured)

    def count_bytes(self) -> None:
        """Count what the controller puts into Ray's object store, and what it gets from it."""

        def counting_put(value: Any) -> Any:
            self.bytes[self._parts[-1]] += self.size(value)
            return PUT(value)

        def counting_get(references: Any, **options: Any) -> Any:
            for reference in references if isinstance(references, list) else [references]:
                self.bytes[self._parts[-1]] += self.sizes[reference]
            return GET(references, **options)

        ray.put, ray.get = counting_put, counting_get

    def reply(self, value: Any) -> Any:
        """Put what a stub returns; not counted before the controller gets it."""
        reference = PUT(value)
        self.sizes[reference] = self.size(value)
        return reference

    def size(self, value: Any) -> int:
        """Bytes of a value as Ray stores it: pickled, with arrays apart from the rest and without a copy."""
        with self(STUBS):
            arrays: list[pickle.PickleBuffer] = []
            pickled = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=arrays.append)
            return len(pickled) + sum(array.raw().nbytes for array in arrays)

    def _charge(self) -> None:
        now = time.process_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


class StubWorkers:
    """In place of the actor manager of a pool: workers that reply at once with random responses."""

    def __init__(self, pool: RayPool, meter: Meter, tokens: int) -> None:
        self.pool = pool
        self.meter = meter
        self.response_length = tokens - PROMPT
        self.replies: list[SimpleNamespace] = []

    def foreach_actor_async(self, name: str, kwargs: dict[str, Any], remote_actor_ids: Sequence[int], **_: Any) -> None:
        """Send a call to a worker."""
        sent = ray.cloudpickle.dumps(kwargs, protocol=5)  # less than 100 KB, which Ray sends with the call
        (worker,) = remote_actor_ids
        with self.meter(STUBS):
            self.meter.bytes[POOL] += len(sent)
            reply = self.meter.reply(self.respond(kwargs.get("requests", ())))
        self.replies.append(SimpleNamespace(actor_id=worker, ok=True, get=lambda: ray.get(reply)))

    def fetch_ready_async_reqs(self, timeout_seconds: float) -> list[SimpleNamespace]:
        """The replies that have arrived."""
        ready, self.replies = self.replies, []
        return ready

    def respond(self, requests: Sequence[Request]) -> Reply:
        """A worker's reply, with random responses."""
        loaded = self.pool.roster.weights
        assert loaded is not None
        return Reply(loaded, TrajectoryBatch(self.random_trajectory(request, loaded) for request in requests))

    def random_trajectory(self, request: Request, loaded: WeightsVersion) -> Trajectory:
        """A random response."""
        ids = np.random.default_rng(request.seed).integers(0, 100_000, self.response_length).tolist()
        return Trajectory.from_tokens(request, ids, torch.randn(len(ids)), True, loaded.version)


class StubPool(RayPool):
    """A pool whose workers are stubs."""

    def __init__(self, meter: Meter, tokens: int) -> None:
        settings = PoolSettings(chunk_size=CHUNK, timeout=600.0, straggler_factor=1e9)
        super().__init__(dict, settings, [ActorOptions(ComputeSettings(1))] * WORKERS)
        self._manager = StubWorkers(self, meter, tokens)

    def _start_worker(self, actor: ActorOptions) -> None:
        self.roster.add_worker(len(self.roster.members))


class StubRank:
    """In place of the actor of a rank: it returns random numbers at once."""

    def __init__(self, rank: int, meter: Meter) -> None:
        self.rank = rank
        self.meter = meter
        self.call = self  # an actor's method is called by its attribute `remote`

    def remote(self, method: str, arguments: Any) -> Any:
        """Call a method."""
        with self.meter(STUBS):
            return self.meter.reply(getattr(self, method)(*GET(arguments)))

    def score(self, trajectories: Sequence[ScoredTokens], _: Collection[str]) -> OutputBatch:
        """See `PpoLearner.score`."""
        return OutputBatch(random_outputs(len(tokens.response_ids)) for tokens in trajectories)

    def update(self, *_: Any) -> dict[str, float]:
        """See `PpoLearner.update`."""
        names = "ptx_loss", "optimizer_steps", "skipped_steps", "policy_gradient_norm", "critic_gradient_norm"
        return dict.fromkeys((*STATISTICS, *MAXIMA, *names), 0.0)

    def policy_weights(self) -> AdapterWeights:
        """See `PpoLearner.policy_weights`."""
        return {name: torch.randn(shape) for name, shape in ADAPTER.items()} if self.rank == 0 else {}


def random_outputs(length: int) -> RoleOutputs:
    """Role outputs of a response."""
    logprobs, reference_logprobs, values = torch.randn(3, length + 1).unbind()
    return RoleOutputs(logprobs[1:], reference_logprobs[1:], values, 0.0, torch.randn(1))


class StubRanks(RayRanks[Any]):
    """Ranks whose actors are stubs."""

    def __init__(self, meter: Meter) -> None:
        self.actors = [StubRank(rank, meter) for rank in range(RANKS)]


def head_term(batch: TermInput) -> TermScores:
    """The output of the reward head."""
    assert batch.reward_outputs is not None
    return TermScores(batch.reward_outputs[:, 0].double())


def make_loop(meter: Meter, count: int, tokens: int, steps: int) -> Ppo:
    """PPO with stubs."""
    ppo = PpoSettings(steps=steps, batch_size=count)
    generator = np.random.default_rng(0)
    prompts = [Request("a prompt", tuple(generator.integers(0, 100_000, PROMPT).tolist()), 0) for _ in range(count)]
    learners = PpoLearners(StubRanks(meter))
    # The composition reads the weight and the normalisation of a term, whatever its kind.
    composition = Composition({"head": LengthTerm(kind="length", max_tokens=1)})
    reward = Reward({"head": head_term}, composition, tokenizer=None)  # type: ignore[arg-type]  # no text is decoded

    def score(trajectories: Sequence[Trajectory]) -> list[RoleOutputs]:
        return reward.score_and_update(trajectories, learners.score(trajectories))

    return Ppo(
        prompts=PromptStream(prompts, count, 1, seed=0),
        rollouts=SynchronousRollouts(StubPool(meter, tokens)),
        learners=learners,
        score=score,
        kl=FixedKl(0.1),
        mismatch=MismatchCheck(0.1, same_weights=False),
        sampling=Sampling(1.0, tokens - PROMPT),
        ppo=ppo,
        learner=LearnerSettings(ranks=RANKS),
        seed=0,
    )


def measure(count: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds and bytes by part of the fastest step, after a first one that does not count."""
    measured: list[dict[str, float]] = []
    ppo = make_loop(METER, count, tokens, repeats + 1)
    steps = ppo.steps()
    for _ in range(repeats + 1):
        METER.clear()
        with METER(REST):
            step = next(steps)
        with METER(METRICS):
            step_metrics(step, ppo.ppo, None)
        measured.append({name: METER.seconds[name] for name in (*PARTS, METRICS, REST)})
    fastest = min(measured[1:], key=lambda seconds: sum(seconds.values()))
    return {"seconds": fastest, "bytes": {name: METER.bytes[name] for name in fastest}}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent of a power law, fitted to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are measured per size")
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("controller.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part, functions in PARTS.items():
        for owner, name in functions:
            METER.wrap(owner, name, part)
    METER.count_bytes()
    results: dict[str, Any] = {}
    with ray_cluster(ClusterSettings(), 1):
        for count in arguments.sizes:
            results[str(count)] = measure(count, arguments.tokens, arguments.repeats)
            print_table(count, results[str(count)])
    sums = [total(result) for result in results.values()]
    results["exponent"] = exponent(arguments.sizes, sums)
    print(f"sums without weights {sums}, exponent {results['exponent']:.2f}")
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def total(result: dict[str, dict[str, float]]) -> float:
    """Seconds of all parts but the weights, which do not depend on the batch."""
    return sum(seconds for name, seconds in result["seconds"].items() if name != WEIGHTS)


def print_table(count: int, result: dict[str, dict[str, float]]) -> None:
    """Print the parts as rows of a table."""
    print(f"| {count} sequences | MB | s |\n|---|---|---|")
    for name, seconds in result["seconds"].items():
        print(f"| {name} | {result['bytes'][name] / 1e6:.1f} | {seconds:.3f} |")
    print(f"| sum | {sum(result['bytes'].values()) / 1e6:.1f} | {sum(result['seconds'].values()):.3f} |", flush=True)


METER = Meter()

if __name__ == "__main__":
    main()
