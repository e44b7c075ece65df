"""Run PPO in TRL 1.12.0, the last release that has it, on the CPU.

    python experiments/benchmarks/trl_ppo.py --model MODEL --prompts PROMPTS.jsonl

Runs in a separate environment, which `bench.py` creates. Prints one line of JSON: seconds and response tokens of each
update but the first. Where TRL's defaults are known to be faulty, the settings follow its own advice: no gradient
accumulation, one minibatch per epoch, stop at EOS. TRL always trains all weights of its critic.
"""

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise
from typing import Any

os.environ.update(
    TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false"
)


def main() -> None:
    arguments = parse_arguments()

    import torch

    torch.set_num_threads(arguments.threads)
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    models = load_models(arguments)
    data = load_prompts(arguments, tokenizer)
    ends: list[float] = []
    tokens: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())
            if arguments.save_every and len(ends) % arguments.save_every == 0:
                trainer.model.policy.save_pretrained(f"{arguments.to}/{len(ends)}")

    first_true = ppo_trainer.first_true_indices

    def count_tokens(bools: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        """Wrap the function by which TRL finds the end of each response: only there the true lengths are visible."""
        first = first_true(bools, *rest, **named)
        if bools.shape[-1] <= arguments.response:
            tokens.append(float(first.clamp(max=arguments.response).sum()))
        return first

    ppo_trainer.first_true_indices = count_tokens
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(output_dir=folder, **ppo_options(arguments))
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            ref_model=None,
            **models,
            train_dataset=data,
            eval_dataset=data.select(range(4)),
            peft_config=LoraConfig(
                r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.add_callback(Clock())
        trainer.train()
    seconds = [after - before for before, after in pairwise(ends)]
    calls = len(tokens) // len(ends)  # per update; the last call locates the first pad token, after EOS
    print(json.dumps({"seconds": seconds, "tokens": tokens[2 * calls - 1 :: calls]}))


def load_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """The policy, and the reward and value models, under the trainer's names."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = arguments.reward or arguments.model
    return {
        "model": AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(
            classifier, dtype=torch.float32, num_labels=1
        ),
        "value_model": AutoModelForSequenceClassification.from_pretrained(
            classifier, dtype=torch.float32, num_labels=1
        ),
    }


def load_prompts(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """As many tokenized prompts as the updates need, repeated if there are too few."""
    from datasets import Dataset

    with open(arguments.prompts) as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    needed = arguments.batch * (arguments.updates + 1)
    repeated = (prompts * (needed // len(prompts) + 1))[:needed]
    return Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in repeated]})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model and its tokenizer")
    parser.add_argument("--prompts", required=True, help="JSONL with a `prompt` on each line")
    parser.add_argument("--batch", type=int, default=32, help="episodes per update")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--response", type=int, default=64, help="maximum number of new tokens")
    parser.add_argument("--epochs", type=int, default=4, help="PPO epochs per update")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA adapter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reward", help="folder of the classifier: reward and initial critic; default: MODEL")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of policy and critic")
    parser.add_argument("--penalty", type=float, help="subtracted from the score of a response without EOS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="updates between adapters written to --to; 0: none")
    parser.add_argument("--to", help="folder for the adapters")
    return parser.parse_args()


def ppo_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of TRL's PPO."""
    return {
        "per_device_train_batch_size": arguments.batch,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": arguments.epochs,
        "total_episodes": arguments.batch * (arguments.updates + 1),
        "response_length": arguments.response,
        "stop_token": "eos",
        "temperature": 1.0,
        "kl_coef": 0.05,
        "learning_rate": arguments.rate,
        "lr_scheduler_type": "constant",
        "missing_eos_penalty": arguments.penalty,
        "local_rollout_forward_batch_size": arguments.batch,
        "num_sample_generations": 0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "seed": arguments.seed,
        "gradient_checkpointing": False,
    }


if __name__ == "__main__":
    main()
