"""Conversations through all stages: what SFT teaches is what is sampled, scored and generated."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from align.outputs.export import export_run
from align.outputs.trained_run import open_run
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from tests.integration.tiny_run import make_settings, run_in_process, write_rows
from tests.policies.text.layouts import LAYOUTS, make_tokenizer
from tests.random_models import save_llama

REPLIES = {"My lamp is broken.": "Is the bulb old?", "No, it is new.": "Then check the fuse.", "Thanks!": "Good bye."}


def messages(*questions: str) -> list[dict[str, str]]:
    turns = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": REPLIES[question]})
    return turns


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages on conversations, with a tokenizer whose EOS is not what its template ends turns with."""
    folder = tmp_path_factory.mktemp("conversations")
    tokenizer = make_tokenizer(LAYOUTS["gemma"])
    model = save_llama(folder / "model", tokenizer, hidden_size=48, intermediate_size=96, num_attention_heads=2)
    orders = [tuple(REPLIES), ("Thanks!",), ("No, it is new.", "Thanks!"), ("My lamp is broken.",)]
    rows: list[dict[str, Any]] = [{"messages": messages(*order)} for order in orders]
    prompts = [{"prompt": row["messages"][:-1]} for row in rows]
    pairs = [{"prompt": row["messages"][:-1], "chosen": "Good bye.", "rejected": "No."} for row in rows]
    settings = make_settings(model, folder)
    sources = {"demonstrations": rows * 4, "demonstrations_heldout": rows, "preferences": pairs, "prompts": prompts}
    for name, examples in sources.items():
        settings["data"][name] = write_rows(folder / f"{name}-chat.jsonl", examples)
    settings["policy"] = {"rank": 16, "alpha": 32}
    settings["sft"] = {"batch_size": 8, "epochs": 60, "learning_rate": 0.01}
    settings["rollouts"] |= {"max_new_tokens": 12}
    settings["learner"] |= {"policy_learning_rate": 0.0}
    return run_in_process(settings)


def test_a_model_learns_to_end_its_turns_as_the_template_does(run: Path) -> None:
    trained = open_run(run)
    tokenizer = trained.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end != tokenizer.eos_token_id
    asked = messages(*REPLIES)
    for turn in (0, 2, 4):
        prompt = asked[: turn + 1]
        ids = tuple(trained.encoder.prompt(prompt))
        (trajectory,) = trained._engine.generate([Request(prompt, ids, 0)], Sampling(0.0, 12))
        assert trajectory.ended
        assert trajectory.response_ids[-1] == end
        assert trained.generate([prompt], temperature=0) == [asked[turn + 1]["content"]]


def test_what_is_sampled_is_what_was_trained_token_for_token(run: Path) -> None:
    trained = open_run(run)
    asked = messages(*REPLIES)
    whole = trained.encoder.conversation(asked, "all")
    for turn, (start, stop) in zip((0, 2, 4), whole.turns, strict=True):
        ids = tuple(trained.encoder.prompt(asked[: turn + 1]))
        (trajectory,) = trained._engine.generate([Request("", ids, 0)], Sampling(0.0, 12))
        assert list(ids) == whole.ids[:start]
        assert list(trajectory.response_ids) == whole.ids[start:stop]


def test_a_base_without_a_template_is_given_one_everywhere(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    rows = [{"messages": messages(*REPLIES)}] * 12
    settings["model"]["chat_template"] = "plain"
    settings["data"]["demonstrations"] = write_rows(tmp_path / "chat.jsonl", rows)
    settings["data"]["demonstrations_heldout"] = write_rows(tmp_path / "heldout.jsonl", rows[:2])
    trained = open_run(run_in_process(settings | {"stages": ["sft"]}))
    prompt = messages(*REPLIES)[:1]
    expected = "User:\nMy lamp is broken.\n\nAssistant:\n"
    assert trained.tokenizer.decode(trained.encoder.prompt(prompt)) == expected
    assert len(trained.generate([prompt], temperature=0)) == 1
    export_run(trained.experiment, trained.folder, tmp_path / "model", "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) == expected
    assert "the chat template `plain`" in (tmp_path / "model" / "README.md").read_text()
