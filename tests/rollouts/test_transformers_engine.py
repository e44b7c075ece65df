from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from policies.build import make_trunk
from policies.files.adapters import tensor_digests, weights_digest
from policies.layers.decode_step import DecodeStep
from policies.methods.lora_trunk import lora_config
from policies.schema import PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rollouts.decoding import Decoder
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine, sample_tokens

POLICY = PolicySettings(rank=4, alpha=8.0, dropout=0.5)
STOPS = frozenset(range(1, 300, 20))
SAMPLING = Sampling(temperature=0.7, max_new_tokens=24)
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
LENGTHS = (3, 17, 1, 8, 8, 30, 2, 11)
IDS = torch.randint(2, 290, (8, 30), generator=torch.Generator().manual_seed(0)).tolist()
REQUESTS = [Request("p", tuple(IDS[seed][:length]), seed) for seed, length in enumerate(LENGTHS)]


def random_weights(trunk: Trunk, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in trunk.adapter(SAMPLER_ROLE).items()}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    """An engine of eight sequences, with random weights of version 7, and another random adapter, `policy`."""
    trunk = make_trunk(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), POLICY, ("policy", SAMPLER_ROLE)
    )
    trunk.write_adapter("policy", random_weights(trunk, 2))
    engine = TransformersEngine(trunk, STOPS, max_num_seqs=8)
    engine.load_adapter(7, random_weights(trunk, 1))
    return engine


@pytest.fixture(scope="module")
def plain(tiny_model: Path, engine: TransformersEngine) -> PeftModel:
    """The same model in plain PEFT and transformers."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    peft = get_peft_model(base, lora_config(POLICY, base.config.name_or_path))
    set_peft_model_state_dict(peft, engine.trunk.read_adapter(SAMPLER_ROLE))
    return peft.eval()


def responses(engine: TransformersEngine, requests: list[Request], sampling: Sampling) -> list[tuple[int, ...]]:
    return [t.response_ids for t in engine.generate(requests, sampling)]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_logprobs_are_those_of_a_full_forward_pass(
    engine: TransformersEngine, plain: PeftModel, temperature: float
) -> None:
    for trajectory in engine.generate(REQUESTS, Sampling(temperature, 24)):
        prompt_ids, tokens = trajectory.request.prompt_ids, torch.tensor(trajectory.response_ids)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([[*prompt_ids, *trajectory.response_ids]])).logits[0]
        logprobs = torch.log_softmax(logits[len(prompt_ids) - 1 : -1] / (temperature or 1.0), dim=-1)
        expected = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(trajectory.sampler_logprobs, expected, rtol=1e-5, atol=1e-5)


def test_responses_end_with_the_first_stop_token_and_are_otherwise_truncated(engine: TransformersEngine) -> None:
    endless = TransformersEngine(engine.trunk, frozenset(), max_num_seqs=8)
    stopped = engine.generate(REQUESTS, SAMPLING)
    for trajectory, full in zip(stopped, responses(endless, REQUESTS, SAMPLING)):
        assert len(full) == SAMPLING.max_new_tokens
        stop = next((index for index, token in enumerate(full) if token in STOPS), None)
        assert trajectory.ended is (stop is not None)
        assert trajectory.response_ids == (full if stop is None else full[: stop + 1])
    assert {trajectory.ended for trajectory in stopped} == {True, False}


def test_a_response_that_stops_at_the_limit_has_ended(engine: TransformersEngine) -> None:
    first = next(t for t in engine.generate(REQUESTS, SAMPLING) if t.ended and t.length > 1)
    for limit, ended in ((first.length, True), (first.length - 1, False)):
        (again,) = engine.generate([first.request], Sampling(SAMPLING.temperature, limit))
        assert (again.length, again.ended) == (limit, ended)


@pytest.mark.parametrize("max_num_seqs", [1, 3])
@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY])
def test_the_rest_of_the_batch_changes_no_response(
    engine: TransformersEngine, max_num_seqs: int, sampling: Sampling
) -> None:
    narrow = TransformersEngine(engine.trunk, STOPS, max_num_seqs)
    assert responses(narrow, REQUESTS[::-1], sampling)[::-1] == responses(engine, REQUESTS, sampling)


def test_same_seed_same_response_and_another_seed_another(engine: TransformersEngine) -> None:
    one, same, other = responses(engine, [Request("p", (5, 6, 7), seed) for seed in (5, 5, 6)], SAMPLING)
    assert one == same != other


def test_trajectories_carry_the_request_and_the_version(engine: TransformersEngine) -> None:
    trajectories = engine.generate(REQUESTS, SAMPLING)
    assert [t.request for t in trajectories] == REQUESTS
    assert all({*t.versions} == {7} for t in trajectories)


def continue_unfinished(
    engine: TransformersEngine, trajectories: list[Trajectory], sampling: Sampling
) -> list[Trajectory]:
    """The trajectories, with another segment in those that are unfinished."""
    unfinished = [index for index, t in enumerate(trajectories) if sampling.is_unfinished(t)]
    requests = [replace(trajectories[i].request, partial_response=trajectories[i]) for i in unfinished]
    continued = list(trajectories)
    for index, trajectory in zip(unfinished, engine.generate(requests, sampling), strict=True):
        continued[index] = trajectory
    return continued


def test_a_response_generated_in_segments_is_the_same(engine: TransformersEngine) -> None:
    uninterrupted = engine.generate(REQUESTS, SAMPLING)
    segmented = replace(SAMPLING, segment_tokens=5)
    trajectories = engine.generate(REQUESTS, segmented)
    assert max(t.length for t in trajectories) == 5
    while any(segmented.is_unfinished(t) for t in trajectories):
        trajectories = continue_unfinished(engine, trajectories, segmented)
    for actual, expected in zip(trajectories, uninterrupted, strict=True):
        torch.testing.assert_close(actual.sampler_logprobs, expected.sampler_logprobs, rtol=1e-5, atol=1e-5)
        assert (actual.request, actual.response_ids) == (expected.request, expected.response_ids)
        assert (actual.ended, actual.versions) == (expected.ended, expected.versions)


def test_a_response_continues_with_other_weights(engine: TransformersEngine, plain: PeftModel) -> None:
    """Each token has the version, and the log-probability, of the weights that it was drawn with."""
    own = engine.trunk.read_adapter(SAMPLER_ROLE)
    other = engine.trunk.read_adapter("policy")
    segmented = replace(SAMPLING, segment_tokens=7)
    partial = engine.generate(REQUESTS, segmented)
    engine.load_adapter(8, other)
    continued = continue_unfinished(engine, partial, segmented)
    assert any(t.versions == (7,) * 7 + (8,) * 7 for t in continued)
    for trajectory in continued:
        prompt_ids, ids = trajectory.request.prompt_ids, torch.tensor(trajectory.response_ids)
        for version, weights in ((7, own), (8, other)):
            set_peft_model_state_dict(plain, weights)
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([[*prompt_ids, *trajectory.response_ids]])).logits[0]
            logprobs = torch.log_softmax(logits[len(prompt_ids) - 1 : -1] / SAMPLING.temperature, dim=-1)
            drawn = torch.tensor(trajectory.versions) == version
            expected = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)[drawn]
            torch.testing.assert_close(trajectory.sampler_logprobs[drawn], expected, rtol=1e-5, atol=1e-5)
    set_peft_model_state_dict(plain, own)
    engine.load_adapter(7, own)


def test_loading_weights_changes_responses_version_and_fingerprint(engine: TransformersEngine) -> None:
    before = engine.trunk.read_adapter(SAMPLER_ROLE)
    weights = engine.trunk.read_adapter("policy")
    fingerprint = engine.load_adapter(8, weights)
    loaded = [(t.response_ids, {*t.versions}) for t in engine.generate(REQUESTS, SAMPLING)]
    engine.load_adapter(7, before)
    assert fingerprint == weights_digest(tensor_digests(weights))
    assert loaded == [(t.response_ids, {8}) for t in engine.generate(REQUESTS, SAMPLING, role="policy")]
    assert [ids for ids, _ in loaded] != responses(engine, REQUESTS, SAMPLING)


def test_greedy_responses_are_those_of_transformers_generate(engine: TransformersEngine, plain: PeftModel) -> None:
    for request, response in zip(REQUESTS, responses(engine, REQUESTS, GREEDY)):
        ids = torch.tensor([request.prompt_ids])
        options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": sorted(STOPS), "pad_token_id": 0}
        expected = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert tuple(expected[0, ids.shape[1] :].tolist()) == response


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf])
    count = 10_000
    tokens, _ = sample_tokens(
        logits.expand(count, -1), torch.arange(count, dtype=torch.float64) / count, temperature=2.0
    )
    frequencies = torch.bincount(tokens, minlength=7) / count
    torch.testing.assert_close(frequencies, torch.softmax(logits / 2.0, -1), rtol=0, atol=2 / count)
    assert not frequencies[logits.isinf()].any()


def forward_shapes(engine: TransformersEngine, requests: list[Request]) -> list[tuple[int, int]]:
    """Sequences and tokens per sequence of every forward pass."""
    seen: list[tuple[int, int]] = []
    prefill = engine.trunk.states
    decode = DecodeStep.__call__

    def watched_prefill(**inputs: Any) -> torch.Tensor:
        sequences, tokens = inputs["input_ids"].shape
        seen.append((sequences, tokens))
        return prefill(**inputs)

    def watched_decode(self: DecodeStep, role: str, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((len(ids), 1))
        return decode(self, role, ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.trunk, "states", watched_prefill)
        patch.setattr(DecodeStep, "__call__", watched_decode)
        engine.generate(requests, SAMPLING)
    return seen


def test_a_prompt_shared_by_several_sequences_is_prefilled_once(engine: TransformersEngine) -> None:
    requests = [Request("p", tuple(IDS[i % 2][: 5 + i % 2]), seed) for i, seed in enumerate(range(8))]
    prefill, *decoding = forward_shapes(engine, requests)
    assert prefill == (2, 6)
    assert decoding[0] == (8, 1)


def test_waiting_requests_are_admitted_while_others_are_decoded(engine: TransformersEngine) -> None:
    narrow = TransformersEngine(engine.trunk, STOPS, max_num_seqs=4)
    requests = [Request("p", tuple(IDS[i % 8][: LENGTHS[i % 8]]), seed=i) for i in range(24)]
    shapes = forward_shapes(narrow, requests)
    prefills = [(sequences, tokens) for sequences, tokens in shapes if tokens > 1 or sequences > 4]
    assert len(prefills) > 2
    assert max(sequences for sequences, tokens in shapes if tokens == 1) <= 4
    wide = TransformersEngine(engine.trunk, STOPS, max_num_seqs=24)
    assert responses(narrow, requests, SAMPLING) == responses(wide, requests, SAMPLING)


def test_a_model_with_a_sliding_window_decodes_in_waves() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6,
    )  # fmt: skip
    trunk = make_trunk(MistralForCausalLM(config).eval(), POLICY, (SAMPLER_ROLE,))
    alone = [TransformersEngine(trunk, STOPS, max_num_seqs=1).generate([r], SAMPLING)[0].response_ids for r in REQUESTS]
    assert responses(TransformersEngine(trunk, STOPS, max_num_seqs=3), REQUESTS, SAMPLING) == alone


def test_a_finished_sequence_does_not_run_past_the_positions_of_the_model() -> None:
    """Sequences admitted later are decoded while it is still in the batch."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=30)
    trunk = make_trunk(GPT2LMHeadModel(config).eval(), POLICY, (SAMPLER_ROLE,))
    requests = [Request("p", tuple(IDS[i % 8][: 6 - i % 2]), seed=i) for i in range(80)]
    trajectories = TransformersEngine(trunk, STOPS, max_num_seqs=16).generate(requests, SAMPLING)
    assert max(t.length for t in trajectories) == SAMPLING.max_new_tokens
    assert len({t.length for t in trajectories}) > 5


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["sampled", "greedy"])
def test_streamed_tokens_are_those_that_generate_gives(engine: TransformersEngine, sampling: Sampling) -> None:
    for request in REQUESTS:
        (expected,) = engine.generate([request], sampling)
        tokens = []
        stream = engine.stream(request, sampling)
        try:
            while True:
                tokens.append(next(stream))
        except StopIteration as end:
            streamed = end.value
        assert tuple(tokens) == expected.response_ids
        assert torch.equal(streamed.sampler_logprobs, expected.sampler_logprobs)
        assert streamed.ended is expected.ended


def test_a_stream_draws_a_token_only_when_the_next_one_is_taken(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Decoder.step

    def counted_step(decoder: Decoder, tokens: torch.Tensor, unfinished: Sequence[bool]) -> torch.Tensor:
        steps.append(1)
        return step(decoder, tokens, unfinished)

    monkeypatch.setattr(Decoder, "step", counted_step)
    endless = TransformersEngine(engine.trunk, frozenset(), max_num_seqs=8)
    stream = endless.stream(REQUESTS[0], SAMPLING)
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(steps) == 2
    assert not torch.is_inference_mode_enabled()


def test_a_recurrent_model_samples_as_it_scores() -> None:
    """Prompts of several lengths: a recurrent state would go through the padding of the shorter ones."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "recurrent_gemma",
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        lru_width=32,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    trunk = make_trunk(model, PolicySettings(rank=4, alpha=8.0), (SAMPLER_ROLE,))
    engine = TransformersEngine(trunk, frozenset(), max_num_seqs=4)
    engine.load_adapter(0, trunk.read_adapter(SAMPLER_ROLE))
    requests = [Request("", tuple(range(5, 5 + length)), seed=length) for length in (2, 5, 9)]
    for trajectory in engine.generate(requests, Sampling(1.0, 6)):
        ids = torch.tensor([[*trajectory.request.prompt_ids, *trajectory.response_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
        start = len(trajectory.request.prompt_ids)
        scored = [float(logprobs[start + index - 1, token]) for index, token in enumerate(trajectory.response_ids)]
        assert trajectory.sampler_logprobs.tolist() == pytest.approx(scored, abs=1e-4)
