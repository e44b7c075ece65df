"""A trained policy in Hugging Face layout, checked against the live one."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from policies.adapters import CONFIG
from policies.loading import default_device, load_base
from policies.schema import ModelSettings


def export_merged(model: ModelSettings, adapter: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Write merged model and tokenizer, load them by plain transformers, and compare with the live policy.

    adapter: the folder of an adapter on the model, or of a model that was trained as a whole.
    Returns the largest difference of log-probabilities on the tokenizer's own vocabulary, in nats: rounding only.
    Raises RuntimeError, with nothing to show for it, where it is more than rounding explains.
    """
    whole = not (adapter / CONFIG).is_file()
    live = _load(adapter, model) if whole else PeftModel.from_pretrained(load_base(model), str(adapter))
    ids = torch.arange(min(64, len(tokenizer)), device=live.device).unsqueeze(0)
    expected = _logprobs(live, ids)
    merged = live if whole else live.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gap = float((_logprobs(_load(folder, model), ids) - expected).abs().max())
    bound = 1e-3 if model.dtype == "float32" else 0.5
    if not gap <= bound:  # NaN too
        raise RuntimeError(f"the exported model differs from the policy by {gap:.2g} nats, more than rounding explains")
    return gap


def _load(folder: Path, settings: ModelSettings) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    return model.to(default_device()).eval()


@torch.no_grad()
def _logprobs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)
