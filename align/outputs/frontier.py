"""The frontier of reward against KL of a run, and its policy beside it at some scales: figures, files and plot."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import save

from align.config.schema import Experiment
from align.data.datasets import Datasets
from align.evaluation.distance import DrawnResponses
from align.outputs.artifacts import scaled_policies
from align.runs.fingerprint import product_digests, run_fingerprint
from align.runs.folder import RunFolder
from align.runtime.atomic_files import new_file
from align.stages.distance import DistanceStudy, check_has_frontier
from align.stages.policy_evaluation import LoadedReward
from policies.errors import UserError
from policies.files.safe_reading import read_tensors
from policies.scaling import widened

FRONTIER_FOLDER = "frontier"
"""The folder in the run's with the plot, and with the scores of the reference's responses, which are used again."""
FRONTIER_PLOT = "frontier.png"
DIAL = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""The scales of the policy that `--dial` compares."""
GAIN_LABELS = {"score": "gain of the score", "gold": "gain of the gold score"}


def measure_frontier(
    experiment: Experiment, run: RunFolder, datasets: Datasets, samples: int, scales: Sequence[float]
) -> dict[str, Any]:
    """Estimate the best policy at each KL, and compare the run's policy with it.

    Args:
        experiment: The run's settings.
        run: The run, in whose folder `frontier/` is written.
        datasets: Its data, of which the held-out prompts are used.
        samples: Responses of the reference to each prompt; they are sampled once and kept.
        scales: a of each policy that is compared, reference + a · (policy - reference).

    Returns:
        `prompts`, `samples`, `points` and `best_of` (see `DistanceStudy.frontier`); and `policies`, with the figures of
        each and its `scale`.

    Raises:
        UserError: The number of samples is odd or below 2, fewer than two prompts are held out, the reward changes
            while it is maximised, the run has no policy, or its method allows no other scale than 1.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"--frontier {samples}: an even number of samples per prompt was expected")
    if len(datasets.prompts_heldout) < 2:
        raise UserError("--frontier: its intervals are over prompts, and one is held out: two are needed")
    *policies, trained = scaled_policies(experiment, run, [*scales, 1.0])
    widest = max((policy.settings for policy in policies), key=lambda settings: settings.full_rank)
    reward = LoadedReward(experiment, run, widest)
    try:
        reward.restore(run)
        check_has_frontier(experiment, reward.scorers.reward.composition.is_stateful)
        kept = run.path / FRONTIER_FOLDER / f"reference-{_key(experiment, run, datasets, samples)}.safetensors"
        weights = widened(trained.weights, widest)
        study = DistanceStudy(reward, datasets.prompts_heldout, samples, weights, _load(kept))
        _save(kept, study.reference)
        compared = []
        for version, (scale, policy) in enumerate(zip(scales, policies, strict=True)):
            compared.append({"scale": scale} | study.compare(version, widened(policy.weights, widest)))
        figures = study.frontier() | {"policies": compared}
    finally:
        reward.close()
    draw_frontier(figures, run.path / FRONTIER_FOLDER / FRONTIER_PLOT)
    return figures


def _key(experiment: Experiment, run: RunFolder, datasets: Datasets, samples: int) -> str:
    """A name for what the scores of the reference's responses depend on."""
    facts = [run_fingerprint(experiment, datasets), product_digests(run), samples]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _load(path: Path) -> DrawnResponses | None:
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    return DrawnResponses(tensors["score"], tensors.get("gold"))


def _save(path: Path, reference: DrawnResponses) -> None:
    path.parent.mkdir(exist_ok=True)
    with new_file(path) as file:
        file.write(save({name: values.contiguous() for name, values in reference.kinds().items()}))


def draw_frontier(figures: dict[str, Any], path: Path) -> None:
    """Draw gains against KL: the best policy, best-of-n, and the policies, with 95 % intervals."""
    names = [name for name in GAIN_LABELS if f"{name}_gain" in figures["policies"][0]]
    figure = Figure(figsize=(5 * len(names), 4), dpi=120, layout="constrained")
    for place, name in enumerate(names, start=1):
        axes: Axes = figure.add_subplot(1, len(names), place)
        _draw_gains(axes, figures, f"{name}_gain")
        axes.set(xlabel="KL to the reference, nats per sequence", ylabel=GAIN_LABELS[name])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    with new_file(path) as file:
        figure.savefig(file, format="png")


def _draw_gains(axes: Axes, figures: dict[str, Any], gain: str) -> None:
    policies = figures["policies"]
    points = figures["points"]
    axes.plot(_column(points, "kl"), _column(points, gain), color="black", linewidth=1, label="best policy at this KL")
    low, high = _column(points, f"{gain}_low"), _column(points, f"{gain}_high")
    axes.fill_between(_column(points, "kl"), low, high, color="black", alpha=0.15, linewidth=0)
    beyond = [policy["best"] for policy in policies if policy.get("best", {}).get("from") == "policy"]
    if beyond:  # not joined to the line: in between, the curve is unknown
        axes.plot(_column(beyond, "kl"), _column(beyond, gain), "kD", markersize=4, label="the same, further out")
    draws = figures["best_of"]
    axes.plot(_column(draws, "kl"), _column(draws, gain), "o", markersize=3, color="#ee7733", label="best of n")
    middle = _column(policies, gain)
    ends = [_column(policies, f"{gain}_{end}") for end in ("low", "high")]
    axes.errorbar(
        x=_column(policies, "kl"),
        y=middle,
        yerr=np.abs(np.array(ends) - np.array(middle)),
        marker="s",
        markersize=4,
        linewidth=1,
        color="#0077bb",
        label="policy, scaled" if len(policies) > 1 else "policy",
    )


def _column(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]
