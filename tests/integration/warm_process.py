"""Runs `align` many times without importing it many times: a process that has imported everything forks for each run.

It reads one JSON object a line from standard input, and answers each with the exit status of its run. It imports, but
computes nothing before it forks, so that no thread of torch's exists in it.
"""

import ctypes
import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

IMPORTED = (
    "align.cli",
    "align.learner.ray_ranks",
    "align.report.page",
    "align.resources.plan",
    "align.runtime.last_words",
    "align.stages.launch",
    "align.stages.ppo",
    "align.stages.reward",
    "align.stages.sft",
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "matplotlib.backends.backend_agg",
    "peft.tuners.lora.bnb",
    "policies.methods.lora_trunk",
    "rollouts.ray_pool",
    "transformers.trainer",
)
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # some of the imports print
    for name in IMPORTED:
        import_module(name)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed run leaves behind becomes our child
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            run(job)
            return
        _, status = os.waitpid(child, 0)
        end_orphans()
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(job: dict[str, Any]) -> None:
    """Run a command. `folder`: where; `watched`: the folder whose writes are counted; `kill_at`: the fatal one."""
    os.chdir(job["folder"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    watched = str(Path(job["watched"]).resolve()).encode()
    ctypes.CDLL(None).watch_folder(watched, ctypes.c_long(job["kill_at"]), log)
    sys.argv = ["align", *job["arguments"]]
    import_module("align.cli").main()


def end_orphans() -> None:
    """End the processes of a run that was killed, such as Ray's."""
    orphans = psutil.Process().children(recursive=True)
    for process in orphans:
        process.kill()
    psutil.wait_procs(orphans)


if __name__ == "__main__":
    main()
