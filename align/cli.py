"""The command `align`."""

import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.choice.command import choose_command
from align.config.stage import Stage, all_stages, stages_from
from align.data import commands as data_commands
from align.jobs import commands as job_commands
from align.runtime.consoles import console, errors, escaped, quiet_consoles
from align.runtime.garbage import no_collections
from align.runtime.quiet import quiet_libraries
from align.runtime.streams import lasting_streams
from align.runtime.wording import counted
from policies.errors import UserError

if TYPE_CHECKING:
    from align.config.schema import Experiment
    from align.outputs.trained_run import TrainedRun
    from align.runs.folder import RunFolder
    from align.stages.launch import Launch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The whole RLHF loop: supervised fine-tuning, a reward model, and PPO or DPO, from one experiment file.",
)
OTHERS = "KEY:=VALUE replaces a whole section, and '~KEY' removes a key, so that its default applies"
File = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="the experiment's YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help=f"settings that replace the file's; {OTHERS}", show_default=False),
]
RunOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help=f"settings that replace the run's; {OTHERS}", show_default=False),
]
EvaluationOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help=f"settings under `evaluation` that replace the run's; {OTHERS}",
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under runs/", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but errors, and the object of --json")]
PolicyScale = Annotated[
    float,
    typer.Option(
        "--scale",
        help="a of the policy, reference + a · (policy - reference): 0 is the reference, 1 the trained policy",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Replace = Annotated[bool, typer.Option("--replace", help="start again, replacing the run of this name")]


def _example(command: str) -> str:
    """The end of a command's help."""
    return f"Example: {command}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"align {version('align-rlhf')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(name="run", epilog=_example("align run experiment.yaml name=second ppo.steps=50"))
def run_command(
    experiment: File,
    overrides: Overrides = None,
    replace: Replace = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run all stages of an experiment."""
    settings = _load(experiment, overrides)  # first: a mistake in the file is reported before torch is imported
    from align.runs.folder import folder_of, refuse_run

    if not replace:
        refuse_run(folder_of(settings))
    _begin(settings, all_stages(), quiet=quiet, as_json=as_json)


def _add_stage_command(stage: Stage) -> None:
    """`align STAGE`: one stage, on top of what the run already has."""

    def command(
        experiment: File,
        overrides: Overrides = None,
        replace: Replace = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        settings = _load(experiment, overrides).model_copy(update={"stages": [stage.name]})
        from align.runs.folder import folder_of, refuse_stage

        if not replace:
            refuse_stage(folder_of(settings), stage.name)
        _begin(settings, stages_from(stage.name), quiet=quiet, as_json=as_json)

    app.command(name=stage.name, help=stage.summary)(command)


for _stage in all_stages():
    _add_stage_command(_stage)


app.command(
    name="submit", epilog=_example("align submit experiment.yaml --address http://10.0.0.1:8265 --env HF_TOKEN")
)(job_commands.submit)
app.add_typer(job_commands.jobs, name="jobs")
app.add_typer(data_commands.data, name="data")


@app.command(name="resume", epilog=_example("align resume runs/second ppo.steps=100"))
def resume_command(run: Run, overrides: RunOverrides = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Resume a stopped run from its last complete checkpoint.

    Settings that do not change what is learned, such as the number of steps or of workers, may be overridden.
    """
    from align.stages.launch import resumed_run

    _run(resumed_run(run, overrides or []), quiet=quiet, as_json=as_json)


@app.command(name="plan", epilog=_example("align plan experiment.yaml --gpu-memory 24"))
@no_collections()
def plan_command(
    experiment: File,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="memory of each GPU in GB; unset: that of this machine's, or the cluster's smallest"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run would do and need, without starting it."""
    settings = _load(experiment, overrides)
    from align.runtime.compilation import compiled_on_first_call

    with compiled_on_first_call():
        from align.resources.plan import plan_table
        from align.stages.launch import plan_run

    plan = plan_run(settings, gpu_memory and gpu_memory * 1e9)
    if as_json:
        print(json.dumps({"name": plan.name, "lines": plan.lines}))
    else:
        console.print(plan_table(plan))


app.command(name="choose", epilog=_example("align choose --task prefer --data pairs.jsonl --model my-model"))(
    choose_command
)


@app.command(name="eval", epilog=_example("align eval runs/second --reward --data pairs.jsonl"))
def evaluate(  # noqa: PLR0913 - one parameter per option
    run: Run,
    overrides: EvaluationOverrides = None,
    reward: Annotated[bool, typer.Option("--reward", help="evaluate the reward model instead")] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="with --reward: preferences, or labelled steps, to evaluate it on; unset: the run's held-out ones"
        ),
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="with --reward: evaluate this sequence-classification model instead")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="with --reward: folder for the results and the plot")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN2", help="compare with the policy of this run, on the prompts of RUN")
    ] = None,
    perplexity: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="measure the perplexity of this file's texts under each model; may be repeated"
        ),
    ] = None,
    scale: PolicyScale = 1.0,
    frontier: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="compare with the best policy at each KL, estimated from N samples of each prompt"
        ),
    ] = None,
    dial: Annotated[
        bool, typer.Option("--dial", help="with --frontier: compare the policy at scales from 0.25 to 1.75")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run's policy against its reference again and update evaluation.json, or evaluate its reward model.

    With --against, compare its policy with that of another run, by the reward of the first. With --perplexity, measure
    how likely texts and held-out demonstrations are under the base model and under what each stage has made of it. With
    --scale, print the figures of another policy on the line through both, and leave evaluation.json as it is. With
    --frontier, estimate the best policy at each KL, 256 samples being a good number, and how close the policy comes.
    """
    from align.outputs.trained_run import open_run

    if sum(map(bool, (reward, against, perplexity, frontier))) > 1:
        raise UserError("--reward, --against, --perplexity and --frontier are different evaluations: choose one")
    if not reward and (data or classifier or to):
        raise UserError("--data, --classifier and --to need --reward: add it")
    _check_scales(scale, dial, bool(reward or perplexity), frontier)
    _check_evaluation_overrides(overrides or [])
    trained = open_run(run, overrides or [], scale)
    if reward:
        _evaluate_reward_model(trained.folder, trained.experiment, data, classifier, to, as_json)
    elif against:
        _compare_policies(trained, open_run(against), as_json)
    elif perplexity:
        _measure_perplexity(trained, perplexity, as_json)
    elif frontier:
        _measure_frontier(trained, frontier, dial, as_json)
    else:
        _show(trained.evaluate(), as_json)


@app.command(epilog=_example("align score runs/second responses.jsonl --to scored.jsonl"))
def score(
    run: Run,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="rows with prompt and response, or with messages", show_default=False),
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="the JSONL file to write: each row with `score` and `terms`")
    ] = None,
    reward_model: Annotated[bool, typer.Option("--reward-model", help="score by the reward model alone")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="replace the file --to")] = False,
    as_json: Json = False,
) -> None:
    """Score the responses in a file by a run's reward, all its terms included, or by its reward model alone."""
    from align.evaluation.tables import scores_table
    from align.outputs.file_scores import check_target, score_file
    from align.outputs.trained_run import open_run

    if replace and not to:
        raise UserError("--replace needs --to: add it")
    if to:
        check_target(to, replace)
    scored = score_file(open_run(run), file, reward_model, _tell)
    if to:
        scored.write(to)
        _tell(f"written to {to}")
    if as_json:
        print(json.dumps(scored.summary()))
    else:
        console.print(scores_table(scored.summary()))


@app.command(epilog=_example("align generate runs/second --prompt 'Name a colour.' --temperature 0"))
def generate(  # noqa: PLR0913 - one parameter per option
    run: Run,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="a message, if the tokenizer has a chat template, or a text; may be repeated"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="a JSONL file with the column `prompt`; texts are continued, messages rendered"),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="system prompt of --prompt and of the chat")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue --prompt, or lines, as text, without the chat template")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="sampling temperature, 0 for greedy; unset: that of the run")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="limit on the tokens of a response; unset: that of the run")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    scale: PolicyScale = 1.0,
) -> None:
    """Generate responses with a run's policy: to prompts, to those of a file, or, without either, in a chat.

    Where the tokenizer has a chat template, --prompt and the lines of the chat are messages of the user; elsewhere,
    and with --raw, the model continues them as text. In the chat, /help lists the commands.
    """
    if (raw or system) and file and not prompt:
        raise UserError("--raw and --system are for --prompt and the chat; the rows of --file are used as they are")
    from align.outputs.prompt_checks import check_text

    check_text(system or "", "--system")
    with redirect_stdout(sys.stderr):  # on import, transformers prints there that W&B is offline
        from align.outputs.generation import Options, chat_on_standard_input, print_responses
        from align.outputs.trained_run import open_run

    options = Options(raw, system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    trained = open_run(run, scale=scale)
    if prompt or file:
        print_responses(trained, prompt or [], file, options, _tell)
    else:
        chat_on_standard_input(trained, options, _tell)


@app.command(epilog=_example("align export runs/second --merge --to model"))
def export(  # noqa: PLR0913 - one parameter per option
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="the folder to write", show_default=False)],
    merge: Annotated[
        bool, typer.Option("--merge", help="a complete model, the adapter merged into its weights")
    ] = False,
    reward: Annotated[bool, typer.Option("--reward", help="the reward model, as a sequence classifier")] = False,
    classifier: Annotated[bool, typer.Option("--classifier", help="the classifier of `align classify`")] = False,
    member: Annotated[
        int | None, typer.Option(min=0, help="with --reward: which member of an ensemble, counted from 0")
    ] = None,
    task: Annotated[str, typer.Option(help="add the soft prompt under this name to the prompt table --to")] = "",
    dtype: Annotated[str, typer.Option(help="with --merge: float32, bfloat16 or float16")] = "float32",
    scale: PolicyScale = 1.0,
) -> None:
    """Export a run's policy, reward model or classifier for other programs, check it, and write a model card."""
    from align.outputs.export import Product, export_prompt, export_run
    from align.runs.folder import find_run

    folder, settings = find_run(run)
    if task:
        export_prompt(settings, folder, to, task)
        errors.print(f"soft prompt of {folder.path} added to {to} as {task}; sft.adapter={to}#{task} starts from it")
        return
    _check_export(to, merge=merge, reward=reward, classifier=classifier, member=member, dtype=dtype)
    if scale != 1 and (reward or classifier):
        raise UserError("--scale is for the policy: remove it, or --reward or --classifier")
    product: Product = "adapter"
    if merge:
        product = "model"
    elif reward:
        product = "reward model"
    elif classifier:
        product = "classifier"
    product, difference, changes = export_run(settings, folder, to, product, dtype=dtype, member=member, scale=scale)
    compared = COMPARED.get(product, "log-probabilities differ from the run's by at most {:.2g} nats").format(
        difference
    )
    errors.print(f"{product} of {folder.path} written to {to}; reloaded, its {compared}", soft_wrap=True)
    for change in changes:
        errors.print(f"generation config of {to}: {change}", soft_wrap=True, markup=False)


COMPARED = {
    "adapter": "log-probabilities differ from the run's by at most {:.2g} nats",
    "model": "log-probabilities differ from the run's by at most {:.2g} nats",
    "reward model": "scores differ from the run's by at most {:.2g}",
    "classifier": "outputs differ from the run's by at most {:.2g}",
}
"""How an export compares with the run's own model."""


def _check_export(to: Path, *, merge: bool, reward: bool, classifier: bool, member: int | None, dtype: str) -> None:
    if to.exists():
        raise UserError(f"--to {to} already exists: choose a new folder")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    if merge and (reward or classifier):
        other = "reward model" if reward else "classifier"
        raise UserError(f"--merge is for the policy; a {other} is always exported complete: remove one of the two")
    if reward and classifier:
        raise UserError("--reward and --classifier are two products: export one after the other")
    if dtype != "float32" and not merge:
        raise UserError("--dtype needs --merge: add it")
    if member is not None and not reward:
        raise UserError("--member needs --reward: add it")


@app.command(epilog=_example("align average runs/a/policy runs/b/policy --to mean"))
def average(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="folders such as runs/NAME/policy", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="the folder to write", show_default=False)],
    weight: Annotated[
        list[float] | None, typer.Option(help="weight of each adapter, in order; unset: all equal")
    ] = None,
) -> None:
    """Average the adapters, and heads, of policies or of reward models that started from the same weights."""
    from align.runtime.atomic_files import new_folder
    from policies.averaging import average_adapters

    shares = weight or [1.0] * len(adapters)
    if len(shares) != len(adapters) or not all(0 < share < math.inf for share in shares):
        raise UserError(f"--weight: expected {len(adapters)} positive weights, one for each adapter")
    if to.exists():
        raise UserError(f"--to {to} already exists: choose a new folder")
    with new_folder(to) as folder:
        average_adapters(adapters, shares, folder)
    errors.print(f"mean of {len(adapters)} adapters written to {to}")


@app.command(name="runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="the folder that holds the runs")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list instead of a table")] = False,
) -> None:
    """List the runs: their state, stage and step, and the newest score and KL."""
    from align.outputs.run_list import list_runs, records, runs_table

    found = list_runs(folder)
    if as_json:
        print(json.dumps(records(found)))
    elif found:
        console.print(runs_table(found, console.width))
    else:
        console.print(f"no runs in {escaped(folder)}")


@app.command()
def report(run: Run, quiet: Quiet = False, as_json: Json = False) -> None:
    """Diagnose a run, and plot its curves on one page, report/index.html."""
    from align.runs.folder import find_run

    folder, _ = find_run(run)
    with quiet_consoles(results=quiet or as_json, progress=quiet):
        result = _report(folder, folder.read_evaluation())
    if as_json:
        print(json.dumps(result, default=str))


@app.command(epilog=_example("align dashboard runs/second"))
def dashboard(run: Run) -> None:
    """Save a view in W&B with the panels of PPO: reward, distance, critic, text and machine.

    It needs the package of the extra `dashboard`. Where the user is not logged in to W&B, it is only written to the
    run's folder.
    """
    from align.outputs.dashboard import make_dashboard
    from align.runs.folder import find_run

    folder, settings = find_run(run)
    made = make_dashboard(folder, settings)
    if made.url:
        console.print(f"dashboard: {made.url}", soft_wrap=True)
    else:
        errors.print(
            f"dashboard written to {escaped(made.file)}; {escaped(made.reason)}. After `wandb login`, "
            f"`align dashboard {escaped(folder.path)}` saves it in W&B",
            soft_wrap=True,
        )


@app.command(name="compare", epilog=_example("align compare runs/first runs/second --to comparison.html"))
def compare_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="runs, as for report", show_default=False)],
    to: Annotated[Path, typer.Option(help="the file to write")] = Path("comparison.html"),
) -> None:
    """Write a page that compares runs: their settings, evaluations and curves."""
    from align.report.compare import write_comparison
    from align.runs.folder import find_run

    write_comparison([find_run(run)[0] for run in runs], to)
    console.print(f"comparison written to {escaped(to)}")


@app.command(name="watch", epilog=_example("align watch runs/first"))
def watch_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs, as for report", show_default=False)],
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="the port; 0: a free one")] = 8420,
) -> None:
    """Show the page about runs in the browser, live, until Ctrl-C."""
    from align.runs.folder import find_run

    try:
        from align.report.watch import serve_page
    except ModuleNotFoundError as error:
        raise UserError(f"align watch needs {error.name}: pip install 'align-rlhf[serve]'") from None
    serve_page([find_run(run)[0] for run in runs], host, port, console.print)


@app.command(epilog=_example("align settings ppo.kl"))
def settings(
    name: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="a section such as ppo.kl, or a setting of one")
    ] = None,
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="print the JSON schema of experiment files, for editors")
    ] = False,
) -> None:
    """Show the settings of an experiment file: names, types, defaults and what they do."""
    from align.config.settings_help import experiment_schema, settings_help

    if json_schema:
        print(json.dumps(experiment_schema(), indent=2))
    else:
        console.print(settings_help(name))


@app.command(epilog=_example("align doctor --address 10.0.0.1:6379"))
def doctor(
    address: Annotated[str | None, typer.Option(help="check the Ray cluster at this address, too")] = None,
    runs: Annotated[Path, typer.Option(help="the folder for runs")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check this machine's installation, and say what mends each problem; exit status 1: there is one."""
    from align.resources.doctor.checks import all_checks, run_checks
    from align.resources.doctor.report import findings_record, findings_table, is_healthy

    with errors.status("checking the installation"):
        findings = run_checks(all_checks(str(runs), address))
    if as_json:
        print(json.dumps(findings_record(findings)))
    else:
        console.print(findings_table(findings))
    if not is_healthy(findings):
        sys.exit(1)


@lasting_streams()
def main() -> None:
    """Run the command. Exit status 0: done; 1: failed; 2: user error; 130: stopped by the user."""
    from align.runtime.failures import ClusterLost
    from align.runtime.signals import Interrupted

    quiet_libraries()
    # Torch reads this at its first tensor. Layers allocate and free megabytes, and each small page costs a fault.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP reads this when torch is imported. By default, a thread that waits for others keeps its core busy for
    # milliseconds, which makes two runs on the same cores several times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except UserError as error:
        errors.print(f"[red]error:[/red] {escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except ClusterLost as error:
        errors.print(f"[red]error:[/red] {escaped(error)}", soft_wrap=True)
        sys.exit(1)
    except Interrupted as stopped:
        errors.print(f"stopped; `align resume {stopped}` resumes the run", soft_wrap=True)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # The process ends: looking through a million objects for cycles would take a second. Triton is loaded where it
        # is installed, and reports what is not collected as leaks.
        if "triton" not in sys.modules:
            gc.freeze()


def _load(path: Path, overrides: list[str] | None) -> "Experiment":
    from align.config.load import load_experiment

    return load_experiment(path, overrides or [])


def _begin(settings: "Experiment", stages: Sequence[Stage], *, quiet: bool, as_json: bool) -> None:
    """Remove what an earlier run wrote in these stages, and run the stages of the experiment."""
    from align.stages.launch import new_run

    _run(new_run(settings, [stage.name for stage in stages]), quiet=quiet, as_json=as_json)


def _run(opened: "AbstractContextManager[Launch]", *, quiet: bool, as_json: bool) -> None:
    """Open a run, print its plan, run the remaining stages, show what has come of them and write the report."""
    from align.resources.plan import make_plan, plan_table, use_table
    from align.resources.ray_cluster import one_connection
    from align.runs.folder import read_peaks
    from align.stages.pipeline import remaining_stages

    with quiet_consoles(results=quiet or as_json, progress=quiet):
        with ExitStack() as stack:
            with one_connection():
                launch = stack.enter_context(opened)
                settings, folder = launch.experiment, launch.folder
                stages = remaining_stages(settings, folder)
                plan = make_plan(settings, launch.datasets, stages, dtype=launch.dtype, placement=launch.placement)
            if not stages:
                console.print(_nothing_to_resume(settings, folder), soft_wrap=True)
            console.print(plan_table(plan))
            evaluation = _run_stages(launch)
        _show(evaluation)
        if peaks := read_peaks(folder, stages):
            console.print(use_table(plan, peaks))
        result = _report(folder, evaluation)  # once the run is not locked any more: the page says its state
    if as_json:
        print(json.dumps({"evaluation": evaluation, **result}, default=str))


def _report(folder: "RunFolder", evaluation: dict[str, Any]) -> dict[str, Any]:
    """Print the diagnosis of a run and write its page; the run, its verdicts and the page by name."""
    from align.diagnosis.listing import verdict_list, verdict_records
    from align.report.page import write_report
    from align.report.run_record import read_run_record

    record = read_run_record(folder.path, evaluation)
    console.print(verdict_list(record.verdicts, is_judged=not record.history.is_empty))
    page = write_report(record)
    console.print(f"report written to {escaped(page)}", soft_wrap=True)
    return {"run": folder.path, "verdicts": verdict_records(record.verdicts), "report": page}


def _run_stages(launch: "Launch") -> dict[str, Any]:
    """Run the remaining stages. A failure that align has not caused ends the command with a message."""
    from align.runtime.failures import Fault, describe_outside_failure
    from align.runtime.last_words import last_words
    from align.runtime.signals import Interrupted, graceful_stop
    from align.stages.pipeline import run_stages

    settings = launch.experiment
    folder = launch.folder
    how_to_resume = folder.how_to_resume
    killed = f"the run was killed from outside, without a message; {how_to_resume}"
    with graceful_stop(settings.checkpoint.grace, how_to_resume) as stop, last_words(killed):
        try:
            return run_stages(settings, folder, launch.datasets, stop)
        except Interrupted:
            raise Interrupted(folder.path) from None
        except Fault as fault:
            errors.print(f"[red]stopped:[/red] {escaped(fault)}", soft_wrap=True)
            sys.exit(1)
        except Exception as error:
            description = describe_outside_failure(error)
            if description is None:
                raise
            errors.print(f"[red]error:[/red] {escaped(description)}; {escaped(how_to_resume)}", soft_wrap=True)
            sys.exit(1)


def _nothing_to_resume(settings: "Experiment", folder: "RunFolder") -> str:
    from align.runs.folder import read_facts

    if "ppo" not in settings.stages:
        return "nothing to resume: all stages of the run are done"
    if "stopped" in read_facts(folder.policy):
        return "nothing to resume: ppo.stop has ended the run"
    return f"nothing to resume: all {counted(settings.ppo.steps, 'step')} are done; a larger ppo.steps adds more"


def _show(evaluation: dict[str, Any], as_json: bool = False) -> None:
    from align.evaluation.tables import evaluation_table

    if as_json:
        print(json.dumps(evaluation))
    else:
        console.print(evaluation_table(evaluation))


def _evaluate_reward_model(
    folder: "RunFolder",
    settings: "Experiment",
    data: Path | None,
    classifier: str | None,
    to: Path | None,
    as_json: bool,
) -> None:
    from align.evaluation.reward_model import write_diagnostics
    from align.evaluation.tables import diagnostics_table
    from align.outputs.trained_run import evaluate_on_file
    from align.runs.products import missing_product

    if not classifier and not folder.done("reward"):
        raise missing_product(settings, folder, "reward")
    facts, worst_errors = evaluate_on_file(settings, folder, data, classifier)
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(diagnostics_table(facts))
    if to:
        to.mkdir(parents=True, exist_ok=True)
        write_diagnostics(to, facts, worst_errors)
        errors.print(f"written to {to}", soft_wrap=True)


def _check_scales(scale: float, dial: bool, measures_others: bool, frontier: int | None) -> None:
    if scale != 1 and measures_others:
        raise UserError("--scale is for the policy: remove it, or --reward or --perplexity")
    if dial and not frontier:
        raise UserError("--dial needs --frontier: add it, such as --frontier 256")
    if dial and scale != 1:
        raise UserError("--dial compares several scales: remove --scale")


def _check_evaluation_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not override.removeprefix("~").startswith("evaluation."):
            raise UserError(f"{override}: an evaluation can change settings of the section evaluation alone")


def _measure_frontier(trained: "TrainedRun", samples: int, dial: bool, as_json: bool) -> None:
    from align.evaluation.tables import frontier_table
    from align.outputs.frontier import DIAL

    figures = trained.frontier(samples, DIAL if dial else (trained.scale,))
    if as_json:
        print(json.dumps(figures))
    else:
        console.print(frontier_table(figures))


def _measure_perplexity(trained: "TrainedRun", files: Sequence[Path], as_json: bool) -> None:
    from align.evaluation.tables import perplexity_table

    section = trained.measure_perplexity(files)
    if as_json:
        print(json.dumps(section))
    else:
        console.print(perplexity_table(section))


def _compare_policies(trained: "TrainedRun", other: "TrainedRun", as_json: bool) -> None:
    from align.evaluation.tables import comparison_table
    from align.outputs.run_comparison import compare_runs, comparison_file

    facts = compare_runs(trained, other)
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(comparison_table(facts))
    _tell(f"written to {comparison_file(trained, other)}")


def _tell(note: str) -> None:
    """Print a note on standard error."""
    errors.print(escaped(note), soft_wrap=True, highlight=False)
