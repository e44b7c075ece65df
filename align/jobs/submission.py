"""What is sent to a Ray cluster to have it run an experiment: command, environment, resources."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.config.source import read_source
from align.resources.actors import RANK, actors_by_stage
from align.runs.fingerprint import flatten, user_functions
from align.runs.folder import folder_of
from policies.errors import UserError
from policies.text.chat_templates import BUILT_IN

PATHS = (
    "model.path",
    "ppo.critic.model",
    "sft.adapter",
    "reward.model",
    "reward.classifier",
    "reward.terms.*.path",
    "data.*.path",
)
"""Settings that name files and folders that a job reads where they are; a `*` stands for any name."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""The environment variable that says after how many seconds Ray kills a job that was told to stop."""
DEFAULT_GRACE = 3600.0
"""Seconds that a run without `checkpoint.grace` has to end the step that it is in."""
GRACE_MARGIN = 60.0
"""Seconds that it has to end after that."""
SPECIAL = re.compile(r"[\\*?\[\]]")
"""Characters that mean something else in a line of a .gitignore."""
METADATA = "align"
"""The key of a job's metadata under which a `RunOfJob` is kept."""


@dataclass(frozen=True)
class JobOptions:
    """What the user says of a job, besides the experiment.

    Attributes:
        python: The Python interpreter on the cluster.
        env: Environment variables of the job and its actors.
        runtime_env: Further fields of Ray's runtime environment.
        cpus: CPUs that the controller reserves; 0: none, it runs on the head.
        gpus: GPUs that the controller reserves; None: one where it trains, and the cluster has any.
        replace: Whether an earlier run of this name is replaced.
    """

    python: str = "python"
    env: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    cpus: float = 1
    gpus: float | None = None
    replace: bool = False


@dataclass(frozen=True)
class RunOfJob:
    """What a job's metadata says of its run, so that another job can resume it.

    Attributes:
        folder: The run's folder on the cluster.
        python: The Python interpreter on the cluster.
        excludes: What is left out of the working directory, see `Submission.excludes`.
        cpus: CPUs that the controller reserves.
        gpus: GPUs that it reserves.
    """

    folder: str
    python: str
    excludes: Sequence[str]
    cpus: float
    gpus: float

    @property
    def metadata(self) -> dict[str, str]:
        """As Ray keeps it."""
        return {METADATA: json.dumps(asdict(self))}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> "RunOfJob | None":
        """Read what `metadata` has written; None: the job is not align's."""
        text = (metadata or {}).get(METADATA)
        return cls(**json.loads(text)) if text else None


@dataclass(frozen=True)
class Submission:
    """A job to be submitted.

    Attributes:
        name: The name of the run.
        entrypoint: The command that the job runs, in a shell.
        working_dir: The folder here that is sent to the cluster, in which the command runs.
        excludes: What is left out of it, as lines of a .gitignore; besides .git, .venv, and what .gitignore names.
        runtime_env: The other fields of Ray's runtime environment.
        run: What the job's metadata says.
    """

    name: str
    entrypoint: str
    working_dir: str
    excludes: Sequence[str]
    runtime_env: Mapping[str, Any]
    run: RunOfJob


def submission_of(
    experiment: Experiment, file: Path, overrides: Sequence[str], options: JobOptions, cluster_gpus: int
) -> Submission:
    """The job that runs an experiment.

    Args:
        experiment: The settings, with the overrides.
        file: The experiment file, within the current folder.
        overrides: The overrides.
        options: What the user says of the job.
        cluster_gpus: GPUs of the cluster.

    Raises:
        UserError: A file that has to be sent is not within the current folder.
    """
    here = Path.cwd()
    arguments = ["run", str(_within(here, file, "the experiment"))]
    for part in read_source(file).included:
        _within(here, part, "include")
    arguments += overrides
    arguments += job_overrides(experiment)
    if options.replace:
        arguments.append("--replace")
    template = experiment.model.chat_template
    if template is not None and template not in BUILT_IN:
        _within(here, Path(template), "model.chat_template")
    for key, function in user_functions(experiment).items():
        source = function.rpartition(":")[0]
        if source.endswith(".py"):
            _within(here, Path(source), key)
    gpus = options.gpus
    if gpus is None:
        gpus = float(cluster_gpus > 0 and trains_in_controller(experiment))
    excludes = tuple(_excludes(experiment, here))
    run = RunOfJob(
        folder=os.path.abspath(folder_of(experiment).path),
        python=options.python,
        excludes=excludes,
        cpus=options.cpus,
        gpus=gpus,
    )
    stop_wait = (experiment.checkpoint.grace or DEFAULT_GRACE) + GRACE_MARGIN
    given = options.runtime_env.get("env_vars") or {}
    env = {STOP_WAIT: f"{stop_wait:.0f}"} | given | dict(options.env)
    return Submission(
        name=experiment.name,
        entrypoint=_entrypoint(options.python, arguments),
        working_dir=str(here),
        excludes=excludes,
        runtime_env=dict(options.runtime_env) | {"env_vars": env},
        run=run,
    )


def resumption_of(run: RunOfJob, runtime_env: Mapping[str, Any], overrides: Sequence[str]) -> Submission:
    """The job that resumes the run of another.

    Args:
        run: What the metadata of the other job says.
        runtime_env: Its runtime environment.
        overrides: Settings that replace the run's.
    """
    kept = {key: value for key, value in runtime_env.items() if key not in ("working_dir", "excludes")}
    return Submission(
        name=Path(run.folder).name,
        entrypoint=_entrypoint(run.python, ["resume", run.folder, *overrides]),
        working_dir=str(Path.cwd()),
        excludes=run.excludes,
        runtime_env=kept,
        run=run,
    )


def trains_in_controller(experiment: Experiment) -> bool:
    """Whether a stage of the experiment starts no actors for its training."""
    stages = actors_by_stage(experiment)
    return any(RANK not in actors for actors in stages.values())


def job_overrides(experiment: Experiment) -> list[str]:
    """The overrides by which a job reads and writes the files that the experiment names, in its own cluster.

    Relative paths become absolute: a job runs in a folder of Ray's, which has no data and does not last.
    """
    overrides = [f"runs={os.path.abspath(experiment.runs)}"]
    for key, value in _paths(experiment):
        absolute = _absolute(value)
        if absolute != value:
            overrides.append(f"{key}={json.dumps(absolute, ensure_ascii=False)}")
    if experiment.cluster.address is not None:
        overrides.append("~cluster.address")
    return overrides


def _paths(experiment: Experiment) -> Iterator[tuple[str, str | list[str]]]:
    """The settings of `PATHS` that are set, by their dotted names."""
    for key, value in flatten(experiment.model_dump(mode="json")):
        if value is not None and any(fnmatchcase(key, pattern) for pattern in PATHS):
            yield key, value


def _absolute(value: str | list[str]) -> str | list[str]:
    """A path, or several, made absolute where they exist here."""
    if isinstance(value, list):
        return [str(_absolute(path)) for path in value]
    return os.path.abspath(value) if os.path.exists(_folder(value)) else value


def _folder(path: str) -> str:
    """The file or folder that a path names: `FOLDER#NAME`, unless it exists as it is, is a part of a folder."""
    return path if os.path.exists(path) else path.partition("#")[0]


def _within(folder: Path, file: Path, what: str) -> Path:
    """The path of a file relative to a folder. Raises UserError where it is not within it."""
    try:
        return (folder / file).resolve().relative_to(folder.resolve())
    except ValueError:
        raise UserError(
            f"{what}: {file} is not within {folder}, the folder that is sent to the cluster: call align submit in a "
            "folder that has it"
        ) from None


def _excludes(experiment: Experiment, folder: Path) -> Iterator[str]:
    """The folder of runs, and the files and folders of data and models, where they are within the folder.

    Ray follows symbolic links: what is left out is both the link and what it leads to.
    """
    named: list[str] = [experiment.runs]
    for _, value in _paths(experiment):
        named += value if isinstance(value, list) else [_folder(value)]
    paths: list[Path] = []
    for name in named:
        paths += [Path(os.path.abspath(folder / name)), (folder / name).resolve()]
    inside = [path for path in dict.fromkeys(paths) if path.exists() and folder in path.parents]
    for path in inside:
        if not any(other in path.parents for other in inside):
            line = SPECIAL.sub(r"\\\g<0>", str(path.relative_to(folder)))
            yield f"/{line}"


def _entrypoint(python: str, arguments: Sequence[str]) -> str:
    """A command line of `align`. Signals go to it alone: the shell is replaced."""
    return f"exec {shlex.join([python, '-m', 'align', *arguments])}"


def with_secrets_hidden(submission: Submission) -> Submission:
    """The submission with the values of environment variables replaced, to be shown."""
    env = submission.runtime_env.get("env_vars") or {}
    hidden = {name: value if name == STOP_WAIT else "…" for name, value in env.items()}
    return replace(submission, runtime_env=dict(submission.runtime_env) | {"env_vars": hidden})
