"""Log-probabilities of families that change the logits of their LM head, against plain transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from policies.build import make_trunk
from policies.errors import UserError
from policies.schema import PolicySettings
from policies.trunk import Trunk

POLICY = PolicySettings(rank=4, alpha=8.0)
IDS = (torch.arange(40).reshape(2, 20) * 7) % 300
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "recurrent_gemma": LLAMA | {"num_hidden_layers": 3, "logits_soft_cap": 3.0, "lru_width": 32},
    "gemma3_text": LLAMA | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "nanochat": LLAMA | {"final_logit_softcapping": 3.0},
    "cohere": LLAMA | {"logit_scale": 0.0625},
    "cohere2": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 8.0},
    "granitemoe": LLAMA | {"logits_scaling": 8.0, "num_local_experts": 3, "num_experts_per_tok": 2},
    "hyperclovax": LLAMA | {"logits_scaling": 0.125},
}
DTYPES = [torch.float32, torch.bfloat16]


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def enlarged(model: PreTrainedModel) -> PreTrainedModel:
    """Make the logits so large that a cap bends them."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def logits_of(trunk: Trunk) -> Tensor:
    with torch.no_grad():
        return trunk.head(trunk.hidden(IDS, ""), "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_plain_transformers(family: str, dtype: torch.dtype) -> None:
    base = enlarged(model_of(family, dtype))
    with torch.no_grad():
        expected = copy.deepcopy(base)(input_ids=IDS).logits.float().log_softmax(-1)
    found = logits_of(make_trunk(base, POLICY, ("policy",))).float().log_softmax(-1)
    rounding = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["recurrent_gemma", "granite", "cohere", "nanochat"])
def test_a_change_of_the_logits_that_is_not_known_is_refused_however_small_they_are(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family, dtype, logits_soft_cap=30.0, final_logit_softcapping=30.0)  # as a random start has them
    monkeypatch.setattr("policies.logits.SOFT_CAPS", ())
    monkeypatch.setattr("policies.logits.FACTORS", ())
    with pytest.raises(UserError, match=rf"{type(model).__name__} does more to its logits"):
        make_trunk(model, POLICY, ("policy",))


def test_a_family_whose_head_is_more_than_one_layer_is_refused() -> None:
    config = AutoConfig.for_model("modernbert-decoder", **SIZES | {"intermediate_size": 48})
    with pytest.raises(UserError, match=r"ModernBertDecoderForCausalLM.*not supported"):
        make_trunk(AutoModelForCausalLM.from_config(config), POLICY, ("policy",))


def test_weights_that_are_not_finite_are_named() -> None:
    model = model_of("granite")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinite numbers"):
        make_trunk(model, POLICY, ("policy",))


def test_logits_that_overflow_are_not_taken_for_another_family() -> None:
    model = model_of("gemma3_text", final_logit_softcapping=None)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(UserError, match=r"logits are not finite in float32"):
        make_trunk(model, POLICY, ("policy",))
