"""Build the quickstart's synthetic environment: its data and a small base model trained from scratch, offline."""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

import synthetic
import torch
from synthetic import USUAL, Annotators
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils.logging import disable_progress_bar

from align.runtime.atomic_files import new_folder, write_json
from align.runtime.quiet import quiet_libraries

Row = dict[str, str]
DESCRIPTION = "environment.json"


@dataclass(frozen=True)
class Sizes:
    """Rows per file, and the length of the base model's training."""

    text: int = 7040
    demonstrations: int = 1500
    pairs: int = 16000
    pairs_heldout: int = 2000
    prompts: int = 2048
    prompts_heldout: int = 512
    steps: int = 440
    batch: int = 16
    """Texts per optimizer step."""
    learning_rate: float = 4e-3


def main() -> None:
    """Build the environment unless the folder already holds it."""
    quiet_libraries()
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="output folder; another environment is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--annotators", choices=synthetic.ANNOTATORS, default="usual", help="who compares replies")
    arguments = parser.parse_args()
    make(arguments.to, arguments.seed, annotators=arguments.annotators)


def make(to: Path, seed: int, sizes: Sizes | None = None, annotators: str = "usual") -> None:
    """Write the environment to the folder `to` in one step, unless the same one is already there."""
    sizes = sizes or Sizes()
    identity = {"version": code_version(), "seed": seed, "annotators": annotators, "sizes": asdict(sizes)}
    if is_up_to_date(to, identity):
        print(f"{to} already holds the environment of seed {seed}")
        return
    started = time.perf_counter()
    files = write_rows(seed, sizes, synthetic.ANNOTATORS[annotators])
    with new_folder(to) as folder:
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        loss = train_base(folder / "base", [row["text"] for row in files["text"]], seed, sizes)
        ceiling = noise_ceiling(files["pairs_heldout"], synthetic.ANNOTATORS[annotators])
        facts = {"beta": synthetic.BETA, "noise_ceiling": ceiling, "base_loss": loss}
        counts = {name: len(rows) for name, rows in files.items()}
        write_json(folder / DESCRIPTION, identity | {"counts": counts} | facts)
    print(f"built the environment of seed {seed} in {to} in {time.perf_counter() - started:.0f} s")


def code_version() -> str:
    """A short digest of the code that builds the environment."""
    sources = [Path(__file__), Path(synthetic.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def is_up_to_date(folder: Path, identity: dict[str, object]) -> bool:
    """Whether the folder holds the environment of this code, seed and sizes."""
    if not (folder / DESCRIPTION).is_file():
        return False
    description = json.loads((folder / DESCRIPTION).read_text())
    return all(description.get(key) == value for key, value in identity.items())


# --- Data -----------------------------------------------------------------------------------------------------------


def write_rows(seed: int, sizes: Sizes, annotators: Annotators = USUAL) -> dict[str, list[Row]]:
    """The rows of every file by its name. No prompt occurs twice, so no file shares a prompt with another."""
    random = Random(seed)
    prompts = unique_prompts(random)

    def pairs(number: int) -> list[Row]:
        return [write_pair(random, prompt, annotators) for prompt in islice(prompts, number)]

    files: dict[str, list[Row]] = {}  # the order of the draws is part of what a seed means
    files["prompts_heldout"] = [{"prompt": prompt} for prompt in islice(prompts, sizes.prompts_heldout)]
    files["pairs_heldout"] = pairs(sizes.pairs_heldout)
    files["demonstrations"] = [write_demonstration(random, prompt) for prompt in islice(prompts, sizes.demonstrations)]
    files["pairs"] = pairs(sizes.pairs)
    files["prompts"] = [{"prompt": prompt} for prompt in islice(prompts, sizes.prompts)]
    files["text"] = [{"text": write_text(random, prompt)} for prompt in islice(prompts, sizes.text)]
    return files


def unique_prompts(random: Random) -> Iterator[str]:
    """An endless stream of distinct prompts."""
    seen: set[str] = set()
    while True:
        if (prompt := synthetic.write_prompt(random)) not in seen:
            seen.add(prompt)
            yield prompt


def write_demonstration(random: Random, prompt: str) -> Row:
    """A prompt with a reply of medium quality."""
    return {"prompt": prompt, "completion": synthetic.write_reply(random, prompt, synthetic.DEMONSTRATIONS)}


def write_pair(random: Random, prompt: str, annotators: Annotators = USUAL) -> Row:
    """Two different replies, ordered by the preference of one of the annotators."""
    first = second = synthetic.write_reply(random, prompt, synthetic.COMPARISONS)
    while second == first:
        second = synthetic.write_reply(random, prompt, synthetic.COMPARISONS)
    if random.random() >= annotators.preference(prompt, first, second):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def write_text(random: Random, prompt: str) -> str:
    """A customer's message with a reply."""
    return prompt + synthetic.write_reply(random, prompt, synthetic.PRETRAINING)


def noise_ceiling(pairs: list[Row], annotators: Annotators = USUAL) -> float:
    """Expected accuracy of a classifier that knows the annotators' preference probabilities, but not their errors."""
    chances = [annotators.preference(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    return sum(max(chance, 1 - chance) for chance in chances) / len(chances)


# --- Base model -----------------------------------------------------------------------------------------------------


def train_base(folder: Path, texts: list[str], seed: int, sizes: Sizes) -> float:
    """Train tokenizer and model on the texts and save both. Returns the loss of the last step, in nats per token."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer)
    loss = train(model, batches(tokenizer, texts, sizes.batch), sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama with a million parameters."""
    width = 128
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=416,
        initializer_range=width**-0.5,  # with the usual 0.02, narrow models learn to copy ten times as slowly
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int) -> Iterator[dict[str, Tensor]]:
    """An endless stream of padded batches of texts of similar length, each text ended by EOS.

    Ids and labels are int64 `[B, T]`; labels are -100 at padding.
    """
    sequences = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    lengths = [len(sequence) for sequence in sequences]
    order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(0))
    for start in count(0, size):
        batch = [torch.tensor(sequences[order[i % len(sequences)]]) for i in range(start, start + size)]
        ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        yield {"input_ids": ids, "labels": labels}


def train(model: LlamaForCausalLM, data: Iterator[dict[str, Tensor]], sizes: Sizes) -> float:
    """Train with AdamW, linear warm-up and cosine decay. Returns the last step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()
    loss = torch.tensor(0.0)
    for step, batch in enumerate(islice(data, sizes.steps)):
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * rate_factor(step, sizes.steps)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up to 1 over the first twentieth of the steps, then cosine decay to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


if __name__ == "__main__":
    main()
