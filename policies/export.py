"""A trained policy or reward model for other programs, checked against the live one."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policies.device import default_device
from policies.errors import UserError
from policies.files.adapters import CONFIG, WEIGHTS, load_adapter, load_head
from policies.files.base_model import load_base
from policies.files.safe_reading import NO_CODE, SAFE
from policies.methods.build import build_trunk
from policies.schema import SELECTED, ModelSettings, PolicySettings
from policies.trunk import Trunk

EXPORT_ROLE = "policy"
OWN = {"bottleneck", *SELECTED} - {"layer_norm"}
"""Methods that PEFT does not have: their adapters are loaded by `policies.methods`."""


def export_adapter(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> float:
    """Copy an adapter with the tokenizer, load it afresh, by plain PEFT where PEFT has it, and compare.

    Returns the largest difference to the live policy, in nats. Raises RuntimeError as `compare` does.
    """
    live = _live(model, policy, source)
    ids = _probe(live)
    expected, before = _of_role(live, EXPORT_ROLE, ids), _of_model(load_base(model, policy), ids)
    del live
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(source / name, folder / name)
    tokenizer.save_pretrained(folder)
    base = load_base(model, policy)
    base.generation_config.save_pretrained(folder)
    if policy.method in OWN:
        fresh = _of_role(_live(model, policy, folder), EXPORT_ROLE, ids)
    else:
        fresh = _of_model(PeftModel.from_pretrained(base, str(folder)).eval(), ids)
    return compare(fresh, expected, before, model.dtype)


def export_merged(
    model: ModelSettings,
    policy: PolicySettings,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str = "float32",
) -> float:
    """Write a whole model with the tokenizer, load it afresh by plain transformers, and compare.

    source: the folder of an adapter on the model, or of a model that was trained as a whole. dtype: of the file.
    Returns the largest difference to the live policy, in nats. Raises UserError where the method cannot be merged or
    the family has no place for what it adds, RuntimeError as `compare` does.
    """
    live = _live(model, policy, source)
    ids = _probe(live)
    expected, before = _of_role(live, EXPORT_ROLE, ids), _of_model(load_base(model, policy), ids)
    write_whole(model, live.merged_weights(EXPORT_ROLE), folder, dtype)
    tokenizer.save_pretrained(folder)
    fresh = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **SAFE).to(default_device()).eval()
    )
    exact = dtype == model.dtype == "float32"
    return compare(_of_model(fresh, ids), expected, before, "float32" if exact else "bfloat16")


def write_whole(model: ModelSettings, weights: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """The base with some of its weights replaced, as transformers saves it."""
    config = AutoConfig.from_pretrained(model.path, **NO_CODE)
    whole = _whole(model, config)
    head = next(name for name, module in whole.named_modules() if module is whole.get_output_embeddings())
    if f"{head}.weight" in weights:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if weights.keys() - whole.state_dict().keys():  # biases, which many families have room for and do not use
        for flag in ("attention_bias", "mlp_bias"):
            if hasattr(config, flag):
                setattr(config, flag, True)
    whole = _whole(model, config)
    if missing := weights.keys() - whole.state_dict().keys():
        raise UserError(
            f"{type(whole).__name__} has no place for {min(missing)}: export without --merge, for `policies.methods`"
        )
    whole.load_state_dict(dict(weights), strict=False)
    whole.to(getattr(torch, dtype)).save_pretrained(folder)


def export_reward(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[float, float]:
    """Write a reward model as a sequence classifier of one label, load it by plain transformers, and compare.

    Returns the largest difference of scores of short rows, and the head's bias, for which such a classifier has no
    place: its scores are ours less that.
    """
    live, head = _live(model, policy, source, "reward"), load_head(source)
    ids = _probe(live)
    with torch.no_grad():
        scores = live.hidden(ids, "reward")[:, -1].float() @ head["weight"].to(ids.device)
    write_whole(model, live.merged_weights("reward"), folder, "float32")
    tokenizer.save_pretrained(folder)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=pad, **SAFE)
    classifier.score.weight.data.copy_(head["weight"].unsqueeze(0))
    classifier.save_pretrained(folder)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, **SAFE).to(default_device()).eval()
    with torch.no_grad():
        gap = float((fresh(input_ids=ids).logits.squeeze(-1) - scores).abs().max())
    if not gap <= 1e-3 * max(1.0, float(scores.abs().max())):
        raise RuntimeError(f"the exported reward model differs from the live one by {gap:.2g}, more than rounding")
    return gap, float(head["bias"])


def compare(fresh: Tensor, expected: Tensor, before: Tensor, dtype: str) -> float:
    """The largest difference of log-probabilities between what was exported and the live policy, in nats.

    before: the base's. Raises RuntimeError where the difference is more than rounding explains, or where it is no
    smaller than the policy's to the base: then the policy's own part may be missing.
    """
    gap = float((fresh - expected).abs().max())
    if not gap <= (1e-3 if dtype == "float32" else 0.5):  # NaN too
        raise RuntimeError(f"the exported model differs from the policy by {gap:.2g} nats, more than rounding explains")
    if not gap < float((expected - before).abs().max()):
        raise RuntimeError("the exported model is as far from the policy as the base is: nothing was trained")
    return gap


def _live(model: ModelSettings, policy: PolicySettings, source: Path, role: str = EXPORT_ROLE) -> Trunk:
    trunk = build_trunk(model, policy, (role,))
    trunk.write_adapter(role, load_adapter(source, policy))
    return trunk


def _whole(model: ModelSettings, config: AutoConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model.path, config=config, dtype=torch.float32, **SAFE)


def _probe(trunk: Trunk) -> Tensor:
    """A few rows of tokens from all over the vocabulary, `[4, 16]`; none is the pad token's."""
    special = {trunk.causal.config.pad_token_id, trunk.causal.config.eos_token_id}
    ids = [i for i in range(trunk.causal.config.get_text_config().vocab_size) if i not in special]
    return torch.tensor(ids)[torch.linspace(0, len(ids) - 1, 64).long()].view(4, 16).to(trunk.causal.device)


@torch.no_grad()
def _of_role(trunk: Trunk, role: str, ids: Tensor) -> Tensor:
    """Log-probabilities `[4, 16, V]` under a role, in float32 on the CPU."""
    return torch.log_softmax(trunk.head(trunk.hidden(ids, role), role).float(), dim=-1).cpu()


@torch.no_grad()
def _of_model(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The same of a model; what it says of virtual tokens is left out."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
