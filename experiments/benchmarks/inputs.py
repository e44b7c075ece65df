"""The arguments that all benchmarks share, and one message where a model or data are missing."""

import argparse
import os
from pathlib import Path


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model, whose default is the environment variable ALIGN_MODEL."""
    parser.add_argument(
        "--model",
        type=Path,
        default=os.environ.get("ALIGN_MODEL") or None,
        help="folder of a causal language model with its tokenizer; default: $ALIGN_MODEL",
    )


def require_model(parser: argparse.ArgumentParser, model: Path | None) -> None:
    """Exit with status 2 and a message unless the model's folder exists."""
    if model is None:
        parser.error("a model is needed: give the folder of a causal language model as --model or as ALIGN_MODEL")
    require_paths(parser, model)


def require_paths(parser: argparse.ArgumentParser, *paths: Path) -> None:
    """Exit with status 2 and a message if one of the files or folders does not exist."""
    for path in paths:
        if not path.exists():
            parser.error(f"{path} does not exist")
