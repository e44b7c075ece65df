"""The commands `align submit` and `align jobs`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from align.runtime.consoles import console, errors, escaped
from align.runtime.ray_job import DASHBOARD_VARIABLE
from align.runtime.wording import clock
from policies.errors import UserError, first_line

if TYPE_CHECKING:
    from align.config.schema import Experiment
    from align.jobs.client import Job, Jobs
    from align.jobs.submission import Submission

jobs = typer.Typer(no_args_is_help=True, help="The jobs that `align submit` has started on a Ray cluster.")

Address = Annotated[
    str,
    typer.Option(
        help="the cluster's dashboard, http://HOST:8265; auto: that of the Ray node on this machine",
        envvar=DASHBOARD_VARIABLE,
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="the job's id, or its beginning", show_default=False)]


def submit(  # noqa: PLR0913 - one parameter per option
    experiment: Annotated[
        Path,
        typer.Argument(
            metavar="EXPERIMENT", help="the experiment's YAML file, in the current folder", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's", show_default=False),
    ] = None,
    address: Address = "auto",
    python: Annotated[str, typer.Option(help="Python on the cluster, such as that of a shared environment")] = "python",
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="an environment variable of the job; may be repeated"),
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option("--runtime-env", help="YAML file with further fields of Ray's runtime environment, such as pip"),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs that the controller reserves; 0: it runs on the head")] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs that it reserves; unset: 1 if it trains and the cluster has any, else 0"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="start again, replacing the run of this name")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the job without submitting it")] = False,
    follow: Annotated[bool, typer.Option(help="show the job's output and pass on its exit status")] = True,
) -> None:
    """Run an experiment as a job of a Ray cluster.

    The current folder is sent to the cluster, without the runs, data and models in it: those are read and written where
    they are, so they must be on storage that the cluster shares.
    """
    from align.config.load import load_experiment
    from align.jobs.submission import JobOptions, submission_of

    settings = load_experiment(experiment, overrides or [])
    options = JobOptions(
        python=python,
        env=_environment(env or []),
        runtime_env=_read_runtime_env(runtime_env),
        cpus=cpus,
        gpus=gpus,
        replace=replace,
    )
    if dry_run:
        _show(submission_of(settings, experiment, overrides or [], options, cluster_gpus=0))
        return
    cluster = _connect(address)
    cluster_gpus = _show_placement(settings, cluster)
    job = cluster.submit(submission_of(settings, experiment, overrides or [], options, cluster_gpus))
    _note(f"job {job} submitted; `{cluster.command('stop', job)}` stops it after a checkpoint")
    if follow:
        _follow(cluster, job)


@jobs.command(name="list")
def list_jobs(
    address: Address = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list instead of a table")] = False,
) -> None:
    """List the jobs, the latest first."""
    found = _connect(address).list()
    if as_json:
        print(json.dumps([_record(job) for job in found]))
    else:
        console.print(_jobs_table(found))


def _record(job: "Job") -> dict[str, Any]:
    """A job as JSON values."""
    return {
        "id": job.id,
        "state": job.status.lower(),
        "exit_status": job.exit_status,
        "message": job.message,
        "submitted": job.started.isoformat(timespec="seconds"),
        "seconds": round(job.seconds, 1),
        "run": job.run.folder,
    }


def _jobs_table(found: Sequence["Job"]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("job", "state", "submitted", "time", "run"):
        table.add_column(column, no_wrap=column != "run", overflow="fold")
    for job in found:
        state = job.status.lower()
        if job.exit_status:
            state += f" ({job.exit_status})"
        table.add_row(job.id, state, f"{job.started:%m-%d %H:%M}", clock(job.seconds), escaped(job.run.folder))
    return table


@jobs.command(name="logs")
def show_logs(
    job: JobId,
    address: Address = "auto",
) -> None:
    """Show what a job has written, and go on until it ends. Its exit status is passed on."""
    cluster = _connect(address)
    _follow(cluster, cluster.find(job).id)


@jobs.command(name="stop")
def stop_job(job: JobId, address: Address = "auto") -> None:
    """Stop a job: its step ends, a checkpoint is written, and the command waits for that."""
    cluster = _connect(address)
    found = cluster.find(job)
    if found.ended:
        _note(f"job {found.id} has ended before: {found.status.lower()}")
        return
    if found.status == "PENDING":
        _note(f"job {found.id} has not started yet: Ray stops it when it has …")
    else:
        _note(f"job {found.id} ends its step and writes a checkpoint …")
    ended = cluster.stop(found.id)
    if ended.status == "STOPPED":
        _note(f"job {ended.id} has stopped; `{cluster.command('resume', ended.id)}` resumes its run")
    else:
        _note(f"job {ended.id} has ended by itself: {ended.status.lower()}")


@jobs.command(name="resume")
def resume_job(
    job: JobId,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the run's", show_default=False),
    ] = None,
    address: Address = "auto",
    follow: Annotated[bool, typer.Option(help="show the job's output and pass on its exit status")] = True,
) -> None:
    """Resume the run of a job that has ended, as another job.

    The current folder is sent again: call it where `align submit` was called.
    """
    from align.jobs.submission import resumption_of

    cluster = _connect(address)
    earlier = cluster.find(job)
    if not earlier.ended:
        stop = cluster.command("stop", earlier.id)
        raise UserError(f"job {earlier.id} is still {earlier.status.lower()}: `{stop}` stops it")
    new = cluster.submit(resumption_of(earlier.run, earlier.runtime_env, overrides or []))
    _note(f"job {new} submitted; it resumes {earlier.run.folder}")
    if follow:
        _follow(cluster, new)


def _connect(address: str) -> "Jobs":
    from align.jobs.client import Jobs

    return Jobs(address)


def _follow(cluster: "Jobs", job_id: str) -> None:
    """Show what a job writes, and end this process with its exit status."""
    from align.jobs.client import exit_status, explanation

    try:
        job = cluster.follow(job_id, _write, _note)
    except KeyboardInterrupt:
        logs, stop = cluster.command("logs", job_id), cluster.command("stop", job_id)
        _note(f"the job goes on; `{logs}` follows it, `{stop}` stops it")
        raise
    if reason := explanation(job):
        errors.print(f"[red]error:[/red] job {job_id}: {escaped(reason)}", soft_wrap=True)
    sys.exit(exit_status(job))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    """Print a note on standard error."""
    errors.print(escaped(text), soft_wrap=True, highlight=False)


def _show_placement(settings: "Experiment", cluster: "Jobs") -> int:
    """Say where the run's actors will be. Returns the number of GPUs of the cluster."""
    from align.resources.actors import most_actors
    from align.resources.placement import GPU, describe_fit, total

    nodes = cluster.nodes()
    actors = most_actors(settings, settings.stages)
    _note(f"placement: {describe_fit(settings, actors, nodes)}")
    return int(total(nodes, GPU))


def _show(submission: "Submission") -> None:
    """Print a submission as YAML, without the values of environment variables."""
    from dataclasses import asdict

    from align.jobs.submission import with_secrets_hidden

    shown = asdict(with_secrets_hidden(submission))
    shown["excludes"] = list(submission.excludes)
    shown["run"]["excludes"] = list(submission.excludes)
    _write(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=sys.maxsize))


def _environment(given: list[str]) -> dict[str, str]:
    """The variables that `--env` names, with the values given there or, without one, in this process."""
    variables = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not name:
            raise UserError(f"--env {text}: expected NAME or NAME=VALUE")
        if not separator and name not in os.environ:
            raise UserError(f"--env {name}: this environment variable is not set: set it, or give --env {name}=VALUE")
        variables[name] = value if separator else os.environ[name]
    return variables


def _read_runtime_env(path: Path | None) -> dict[str, Any]:
    """The fields of Ray's runtime environment in a file."""
    if path is None:
        return {}
    from ray.runtime_env import RuntimeEnv

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {path} cannot be read: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"--runtime-env {path}: expected fields of Ray's runtime environment, as `name: value`")
    for name in ("working_dir", "excludes"):
        if name in fields:
            raise UserError(f"--runtime-env {path}: {name}: the current folder is sent; remove this field")
    try:
        RuntimeEnv(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"--runtime-env {path}: {first_line(error)}") from None
    for name in sorted(fields.keys() - RuntimeEnv.known_fields):
        _note(f"--runtime-env {path}: {name} is not a field of Ray's; it needs a plugin on the cluster")
    return fields
