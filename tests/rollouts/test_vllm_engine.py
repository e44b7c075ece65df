"""The engine on vLLM, where it is installed (`make vllm`), against the engine on transformers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("vllm")

from policies.build import build_trunk
from policies.files.adapters import tensor_digests, weights_digest
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.build import build_engine
from rollouts.engine import Engine, Sampling
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine, build_transformers_engine
from rollouts.vllm_engine import VllmEngine
from tests.random_models import save_llama

POLICY = PolicySettings(rank=4, alpha=8)
STOP = [".", " dog"]
REQUESTS = [Request("x", (5 + i, 6, 7, *range(8, 8 + i % 5)), i) for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> ModelSettings:
    """A random Llama with a head dimension that vLLM's kernels support."""
    folder = save_llama(
        tmp_path_factory.mktemp("model"),
        tiny_tokenizer,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return ModelSettings(path=str(folder))


@pytest.fixture(scope="module")
def engine(model: ModelSettings) -> VllmEngine:
    vllm = {"max_model_len": 256, "enforce_eager": True}
    settings = RolloutSettings(engine="vllm", workers=1, vllm=vllm, max_num_seqs=8, stop=STOP)
    engine = build_engine(model, POLICY, settings)
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="module")
def reference(model: ModelSettings) -> TransformersEngine:
    return build_transformers_engine(model, POLICY, RolloutSettings(max_num_seqs=8, stop=STOP))


def versions(model: ModelSettings) -> list[AdapterWeights]:
    first = build_trunk(model, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    adapters: list[AdapterWeights] = []
    for version in range(3):
        adapters.append({name: tensor + 0.03 * version for name, tensor in first.items()})
    return adapters


def test_greedy_text_and_logprobs_are_those_of_transformers_under_each_adapter(
    engine: VllmEngine, reference: TransformersEngine, model: ModelSettings
) -> None:
    texts = set()
    for version, weights in enumerate(versions(model)):
        assert engine.load_adapter(version, weights) == weights_digest(tensor_digests(weights))
        reference.load_adapter(version, weights)
        actual = engine.generate(REQUESTS, Sampling(0.0, 16))
        expected = reference.generate(REQUESTS, Sampling(0.0, 16))
        for one, other in zip(actual, expected, strict=True):
            assert one.response_ids == other.response_ids
            assert one.ended == other.ended
            torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=1e-4, rtol=0)
        assert all({*t.versions} == {version} for t in actual)
        texts.add(tuple(t.response_ids for t in actual))
    assert len(texts) > 1


def test_samples_carry_the_logprobs_of_their_temperature(
    engine: VllmEngine, reference: TransformersEngine, model: ModelSettings
) -> None:
    weights = versions(model)[1]
    engine.load_adapter(1, weights)
    sampled = engine.generate(REQUESTS, Sampling(0.7, 16))
    trunk = reference.trunk
    trunk.write_adapter(SAMPLER_ROLE, weights)
    for t in sampled:
        ids = torch.tensor([[*t.request.prompt_ids, *t.response_ids]])
        with torch.no_grad():
            logits = trunk.head(trunk.hidden(ids, SAMPLER_ROLE), SAMPLER_ROLE)[0, len(t.request.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits / 0.7, -1)
        expected = logprobs.gather(-1, torch.tensor(t.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(t.sampler_logprobs, expected, atol=1e-4, rtol=0)


def generate_in_segments(
    engine: Engine, sampling: Sampling, versions: Sequence[tuple[int, AdapterWeights]]
) -> list[Trajectory]:
    """The trajectories of every segment, each segment with its version of the weights."""
    trajectories: list[Trajectory] = []
    requests = REQUESTS
    for version, weights in versions:
        engine.load_adapter(version, weights)
        segment = engine.generate(requests, sampling)
        requests = [replace(t.request, partial_response=t) for t in segment if sampling.is_unfinished(t)]
        trajectories += segment
    return trajectories


def test_a_response_continues_with_other_weights(
    engine: VllmEngine, reference: TransformersEngine, model: ModelSettings
) -> None:
    weights = versions(model)
    segmented = Sampling(0.0, 16, segment_tokens=6)
    segments = [(1, weights[1]), (2, weights[2]), (2, weights[2])]
    actual = generate_in_segments(engine, segmented, segments)
    expected = generate_in_segments(reference, segmented, segments)
    for one, other in zip(actual, expected, strict=True):
        assert (one.request, one.response_ids) == (other.request, other.response_ids)
        assert (one.ended, one.versions) == (other.ended, other.versions)
        torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=1e-4, rtol=0)
    assert any({*t.versions} == {1, 2} for t in actual)


def test_a_continued_sample_does_not_repeat_its_draws(engine: VllmEngine) -> None:
    requests = [Request("x", (5, 6, 7), seed) for seed in range(12)]
    segmented = Sampling(2.0, 12, segment_tokens=6)
    unfinished = [t for t in engine.generate(requests, segmented) if segmented.is_unfinished(t)]
    assert unfinished
    continued = engine.generate([replace(t.request, partial_response=t) for t in unfinished], segmented)
    for first, both in zip(unfinished, continued, strict=True):
        assert both.response_ids[:6] == first.response_ids != both.response_ids[6:]


def test_a_response_depends_on_its_seed(engine: VllmEngine) -> None:
    one, same, other = (engine.generate([Request("x", (5, 6, 7), seed)], Sampling(1.0, 24))[0] for seed in (1, 1, 2))
    assert one.response_ids == same.response_ids != other.response_ids


def test_a_response_ends_at_a_stop_string_or_the_limit(engine: VllmEngine, reference: TransformersEngine) -> None:
    assert reference.stop_strings
    sampled = engine.generate([Request("x", (5 + i, 6), i) for i in range(40)], Sampling(1.0, 24))
    assert {t.ended for t in sampled} == {True, False}
    for t in sampled:
        prefixes = [t.response_ids[:length] for length in range(1, t.length + 1)]
        stops = [reference.stop_strings(ids) or ids[-1] in reference.stop_ids for ids in prefixes]
        assert stops == [*[False] * (t.length - 1), t.ended]
        assert t.ended or t.length == 24
