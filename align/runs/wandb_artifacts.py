"""The products of a run as artifacts of W&B."""

import os
import shutil
from pathlib import Path
from typing import Any

from align.runs.sink import RunProduct

MAX_SENT_BYTES = 200e6
"""The size of a product above which its files stay where they are, and W&B gets their names and checksums."""


def artifact_of(product: RunProduct, folder: Path) -> Any:
    """The artifact of a product.

    W&B reads the files when it sends them, which may be days later with `wandb sync`. So it is given links to them,
    which stay as they are if the run replaces its files.

    Args:
        product: The product.
        folder: Where the links are made, in a folder for each product.
    """
    import wandb

    artifact = wandb.Artifact(product.name, product.kind, metadata=product.metadata)
    if product.size > MAX_SENT_BYTES:
        for name, path in product.files.items():
            artifact.add_reference(path.absolute().as_uri(), name=name)
        return artifact
    for name, path in product.files.items():
        link = (folder / f"{product.name}-{product.version}" / name).absolute()
        _link(path, link)
        artifact.add_file(str(link), name=name, policy="immutable", skip_cache=True)
    return artifact


def _link(path: Path, link: Path) -> None:
    """Make a hard link; a copy where the file system has none."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copy2(path, link)
