"""EleutherAI's evaluation harness on an exported model, with a task in a file; nothing is downloaded."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import align
from tests.integration.tiny_run import ENVIRONMENT, WORDS, make_settings, run_in_process, write_rows

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

TASK = """task: doors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_the_harness_measures_the_exported_model(tiny_model: Path, tmp_path: Path) -> None:
    run = align.open_run(run_in_process(make_settings(tiny_model, tmp_path) | {"stages": ["sft"]}))
    run.export(tmp_path / "model", merge=True)
    texts = [f"the {word} is by the door" for word in WORDS]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "doors.yaml").write_text(TASK.format(file=file))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "doors", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    command += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "results")]
    environment = ENVIRONMENT | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=250, capture_output=True)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(results.read_text())["results"]["doors"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits_per_byte(tmp_path / "model", texts), rel=1e-4)


def bits_per_byte(model: Path, texts: list[str]) -> float:
    """By plain transformers: the first token after EOS, and no EOS at the end, as the harness does it."""
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logprobs = causal(input_ids=ids).logits[0, :-1].log_softmax(-1)
        bits -= float(logprobs.gather(-1, ids[0, 1:, None]).sum()) / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)
