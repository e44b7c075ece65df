"""What a run is made from: its settings, models and data. A run that goes on must go on with the same."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.data.datasets import Datasets
from align.runs.folder import RunFolder
from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.base_model import load_model_config
from policies.files.safe_reading import read_object

CHANGEABLE = (
    *("name", "runs", "checkpoint", "tracking", "cluster", "data.on_bad_row"),
    *(
        "rollouts.workers",
        "rollouts.gpus",
        "rollouts.timeout",
        "rollouts.straggler_factor",
        "rollouts.max_num_seqs",
        "rollouts.chunk_size",
    ),
    *("learner.ranks", "learner.gpus", "learner.zero", "learner.tokens_per_microbatch", "learner.restarts"),
    *("sft.tokens_per_microbatch", "reward.tokens_per_microbatch", "model.gradient_checkpointing"),
    *("ppo.steps", "ppo.stop"),
)
"""Settings that may change while a run is stopped: how long, where and by how many it is computed, and not what."""

MODEL_KEYS = ("model.path", "ppo.critic.model", "reward.classifier")
"""Settings that name a model. What is there is compared, and not where it is."""

DATASET_KEYS = {
    "examples": "data.demonstrations",
    "demonstrations_heldout": "data.demonstrations",
    "cases": "data.preferences",
    "preferences_heldout": "data.preferences_heldout",
    "prompts": "data.prompts",
    "prompts_heldout": "data.prompts_heldout",
}


def run_fingerprint(experiment: Experiment, datasets: Datasets) -> dict[str, Any]:
    """Settings by their names, and hashes of the models and of the rows that are trained on, in tokens."""
    settings = dict(_flat(experiment.model_dump(mode="json")))
    models = {name: settings[name] for name in MODEL_KEYS if settings.get(name)}
    return {
        "settings": settings,
        "models": {name: model_digest(where) for name, where in models.items()},
        "rows": {
            field.name: _rows_digest(getattr(datasets, field.name))
            for field in fields(datasets)
            if field.name in DATASET_KEYS
        },
    }


def write_fingerprint(run: RunFolder, experiment: Experiment, datasets: Datasets) -> None:
    """Keep them in the run's folder."""
    write_json(run.fingerprint, run_fingerprint(experiment, datasets))


def check_fingerprint(run: RunFolder, experiment: Experiment, datasets: Datasets) -> None:
    """Raise UserError, naming the first setting, model or source that is not what the run began with."""
    before, now = read_object(run.fingerprint), run_fingerprint(experiment, datasets)
    then = before["settings"]
    for name, value in now["settings"].items():
        free = any(name == free or name.startswith(f"{free}.") for free in CHANGEABLE)
        located = name in MODEL_KEYS or (name.startswith("data.") and not name.endswith(("heldout_share", "limit")))
        if then.get(name) != value and not free and not located:
            raise UserError(
                f"{run.path} began with {name} {then.get(name)!r}, and it is {value!r} now: set it as it was, or start "
                "another run. While a run is stopped, these may change: " + ", ".join(CHANGEABLE)
            )
    for name, digest in now["models"].items():
        if before["models"].get(name) != digest:
            raise UserError(f"{name}: {now['settings'][name]} is not the model that {run.path} began with")
    for name, digest in now["rows"].items():
        if before["rows"].get(name) != digest:
            raise UserError(
                f"{DATASET_KEYS[name]}: the rows, or their tokens, are not those that {run.path} began with"
            )


def product_digests(run: RunFolder) -> dict[str, str]:
    """Hashes of what PPO starts from: the reference, and the reward model."""
    folders = {"sft": run.sft, "reward": run.reward}
    return {
        name: files_digest(path for path in sorted(folder.rglob("*")) if path.is_file())
        for name, folder in folders.items()
        if folder.is_dir()
    }


def model_digest(where: str) -> str:
    """A hash of the files of a model's folder that are read; of a model of the hub, its revision."""
    folder = Path(where)
    if not folder.is_dir():
        return str(load_model_config(where)._commit_hash)
    kinds = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return files_digest(path for path in sorted(folder.iterdir()) if path.suffix in kinds)


def files_digest(paths: Iterable[Path]) -> str:
    """One hash of the names and bytes of these files."""
    listed = list(paths)
    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(_file_digest, listed))
    named = [[path.name, part] for path, part in zip(listed, parts, strict=True)]
    return hashlib.blake2b(repr(named).encode(), digest_size=32).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _rows_digest(rows: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for row in rows:
        digest.update(repr(row).encode(errors="surrogatepass"))
    return digest.hexdigest()


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value
