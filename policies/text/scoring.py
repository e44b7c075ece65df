"""The tokenizer of an exported reward model: what it makes of texts and messages ends where the score is read off."""

import copy
import json

from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from policies.text.encoder import ASSISTANT, TextEncoder

PAD = "<|pad|>"
"""A pad token for tokenizers that have no special token besides those that end a response."""
POST_PROCESSOR_FLAGS = ("add_bos_token", "add_eos_token")
"""Settings of a tokenizer that rebuild its post-processor whenever it is loaded."""


def scoring_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer for a sequence classifier that scores the last token which is not padding.

    It ends every text with EOS, its chat template ends with the end of the assistant's turn, and its pad token is one
    that never ends a response.

    Args:
        tokenizer: The base model's tokenizer.
    """
    encoder = TextEncoder(tokenizer)
    scoring = copy.deepcopy(tokenizer)
    _end_texts_with_eos(scoring)
    if isinstance(scoring.chat_template, str):
        scoring.chat_template = _ending_with_the_turn(scoring.chat_template, encoder)
    _choose_pad(scoring, encoder.end_ids)
    scoring.padding_side = "right"
    return scoring


def _end_texts_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer put EOS after every text; one that is not in the tokenizers library stays as it is."""
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id or not tokenizer.is_fast:
        return
    if tokenizer.init_kwargs.keys() & set(POST_PROCESSOR_FLAGS):
        tokenizer.add_eos_token = True
        return
    eos = tokenizer.eos_token
    append = TemplateProcessing(
        single=f"$A:0 {eos}:0", pair=f"$A:0 $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    backend = tokenizer.backend_tokenizer
    before = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = ProcessorSequence([*before, append])


def _ending_with_the_turn(template: str, encoder: TextEncoder) -> str:
    """A template that renders what another one does; after an assistant's turn, nothing but the end of the turn."""
    if encoder.end_of_turn is None:
        separator = encoder.turn_separator
        ended = f"rendered[:rendered | length - {len(separator)}] ~ eos_token"
        condition = f"rendered.endswith({json.dumps(separator)})"
    else:
        end = json.dumps(encoder.end_of_turn, ensure_ascii=False)
        ended = f"rendered.rpartition({end})[0] ~ {end}"
        condition = f"{end} in rendered"
    return (
        f"{{% set rendered +%}}{template.removesuffix(chr(10))}{{%+ endset %}}"
        f"{{% if messages[-1]['role'] == '{ASSISTANT}' and not add_generation_prompt and {condition} %}}"
        f"{{{{ {ended} }}}}{{% else %}}{{{{ rendered }}}}{{% endif %}}"
    )


def _choose_pad(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> None:
    """Set a pad token that ends no response: a classifier takes the last token that is not padding."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in end_ids:
        return
    special = [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) not in end_ids]
    pad = tokenizer.unk_token if tokenizer.unk_token in special else next(iter(special), None)
    if pad is not None:
        tokenizer.pad_token = pad
        return
    tokenizer.add_special_tokens({"pad_token": PAD})
