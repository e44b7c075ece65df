"""The command `align`."""

import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from align.config.schema import STAGES, Experiment
from align.runtime.quiet import quiet_libraries
from policies.errors import UserError

if TYPE_CHECKING:
    from align.data.datasets import Datasets
    from align.runs.folder import RunFolder

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The whole RLHF loop: supervised fine-tuning, a reward model, and PPO, from one experiment file.",
)
console = Console()
errors = Console(stderr=True)

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="the experiment's YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's", show_default=False),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under runs/", show_default=False)]
Replace = Annotated[bool, typer.Option("--replace", help="start anew where a run of this name is")]


@app.command()
def run(experiment: File, overrides: Overrides = None, replace: Replace = False) -> None:
    """Run all stages of an experiment."""
    _start(_load(experiment, overrides), replace)


@app.command()
def sft(experiment: File, overrides: Overrides = None, replace: Replace = False) -> None:
    """Run supervised fine-tuning alone."""
    _one_stage("sft", experiment, overrides, replace)


@app.command()
def reward(experiment: File, overrides: Overrides = None, replace: Replace = False) -> None:
    """Train the reward model alone, from the SFT model that the run has."""
    _one_stage("reward", experiment, overrides, replace)


@app.command()
def ppo(experiment: File, overrides: Overrides = None, replace: Replace = False) -> None:
    """Run PPO alone, from the SFT and reward models that the run has."""
    _one_stage("ppo", experiment, overrides, replace)


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Go on with a run that was stopped, from its last whole checkpoint; settings that do not change what is learned,
    as more steps or other workers, may be others now."""
    from align.config.load import dump_experiment
    from align.runs.fingerprint import check_fingerprint
    from align.runs.folder import locked, open_run
    from align.stages.pipeline import load_datasets, reopen

    folder, settings = open_run(run, overrides=overrides or [])
    datasets = load_datasets(settings)
    with locked(folder):
        check_fingerprint(folder, settings, datasets)
        dump_experiment(settings, folder.config)
        reopen(settings, folder)
        _go(settings, folder, datasets)


@app.command()
def plan(experiment: File, overrides: Overrides = None) -> None:
    """Say what a run would do and need, without starting it."""
    from align.resources.plan import plan_table
    from align.runs.folder import folder_of
    from align.stages.pipeline import load_datasets, stages_left

    settings = _load(experiment, overrides)
    left = stages_left(settings, folder_of(settings))
    console.print(plan_table(settings, load_datasets(settings), left))


@app.command(name="eval")
def evaluate(
    run: Run,
    reward: Annotated[bool, typer.Option("--reward", help="judge the reward model instead")] = False,
    data: Annotated[Path | None, typer.Option(help="with --reward: feedback to judge it by; unset: the run's")] = None,
    classifier: Annotated[
        str | None, typer.Option(help="with --reward: judge this sequence-classification model in its place")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="with --reward: the folder to write figures and plot to")] = None,
) -> None:
    """Judge a run's policy against its reference again, and write evaluation.json; or judge its reward model."""
    from align.outputs.trained_run import evaluate_run
    from align.runs.folder import open_run
    from align.runtime.atomic_files import write_json
    from align.stages.pipeline import load_datasets

    folder, settings = open_run(run)
    if reward:
        _evaluate_reward_model(folder, settings, data, classifier, to)
        return
    if data or classifier or to:
        raise UserError("--data, --classifier and --to are for --reward: give it too")
    if not folder.done("ppo"):
        raise UserError(f"run {folder.path} has no policy/ yet: `align resume {folder.path}` goes on with it")
    evaluation = folder.read_evaluation() | evaluate_run(settings, folder, load_datasets(settings))
    write_json(folder.evaluation, evaluation)
    _show(evaluation)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="a prompt; may be given more than once")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a JSONL file of rows with `prompt`")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; unset: the run's")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="unset: the run's")] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Answer prompts with a run's policy: those given, those of a file, or a chat line by line."""
    with redirect_stdout(sys.stderr):  # transformers says there at import that W&B is offline, amid the answers
        from align.outputs.trained_run import TextGenerator
    from align.runs.folder import open_run
    from rollouts.engine import Sampling

    folder, settings = open_run(run)
    prompts = list(prompt or []) + _prompts_of(file)
    sampling = Sampling(
        settings.rollouts.temperature if temperature is None else temperature,
        max_new_tokens or settings.rollouts.max_new_tokens,
    )
    answerer = TextGenerator(settings, folder)
    if prompts:
        for response in answerer.answer(prompts, sampling, seed):
            print(response)
        return
    for turn, line in enumerate(iter(_ask, "")):
        print(answerer.answer([line], sampling, seed + turn)[0])


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="the folder to write", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="a whole model, the adapter merged into its weights")] = False,
    reward: Annotated[bool, typer.Option("--reward", help="the reward model, as a sequence classifier")] = False,
    member: Annotated[int | None, typer.Option(min=0, help="with --reward: which one of an ensemble, from 0")] = None,
    task: Annotated[str, typer.Option(help="add a soft prompt under this name to a table of several, --to")] = "",
    dtype: Annotated[str, typer.Option(help="of a whole model: float32, bfloat16 or float16")] = "float32",
) -> None:
    """Write a run's policy for other programs, check it, and describe it in a model card."""
    from align.outputs.export import export_prompt, export_run
    from align.runs.folder import open_run

    folder, settings = open_run(run)
    if task:
        export_prompt(settings, folder, to, task)
        errors.print(f"soft prompt of {folder.path} added to {to} as {task}; sft.adapter={to}#{task} starts from it")
        return
    if to.exists():
        raise UserError(f"--to {to} exists already: give a new folder")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: float32, bfloat16 or float16 was expected")
    if merge and reward:
        raise UserError("--merge is for the policy; a reward model is written whole in any case: leave one of them out")
    if dtype != "float32" and not merge:
        raise UserError("--dtype is of a whole model: give --merge with it")
    if member is not None and not reward:
        raise UserError("--member is of a reward model: give --reward with it")
    what = "reward model" if reward else "model" if merge else "adapter"
    what, gap = export_run(settings, folder, to, what, dtype, member)
    errors.print(f"{what} of {folder.path} written to {to}; loaded afresh it differs from the live one by {gap:.2g}")


@app.command()
def average(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="folders, as runs/NAME/policy", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="the folder to write", show_default=False)],
    weight: Annotated[list[float] | None, typer.Option(help="of each, in their order; unset: all alike")] = None,
) -> None:
    """Write the mean of adapters that started alike, with that of their heads: of policies, or of reward models."""
    from align.runtime.atomic_files import new_folder
    from policies.averaging import average_adapters

    shares = weight or [1.0] * len(adapters)
    if len(shares) != len(adapters) or not all(0 < share < math.inf for share in shares):
        raise UserError(f"--weight: one for each of the {len(adapters)} adapters, above 0, was expected")
    if to.exists():
        raise UserError(f"--to {to} exists already: give a new folder")
    with new_folder(to) as folder:
        average_adapters(adapters, shares, folder)
    errors.print(f"mean of {len(adapters)} adapters written to {to}")


@app.command()
def report(run: Run) -> None:
    """Draw a run's curves on one page, report/index.html."""
    from align.outputs.report import write_report
    from align.runs.folder import open_run

    folder, _ = open_run(run)
    console.print(f"report written to {write_report(folder.path, folder.read_evaluation())}")


def main() -> None:
    """Exit status 0: done; 2: a mistake in what the user gave; 130: stopped by the user; 1: anything else."""
    from align.runtime.signals import Interrupted

    quiet_libraries()
    # Torch reads it at its first tensor. Tensors of megabytes come and go in every layer, at a fault for each page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except UserError as error:
        errors.print(f"[red]error:[/red] {_escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except Interrupted as stopped:
        errors.print(f"stopped; `align resume {stopped}` goes on", soft_wrap=True)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)


def _load(path: Path, overrides: list[str] | None) -> Experiment:
    from align.config.load import load_experiment

    return load_experiment(path, overrides or [])


def _start(settings: Experiment, replace: bool) -> None:
    from align.runs.fingerprint import write_fingerprint
    from align.runs.folder import begin_run, folder_of, locked, refuse_run
    from align.stages.pipeline import load_datasets

    folder = folder_of(settings)
    if not replace:
        refuse_run(folder)
    datasets = load_datasets(settings)
    with locked(folder):
        write_fingerprint(folder, settings, datasets)
        begin_run(folder, settings)
        _go(settings, folder, datasets)


def _one_stage(stage: str, path: Path, overrides: list[str] | None, replace: bool) -> None:
    """A stage on top of what the run has."""
    from align.runs.fingerprint import write_fingerprint
    from align.runs.folder import begin_run, folder_of, locked, refuse_stage
    from align.stages.pipeline import load_datasets

    settings = _load(path, overrides).model_copy(update={"stages": [stage]})
    folder = folder_of(settings)
    if not replace:
        refuse_stage(folder, stage)
    datasets = load_datasets(settings)
    with locked(folder):
        write_fingerprint(folder, settings, datasets)
        begin_run(folder, settings, STAGES[STAGES.index(stage) :])
        _go(settings, folder, datasets)


def _go(settings: Experiment, folder: "RunFolder", datasets: "Datasets") -> None:
    """Print the plan, run what is left, show the evaluation and draw the report."""
    from align.outputs.report import write_report
    from align.resources.plan import plan_table
    from align.runtime.failures import Fault, describe_outside_failure
    from align.runtime.last_words import last_words
    from align.runtime.signals import Interrupted, graceful_stop
    from align.stages.pipeline import run_stages, stages_left

    console.print(plan_table(settings, datasets, stages_left(settings, folder)))
    goes_on = f"`align resume {folder.path}` goes on from the last checkpoint"
    with graceful_stop() as stop, last_words(f"the run was ended from outside, without a word; {goes_on}"):
        try:
            evaluation = run_stages(settings, folder, datasets, stop)
        except Interrupted:
            raise Interrupted(folder.path) from None
        except Fault as fault:
            errors.print(f"[red]stopped:[/red] {_escaped(fault)}", soft_wrap=True)
            sys.exit(1)
        except Exception as error:
            if (said := describe_outside_failure(error)) is None:
                raise
            errors.print(f"[red]error:[/red] {_escaped(said)}; {_escaped(goes_on)}", soft_wrap=True)
            sys.exit(1)
    _show(evaluation)
    console.print(f"report: {write_report(folder.path, evaluation)}")


def _show(evaluation: dict[str, Any]) -> None:
    from align.evaluation.tables import evaluation_table

    console.print(evaluation_table(evaluation))


def _evaluate_reward_model(
    folder: "RunFolder", settings: Experiment, data: Path | None, classifier: str | None, to: Path | None
) -> None:
    from align.data.datasets import read_preferences
    from align.evaluation.reward_model import write_diagnostics
    from align.evaluation.tables import diagnostics_table
    from align.outputs.trained_run import evaluate_reward_model

    if not classifier and not folder.done("reward"):
        raise UserError(f"run {folder.path} has no reward/ yet: `align resume {folder.path}` goes on with it")
    facts, worst = evaluate_reward_model(settings, folder, read_preferences(settings, data), classifier)
    console.print(diagnostics_table(facts))
    if to:
        to.mkdir(parents=True, exist_ok=True)
        write_diagnostics(to, facts, worst)
        console.print(f"written to {to}")


def _prompts_of(file: Path | None) -> list[Any]:
    if file is None:
        return []
    from align.config.schema import SourceSettings
    from align.data.readers import parse_prompt, parse_rows, read_rows

    rows = read_rows(SourceSettings(path=str(file)))
    return [row.prompt for row in parse_rows(rows, parse_prompt, "error").items]


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _escaped(error: Exception | str) -> str:
    from rich.markup import escape

    return escape(str(error))
