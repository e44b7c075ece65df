"""Machines made of Linux namespaces, and Ray nodes on them.

Each has a network, processes, temporary files and a host name of its own. All of it ends with its first process, and
that one with the process that has started it.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
PORT = 6379
PORT_TO_OTHER = "port0"
NAMESPACES = ("--net", "--mount", "--uts", "--pid")
HOME = "/tmp/home"
CACHE = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HOME": HOME,
    "XDG_CACHE_HOME": str(CACHE),  # compiled kernels
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "COLUMNS": "200",
}

SET_UP = """
set -e
name=$1 address=$2 work=$3
shift 3
hostname "$name"
ip link set lo up
ip link add link0 type bridge
ip address add "$address/24" dev link0
ip link set link0 up
mount -t tmpfs tmpfs /mnt
number=0
for folder; do
    number=$((number + 1))
    mkdir "/mnt/$number"
    mount --bind "$folder" "/mnt/$number"
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$work"
mount -t tmpfs tmpfs /tmp
number=0
for folder; do
    number=$((number + 1))
    mkdir -p "$folder"
    mount --bind "/mnt/$number" "$folder"
done
umount -R -l /mnt
mkdir -p "$work" "$HOME"
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$name" > /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
echo ready
cat > /dev/null
"""
"""The first process of a machine, as Debian sets one up: the host name resolves to 127.0.1.1. It ends with its input.

Its address is on a bridge, and stays where the other machine is gone. Arguments: the host name; the address; the
working folder, which is empty on this machine unless it is among the following; and the folders that the machine shares
with this one, which /tmp may contain.
"""


def why_no_machines() -> str | None:
    """Why no machines can be made here; None where they can."""
    if os.geteuid() != 0:
        return "namespaces are for root"
    attempt = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    return attempt.stderr.strip() or "unshare fails" if attempt.returncode else None


@dataclass
class Machine:
    """A machine.

    Attributes:
        name: Its host name.
        address: Its address.
        work: The working folder of its commands.
        shared: The folders that it shares with this machine.
    """

    name: str
    address: str
    work: Path
    shared: Sequence[Path]
    first_process: int = field(init=False, default=0)
    _holder: "subprocess.Popen[str] | None" = field(init=False, default=None)

    def start(self) -> None:
        folders = map(str, (REPOSITORY, sys.prefix, *self.shared))
        line = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        holder = self._holder = subprocess.Popen(
            [*line, "bash", "-c", SET_UP, "bash", self.name, self.address, str(self.work), *folders],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        self.first_process = psutil.Process(holder.pid).children()[0].pid

    def popen(self, *command: object, **environment: str) -> "subprocess.Popen[str]":
        """Start a command on this machine."""
        enter = ["nsenter", "--target", str(self.first_process), *NAMESPACES, f"--wd={self.work}"]
        return subprocess.Popen(
            [*enter, *map(str, command)],
            env=ENVIRONMENT | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: object, **environment: str) -> str:
        """Run a command on this machine to its end. Gives what it wrote."""
        process = self.popen(*command, **environment)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, f"{command}: {output}{errors}"
        return output

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes whose names contain this."""
        space = os.readlink(f"/proc/{self.first_process}/ns/pid")
        every = psutil.process_iter(["name"])
        return [process for process in every if name in process.info["name"] and _is_in(process, space)]

    def set_link(self, state: str) -> None:
        """Set its link to the other machine `up` or `down`."""
        self.run("ip", "link", "set", PORT_TO_OTHER, state)

    def end(self) -> None:
        """Kill all its processes, and wait for the last. Without effect where it has not been started."""
        if self._holder is None:
            return
        self._holder.kill()
        self._holder.communicate()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.first_process).wait(timeout=60)


def _is_in(process: psutil.Process, space: str) -> bool:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid") == space
    except OSError:
        return False


def connect(first: Machine, second: Machine) -> None:
    """Link two machines."""
    enter = ["nsenter", "--target", str(first.first_process), "--net"]
    # The end of a machine removes its link, but not at once.
    subprocess.run([*enter, "ip", "link", "delete", PORT_TO_OTHER], capture_output=True, check=False)
    peer = ["peer", "name", PORT_TO_OTHER, "netns", str(second.first_process)]
    subprocess.run([*enter, "ip", "link", "add", PORT_TO_OTHER, "type", "veth", *peer], check=True)
    for machine in (first, second):
        machine.run("ip", "link", "set", PORT_TO_OTHER, "master", "link0")
        machine.set_link("up")


def start_ray(machine: Machine, *options: object, **environment: str) -> None:
    """Start a Ray node."""
    line = ["ray", "start", "--node-ip-address", machine.address, "--object-store-memory", 100_000_000, *options]
    machine.run(*line, **environment)
