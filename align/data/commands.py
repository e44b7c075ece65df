"""The commands `align data check` and `align data prepare`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.runtime.consoles import console, errors, escaped
from policies.errors import UserError
from policies.schema import ModelSettings

if TYPE_CHECKING:
    from align.data.quality.corpus import Corpus

data = typer.Typer(no_args_is_help=True, help="Check and prepare files of demonstrations, preferences and prompts.")

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="files, or folders of files", show_default=False)]
Kind = Annotated[
    str | None,
    typer.Option(help="demonstrations, preferences or prompts; unset: recognised by the columns"),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NEW=OLD", help="align's name of a column and that in the data; may be repeated"),
]
Heldout = Annotated[
    list[Path] | None, typer.Option(help="a file of prompts that must not be among the rows; may be repeated")
]
Model = Annotated[Path | None, typer.Option(help="folder of a model, for its tokenizer and chat template")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="with --model: chat template in place of its own, as model.chat_template of an experiment"),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="most tokens of a row, or words without --model; unset: the model's context length"),
]


@data.command(name="check", epilog="Example: align data check train.jsonl --heldout test.jsonl --model my-model")
def check_command(  # noqa: PLR0913 - one parameter per option
    files: Files,
    kind: Kind = None,
    column: Columns = None,
    heldout: Heldout = None,
    model: Model = None,
    chat_template: ChatTemplate = None,
    max_length: MaxLength = None,
    locations: Annotated[int, typer.Option(min=0, help="how many locations each finding lists")] = 5,
    to: Annotated[Path | None, typer.Option(help="folder for check.json and lengths.png")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace the folder --to")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Look for faults in data: duplicates, cut-off texts, odd characters, contradictions and others.

    Exit status 1: there is a problem.
    """
    _refuse_existing(to, replace)
    from align.data.quality.report import check_corpus, report_record, report_tables, write_data_report

    with errors.status("checking"):
        report = check_corpus(
            open_corpus(files, kind, column, heldout, model=model, chat_template=chat_template, max_length=max_length)
        )
    if as_json:
        print(json.dumps(report_record(report, locations)))
    else:
        console.print(report_tables(report, locations))
    if to:
        write_data_report(report, to, locations)
        errors.print(f"written to {escaped(to)}", soft_wrap=True)
    if report.problems:
        sys.exit(1)


@data.command(name="prepare", epilog="Example: align data prepare pairs.jsonl --to clean.jsonl --heldout-share 0.1")
def prepare_command(  # noqa: PLR0913 - one parameter per option
    files: Files,
    to: Annotated[Path, typer.Option(help="the file to write, of JSON lines", show_default=False)],
    steps: Annotated[
        str | None, typer.Option(help="names of steps, separated by commas; unset: the default of docs/data-check.md")
    ] = None,
    kind: Kind = None,
    column: Columns = None,
    heldout: Heldout = None,
    model: Model = None,
    chat_template: ChatTemplate = None,
    max_length: MaxLength = None,
    heldout_share: Annotated[
        float | None, typer.Option(help="share of the prompts whose rows go to NAME-heldout.jsonl, beside --to")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="YAML list of texts with {prompt}: each prompt is put into one of them")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the split and of the choice of templates")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="replace the files that are written")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Clean data by steps, split it by prompt, and put prompts into templates."""
    _check_target(to, heldout_share, replace)
    from align.data.quality.prepare import prepare, prepared_record, prepared_table, write_prepared
    from align.data.quality.steps import chosen_steps
    from align.data.quality.templates import read_templates

    templates = read_templates(template) if template else []
    with errors.status("preparing"):
        corpus = open_corpus(
            files, kind, column, heldout, model=model, chat_template=chat_template, max_length=max_length
        )
        names = None if steps is None else [name.strip() for name in steps.split(",") if name.strip()]
        chosen = chosen_steps(names, corpus)
        prepared = prepare(corpus, chosen, to, heldout_share=heldout_share, templates=templates, seed=seed)
        write_prepared(prepared)
    if as_json:
        print(json.dumps(prepared_record(prepared)))
    else:
        console.print(prepared_table(prepared))


def _check_target(to: Path, heldout_share: float | None, replace: bool) -> None:
    if to.suffix != ".jsonl":
        raise UserError(f"--to {to}: a file that ends in .jsonl was expected")
    _refuse_existing(to, replace)
    if heldout_share is None:
        return
    if not 0 < heldout_share < 1:
        raise UserError(f"--heldout-share {heldout_share:g}: a number between 0 and 1 was expected")
    from align.data.quality.prepare import heldout_path

    _refuse_existing(heldout_path(to), replace)


def _refuse_existing(path: Path | None, replace: bool) -> None:
    if path and path.exists() and not replace:
        raise UserError(f"{path} already exists: choose a new name, or add --replace")


def open_corpus(
    files: Sequence[Path],
    kind: str | None,
    columns: Sequence[str] | None,
    heldout: Sequence[Path] | None,
    *,
    model: Path | None,
    chat_template: str | None = None,
    max_length: int | None,
) -> "Corpus":
    """Read the files, the held-out ones and the tokenizer."""
    from align.data.forms import CHECKED_KINDS
    from align.data.quality.corpus import heldout_texts, read_corpus

    if chat_template and not model:
        raise UserError("--chat-template needs --model: add it")
    if kind is not None and kind not in CHECKED_KINDS:
        raise UserError(f"--kind {kind}: expected one of {', '.join(CHECKED_KINDS)}")
    known = next((each for each in CHECKED_KINDS if each == kind), None)
    corpus = read_corpus(files, known, renamed_columns(columns or []))
    corpus.max_length = max_length
    if heldout:
        corpus.heldout = heldout_texts(heldout, renamed_columns(columns or []))
        corpus.heldout_files = [str(path) for path in heldout]
    if model:
        _add_tokenizer(corpus, ModelSettings(path=str(model), chat_template=chat_template))
    return corpus


def _add_tokenizer(corpus: "Corpus", model: ModelSettings) -> None:
    from policies.files.base_model import load_model_config, load_model_tokenizer
    from policies.text.encoder import TextEncoder

    # Control tokens are a finding of their own, so that they are no reason not to encode a row.
    corpus.encoder = TextEncoder(load_model_tokenizer(model), "control")
    if corpus.max_length is None:
        corpus.max_length = getattr(load_model_config(model.path), "max_position_embeddings", None)


def renamed_columns(columns: Sequence[str]) -> dict[str, str]:
    """The values of `--column`: align's name of a column: its name in the data. Raises UserError where one is none."""
    renamed: dict[str, str] = {}
    for each in columns:
        new_name, equals, name = each.partition("=")
        if not (new_name and equals and name):
            raise UserError(f"--column {each}: expected NEW=OLD, such as prompt=question")
        renamed[new_name] = name
    return renamed
