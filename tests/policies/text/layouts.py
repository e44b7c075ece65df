"""Small tokenizers with the vocabulary types and chat templates of the families that people adapt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "My lamp is broken. Is the bulb old? No, it is new. Then check the fuse, and call again at 10:30.",
    "user assistant model system You are a terse helper. Thanks! Good bye. Name a colour: blue, red, green.",
    "[INST] [/INST] <<SYS>> think tool 0 1 2 3 4 5 6 7 8 9 yes no {} () \n\n",
)

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '') "
    "+ m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role "
    "+ '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set content = content.split('</think>')[-1] | trim %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{% set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}{% endif %}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GPT_2 = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '') + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen split a text into words: line breaks stay together, whatever follows."""


@dataclass(frozen=True)
class Layout:
    """How a family turns text into tokens.

    Attributes:
        template: A chat template of the family's structure.
        sentencepiece: Whether words carry their blank as `▁`, with bytes to fall back on; otherwise byte-level BPE.
        blank: Where a blank is put of the tokenizer's own: before every text, after special tokens, too; before the
            first text alone; or nowhere.
        bos: The token at the start of a text.
        eos: The tokenizer's end-of-sequence token.
        end: What the template ends the assistant's turns with.
        others: Further special tokens.
    """

    template: str
    sentencepiece: bool
    blank: Literal["always", "first", "never"]
    bos: str | None
    eos: str
    end: str
    others: tuple[str, ...] = ()


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
LAYOUTS = {
    "llama 2": Layout(LLAMA_2, True, "always", bos="<s>", eos="</s>", end="</s>"),
    "llama 3": Layout(
        LLAMA_3, False, "never", bos="<|begin|>", eos="<|end_of_text|>", end="<|eot_id|>", others=HEADERS
    ),
    "qwen 2.5": Layout(
        CHATML, False, "never", bos=None, eos="<|endoftext|>", end="<|im_end|>", others=("<|im_start|>", "<|im_end|>")
    ),
    "qwen 3": Layout(
        QWEN_3, False, "never", bos=None, eos="<|im_end|>", end="<|im_end|>", others=("<|im_start|>", "<|endoftext|>")
    ),
    "gemma": Layout(
        GEMMA, True, "never", bos="<bos>", eos="<eos>", end="<end_of_turn>", others=("<start_of_turn>", "<end_of_turn>")
    ),
    "mistral": Layout(MISTRAL, True, "first", bos="<s>", eos="</s>", end="</s>", others=("[INST]", "[/INST]")),
    "phi 3": Layout(PHI_3, True, "always", bos="<s>", eos="<|endoftext|>", end="<|end|>", others=ROLES),
    "gpt 2": Layout(GPT_2, False, "never", bos=None, eos="<|endoftext|>", end="<|endoftext|>"),
}


def make_tokenizer(layout: Layout, texts: Sequence[str] = TEXTS) -> PreTrainedTokenizerFast:
    """A tokenizer of this layout, trained on a few lines."""
    named = [layout.bos, layout.eos, *layout.others]
    special = ["<pad>", *(token for token in named if token)]
    tokenizer = (
        _sentencepiece(layout, texts, special)
        if layout.sentencepiece
        else _byte_level(texts, special, layout is LAYOUTS["gpt 2"])
    )
    if layout.bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{layout.bos} $A", special_tokens=[(layout.bos, tokenizer.token_to_id(layout.bos))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=layout.bos,
        eos_token=layout.eos,
        additional_special_tokens=list(layout.others),
    )
    wrapped.chat_template = layout.template
    return wrapped


def _byte_level(texts: Sequence[str], special: list[str], gpt_2: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if gpt_2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _sentencepiece(layout: Layout, texts: Sequence[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blank = pre_tokenizers.Metaspace(prepend_scheme=layout.blank, split=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=["<unk>", *special, *fallback], show_progress=False, max_token_length=8
    )
    tokenizer.pre_tokenizer = blank
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in fallback]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    strip = [] if layout.blank == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
