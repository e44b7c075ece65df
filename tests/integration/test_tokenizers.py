"""Tokenizers as they come: what is no part of a text must change no figure."""

import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from align.config.load import load_experiment
from align.config.schema import Experiment
from align.stages.pipeline import load_datasets
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, build_transformers_engine
from tests.integration.tiny_run import figures, make_settings, run_in_process


def no_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = None


def pad_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def left(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = tokenizer.truncation_side = "left"


def wrapped(tokenizer: PreTrainedTokenizerBase) -> None:
    """With a BOS before and an EOS behind every text, as some tokenizers add them."""
    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    bos, eos = (("<pad>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=[bos, eos])


def with_tokenizer(model: Path, folder: Path, change: object) -> Path:
    """A copy of a model with its tokenizer changed."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert callable(change)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "change", [pad_is_eos, pytest.param(no_pad, marks=pytest.mark.slow), pytest.param(left, marks=pytest.mark.slow)]
)
def test_the_pad_token_and_the_side_of_padding_change_no_figure(
    change: object, tiny_model: Path, tmp_path: Path
) -> None:
    plain = make_settings(tiny_model, tmp_path)
    other = plain | {"name": "other", "model": {"path": str(with_tokenizer(tiny_model, tmp_path / "m", change))}}
    assert figures(run_in_process(other)) == figures(run_in_process(plain))


def test_a_bos_stands_once_before_the_prompt_and_no_eos_behind_it(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    plain = load_datasets(Experiment.model_validate(settings))
    settings["model"] = {"path": str(with_tokenizer(tiny_model, tmp_path / "m", wrapped))}
    datasets = load_datasets(Experiment.model_validate(settings))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["path"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for prompt, without in zip(datasets.prompts, plain.prompts, strict=True):
        assert prompt.prompt_ids == (bos, *without.prompt_ids)
    for demonstration, bare in zip(datasets.demonstrations, plain.demonstrations, strict=True):
        assert demonstration.ids == [bos, *bare.ids]
        assert demonstration.ids.count(eos) == 1
    for preference, unmarked in zip(datasets.preferences, plain.preferences, strict=True):
        assert preference.prompt_ids == [bos, *unmarked.prompt_ids]
        assert preference.responses_ids == unmarked.responses_ids


@pytest.mark.slow
def test_a_tokenizer_that_adds_bos_and_eos_goes_through_all_stages(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["model"] = {"path": str(with_tokenizer(tiny_model, tmp_path / "m", wrapped))}
    run = run_in_process(settings)
    assert sum("policy/loss" in row for row in figures(run)) == 3
    assert load_experiment(run / "config.yaml").model.path == settings["model"]["path"]


def test_any_of_several_ids_ends_a_response(tiny_model: Path, tmp_path: Path) -> None:
    ends = {1, 10, 40, 77, 120, 200}
    shutil.copytree(tiny_model, tmp_path / "m")
    GenerationConfig(eos_token_id=sorted(ends - {1})).save_pretrained(tmp_path / "m")
    experiment = Experiment.model_validate(make_settings(tmp_path / "m", tmp_path))
    engine = build_transformers_engine(experiment.model, experiment.policy, experiment.rollouts)
    engine.load_adapter(1, engine.trunk.read_adapter(SAMPLER_ROLE))
    made = engine.generate([Request("", (5 + i,), i) for i in range(60)], Sampling(1.0, 60))
    assert len({t.response_ids[-1] for t in made if t.ended}) > 2
    for t in made:
        assert not ends.intersection(t.response_ids[:-1])
        assert (t.response_ids[-1] in ends) == t.ended
