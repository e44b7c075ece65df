"""The command `align choose`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from align.choice.facts import TASKS
from align.data.commands import Columns, renamed_columns
from align.runtime.consoles import console, errors, escaped
from policies.errors import UserError

TASK_HELP = "; ".join(f"{name}: {meaning}" for name, meaning in TASKS.items())


def choose_command(  # noqa: PLR0913 - one parameter per option
    task: Annotated[str, typer.Option(help=TASK_HELP, show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(help="a file, or a folder of files, of any kind of rows; may be repeated", show_default=False),
    ],
    model: Annotated[str, typer.Option(help="folder or hub name of the base model", show_default=False)],
    to: Annotated[Path, typer.Option(help="the experiment file to write; its name is that of the run")] = Path(
        "experiment.yaml"
    ),
    column: Columns = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="memory of each GPU in GB; unset: that of this machine's, or else its own memory"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace the file --to")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Choose a technique by task, data, model and machine, and write an experiment to start with.

    docs/choose.md has the rules, with the papers that they are from.
    """
    known = next((each for each in TASKS if each == task), None)
    if known is None:
        raise UserError(f"--task {task}: expected one of {', '.join(TASKS)}")
    if to.suffix not in (".yaml", ".yml"):
        raise UserError(f"--to {to}: a file that ends in .yaml was expected")
    if to.exists() and not replace:
        raise UserError(f"{to} already exists: choose a new name, or add --replace")
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: the folder {to.parent} does not exist")
    from align.choice.choose import choose
    from align.resources.plan import plan_table, text_table
    from align.runtime.atomic_files import write_text

    with errors.status("choosing"):
        choice = choose(
            task=known,
            files=data,
            model=model,
            name=to.stem,
            columns=renamed_columns(column or []),
            gpu_gigabytes=gpu_memory,
        )
    write_text(to, choice.text)
    if as_json:
        print(json.dumps(choice.record | {"file": str(to)}))
        return
    console.print(text_table("choice", choice.lines))
    console.print(plan_table(choice.plan))
    errors.print(f"written to {escaped(to)}; `align run {escaped(to)}` runs it", soft_wrap=True)
