"""One adapter out of several."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from policies.errors import UserError
from policies.files.adapters import CONFIG, MODEL, WEIGHTS
from policies.files.safe_reading import check_names_and_shapes, read_object, read_tensors

MODEL_CONFIG = "config.json"
KIND = ("peft_type", "model_type")
WHERE = "base_model_name_or_path"
"""What two adapters' files may say otherwise: the base may have been found elsewhere."""


def average_adapters(folders: Sequence[Path], shares: Sequence[float], to: Path) -> None:
    """Write the weighted mean of the parameters of adapters, or whole models, of one kind, and of their heads.

    Meant for adapters that started alike: policies of several seeds from one SFT adapter (Wortsman et al. 2022, "Model
    soups"), members of an ensemble of reward models (Ramé et al. 2024, "WARM"). It is the mean of LoRA's factors, not
    of their products. shares: positive, and scaled here to a sum of 1. Raises UserError where they do not go together.
    """
    first, total = folders[0], sum(shares)
    config = CONFIG if (first / CONFIG).is_file() else MODEL_CONFIG
    kind = read_object(first / config)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    if not {WEIGHTS, MODEL} & {*files}:
        raise UserError(f"{first} holds neither {WEIGHTS} nor {MODEL}: it is not an adapter")
    made = {name: read_tensors(first / name) for name in files}
    sums = {name: {k: w.double() * shares[0] for k, w in tensors.items()} for name, tensors in made.items()}
    for folder, share in zip(folders[1:], shares[1:], strict=True):
        other = read_object(folder / config)
        odd = [k for k in kind.keys() | other.keys() if kind.get(k) != other.get(k) and k != WHERE]
        if odd := sorted(odd, key=lambda k: (k not in KIND, k)):
            raise UserError(
                f"{folder / config}: {odd[0]} is {other.get(odd[0])!r}, and {kind.get(odd[0])!r} in {first}: only "
                "adapters of one kind have a mean"
            )
        for name in files:
            weights = read_tensors(folder / name)
            check_names_and_shapes(weights, made[name], str(folder / name))
            for key, weight in weights.items():
                sums[name][key] += weight.double() * share
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(first / config, to / config)
    for name, tensors in made.items():
        means = {key: (sums[name][key] / total).to(weight.dtype) for key, weight in tensors.items()}
        save_file(means, to / name, metadata={"format": "pt"} if name == MODEL else None)
