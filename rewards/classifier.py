"""A pretrained sequence-classification model as a reward model, with its own tokenizer and chat template."""

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
    """Scores texts: by the one output of a model, or by the log-odds of the second of two classes."""

    def __init__(self, path: str, key: str = "reward.classifier", tokens: int = 4096) -> None:
        """Load a model in float32 onto the default device.

        Args:
            path: Folder or hub name of the model.
            key: The setting that names the path, for messages.
            tokens: Largest number of tokens in a microbatch, padding included; a longer text is a microbatch by itself.

        Raises:
            UserError: The model does not exist, cannot be loaded, or has more than two outputs.
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
            raise UserError(f"{key}: {path} is not a trained classifier: its weights lack {missing}")
        if model.config.num_labels not in (1, 2):
            raise UserError(
                f"{key}: {path} has {model.config.num_labels} outputs; 1 (a score) or 2 (classes) were expected"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # the model finds the last token by it
        self.model = model.float().requires_grad_(False).eval().to(default_device())
        self.tokens = tokens

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score responses.

        Args:
            prompts: Texts or lists of messages `[N]`.
            responses: Texts `[N]`.

        Returns:
            Scores `[N]` float32, on the CPU.
        """
        sequences = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        lengths = [len(sequence) for sequence in sequences]
        scores = torch.empty(len(sequences))
        for members in length_buckets(lengths, self.tokens):
            ids = [sequences[i] for i in members]
            padded = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            logits = self.model(**padded.to(self.model.device)).logits.float().cpu()  # [members, 1 or 2]
            scores[members] = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return scores

    def _encode(self, prompt: Prompt, response: str) -> list[int]:
        if self.tokenizer.chat_template:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            conversation = [*messages, {"role": "assistant", "content": response}]
            return list(self.tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"])
        return list(self.tokenizer(prompt_text(prompt) + response, truncation=True)["input_ids"])
