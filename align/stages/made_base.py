"""The base model of an experiment that makes its own, by `model.architecture`: made once, before anything is read."""

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.config.schema import Experiment, SourceSettings
from align.data.forms import read_source_rows
from align.data.quality.rows import texts_in
from align.runs.folder import folder_of
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.seeds import seed_for
from policies.errors import UserError
from policies.files.made_base import make_config, train_tokenizer, write_base
from policies.files.safe_reading import read_object
from policies.schema import TokenizerSettings

ORIGIN = "made.json"
"""The file in the folder of a made base that says what it was made of."""


def make_base(experiment: Experiment) -> None:
    """Make the base model at `model.path` where the settings describe one and it is not there yet.

    Raises:
        UserError: There is another model at this path; there are no texts; or no such model can be made.
    """
    if experiment.model.architecture is None:
        return
    folder = Path(experiment.model.path)
    texts = _texts(experiment)
    with _locked(folder):
        if folder.exists():
            _check_origin(folder, _origin(experiment, texts))
            return
        with new_folder(folder) as temporary:
            _write(experiment, texts, temporary, with_weights=True)


@contextmanager
def planned_base(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment with a base model that a plan can read, within the block.

    Where the base is not made yet, its tokenizer and its configuration are in a temporary folder. Its weights are there
    too where a run exists, whose base they are compared with.

    Raises:
        UserError: As for `make_base`.
    """
    if experiment.model.architecture is None:
        yield experiment
        return
    texts = _texts(experiment)
    folder = Path(experiment.model.path)
    if folder.exists():
        _check_origin(folder, _origin(experiment, texts))
        yield experiment
        return
    with tempfile.TemporaryDirectory() as temporary:
        _write(experiment, texts, Path(temporary), with_weights=folder_of(experiment).fingerprint.is_file())
        model = experiment.model.model_copy(update={"path": temporary})
        yield experiment.model_copy(update={"model": model})


def _write(experiment: Experiment, texts: list[str], folder: Path, with_weights: bool) -> None:
    architecture = experiment.model.architecture
    assert architecture is not None
    tokenizer = train_tokenizer(texts, _tokenizer_settings(experiment))
    config = make_config(architecture, tokenizer)
    write_base(folder, tokenizer, config, seed_for(experiment.seed, "base model"), with_weights)
    write_json(folder / ORIGIN, _origin(experiment, texts))


def _tokenizer_settings(experiment: Experiment) -> TokenizerSettings:
    return experiment.model.tokenizer or TokenizerSettings()


def _texts(experiment: Experiment) -> list[str]:
    """The texts of all demonstrations that SFT trains on, in order."""
    data = experiment.data
    sources: list[SourceSettings] = list(data.mixture.values())
    if data.demonstrations is not None:
        sources.append(data.demonstrations)
    if not sources:
        raise UserError("model.architecture: the tokenizer is trained on the texts of data.demonstrations: set it")
    texts: list[str] = []
    for source in sources:
        for row in read_source_rows(source, "demonstrations"):
            texts += texts_of_row(row.values)
    if not texts:
        raise UserError("model.architecture: the rows of data.demonstrations have no texts to train a tokenizer on")
    return texts


def texts_of_row(values: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row of demonstrations: of `text`, `prompt` and `completion`, and the contents of messages."""
    for name in ("prompt", "messages", "completion", "text"):
        yield from texts_in(values.get(name))


def _origin(experiment: Experiment, texts: list[str]) -> dict[str, Any]:
    """What a base is made of."""
    digest = hashlib.blake2b(digest_size=32)
    for text in texts:
        digest.update(repr(text).encode())
    return {
        "architecture": dict(experiment.model.architecture or {}),
        "tokenizer": _tokenizer_settings(experiment).model_dump(mode="json"),
        "seed": experiment.seed,
        "texts": digest.hexdigest(),
    }


ORIGIN_PARTS = {
    "architecture": "model.architecture",
    "tokenizer": "model.tokenizer",
    "seed": "seed",
    "texts": "the texts of data.demonstrations",
}
"""The parts of an origin, as people know them."""


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raise UserError where a folder holds a base that was made of something else, or that was not made."""
    file = folder / ORIGIN
    if not file.is_file():
        raise UserError(
            f"model.path: {folder} is there already, and is not a base made by model.architecture: name a new folder, "
            "or remove model.architecture to start from this model"
        )
    made_of = read_object(file)
    for part, value in origin.items():
        if made_of.get(part) != value:
            raise UserError(
                f"model.path: {folder} holds a base that was made with another value of {ORIGIN_PARTS[part]}: name "
                "another folder, remove this one, or remove model.architecture to start from it as it is"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("a")
    except OSError as error:
        raise UserError(f"model.path: {folder} cannot be made: {error.strerror}: choose another folder") from None
    with lock as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
