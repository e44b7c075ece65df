"""Exports a trained model for other programs, and checks the export against the live model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from policies.build import build_trunk
from policies.device import default_device
from policies.errors import UserError
from policies.files.adapters import CONFIG, WEIGHTS, load_adapter, load_head
from policies.files.base_model import load_base
from policies.files.generation import write_generation_config
from policies.files.safe_reading import NO_CODE, SAFE
from policies.files.writing import save_model
from policies.schema import ModelSettings, PolicySettings
from policies.text.encoder import TextEncoder
from policies.text.scoring import scoring_tokenizer
from policies.trunk import Trunk

EXPORT_ROLE = "policy"
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of log-probabilities, in nats, that rounding explains, by the coarser dtype of the two."""
MAX_SCORE_DIFFERENCE = 1e-3
"""Largest difference of a head's outputs that rounding explains, relative to the largest output or to 1."""
PROBE_SHAPE = (4, 16)
"""Sequences, and tokens of each, that an export is compared on."""
PROBE_TEXTS = (("Is it late?", " No."), ("What is it that you do there?", " I read."))
"""Prompts and responses that an exported head is compared on besides, padded in one batch."""


def export_adapter(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> float:
    """Copy an adapter and the tokenizer, reload them, with plain PEFT where it has the method, and compare.

    Args:
        model: The base model.
        policy: The adapter's settings.
        source: The adapter's folder.
        tokenizer: The base model's tokenizer.
        folder: The folder to write to; it is created if it does not exist.

    Returns:
        The largest difference to the live policy's log-probabilities, in nats.

    Raises:
        UserError: The adapter does not match `policy`.
        RuntimeError: The export differs from the live policy (see `compare`).
    """
    live = load_live(model, policy, source)
    ids = _probe(live)
    expected = _log_probs_of_role(live, EXPORT_ROLE, ids)
    base_log_probs = _log_probs_of_model(load_base(model, policy), ids)
    del live
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, folder / name)
    tokenizer.save_pretrained(folder)
    write_generation_config(model.path, folder, TextEncoder(tokenizer).end_ids)
    base = load_base(model, policy)
    if policy.spec.in_peft:
        reloaded = _log_probs_of_model(PeftModel.from_pretrained(base, str(folder)).eval(), ids)
    else:
        reloaded = _log_probs_of_role(load_live(model, policy, folder), EXPORT_ROLE, ids)
    return compare(reloaded, expected, base_log_probs, model.dtype_for(policy))


def export_merged(
    model: ModelSettings,
    policy: PolicySettings,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str = "float32",
) -> float:
    """Write a complete model and the tokenizer, reload them with plain transformers, and compare.

    Args:
        model: The base model.
        policy: The adapter's settings.
        source: The folder of an adapter for the base model, or of a model with all weights trained.
        tokenizer: The base model's tokenizer.
        folder: The folder to write to.
        dtype: The dtype of the weights in the file.

    Returns:
        The largest difference to the live policy's log-probabilities, in nats.

    Raises:
        UserError: The method cannot be merged, or the model family has no parameters for what the method adds.
        RuntimeError: The export differs from the live policy (see `compare`).
    """
    live = load_live(model, policy, source)
    ids = _probe(live)
    expected = _log_probs_of_role(live, EXPORT_ROLE, ids)
    base_log_probs = _log_probs_of_model(load_base(model, policy), ids)
    write_model(model, live.merged_weights(EXPORT_ROLE), folder, dtype)
    write_generation_config(model.path, folder, TextEncoder(tokenizer).end_ids)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **SAFE)
    log_probs = _log_probs_of_model(reloaded.to(default_device()).eval(), ids)
    exact = dtype == model.dtype_for(policy) == "float32"
    return compare(log_probs, expected, base_log_probs, "float32" if exact else "bfloat16")


def write_model(model: ModelSettings, weights: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the base model with some of its weights replaced, as transformers saves it, but no generation config.

    Args:
        model: The base model.
        weights: The weights that replace the base's, by name in the base.
        folder: The folder to write to.
        dtype: The dtype of the weights in the file.

    Raises:
        UserError: The model family has no parameter with one of these names.
    """
    config = AutoConfig.from_pretrained(model.path, **NO_CODE)
    base = _load_model(model, config)
    lm_head = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
    if f"{lm_head}.weight" in weights:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    if weights.keys() - base.state_dict().keys():  # biases, which many families support but do not use
        for flag in ("attention_bias", "mlp_bias"):
            if hasattr(config, flag):
                setattr(config, flag, True)
    target = _load_model(model, config)
    missing = weights.keys() - target.state_dict().keys()
    if missing:
        raise UserError(
            f"{type(target).__name__} has no parameter {min(missing)}: export without --merge, for `policies.methods` "
            "to load"
        )
    target.load_state_dict(dict(weights), strict=False)
    target.generation_config = GenerationConfig()  # the base's own may be one that transformers refuses to save
    save_model(target.to(getattr(torch, dtype)), folder)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)  # not every model has one


def export_reward(
    model: ModelSettings, policy: PolicySettings, source: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[float, float]:
    """Write a reward model as a sequence classifier with one label, reload it with plain transformers, and compare.

    Args:
        model: The base model.
        policy: The adapter's settings.
        source: The folder of the reward model's adapter and head.
        tokenizer: The base model's tokenizer.
        folder: The folder to write to.

    Returns:
        The largest difference of scores, on short sequences in one padded batch; and the head's bias, which such a
        classifier does not have: its scores are the reward model's minus this bias.

    Raises:
        UserError: The method cannot be merged, or the model family has no parameters for what the method adds.
        RuntimeError: The scores differ by more than rounding explains.
    """
    live = load_live(model, policy, source, "reward")
    head = load_head(source)
    difference = export_head(model, live, head["weight"].unsqueeze(0), tokenizer, folder)
    return difference, float(head["bias"])


def export_head(
    model: ModelSettings, live: Trunk, weight: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path, **config: Any
) -> float:
    """Write a base model with a linear head as a sequence classifier, reload it with plain transformers, and compare.

    Args:
        model: The base model.
        live: The live model, with the adapter of one role; it is not used afterwards.
        weight: The head's weight `[C, H]`.
        tokenizer: The base model's tokenizer.
        folder: The folder to write to.
        **config: Attributes of the classifier's config.

    Returns:
        The largest difference of the outputs, on short sequences in one padded batch.

    Raises:
        UserError: The method cannot be merged, or the model family has no parameters for what the method adds.
        RuntimeError: The outputs differ by more than rounding explains.
    """
    scoring = scoring_tokenizer(tokenizer)
    sequences = [*_probe(live).tolist(), *_probe_texts(tokenizer)]
    expected = _live_outputs(live, weight, sequences)  # [B, C]
    write_model(model, live.merged_weights(live.roles[0]), folder, "float32")
    scoring.save_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(weight), **SAFE)
    for name, value in config.items():
        setattr(classifier.config, name, value)
    classifier.config.pad_token_id = scoring.pad_token_id
    classifier.config.get_text_config().pad_token_id = scoring.pad_token_id
    if scoring.pad_token_id >= classifier.get_input_embeddings().num_embeddings:
        classifier.resize_token_embeddings(scoring.pad_token_id + 1, mean_resizing=False)
    classifier.score.weight.data.copy_(weight)
    save_model(classifier, folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder, **SAFE).to(default_device()).eval()
    padded = scoring.pad({"input_ids": sequences}, return_tensors="pt").to(reloaded.device)
    with torch.no_grad():
        logits = reloaded(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits  # [B, C]
    difference = float((logits.cpu() - expected).abs().max())
    if not difference <= MAX_SCORE_DIFFERENCE * max(1.0, float(expected.abs().max())):  # NaN too
        raise RuntimeError(
            f"the exported {live.roles[0]} model differs from the live one by {difference:.2g}, more than rounding "
            "explains"
        )
    return difference


def compare(exported: Tensor, expected: Tensor, base: Tensor, dtype: str) -> float:
    """Compute the largest difference of log-probabilities between an export and the live policy, and check it.

    Args:
        exported: Log-probabilities `[B, T, V]` of the reloaded export.
        expected: Log-probabilities `[B, T, V]` of the live policy.
        base: Log-probabilities `[B, T, V]` of the base model.
        dtype: "float32" where both sides compute in it; any other value allows more rounding.

    Returns:
        The difference, in nats.

    Raises:
        RuntimeError: The difference is more than rounding explains; or it is no smaller than that between policy and
            base model, so that the export may lack what was trained.
    """
    difference = float((exported - expected).abs().max())
    if not difference <= MAX_DIFFERENCE["float32" if dtype == "float32" else "bfloat16"]:  # NaN too
        raise RuntimeError(
            f"the exported model differs from the policy by {difference:.2g} nats, more than rounding explains"
        )
    if not difference < float((expected - base).abs().max()):
        raise RuntimeError("the exported model is as far from the policy as the base is: nothing was trained")
    return difference


def load_live(model: ModelSettings, policy: PolicySettings, source: Path, role: str = EXPORT_ROLE) -> Trunk:
    """The live model: a trunk with one role, which has the saved adapter."""
    trunk = build_trunk(model, policy, (role,))
    trunk.write_adapter(role, load_adapter(source, policy))
    return trunk


def _load_model(model: ModelSettings, config: AutoConfig) -> PreTrainedModel:
    """The base model with all weights in float32, under this config."""
    return AutoModelForCausalLM.from_pretrained(model.path, config=config, dtype=torch.float32, **SAFE)


def _probe(trunk: Trunk) -> Tensor:
    """Token ids of shape `PROBE_SHAPE`, spread over the vocabulary; without pad and end-of-sequence tokens."""
    special = {trunk.causal.config.pad_token_id, trunk.causal.config.eos_token_id}
    vocabulary = range(trunk.causal.config.get_text_config().vocab_size)
    ids = torch.tensor([token for token in vocabulary if token not in special])
    sequences, tokens = PROBE_SHAPE
    chosen = torch.linspace(0, len(ids) - 1, sequences * tokens).long()
    return ids[chosen].view(PROBE_SHAPE).to(trunk.causal.device)


def _probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of two texts of different lengths that end as responses end."""
    encoder = TextEncoder(tokenizer)
    exchanges = [encoder.exchange(*texts) for texts in PROBE_TEXTS]
    return [exchange.prompt_ids + exchange.response_ids for exchange in exchanges]


@torch.no_grad()
def _live_outputs(trunk: Trunk, weight: Tensor, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The outputs `[B, C]` of sequences, each alone, by the weight `[C, H]` of the role's head, on the CPU."""
    outputs: list[Tensor] = []
    for sequence in sequences:
        ids = torch.tensor([sequence], device=trunk.causal.device)
        hidden = trunk.hidden(ids, trunk.roles[0])[0, -1].float()  # [H]
        outputs.append(weight.to(hidden.device) @ hidden)
    return torch.stack(outputs).cpu()


@torch.no_grad()
def _log_probs_of_role(trunk: Trunk, role: str, ids: Tensor) -> Tensor:
    """Log-probabilities `[B, T, V]` under a role, in float32 on the CPU."""
    return torch.log_softmax(trunk.head(trunk.hidden(ids, role), role).float(), dim=-1).cpu()


@torch.no_grad()
def _log_probs_of_model(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities `[B, T, V]` of a model, without those of virtual tokens."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
