"""Damaged checkpoints: skipped with a warning, or refused with a UserError; never unpickled."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from align.config.ppo_settings import CriticSettings
from align.config.schema import SftSettings
from align.learner.files import read_states
from align.learner.group import LocalRank
from align.ppo.checkpoint import read_pending, read_progress, trained_roles
from align.runs.checkpoint import MANIFEST, checkpoints, latest, seal
from align.supervised.fit import restore
from align.supervised.learner import SupervisedLearner, SupervisedLearners
from align.supervised.sft_objective import SftBlueprint
from policies.errors import UserError
from policies.schema import ModelSettings, PolicySettings
from rewards.schema import FitSettings
from tests.fuzz.harm import altered, confined, damaged, odd_value, refusal, run

POLICY = PolicySettings(rank=2, alpha=4)
Read = Callable[[Path], None]


def read_ppo(checkpoint: Path) -> None:
    """Read everything that PPO reads from a checkpoint."""
    progress = read_progress(checkpoint, {})
    read_states(checkpoint, POLICY, *trained_roles(CriticSettings()), ranks=0)
    if len(progress.pending) < 9:
        read_pending(checkpoint, POLICY, progress)


@pytest.fixture(scope="module")
def read_sft(tiny_model: Path) -> Iterator[Read]:
    """Reads everything that SFT reads from a checkpoint, into a learner."""
    objective = SftBlueprint(ModelSettings(path=str(tiny_model)), POLICY, 0, [], [], SftSettings())
    ranks = LocalRank(lambda: SupervisedLearner(objective.build(), FitSettings(), zero=0, seed=0))
    learners = SupervisedLearners(ranks)

    def read(checkpoint: Path) -> None:
        restore(learners, checkpoint, POLICY)

    yield read
    ranks.close()


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@st.composite
def harms(draw: st.DrawFn, names: list[str], contents: dict[str, bytes]) -> list[tuple[str, Any]]:
    """Kinds and arguments of what is done to a checkpoint, in order; `seal` writes a manifest that matches."""
    steps: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(names))
        how = draw(st.sampled_from(["bytes", "bytes", "json", "remove", "add", "pickle", "link", "folder"]))
        if how == "bytes":
            steps.append(("write", (name, draw(damaged(contents[name])))))
        elif how == "json":
            name = draw(st.sampled_from([name for name in names if name.endswith(".json")]))
            tree = draw(altered(json.loads(contents[name]), odd_value))
            steps.append(("write", (name, json.dumps(tree).encode())))
        elif how == "add":
            extra = draw(st.sampled_from(["scaler.pt", "optimizer.pt", "training_args.bin", "deep/x", ".hidden", "é"]))
            steps.append(("pickle", extra))
        else:
            steps.append((how, name))
    if draw(st.booleans()):
        steps.append(("seal", None))
    elif draw(st.booleans()):
        steps.append(("manifest", draw(manifests(json.loads(contents[MANIFEST])))))
    return steps


@st.composite
def manifests(draw: st.DrawFn, manifest: dict[str, Any]) -> bytes:
    """A manifest with wrong entries."""
    files = manifest["files"]
    facts = files[draw(st.sampled_from(sorted(files)))]
    how = draw(st.sampled_from(["outside", "absolute", "size", "altered", "bytes"]))
    if how == "outside":
        files["../../../config.yaml"] = facts
    elif how == "absolute":
        files["/etc/hostname"] = facts
    elif how == "size":
        facts["size"] = draw(st.sampled_from([0, -1, 10**30, "1", None]))
    elif how == "altered":
        manifest = draw(altered(manifest, odd_value))
    content = json.dumps(manifest).encode()
    return draw(damaged(content)) if how == "bytes" else content


def name_of(what: Any) -> str:
    """The file that a step of damage is about."""
    if isinstance(what, str):
        return what
    return str(what[0]) if isinstance(what, tuple) else MANIFEST


def make_room(path: Path) -> None:
    """Remove what is at a path, and create the folder that it is in."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)


def harm(checkpoint: Path, steps: list[tuple[str, Any]], marker: Path) -> None:
    """Damage a checkpoint in these steps."""
    for how, what in steps:
        path = checkpoint / name_of(what)
        if how == "seal":
            if path.is_dir():
                path.rmdir()
            seal(checkpoint)
            continue
        make_room(path)
        if how == "write":
            path.write_bytes(what[1])
        elif how == "manifest":
            path.write_bytes(what)
        elif how == "pickle":
            path.write_bytes(pickle.dumps(Planted(marker)))
        elif how == "link":
            path.symlink_to("/etc/hostname")
        elif how == "folder":
            path.mkdir()


def contents_of(checkpoint: Path) -> dict[str, bytes]:
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in sorted(checkpoint.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("examples", [60, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_damaged_checkpoint_is_skipped_or_refused(
    finished: Path,
    tmp_path: Path,
    read_sft: Read,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    examples: int,
) -> None:
    older, newer = checkpoints(finished / "checkpoints" / stage)
    before = contents_of(newer)
    read = read_ppo if stage == "ppo" else read_sft
    read(newer)
    marker = tmp_path / "marker"
    copy = tmp_path / "copy"
    caplog.set_level(logging.WARNING)

    def check(steps: list[tuple[str, Any]]) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        for checkpoint in (older, newer):
            shutil.copytree(checkpoint, copy / checkpoint.name)
        harm(copy / newer.name, steps, marker)
        caplog.clear()
        with confined(copy):
            last = latest(copy)
            assert last is not None
            if last.name == older.name:
                assert newer.name in caplog.text
                return
            if steps[-1][0] != "seal":  # a checkpoint that matches its original manifest is unchanged
                assert contents_of(last) | {MANIFEST: b""} == before | {MANIFEST: b""}
            message = refusal(lambda: read(last))
            assert message is None or str(last) in message
        assert not marker.exists()

    run(check, harms(sorted(before), before), examples)


def test_a_manifest_cannot_name_a_file_elsewhere(finished: Path, tmp_path: Path) -> None:
    """Not even one with the size and hash that it states."""
    outside = tmp_path / "copy" / "outside"
    checkpoint = Path(shutil.copytree(checkpoints(finished / "checkpoints" / "ppo")[-1], tmp_path / "copy" / "step-3"))
    shutil.copy(checkpoint / "state.json", outside)
    for name in ("../outside", str(outside)):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        manifest["files"][name] = manifest["files"]["state.json"]
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"step-3: .*outside is missing"):
            latest(tmp_path / "copy")
        del manifest["files"][name]


def test_a_link_in_a_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoints(finished / "checkpoints" / "ppo")[-1], tmp_path / "copy" / "step-3"))
    (checkpoint / "state.json").rename(tmp_path / "state.json")
    (checkpoint / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"state\.json is neither a file nor a folder"):
        latest(tmp_path / "copy")


def test_folders_that_are_not_checkpoints_are_ignored(finished: Path, tmp_path: Path) -> None:
    real = checkpoints(finished / "checkpoints" / "ppo")[-1]
    shutil.copytree(real, tmp_path / "step-3")
    for name in ("step-", "step-x", "step--4", "step-1e9", "step-٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-8").write_text("a file")
    (tmp_path / "step-9").symlink_to(real)
    assert checkpoints(tmp_path) == [tmp_path / "step-3"]
    assert latest(tmp_path) == tmp_path / "step-3"
