"""The fingerprint of a run: its settings, models, functions and data, which must be the same when it is resumed."""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from align.config.estimators import is_user_function
from align.config.schema import Experiment
from align.data.datasets import Datasets
from align.runs.folder import RunFolder
from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.safe_reading import read_object
from policies.text.chat_templates import read_template
from rewards.terms.function import UserFunctionSettings

CHANGEABLE = (
    "name",
    "runs",
    "checkpoint",
    "tracking",
    "cluster",
    "data.on_bad_row",
    "rollouts.workers",
    "rollouts.gpus",
    "rollouts.cpus",
    "rollouts.resources",
    "rollouts.label_selector",
    "rollouts.strategy",
    "rollouts.timeout",
    "rollouts.straggler_factor",
    "rollouts.max_num_seqs",
    "rollouts.chunk_size",
    "learner.ranks",
    "learner.gpus",
    "learner.cpus",
    "learner.resources",
    "learner.label_selector",
    "learner.strategy",
    "learner.zero",
    "learner.tokens_per_microbatch",
    "learner.restarts",
    "sft.ranks",
    "sft.zero",
    "sft.tokens_per_microbatch",
    "classify.ranks",
    "classify.zero",
    "classify.tokens_per_microbatch",
    "reward.ranks",
    "reward.zero",
    "reward.tokens_per_microbatch",
    "dpo.ranks",
    "dpo.zero",
    "dpo.tokens_per_microbatch",
    "reward.terms.*.timeout",
    "reward.terms.*.processes",
    "reward.terms.*.memory_gb",
    "model.gradient_checkpointing",
    "ppo.steps",
    "ppo.stop",
    "evaluation.judge",
    "evaluation.texts",
    "evaluation.window",
)
"""Settings, and sections of settings, that may change before a run is resumed: they decide how long, where and in how
many processes it computes, and what is measured afterwards, not what it learns. A `*` stands for any name."""

MODEL_KEYS = ("model.path", "ppo.critic.model", "reward.classifier")
"""Settings that name a model. The content of the model is compared, not its location."""

DATASET_KEYS = {
    "demonstrations": "data.demonstrations",
    "demonstrations_heldout": "data.demonstrations",
    "labels": "data.labels",
    "labels_heldout": "data.labels",
    "preferences": "data.preferences",
    "preferences_heldout": "data.preferences_heldout",
    "step_labels": "data.step_labels",
    "step_labels_heldout": "data.step_labels_heldout",
    "prompts": "data.prompts",
    "prompts_heldout": "data.prompts_heldout",
}
"""The setting that names the source of each field of `Datasets`. The tokens are compared, not the location."""

SELECTION_KEYS = ("heldout_share", "limit")
"""Last parts of the names of settings under `data` whose values are compared: they select rows."""

MODEL_FILE_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""The files of a model's folder that are read."""


def run_fingerprint(experiment: Experiment, datasets: Datasets) -> dict[str, Any]:
    """Compute the fingerprint of a run.

    Args:
        experiment: The settings.
        datasets: The tokenized data.

    Returns:
        `settings`: every setting by its dotted name; `models`: by setting, a hash of the model; `template`: a hash of
        the chat template that `model.chat_template` names, or None; `functions`: by setting, a hash of the file with
        the user's function; `rows`: by field of `Datasets`, a hash of the tokenized rows.
    """
    settings = dict(flatten(experiment.model_dump(mode="json")))
    model_locations = {key: settings[key] for key in MODEL_KEYS if settings.get(key)}
    models = {key: model_digest(location) for key, location in model_locations.items()}
    template = _template_digest(experiment.model.chat_template)
    functions = {key: _function_digest(where, key) for key, where in user_functions(experiment).items()}
    rows = {field: _rows_digest(getattr(datasets, field)) for field in DATASET_KEYS}
    return {"settings": settings, "models": models, "template": template, "functions": functions, "rows": rows}


def write_fingerprint(run: RunFolder, experiment: Experiment, datasets: Datasets) -> None:
    """Write the fingerprint to `fingerprint.json` in the run's folder."""
    write_json(run.fingerprint, run_fingerprint(experiment, datasets))


def recorded_dtype(run: RunFolder) -> str | None:
    """The dtype that a run was started with; None: there is no such run."""
    if not run.fingerprint.is_file():
        return None
    return str(read_object(run.fingerprint)["settings"]["model.dtype"])


def check_fingerprint(run: RunFolder, experiment: Experiment, datasets: Datasets) -> None:
    """Check that a run is resumed with the settings, models and data that it was started with.

    Args:
        run: The run, with its `fingerprint.json`.
        experiment: The settings to resume it with.
        datasets: The data to resume it with.

    Raises:
        UserError: Something differs; the message names the first such setting, model or source.
    """
    if difference := find_difference(run, experiment, datasets):
        raise UserError(difference.text + difference.advice)


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was when a run was started: what, and what to do before the run is resumed."""

    text: str
    advice: str = ""


def find_difference(run: RunFolder, experiment: Experiment, datasets: Datasets) -> Difference | None:
    """The first setting, model, function or source that differs from what a run was started with, and must not.

    Args:
        run: The run, with its `fingerprint.json`.
        experiment: The settings to compare.
        datasets: The data to compare.
    """
    started = read_object(run.fingerprint)
    current = run_fingerprint(experiment, datasets)
    if difference := _setting_difference(run, started["settings"], current["settings"]):
        return difference
    for key, digest in current["models"].items():
        if started["models"].get(key) != digest:
            location = current["settings"][key]
            return Difference(f"{key}: {location} is not the model that {run.path} was started with")
    if current["template"] != started.get("template"):
        file = experiment.model.chat_template
        return Difference(
            f"model.chat_template: {file} has changed since {run.path} was started",
            ": restore it, or start another run",
        )
    for key, digest in current["functions"].items():
        if started["functions"].get(key) != digest:
            file = user_functions(experiment)[key].rpartition(":")[0]
            return Difference(
                f"{key}: {file} has changed since {run.path} was started", ": restore it, or start another run"
            )
    for field, digest in current["rows"].items():
        if started["rows"].get(field) != digest:
            return Difference(
                f"{DATASET_KEYS[field]}: the rows, or their tokens, are not those that {run.path} was started with"
            )
    return None


def product_digests(run: RunFolder) -> dict[str, str]:
    """Hash the products that PPO starts from.

    Returns:
        `sft` and `reward`, where these stages have run, each with the hash of the files in its folder.
    """
    digests: dict[str, str] = {}
    for name, folder in (("sft", run.sft), ("reward", run.reward)):
        if folder.is_dir():
            digests[name] = files_digest(path for path in sorted(folder.rglob("*")) if path.is_file())
    return digests


def model_digest(location: str) -> str:
    """A hash of the files in a model's folder that are read; for a model on the hub, its revision."""
    folder = Path(location)
    if not folder.is_dir():
        config_file = cached_file(location, "config.json")
        return str(extract_commit_hash(config_file, None))
    return files_digest(path for path in sorted(folder.iterdir()) if path.suffix in MODEL_FILE_SUFFIXES)


def _template_digest(name: str | None) -> str | None:
    """A hash of a chat template; None where the tokenizer's own is used."""
    return None if name is None else hashlib.blake2b(read_template(name).encode()).hexdigest()


def user_functions(experiment: Experiment) -> dict[str, str]:
    """The user's functions, `FILE.py:function` or `module:function`, by the setting that names them."""
    functions = {}
    for key, name in (("ppo.estimator", experiment.ppo.estimator), ("ppo.policy_loss", experiment.ppo.policy_loss)):
        if is_user_function(name):
            functions[key] = name
    for name, term in experiment.reward.terms.items():
        if isinstance(term, UserFunctionSettings):
            functions[f"reward.terms.{name}.function"] = term.function
    if experiment.rollouts.environment:
        functions["rollouts.environment"] = experiment.rollouts.environment
    if experiment.evaluation.gold:
        functions["evaluation.gold"] = experiment.evaluation.gold
    return functions


def _function_digest(where: str, key: str) -> str:
    """A hash of the file with a function; of a module without a file, of its name."""
    source = where.rpartition(":")[0]
    if not source.endswith(".py"):
        try:
            spec = importlib.util.find_spec(source)
        except (Exception, SystemExit) as error:  # of the package that the module is in, which is imported here
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{key}: module {source} cannot be imported: {reason}") from error
        source = spec.origin if spec and spec.origin else source
    file = Path(source)
    if file.is_file():
        return _file_digest(file)
    if source.endswith(".py"):
        raise UserError(f"{key}: file {file} does not exist")
    return hashlib.blake2b(source.encode()).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """One hash of the names and bytes of these files, in order."""
    files = list(paths)
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(_file_digest, files))
    named = [[path.name, digest] for path, digest in zip(files, digests, strict=True)]
    return hashlib.blake2b(repr(named).encode(), digest_size=32).hexdigest()


def _setting_difference(run: RunFolder, started: Mapping[str, Any], current: Mapping[str, Any]) -> Difference | None:
    """The first setting that differs and must not."""
    for name, value in current.items():
        if started.get(name) != value and not _may_change(name) and not _is_location(name):
            return Difference(
                f"{run.path} was started with {name} {started.get(name)!r}, and it is {value!r} now",
                ": set it back, or start another run. Before a run is resumed, these may change: "
                + ", ".join(CHANGEABLE),
            )
    return None


def _may_change(name: str) -> bool:
    """Whether a setting, or the section that it is in, may change."""
    return any(fnmatchcase(name, key) or fnmatchcase(name, f"{key}.*") for key in CHANGEABLE)


def _is_location(name: str) -> bool:
    """Whether a setting says where a model or a data source is, so that its content is compared instead."""
    if name.startswith("data."):
        return not name.endswith(SELECTION_KEYS)
    return name in MODEL_KEYS


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _rows_digest(rows: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for row in rows:
        digest.update(repr(row).encode(errors="surrogatepass"))
    return digest.hexdigest()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and value of nested settings; an empty mapping is a value."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
