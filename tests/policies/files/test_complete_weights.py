import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from policies.errors import UserError
from policies.files.base_model import load_base, load_tokenizer
from policies.files.complete_weights import load_complete
from policies.schema import ModelSettings, PolicySettings

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
QLORA = PolicySettings(method="qlora", rank=4, alpha=8)
Weights = dict[str, Tensor]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> ModelSettings:
    """Change the weights in a model's folder."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSettings(path=str(folder), dtype="float32")


def prefixed(weights: Weights) -> Weights:
    return {f"base_model.model.{name}": tensor.clone() for name, tensor in weights.items()}


def without_a_layer(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}


def filled(name: str, value: float) -> Callable[[Weights], Weights]:
    """Put a value in one element of a tensor."""

    def change(weights: Weights) -> Weights:
        weights[name].view(-1)[5] = value
        return weights

    return change


@pytest.mark.parametrize("policy", [None, QLORA], ids=["float32", "qlora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed, r"lack 2\d of the weights of LlamaForCausalLM.*begin with 'base_model\.model\.'"),
        (without_a_layer, r"lack 9 of the weights of LlamaForCausalLM, such as model\.layers\.1\.input_layernorm"),
        (lambda w: w | {NORM: torch.ones(16)}, r"model\.norm\.weight is \[16\], but \[32\]"),
        (
            lambda w: w | {UP: torch.ones(64, 16)},
            r"model\.layers\.1\.mlp\.up_proj\.weight is \[64, 16\], but \[64, 32\]",
        ),
        (filled(UP, float("nan")), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite numbers"),
        (filled(UP, float("inf")), r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite numbers"),
        (
            filled("model.embed_tokens.weight", float("-inf")),
            r"model\.embed_tokens\.weight holds NaN or infinite numbers",
        ),
    ],
    ids=["prefix", "layer", "vector", "matrix", "nan", "inf", "embedding"],
)
def test_a_base_whose_weights_do_not_all_load_is_refused(
    folder: Path, change: Callable[[Weights], Weights], message: str, policy: PolicySettings | None
) -> None:
    settings = rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load_base(settings, policy)


def test_weights_under_two_names_are_refused(folder: Path) -> None:
    settings = rewrite(folder, lambda weights: weights | prefixed(weights))
    with pytest.raises(UserError, match=r"base_model\.model\.\S+ beside"):
        load_base(settings)


def test_weights_with_an_unmerged_adapter_are_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    settings = rewrite(folder, lambda weights: weights | {name: torch.ones(4, 32)})
    with pytest.raises(UserError, match=r"an adapter that is not merged.*q_proj\.lora_A"):
        load_base(settings)


def test_tensors_without_a_place_in_the_model_are_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = rewrite(folder, lambda weights: weights | {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)})
    with caplog.at_level(logging.WARNING):
        load_base(settings)
        load_base(settings)
    (record,) = (record for record in caplog.records if record.name.startswith("policies."))
    assert "1 tensor that LlamaForCausalLM does not use: model.layers.2.mlp.up_proj.weight" in record.getMessage()


def test_weights_of_a_float16_base_that_overflow_are_refused(folder: Path) -> None:
    settings = rewrite(folder, filled(UP, 1e6)).model_copy(update={"dtype": "float16"})
    with pytest.raises(UserError, match=r"up_proj\.weight holds NaN or infinite numbers.*float16"):
        load_base(settings)


def test_a_classifier_is_read_by_the_same_rules(folder: Path) -> None:
    with pytest.raises(UserError, match=r"lack 1 of the weights of LlamaForSequenceClassification: score\.weight"):
        load_complete(AutoModelForSequenceClassification, str(folder), torch.device("cpu"), num_labels=1)


def test_a_token_beyond_the_embeddings_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    rows = len(tokenizer)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"'</tool>' has id {rows + 1}.*embeddings have {rows} rows"):
        load_tokenizer(str(folder))
