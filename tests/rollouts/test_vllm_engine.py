"""The engine on vLLM, where it is installed: `make vllm`."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("vllm")

from policies.files.adapters import tensor_digests, weights_digest
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine, build_transformers_engine
from rollouts.vllm_engine import VllmEngine

POLICY = PolicySettings(rank=4, alpha=8)
SETTINGS = {"rows": 8, "stop": [".", " dog"]}
REQUESTS = [Request("x", (5 + i, 6, 7, *range(8, 8 + i % 5)), i) for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> ModelSettings:
    """A random Llama whose heads are as wide as vLLM's kernels want them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tiny_tokenizer.eos_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return ModelSettings(path=str(folder))


@pytest.fixture(scope="module")
def engine(model: ModelSettings) -> VllmEngine:
    vllm = {"max_model_len": 256, "enforce_eager": True}
    made = build_engine(model, POLICY, RolloutSettings(engine="vllm", workers=1, vllm=vllm, **SETTINGS))
    assert isinstance(made, VllmEngine)
    return made


@pytest.fixture(scope="module")
def ours(model: ModelSettings) -> TransformersEngine:
    return build_transformers_engine(model, POLICY, RolloutSettings(**SETTINGS))


def versions(model: ModelSettings) -> list[dict[str, torch.Tensor]]:
    first = build_trunk(model, POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    return [{name: tensor + 0.03 * version for name, tensor in first.items()} for version in range(3)]


def test_greedy_text_and_logprobs_are_those_of_transformers_under_each_adapter(
    engine: VllmEngine, ours: TransformersEngine, model: ModelSettings
) -> None:
    texts = set()
    for version, weights in enumerate(versions(model)):
        assert engine.load_adapter(version, weights) == weights_digest(tensor_digests(weights))
        ours.load_adapter(version, weights)
        theirs, expected = (e.generate(REQUESTS, Sampling(0.0, 16)) for e in (engine, ours))
        assert [t.response_ids for t in theirs] == [t.response_ids for t in expected]
        assert [t.ended for t in theirs] == [t.ended for t in expected]
        for mine, other in zip(expected, theirs, strict=True):
            torch.testing.assert_close(other.sampler_logprobs, mine.sampler_logprobs, atol=1e-4, rtol=0)
        assert {v for t in theirs for v in t.versions} == {version}
        texts.add(tuple(t.response_ids for t in theirs))
    assert len(texts) > 1


def test_samples_carry_the_logprobs_of_their_temperature(
    engine: VllmEngine, ours: TransformersEngine, model: ModelSettings
) -> None:
    weights = versions(model)[1]
    engine.load_adapter(1, weights)
    sampled = engine.generate(REQUESTS, Sampling(0.7, 16))
    trunk = ours.trunk
    trunk.write_adapter(SAMPLER_ROLE, weights)
    for t in sampled:
        ids = torch.tensor([[*t.request.prompt_ids, *t.response_ids]])
        with torch.no_grad():
            logits = trunk.head(trunk.hidden(ids, SAMPLER_ROLE), SAMPLER_ROLE)[0, len(t.request.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits / 0.7, -1)
        expected = logprobs.gather(-1, torch.tensor(t.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(t.sampler_logprobs, expected, atol=1e-4, rtol=0)


def test_a_response_goes_on_under_other_weights(
    engine: VllmEngine, ours: TransformersEngine, model: ModelSettings
) -> None:
    stretched, weights = Sampling(0.0, 16, segment_tokens=6), versions(model)
    trajectories: list[list[Trajectory]] = []
    for each in (engine, ours):
        requests, made = REQUESTS, []
        for version in (1, 2, 2):
            each.load_adapter(version, weights[version])
            made = [*made, *each.generate(requests, stretched)]
            requests = [
                replace(t.request, partial_response=t) for t in made[-len(requests) :] if stretched.is_unfinished(t)
            ]
        trajectories.append(made)
    for theirs, expected in zip(*trajectories, strict=True):
        assert (theirs.request, theirs.response_ids) == (expected.request, expected.response_ids)
        assert (theirs.ended, theirs.versions) == (expected.ended, expected.versions)
        torch.testing.assert_close(theirs.sampler_logprobs, expected.sampler_logprobs, atol=1e-4, rtol=0)
    assert any({*t.versions} == {1, 2} for t in trajectories[0])


def test_a_sample_that_goes_on_does_not_repeat_its_draws(engine: VllmEngine) -> None:
    requests, stretched = [Request("x", (5, 6, 7), seed) for seed in range(12)], Sampling(2.0, 12, segment_tokens=6)
    going = [t for t in engine.generate(requests, stretched) if stretched.is_unfinished(t)]
    assert going
    for begun, more in zip(going, engine.generate([replace(t.request, partial_response=t) for t in going], stretched)):
        assert more.response_ids[:6] == begun.response_ids != more.response_ids[6:]


def test_a_response_depends_on_its_seed(engine: VllmEngine) -> None:
    one, same, other = (engine.generate([Request("x", (5, 6, 7), seed)], Sampling(1.0, 24))[0] for seed in (1, 1, 2))
    assert one.response_ids == same.response_ids != other.response_ids


def test_a_response_ends_at_a_stop_string_or_the_limit(engine: VllmEngine, ours: TransformersEngine) -> None:
    assert ours.stop_strings
    sampled = engine.generate([Request("x", (5 + i, 6), i) for i in range(40)], Sampling(1.0, 24))
    assert {t.ended for t in sampled} == {True, False}
    for t in sampled:
        stops = [ours.stop_strings(t.response_ids[:n]) or t.response_ids[n - 1] in ours.stop_ids
                 for n in range(1, t.length + 1)]  # fmt: skip
        assert stops == [*[False] * (t.length - 1), t.ended]
        assert t.ended or t.length == 24
