"""The program of a child interpreter, which runs one check and writes its finding to standard output as JSON.

It imports nothing of align before it has the path of the process that has started it.
"""

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module


def run_and_reply(module: str, function: str, arguments: list[str]) -> None:
    """Run a check; what libraries write to standard output goes to standard error.

    Args:
        module: The module of the check.
        function: Its name there.
        arguments: What it takes.
    """
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from align.runtime.quiet import quiet_libraries
    from policies.errors import first_line

    quiet_libraries()
    try:
        outcome = asdict(getattr(import_module(module), function)(*arguments))
    except Exception as error:
        outcome = {"failure": f"{type(error).__name__}: {first_line(error)}"}
    with reply:
        json.dump(outcome, reply)
    sys.stderr.flush()
    os._exit(0)  # libraries may have left threads behind, for which Python would wait


if __name__ == "__main__":
    setup = json.loads(sys.argv[1])
    sys.path[:] = setup["path"]
    run_and_reply(setup["module"], setup["function"], setup["arguments"])
