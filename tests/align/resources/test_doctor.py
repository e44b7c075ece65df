"""`align doctor` in child processes whose environment lacks what it looks for."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from align.resources.doctor.checks import Check, all_checks, run_check, run_checks
from align.resources.doctor.finding import Finding, ok
from align.resources.doctor.hardware import cpu_quota
from align.resources.doctor.report import findings_record, findings_table
from align.resources.ray_cluster import LONGEST_TMPDIR
from tests.documents import ROOT, parse_align, setting_exists

PACKAGE = ROOT / "align" / "resources" / "doctor"
COMMAND = """
import sys
from align.resources.doctor import checks
every_check = checks.all_checks
only = sys.argv[1]
if only:
    checks.all_checks = lambda *arguments: [check for check in every_check(*arguments) if check.name == only]
sys.argv = ["align", "doctor", *sys.argv[2:]]
from align.cli import main
main()
"""
"""The command, with the one check that its first argument names; with all where it is empty."""
NAMES = {check.name for check in all_checks("runs", "address")}


def doctor(folder: Path, only: str, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command, or one of its checks, in a folder, with changes of the environment; None: without a variable."""
    first = changes.pop("PYTHONPATH", None)
    environment = os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{ROOT}" if first else str(ROOT), "COLUMNS": "80"}
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, only, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def finding(folder: Path, only: str, status: int, *arguments: str, **changes: str | None) -> Finding:
    """What one check finds, where the command ends with this exit status."""
    ended = doctor(folder, only, "--json", *arguments, **changes)
    assert ended.returncode == status, ended.stdout + ended.stderr
    (check,) = json.loads(ended.stdout)["checks"]
    assert check.pop("name") == only
    return Finding(**check)


def package(folder: Path, name: str, version: str, code: str | None = None) -> str:
    """Make an installed package in a folder; with code, one that can be imported."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    return str(folder)


@pytest.mark.timeout(900)  # it imports everything that runs import, in several processes
def test_a_healthy_machine_has_no_problem(tmp_path: Path) -> None:
    ended = doctor(tmp_path, "", "--json")
    assert ended.returncode == 0, ended.stdout
    report = json.loads(ended.stdout)
    assert report["healthy"]
    assert [check["name"] for check in report["checks"]] == [check.name for check in all_checks("runs", None)]
    for check in report["checks"]:
        assert check["state"] in ("ok", "warning")
        assert (check["cure"] is None) == (check["state"] == "ok")
    assert not list(tmp_path.iterdir())


def test_libraries_that_cannot_be_imported_are_findings_and_end_no_check(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "ray", "vllm", "wandb", "huggingface_hub"):
        package(tmp_path / "broken", name, "99.0", f"raise ImportError('lib{name}.so is missing')")
    ended = doctor(tmp_path, "", PYTHONPATH=str(tmp_path / "broken"))
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(re.findall(r"^(?:problem|warning|ok) ", ended.stdout, re.MULTILINE)) == len(NAMES) - 1
    found = " ".join(ended.stdout.split())
    assert "problem imports torch cannot be imported: ImportError: libtorch.so is missing" in found
    assert "→ pip install --force-reinstall 'torch>=2.13'" in found
    for name in ("vllm", "torch", "wandb", "huggingface_hub"):
        assert f"lib{name}.so is missing" in found
    assert "Traceback" not in ended.stdout + ended.stderr


def test_without_a_compiler_the_cure_is_one(tmp_path: Path) -> None:
    found = finding(tmp_path, "kernels", 1, PATH=str(tmp_path), CXX="")
    assert found.found.startswith("no C++ compiler: there is no c++ on PATH")
    assert found.cure == "install g++ (Debian and Ubuntu: apt install g++), or set CXX to a C++17 compiler with OpenMP"
    found = finding(tmp_path, "kernels", 1, CXX="no-such-compiler")
    assert found.found.startswith("no C++ compiler: there is no no-such-compiler on PATH")


def test_the_error_of_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho note >&2\necho 'error: no OpenMP' >&2\nexit 1\n")
    compiler.chmod(0o755)
    found = finding(tmp_path, "kernels", 1, CXX=str(compiler))
    assert found.found.startswith(f"{compiler} cannot compile the kernels: error: no OpenMP")
    assert found.cure is not None


def test_a_package_outside_the_tested_versions_is_told_with_the_command_that_installs_one(tmp_path: Path) -> None:
    found = finding(tmp_path, "packages", 1, PYTHONPATH=package(tmp_path / "old", "torch", "2.9.0"))
    assert found == Finding("problem", "torch is 2.9.0, tested: >=2.13", "pip install 'torch>=2.13'")


def test_a_package_of_an_extra_is_compared_with_the_tested_versions_too(tmp_path: Path) -> None:
    found = finding(tmp_path, "optional packages", 1, PYTHONPATH=package(tmp_path, "bitsandbytes", "0.1"))
    assert found.state == "problem"
    assert found.cure is not None
    assert found.cure.startswith("pip install 'bitsandbytes>=")


def test_packages_that_align_requires_are_looked_up_in_its_own_metadata(tmp_path: Path) -> None:
    package(tmp_path, "align-rlhf", "0.2.0")
    with (tmp_path / "align_rlhf-0.2.0.dist-info" / "METADATA").open("a") as file:
        file.write("Requires-Python: >=3.99\nRequires-Dist: no-such-package[x]>=3\nProvides-Extra: later\n")
        file.write("Requires-Dist: another-package>=1; extra == 'later'\n")
    missing = finding(tmp_path, "packages", 1, PYTHONPATH=str(tmp_path))
    assert missing == Finding("problem", "no-such-package is not installed", "pip install 'no-such-package[x]>=3'")
    python = finding(tmp_path, "Python", 1, PYTHONPATH=str(tmp_path))
    assert python.cure == "install align in an environment of a Python >=3.99"
    optional = finding(tmp_path, "optional packages", 0, PYTHONPATH=str(tmp_path))
    assert "another-package (pip install 'align-rlhf[later]')" in optional.found


def test_a_torchvision_of_another_torch_is_to_be_removed(tmp_path: Path) -> None:
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    found = finding(tmp_path, "imports", 1, PYTHONPATH=package(tmp_path, "torch", "2.13.0", code))
    assert found.cure is not None
    assert found.cure.startswith("pip uninstall torchvision")


@pytest.mark.parametrize("runs", ["file", "file/runs", "/proc/runs"])
def test_a_folder_for_runs_that_cannot_be_written_is_told(runs: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = finding(tmp_path, "folder of runs", 1, "--runs", runs)
    assert found.found.startswith(f"nothing can be written in {tmp_path / runs}: ")
    assert found.cure == "set `runs` to a folder that can be written: align run EXPERIMENT runs=FOLDER"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_for_runs_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    assert "Permission denied" in finding(tmp_path, "folder of runs", 1).found


def test_a_temporary_folder_or_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "x")
    for check, variable in (("temporary files", "TMPDIR"), ("caches", "XDG_CACHE_HOME"), ("caches", "HF_HOME")):
        found = finding(tmp_path, check, 0, **{variable: nowhere})
        assert found.state == "warning"
        assert nowhere in found.found
        assert found.cure == f"set {variable} to a folder that can be written"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_an_address_where_no_cluster_listens_is_told(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    found = finding(tmp_path, "cluster", 1, "--address", address)
    assert found.found == f"cluster.address {address} cannot be reached: [Errno 111] Connection refused"
    assert found.cure == "set it to the address of the cluster's head, which `ray start --head` prints"


HEAD = """
import ray, sys
from align.config.schema import ClusterSettings
from align.resources.ray_cluster import head_address, ray_cluster
with ray_cluster(ClusterSettings(), cpus=1):
    print(head_address(ClusterSettings()), flush=True)
    sys.stdin.read()
"""
OPEN = {"RAY_AUTH_MODE": "disabled"}


@contextmanager
def cluster(folder: Path, python_path: str) -> Iterator[str]:
    """The address of a cluster of one node whose workers import from a path."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", HEAD],
        cwd=folder,
        env=os.environ | OPEN | {"PYTHONPATH": python_path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as head:
        assert head.stdin is not None
        assert head.stdout is not None
        try:
            yield head.stdout.readline().strip()
        finally:
            head.stdin.close()


@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes start or join a cluster
def test_the_nodes_of_a_cluster_are_compared_with_this_machine(tmp_path: Path) -> None:
    other = package(tmp_path / "other", "wandb", "0.1")
    with cluster(tmp_path, f"{other}{os.pathsep}{ROOT}") as address:
        different = finding(tmp_path, "cluster", 1, "--address", address, **OPEN)
        same = finding(tmp_path, "cluster", 0, "--address", address, **OPEN, PYTHONPATH=other)
    node = address.partition(":")[0]
    cores = len(os.sched_getaffinity(0))
    assert different.found.startswith(f"1 node: {node} ({cores} CPU")
    assert f"On {node}, wandb is 0.1 (" in different.found
    assert different.cure == f"install the same packages on {node} as here"
    assert same.state == "ok"


def why_no_mounts() -> str | None:
    """Why this process cannot change what is mounted for a child; None where it can."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "mounts are for root"
    attempt = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return attempt.stderr.strip() or "unshare fails" if attempt.returncode else None


def mounted(script: str, folder: Path, only: str = "Ray") -> Finding:
    """What a check finds where a shell script has changed what is mounted."""
    line = f'set -e; {script}\nexec "$@"'
    ended = subprocess.run(
        ["unshare", "--mount", "bash", "-c", line, "bash", sys.executable, "-P", "-c", COMMAND, only, "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout, ended.stderr
    (check,) = json.loads(ended.stdout)["checks"]
    assert ended.returncode == int(check["state"] == "problem")
    del check["name"]
    return Finding(**check)


@pytest.mark.skipif(why_no_mounts() is not None, reason=str(why_no_mounts()))
def test_ray_without_shared_memory_is_told(tmp_path: Path) -> None:
    found = mounted("mount -t tmpfs -o ro tmpfs /dev/shm", tmp_path)
    assert found == Finding(
        "problem",
        "nothing can be written in /dev/shm, without which Ray does not start",
        "mount -t tmpfs tmpfs /dev/shm; in a container: docker run --shm-size",
    )


@pytest.mark.skipif(why_no_mounts() is not None, reason=str(why_no_mounts()))
def test_ray_without_a_folder_for_sockets_is_told(tmp_path: Path) -> None:
    long = f"/mnt/{'x' * 100}"
    script = f"mount -t tmpfs tmpfs /mnt; mkdir {long}; export TMPDIR={long}"
    for folder in ("/tmp", "/var/tmp"):
        script += f"; mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}"
    found = mounted(script, tmp_path)
    assert found.found.startswith(f"TMPDIR {long} is too long a path for Ray's sockets, and /tmp and /var/tmp cannot")
    assert found.cure == f"set TMPDIR to a folder whose path has at most {LONGEST_TMPDIR} bytes"


@pytest.mark.slow
@pytest.mark.skipif(why_no_mounts() is not None, reason=str(why_no_mounts()))
def test_little_shared_memory_is_a_warning(tmp_path: Path) -> None:
    found = mounted("mount -t tmpfs -o size=64m tmpfs /dev/shm", tmp_path)
    assert found.state == "warning"
    assert found.found == "/dev/shm has 0.067 GB free, so Ray keeps objects in files, which is slow"


@pytest.mark.skipif(why_no_mounts() is not None, reason=str(why_no_mounts()))
def test_little_space_for_temporary_files_is_a_warning(tmp_path: Path) -> None:
    script = "mount -t tmpfs -o size=90m tmpfs /mnt; export TMPDIR=/mnt"
    found = mounted(script, tmp_path, "temporary files")
    cure = "free space there, or set TMPDIR to a folder with more"
    assert found == Finding("warning", "/mnt: only 0.09 GB are free", cure)


def test_ray_without_a_home_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = finding(tmp_path, "Ray", 1, HOME=str(tmp_path / "file"))
    assert found.found.startswith("Ray does not start: ")
    assert found.cure is not None
    assert found.cure.startswith("set HOME and TMPDIR")


def test_a_file_that_hides_a_package_from_rays_workers_is_told(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    found = finding(tmp_path, "names of files", 1)
    assert found.found.startswith(f"{tmp_path / 'rewards.py'} hides the package `rewards`")
    assert found.cure == "rename it, and start Python again"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA here")
def test_a_torch_for_cpus_beside_a_driver_is_a_warning(tmp_path: Path) -> None:
    """The driver is simulated."""
    command = tmp_path / "nvidia-smi"
    command.touch(mode=0o755)
    found = finding(tmp_path, "device", 0, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert found.state == "warning"
    assert "is a build for CPUs" in found.found
    assert found.cure is not None
    assert found.cure.startswith(f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]} ")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_cores_of_a_container_are_those_of_its_control_group(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == expected


class _Answer(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_servers_that_answer_and_servers_that_do_not_are_told_apart(tmp_path: Path) -> None:
    key = {"WANDB_MODE": None, "WANDB_API_KEY": "0" * 40, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        hub = finding(tmp_path, "hub", 0, HF_ENDPOINT=address, **key)
        wandb = finding(tmp_path, "W&B", 0, WANDB_BASE_URL=address, **key)
    finally:
        server.shutdown()
        server.server_close()
    assert hub == ok(f"{address} answers")
    assert wandb == ok(f"runs are tracked online: there is an API key, and {address} answers")
    hub = finding(tmp_path, "hub", 0, HF_ENDPOINT=address, **key)
    wandb = finding(tmp_path, "W&B", 0, WANDB_BASE_URL=address, **key)
    assert hub.state == wandb.state == "warning"
    assert hub.found.startswith(f"{address}: it cannot be reached; needed only for")
    assert wandb.found == f"there is an API key, but {address}: it cannot be reached; runs are tracked offline"


def test_a_server_that_accepts_and_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = finding(tmp_path, "hub", 0, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")
    assert found.found.startswith(f"{address}: no answer within 5 s")


def test_without_a_key_or_online_nothing_is_to_be_mended(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "NETRC": str(tmp_path / "none")}
    assert "no API key" in finding(tmp_path, "W&B", 0, **home, WANDB_MODE=None).found
    assert finding(tmp_path, "W&B", 0, WANDB_MODE="offline") == ok("runs are tracked offline, as WANDB_MODE says")
    assert finding(tmp_path, "hub", 0, HF_HUB_OFFLINE="1").state == "ok"


def test_online_without_a_key_is_a_problem(tmp_path: Path) -> None:
    nowhere = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "NETRC": str(tmp_path / "none")}
    found = finding(tmp_path, "W&B", 1, **nowhere, WANDB_MODE="online")
    assert found.cure == "wandb login, or set WANDB_MODE to offline"


def test_a_setting_of_wandb_that_is_not_valid_is_told(tmp_path: Path) -> None:
    found = finding(tmp_path, "W&B", 1, WANDB_MODE="onlin")
    assert found.found.startswith("W&B cannot start: ")
    assert "mode Input should be 'online', 'offline'" in found.found


MISBEHAVING = """
import os, signal, sys, threading, time
from align.resources.doctor.finding import ok


def crashes():
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            open("cleaned-up", "w").close()
            raise


def raises():
    raise ValueError("first line\\nsecond line")


def exits():
    sys.exit(3)


def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("a library's notice")
    return ok("done")
"""


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("crashes", Finding("problem", "ended by SIGSEGV: about to crash", "the cure")),
        ("hangs", Finding("problem", "no result within 2 s", "the cure")),
        ("raises", Finding("problem", "ValueError: first line", "the cure")),
        ("exits", Finding("problem", "exit status 3", "the cure")),
        ("leaves_a_thread", ok("done")),
    ],
)
def test_a_check_that_fails_is_a_problem_with_a_cure(
    function: str, expected: Finding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = __import__("misbehaving")
    check = Check("name", getattr(module, function), seconds=2 if function == "hangs" else 60, cure="the cure")
    assert run_check(check) == expected
    assert (tmp_path / "cleaned-up").exists() == (function == "hangs")


def test_checks_keep_their_order_and_the_table_has_problems_first(tmp_path: Path) -> None:
    checks = [check for check in all_checks(str(tmp_path), None) if check.name in ("Python", "folder of runs")]
    assert list(run_checks(checks)) == ["Python", "folder of runs"]
    findings = {
        "first": ok("good [red]"),
        "second": Finding("warning", "slow", "be quick"),
        "third": Finding("problem", "bad", "be good"),
    }
    table = findings_table(findings)
    assert table.title == "3 checks: 1 problem and 1 warning"
    assert [str(cell) for cell in table.columns[1].cells] == ["third", "second", "first"]
    assert [str(cell) for cell in table.columns[2].cells] == ["bad\n→ be good", "slow\n→ be quick", "good [red]"]
    assert findings_record(findings)["healthy"] is False


def cures() -> list[str]:
    """Every text of the checks but docstrings; what an f-string inserts is X."""
    texts: list[str] = []
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts |= {id(value) for value in node.values}
                texts.append("".join(_text(value) for value in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
                texts.append(node.value)
    return texts


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "X"


def test_the_document_lists_every_check() -> None:
    table = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8").partition("| check |")[2]
    names = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert names == [check.name for check in all_checks("runs", "address")]


COMMANDS = re.compile(r"(?:^|[`:] ?)align ([a-z]+ [^`]+)")
SETTINGS = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)*)=[^=]|`([a-z_]+)` (?:to|of)\b|\bset ([a-z_]+\.[a-z_]+) to")


def test_commands_and_settings_that_a_cure_names_exist() -> None:
    commands: list[str] = []
    settings: set[str] = set()
    for text in cures():
        commands += COMMANDS.findall(text)
        for groups in SETTINGS.findall(text):
            settings |= {group for group in groups if group}
    assert commands
    assert {"runs", "cluster.threads", "cluster.address", "tracking.wandb"} <= settings
    for command in commands:
        parse_align(command.split())
    for setting in settings:
        assert setting_exists(setting), setting
