"""A ready sequence-classification model as the reward, with its own tokenizer and template."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from policies.batching import length_buckets
from policies.device import default_device
from policies.errors import UserError
from policies.files.base_model import check_model_folder, check_weights, reason
from policies.files.safe_reading import NO_CODE, SAFE
from policies.text.tokenization import Prompt, prompt_text


class Classifier:
    """Scores text by a model with one output: the score; or with two: the log-odds of the second class."""

    def __init__(self, path: str, key: str = "reward.classifier", tokens: int = 4096) -> None:
        """key: the setting that names the path.

        Raises UserError where the folder is no such model or it has another number of outputs.
        """
        check_model_folder(path)
        check_weights(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
            model, loading = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **SAFE)
        except Exception as error:  # the tokenizers library raises plain ones
            raise UserError(f"{key}: {path} cannot be loaded: {reason(error)}") from error
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"]))
            raise UserError(f"{key}: {path} is no trained classifier: its weights lack {missing}")
        if model.config.num_labels not in (1, 2):
            raise UserError(f"{key}: {path} has {model.config.num_labels} outputs; a reward has 1, or 2 classes")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # the model looks for a row's end by it
        self.model = model.float().requires_grad_(False).eval().to(default_device())
        self.tokens = tokens

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Scores `[N]` float32 of whole texts."""
        rows = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        scores = torch.empty(len(rows))
        for indices in length_buckets([len(row) for row in rows], self.tokens):
            padded = self.tokenizer.pad(
                {"input_ids": [rows[i] for i in indices]}, padding_side="right", return_tensors="pt"
            )
            logits = self.model(**padded.to(self.model.device)).logits.float().cpu()
            scores[indices] = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return scores

    def _encode(self, prompt: Prompt, response: str) -> list[int]:
        if self.tokenizer.chat_template:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            whole = [*messages, {"role": "assistant", "content": response}]
            return list(self.tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"])
        return list(self.tokenizer(prompt_text(prompt) + response, truncation=True)["input_ids"])
