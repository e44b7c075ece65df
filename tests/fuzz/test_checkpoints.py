"""Damaged checkpoints: passed over for the one before with a warning, or refused with a UserError; never unpickled."""

import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import get_scheduler

from align.config.schema import CriticSettings
from align.ppo.checkpoint import read_pending, read_progress, read_states
from align.runs.checkpoint import MANIFEST, checkpoints, latest, seal
from align.supervised.trainer import WEIGHTS
from align.supervised.trainer_state import HYPERPARAMETERS, OPTIMIZER, read_optimizer, read_random, read_state
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes, read_tensors
from policies.schema import PolicySettings
from tests.fuzz.harm import altered, confined, damaged, odd_value, refusal, run

POLICY = PolicySettings(rank=2, alpha=4)
Read = Callable[[Path], None]


def read_ppo(checkpoint: Path) -> None:
    """All that PPO reads of a checkpoint."""
    progressed = read_progress(checkpoint, {})
    read_states(checkpoint, POLICY, CriticSettings(), 0)
    if len(progressed.pending) < 9:
        read_pending(checkpoint, POLICY, progressed)


def read_fit(real: Path) -> Read:
    """All that a supervised stage reads of a checkpoint, with an optimizer as that of a real one."""
    weights, moments = load_file(real / WEIGHTS), load_file(real / OPTIMIZER)
    groups = json.loads((real / HYPERPARAMETERS).read_text())["groups"]

    def read(checkpoint: Path) -> None:
        of = [{"params": [torch.zeros_like(moments[f"{n}.exp_avg"]) for n in group["params"]]} for group in groups]
        optimizer = AdamW(of, lr=1.0, fused=True)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=9)
        read_state(checkpoint)
        check_names_and_shapes(read_tensors(checkpoint / WEIGHTS), weights, checkpoint / WEIGHTS)
        read_optimizer(checkpoint, optimizer, scheduler)
        read_random(checkpoint)

    return read


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@st.composite
def harms(draw: st.DrawFn, names: list[str], contents: dict[str, bytes]) -> list[tuple[str, Any]]:
    """What is done to a checkpoint, in order; `seal`: its manifest is made to fit."""
    done: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(names))
        how = draw(st.sampled_from(["bytes", "bytes", "json", "remove", "add", "pickle", "link", "folder"]))
        if how == "bytes":
            done.append(("write", (name, draw(damaged(contents[name])))))
        elif how == "json":
            name = draw(st.sampled_from([name for name in names if name.endswith(".json")]))
            tree = draw(altered(json.loads(contents[name]), odd_value))
            done.append(("write", (name, json.dumps(tree).encode())))
        elif how == "add":
            extra = draw(st.sampled_from(["scaler.pt", "optimizer.pt", "training_args.bin", "deep/x", ".hidden", "é"]))
            done.append(("pickle", extra))
        else:
            done.append((how, name))
    if draw(st.booleans()):
        done.append(("seal", None))
    elif draw(st.booleans()):
        done.append(("manifest", draw(manifests(json.loads(contents[MANIFEST])))))
    return done


@st.composite
def manifests(draw: st.DrawFn, manifest: dict[str, Any]) -> bytes:
    """A manifest that lies."""
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


def harm(checkpoint: Path, done: list[tuple[str, Any]], marker: Path) -> None:
    """Do it."""
    for how, what in done:
        path = checkpoint / (what if isinstance(what, str) else what[0] if isinstance(what, tuple) else MANIFEST)
        if how == "seal":
            if (checkpoint / MANIFEST).is_dir():
                (checkpoint / MANIFEST).rmdir()
            seal(checkpoint)
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
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


@pytest.fixture
def kept_random() -> Any:
    """Random numbers go on afterwards as if no checkpoint had been read."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("examples", [60, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    finished: Path,
    tmp_path: Path,
    kept_random: None,
    caplog: pytest.LogCaptureFixture,
    stage: str,
    examples: int,
) -> None:
    older, newer = checkpoints(finished / "checkpoints" / stage)
    before = contents_of(newer)
    read = read_ppo if stage == "ppo" else read_fit(newer)
    read(newer)
    marker, copy = tmp_path / "marker", tmp_path / "copy"
    caplog.set_level(logging.WARNING)

    def check(done: list[tuple[str, Any]]) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        for checkpoint in (older, newer):
            shutil.copytree(checkpoint, copy / checkpoint.name)
        harm(copy / newer.name, done, marker)
        caplog.clear()
        with confined(copy):
            last = latest(copy)
            assert last is not None
            if last.name == older.name:
                assert newer.name in caplog.text
                return
            if done[-1][0] != "seal":  # what is sound by its own manifest is as it was written
                assert contents_of(last) | {MANIFEST: b""} == before | {MANIFEST: b""}
            said = refusal(lambda: read(last))
            assert said is None or str(last) in said
        assert not marker.exists()

    run(check, harms(sorted(before), before), examples)


def test_a_manifest_names_no_file_elsewhere(finished: Path, tmp_path: Path) -> None:
    """Not even one whose size and hash are as it says."""
    outside = tmp_path / "copy" / "outside"
    checkpoint = Path(shutil.copytree(checkpoints(finished / "checkpoints" / "ppo")[-1], tmp_path / "copy" / "step-3"))
    shutil.copy(checkpoint / "state.json", outside)
    for name in ("../outside", str(outside)):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        manifest["files"][name] = manifest["files"]["state.json"]
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"step-3 lacks .*outside"):
            latest(tmp_path / "copy")
        del manifest["files"][name]


def test_a_link_is_no_file_of_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoints(finished / "checkpoints" / "ppo")[-1], tmp_path / "copy" / "step-3"))
    (checkpoint / "state.json").rename(tmp_path / "state.json")
    (checkpoint / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"state\.json is neither file nor folder"):
        latest(tmp_path / "copy")


def test_folders_that_are_no_checkpoints_are_left_alone(finished: Path, tmp_path: Path) -> None:
    real = checkpoints(finished / "checkpoints" / "ppo")[-1]
    shutil.copytree(real, tmp_path / "step-3")
    for name in ("step-", "step-x", "step--4", "step-1e9", "step-٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-8").write_text("a file")
    (tmp_path / "step-9").symlink_to(real)
    assert checkpoints(tmp_path) == [tmp_path / "step-3"]
    assert latest(tmp_path) == tmp_path / "step-3"
