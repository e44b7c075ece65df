"""Train a reward model by TRL's RewardTrainer on the CPU, as one side of `bench.py`.

    python experiments/reward_models/trl_reward.py --model MODEL --pairs PAIRS.jsonl

Runs in a separate environment, which `bench.py` creates. Prints one line of JSON: the seconds of each step but the
first.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--pairs", required=True, help="JSONL with `prompt`, `chosen`, `rejected`")
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA adapter")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(time.perf_counter())

    with open(arguments.pairs) as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype=torch.float32)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch,
            num_train_epochs=1,
            max_length=arguments.max_tokens,
            learning_rate=5e-4,
            gradient_checkpointing=False,  # it is on by default in TRL, and would only cost time here
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="SEQ_CLS",
                r=arguments.rank,
                lora_alpha=2 * arguments.rank,
                target_modules="all-linear",
                modules_to_save=["score"],
            ),
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"seconds": [b - a for a, b in pairwise(clock.ends)]}))


if __name__ == "__main__":
    main()
