"""Turns off progress bars and notices of libraries, which would bury those of align."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence the libraries; to be called before transformers and DeepSpeed are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A filter, because DeepSpeed sets the level of its logger on import.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # On a CPU with bfloat16 it looks for a package of kernels that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
