"""SFT or DPO by TRL: the other side of supervised.py. Reads the job as JSON on stdin, prints its figures as JSON."""

import json
import sys
import time

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

spent = []
"""Seconds of each timed call."""


def timed(function):
    def call(*arguments, **options):
        started = time.perf_counter()
        result = function(*arguments, **options)
        spent.append(time.perf_counter() - started)
        return result

    return call


job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(job["model"])
rows = load_dataset("json", data_files=job["rows"], split="train")
lora = None
if job["method"] == "lora":
    lora = LoraConfig(
        r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
common = {
    "output_dir": job["to"],
    "num_train_epochs": 1,
    "learning_rate": job["learning_rate"],
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": job["max_tokens"],
    "seed": 0,
}
if job["task"] == "sft":
    # A batch of packed rows has about as many tokens as a batch of rows by themselves.
    batch = job["packed_batch"] if job["packing"] else job["batch"]
    arguments = SFTConfig(**common, per_device_train_batch_size=batch, packing=job["packing"])
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
else:
    arguments = DPOConfig(
        **common, per_device_train_batch_size=job["batch"], beta=job["beta"], precompute_ref_log_probs=True
    )
    DPOTrainer._precompute_ref_logps = timed(DPOTrainer._precompute_ref_logps)
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
trainer.train = timed(trainer.train)
trainer.train()
seconds = sum(spent)
trainer.save_model(job["to"])
print(json.dumps({"seconds": seconds, "steps": trainer.state.global_step}))
