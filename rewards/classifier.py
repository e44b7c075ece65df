"""A pretrained sequence-classification model as a reward model, with its own tokenizer and chat template."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from policies.batching import length_buckets
from policies.device import default_device
from policies.errors import UserError
from policies.files.base_model import check_model_folder, check_token_ids, check_weights, reason
from policies.files.complete_weights import load_complete
from policies.files.safe_reading import NO_CODE
from policies.text.tokenization import Prompt
from rewards.classifier_text import ClassifierEncoder, ClassifierText
from rewards.positions import position_room

log = logging.getLogger(__name__)


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
            check_token_ids(self.tokenizer, path)
            model = load_complete(AutoModelForSequenceClassification, path, default_device())
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        except Exception as error:  # the tokenizers library raises plain ones
            raise UserError(f"{key}: {path} cannot be loaded: {reason(error)}") from error
        if model.config.num_labels not in (1, 2):
            raise UserError(
                f"{key}: {path} has {model.config.num_labels} outputs; 1 (a score) or 2 (classes) were expected"
            )
        self.model = model.float().requires_grad_(False).eval()
        self.encoder = ClassifierEncoder(self.tokenizer, position_room(self.model), key)
        self.tokens = tokens
        self.key = key
        self._takes_padding = self._padding_changes_no_score()
        self._said_shortened = False

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score responses.

        Args:
            prompts: Texts or lists of messages `[N]`.
            responses: Texts `[N]`.

        Returns:
            Scores `[N]` float32, on the CPU.

        Raises:
            UserError: A response does not fit the model's positions, or the chat template fails on a prompt.
        """
        return self.score_and_flag(prompts, responses)[0]

    @torch.no_grad()
    def score_and_flag(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score responses, and say whose prompt was shortened to fit; arguments and exceptions as of `score`.

        Returns:
            Scores `[N]` float32, and 1 where the start of the prompt was left out, else 0, `[N]` float64; on the CPU.
        """
        texts: list[ClassifierText] = []
        for prompt, response in zip(prompts, responses, strict=True):
            texts.append(self.encoder.encode(prompt, response))
        shortened = torch.tensor([text.shortened for text in texts], dtype=torch.float64)
        if shortened.any() and not self._said_shortened:
            self._said_shortened = True
            log.warning(
                "%s: %d of %d prompts are too long for the model's %s positions; it reads them without their start",
                self.key,
                int(shortened.sum()),
                len(texts),
                self.encoder.room,
            )
        lengths = [len(text.ids) for text in texts]
        scores = torch.empty(len(texts))
        for members in self._microbatches(lengths):
            logits = self._logits([texts[i].ids for i in members])  # [members, 1 or 2]
            scores[members] = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return scores, shortened

    def _microbatches(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """The indices of the sequences that share a microbatch."""
        if not self._takes_padding:
            return [[i] for i in range(len(lengths))]
        return length_buckets(lengths, self.tokens)

    def _padding_changes_no_score(self) -> bool:
        """Whether sequences of different lengths can share a microbatch, which a few tokens show."""
        if self.model.config.is_encoder_decoder:  # it reads the score off at EOS, of which all would need as many
            return False
        rows = self.model.get_input_embeddings().num_embeddings
        ids = [token for token in range(rows) if token != self.model.config.get_text_config().pad_token_id]
        short, long = ids[-4:-1], ids[-9:-1]
        alone = torch.cat([self._logits([short]), self._logits([long])])
        return torch.allclose(self._logits([short, long]), alone, rtol=0.02, atol=0.02)

    @torch.no_grad()
    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The logits `[B, outputs]` of sequences `[B]` of token ids, on the CPU, as if each were alone."""
        config = self.model.config.get_text_config()
        rows = self.model.get_input_embeddings().num_embeddings
        pad = config.pad_token_id
        if pad is None or not 0 <= pad < rows:
            # Without one the model scores the last token; in a batch it looks for the last that is not padding.
            ends = {sequence[-1] for sequence in sequences}
            pad = next(token for token in range(rows) if token not in ends)
        ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, T]
        device = self.model.device
        with _pad_token_id(config, pad):
            logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits.float().cpu()


@contextmanager
def _pad_token_id(config: PreTrainedConfig, pad: int) -> Iterator[None]:
    """Set the id by which a classifier finds the last token of a padded sequence."""
    before = config.pad_token_id
    config.pad_token_id = pad
    try:
        yield
    finally:
        config.pad_token_id = before
