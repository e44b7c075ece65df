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

from policies.build import build_trunk
from policies.device import default_device
from policies.errors import UserError
from policies.files.adapters import CONFIG, WEIGHTS, load_adapter, load_head
from policies.files.base_model import load_base
from policies.files.safe_reading import NO_CODE, SAFE
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk

EXPORT_ROLE = "policy"
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Differences of log-probabilities, in nats, that rounding explains."""
MAX_SCORE_DIFFERENCE = 1e-3
"""Difference of reward scores that rounding explains, relative to the largest score or to 1."""
PROBE_SHAPE = (4, 16)
"""Sequences and tokens that an export is compared on."""


def export_adapter(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> float:
    """Copy an adapter and the tokenizer, reload it, by plain PEFT where PEFT has the method, and compare.

    Args:
        model: the base.
        policy: the settings of the adapter.
        source: folder of the adapter.
        tokenizer: of the base.
        folder: where the export goes; made where it does not exist.

    Returns:
        The largest difference to the live policy's log-probabilities, in nats.

    Raises:
        UserError: the adapter is not as `policy` says.
        RuntimeError: see `compare`.
    """
    live = _live(model, policy, source)
    ids = _probe(live)
    expected = _log_probs_of_role(live, EXPORT_ROLE, ids)
    before = _log_probs_of_model(load_base(model, policy), ids)
    del live
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(source / name, folder / name)
    tokenizer.save_pretrained(folder)
    base = load_base(model, policy)
    base.generation_config.save_pretrained(folder)
    if policy.spec.in_peft:
        reloaded = _log_probs_of_model(PeftModel.from_pretrained(base, str(folder)).eval(), ids)
    else:
        reloaded = _log_probs_of_role(_live(model, policy, folder), EXPORT_ROLE, ids)
    return compare(reloaded, expected, before, model.dtype)


def export_merged(
    model: ModelSettings,
    policy: PolicySettings,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str = "float32",
) -> float:
    """Write a complete model and the tokenizer, reload it by plain transformers, and compare.

    Args:
        model: the base.
        policy: the settings of the adapter.
        source: folder of an adapter for the base, or of a model with all weights trained.
        tokenizer: of the base.
        folder: where the export goes.
        dtype: of the file.

    Returns:
        The largest difference to the live policy's log-probabilities, in nats.

    Raises:
        UserError: the method cannot be merged, or the family has no parameters for what the method adds.
        RuntimeError: see `compare`.
    """
    live = _live(model, policy, source)
    ids = _probe(live)
    expected = _log_probs_of_role(live, EXPORT_ROLE, ids)
    before = _log_probs_of_model(load_base(model, policy), ids)
    write_model(model, live.merged_weights(EXPORT_ROLE), folder, dtype)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **SAFE)
    log_probs = _log_probs_of_model(reloaded.to(default_device()).eval(), ids)
    exact = dtype == model.dtype == "float32"
    return compare(log_probs, expected, before, "float32" if exact else "bfloat16")


def write_model(model: ModelSettings, weights: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the base with some of its weights replaced, as transformers saves it.

    Args:
        model: the base.
        weights: those that replace the base's, by name in the base.
        folder: where the model goes.
        dtype: of the file.

    Raises:
        UserError: the family has no parameter of such a name.
    """
    config = AutoConfig.from_pretrained(model.path, **NO_CODE)
    plain = _load_model(model, config)
    head = next(name for name, module in plain.named_modules() if module is plain.get_output_embeddings())
    if f"{head}.weight" in weights:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    if weights.keys() - plain.state_dict().keys():  # biases, which many families support but do not use
        for flag in ("attention_bias", "mlp_bias"):
            if hasattr(config, flag):
                setattr(config, flag, True)
    changed = _load_model(model, config)
    missing = weights.keys() - changed.state_dict().keys()
    if missing:
        raise UserError(
            f"{type(changed).__name__} has no parameter {min(missing)}: export without --merge, for `policies.methods` "
            "to load"
        )
    changed.load_state_dict(dict(weights), strict=False)
    changed.to(getattr(torch, dtype)).save_pretrained(folder)


def export_reward(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[float, float]:
    """Write a reward model as a sequence classifier of one label, reload it by plain transformers, and compare.

    Args:
        model: the base.
        policy: the settings of the adapter.
        source: folder of the reward model's adapter and head.
        tokenizer: of the base.
        folder: where the export goes.

    Returns:
        The largest difference of the scores of short sequences; and the head's bias, which such a classifier does not
        have: its scores are the reward model's minus this bias.

    Raises:
        UserError: as `export_merged` does.
        RuntimeError: the scores differ by more than rounding.
    """
    live = _live(model, policy, source, "reward")
    head = load_head(source)
    ids = _probe(live)
    with torch.no_grad():
        scores = live.hidden(ids, "reward")[:, -1].float() @ head["weight"].to(ids.device)  # [B]
    write_model(model, live.merged_weights("reward"), folder, "float32")
    tokenizer.save_pretrained(folder)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=pad, **SAFE)
    classifier.score.weight.data.copy_(head["weight"].unsqueeze(0))  # [1, H]
    classifier.save_pretrained(folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder, **SAFE).to(default_device()).eval()
    with torch.no_grad():
        difference = float((reloaded(input_ids=ids).logits.squeeze(-1) - scores).abs().max())
    if not difference <= MAX_SCORE_DIFFERENCE * max(1.0, float(scores.abs().max())):  # NaN too
        raise RuntimeError(
            f"the exported reward model differs from the live one by {difference:.2g}, more than rounding explains"
        )
    return difference, float(head["bias"])


def compare(exported: Tensor, expected: Tensor, before: Tensor, dtype: str) -> float:
    """The largest difference of log-probabilities between what was exported and the live policy.

    Args:
        exported: log-probabilities `[B, T, V]` of the reloaded export.
        expected: those of the live policy.
        before: those of the base.
        dtype: how coarse the comparison is, "float32" or another.

    Returns:
        The difference, in nats.

    Raises:
        RuntimeError: the difference is more than rounding explains; or it is no smaller than the policy's to the base,
            so that the policy's own part may be missing.
    """
    difference = float((exported - expected).abs().max())
    if not difference <= MAX_DIFFERENCE["float32" if dtype == "float32" else "bfloat16"]:  # NaN too
        raise RuntimeError(
            f"the exported model differs from the policy by {difference:.2g} nats, more than rounding explains"
        )
    if not difference < float((expected - before).abs().max()):
        raise RuntimeError("the exported model is as far from the policy as the base is: nothing was trained")
    return difference


def _live(model: ModelSettings, policy: PolicySettings, source: Path, role: str = EXPORT_ROLE) -> Trunk:
    trunk = build_trunk(model, policy, (role,))
    trunk.write_adapter(role, load_adapter(source, policy))
    return trunk


def _load_model(model: ModelSettings, config: AutoConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model.path, config=config, dtype=torch.float32, **SAFE)


def _probe(trunk: Trunk) -> Tensor:
    """Sequences of tokens from all over the vocabulary, `PROBE_SHAPE`; without pad and end-of-sequence tokens."""
    special = {trunk.causal.config.pad_token_id, trunk.causal.config.eos_token_id}
    vocabulary = range(trunk.causal.config.get_text_config().vocab_size)
    ids = torch.tensor([token for token in vocabulary if token not in special])
    sequences, tokens = PROBE_SHAPE
    chosen = torch.linspace(0, len(ids) - 1, sequences * tokens).long()
    return ids[chosen].view(PROBE_SHAPE).to(trunk.causal.device)


@torch.no_grad()
def _log_probs_of_role(trunk: Trunk, role: str, ids: Tensor) -> Tensor:
    """Log-probabilities `[B, T, V]` under a role, in float32 on the CPU."""
    return torch.log_softmax(trunk.head(trunk.hidden(ids, role), role).float(), dim=-1).cpu()


@torch.no_grad()
def _log_probs_of_model(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities `[B, T, V]` of a model, without those of virtual tokens."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
