"""Tiny random models of many families through everything that a policy is put through."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from policies.batching import collate
from policies.build import build_trunk
from policies.errors import UserError
from policies.export import export_adapter, export_merged
from policies.files.adapters import save_adapter
from policies.files.base_model import load_base
from policies.layers import native
from policies.logprobs import token_logprobs
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine
from tests.integration.tiny_run import figures, make_settings, run_in_process

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LLAMA | {"tie_word_embeddings": True},
    "mistral": LLAMA | {"sliding_window": 6},
    "qwen2": LLAMA | {"vocab_size": 304},  # transformers adds a token to the tokenizers of this family
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma2": LLAMA
    | {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "phi3": LLAMA | {"pad_token_id": 0},
    "olmo2": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "gpt_neox": SIZES | {"intermediate_size": 48},
    "opt": SIZES | {"ffn_dim": 48, "init_std": 0.2, "word_embed_proj_dim": 32},
    "falcon": SIZES | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "mixtral": LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2},
}
METHODS = {
    "lora": PolicySettings(rank=4, alpha=8),
    "dora": PolicySettings(rank=4, alpha=8, dora=True),
    "qlora": PolicySettings(method="qlora", rank=4, alpha=8),
    "ia3": PolicySettings(method="ia3"),
    "bottleneck": PolicySettings(method="bottleneck", bottleneck=8),
    "bitfit": PolicySettings(method="bitfit"),
    "layer_norm": PolicySettings(method="layer_norm"),
    "top_layers": PolicySettings(method="top_layers", layers=1),
    "feature": PolicySettings(method="feature"),
    "prompt_tuning": PolicySettings(method="prompt_tuning", virtual_tokens=3),
    "p_tuning": PolicySettings(method="p_tuning", virtual_tokens=3),
    "prefix_tuning": PolicySettings(method="prefix_tuning", virtual_tokens=3),
    "full": PolicySettings(method="full"),
}
UNMERGED = ("bottleneck", "prompt_tuning", "p_tuning", "prefix_tuning")
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34]]
RESPONSES = [[40, 41, 42], [50, 51, 52, 53, 54, 55, 56, 57, 58], [60]]

outcomes: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and folder of a tiny model; the tokenizer is not needed."""
    tokenizer = request.getfixturevalue("tiny_tokenizer")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer)} | FAMILIES[request.param]
    config = AutoConfig.for_model(request.param, eos_token_id=1, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and gains that are not all alike, so that a lost one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def far_off(trunk: Trunk, role: str) -> Trunk:
    generator = torch.Generator().manual_seed(1)
    weights = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in trunk.read_adapter(role).items()}
    trunk.write_adapter(role, weights)
    return trunk


@torch.no_grad()
def scored(trunk: Trunk, role: str) -> Tensor:
    batch = collate(PROMPTS, RESPONSES)
    states = trunk.hidden_packed(batch.ids, batch.lengths, role)
    return token_logprobs(states[batch.predictors], batch.response_ids, lambda h: trunk.head(h, role), 1.0)


def check(name: str, what: str, does: Callable[[], str]) -> None:
    """Run a check and note its outcome for the table."""
    try:
        outcomes[name, what] = does()
    except UserError as error:
        outcomes[name, what] = "refused"
        refused = str(error)
        assert "policy." in refused or "export" in refused, refused
    except BaseException:
        outcomes[name, what] = "✗"
        raise


def test_log_probabilities_are_those_of_the_model_itself_row_by_row(family: tuple[str, Path]) -> None:
    name, folder = family

    @torch.no_grad()
    def does() -> str:
        trunk = build_trunk(ModelSettings(path=str(folder)), METHODS["lora"], ("policy",))
        model = AutoModelForCausalLM.from_pretrained(folder)
        alone = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([prompt + response])
            whole = torch.log_softmax(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0], -1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            alone.append(whole[places, torch.tensor(response)])
        torch.testing.assert_close(scored(trunk, ""), torch.cat(alone), rtol=1e-4, atol=1e-4)
        return "✓" if trunk.supports_packing else "padded"

    check(name, "log-probabilities", does)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_gradient_of_a_packed_batch_is_the_sum_of_the_model_itself_row_by_row(
    family: tuple[str, Path], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = family
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    trunk = build_trunk(ModelSettings(path=str(folder), dtype="float32"), METHODS["full"], ("policy",))
    trunk.train_only("policy")
    batch = collate(PROMPTS, RESPONSES)
    states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
    (
        -token_logprobs(states[batch.predictors], batch.response_ids, partial(trunk.head, role="policy"), 1.0).sum()
    ).backward()
    packed = {name: weight.grad for name, weight in trunk.adapter("policy").items()}

    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").backward()
    alone = {name: weight.grad for name, weight in model.named_parameters()}

    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    assert packed.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-5, atol=1e-5 * largest)


def test_a_model_without_one_of_its_tensors_is_refused(family: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = family
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if ".0." not in name:  # both layers are alike
            rest = {other: tensor for other, tensor in weights.items() if other != name}
            save_file(rest, copy / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(UserError, match=r"lack [12] of the weights|the shape of|weights that it stacks"):
                load_base(ModelSettings(path=str(copy), dtype="float32"))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in METHODS]
)
def test_a_method_gives_roles_of_their_own_that_train_sample_and_are_exported(
    family: tuple[str, Path], method: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name, folder = family
    model, settings = ModelSettings(path=str(folder)), METHODS[method]

    def does() -> str:
        trunk = build_trunk(model, settings, ("reference", "policy", SAMPLER_ROLE))
        still = "reference" if method == "full" else ""
        base = scored(trunk, still)
        far_off(trunk, "policy")
        moved = scored(trunk, "policy")
        assert (moved - base).abs().max() > 0.01
        assert torch.equal(scored(trunk, still), base)
        trunk.train_only("policy")
        batch = collate(PROMPTS, RESPONSES)
        states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
        token_logprobs(
            states[batch.predictors], batch.response_ids, lambda h: trunk.head(h, "policy"), 1.0
        ).sum().backward()
        gradients = [p.grad for p in trunk.adapter("policy").values() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        engine = TransformersEngine(trunk, frozenset(), max_num_seqs=3)
        engine.load_adapter(1, trunk.read_adapter("policy"))
        made = engine.generate([Request("", tuple(p), seed) for seed, p in enumerate(PROMPTS)], Sampling(1.0, 9))
        batch = collate([t.request.prompt_ids for t in made], [t.response_ids for t in made])
        with torch.no_grad():
            states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
            said = token_logprobs(states[batch.predictors], batch.response_ids, lambda h: trunk.head(h, "policy"), 1.0)
        torch.testing.assert_close(torch.cat([t.sampler_logprobs for t in made]), said, rtol=1e-3, atol=1e-3)
        save_adapter(tmp_path / "policy", trunk.read_adapter("policy"), settings, trunk.base)
        exports = model, settings, tmp_path / "policy", tiny_tokenizer
        if method not in (*UNMERGED, "bitfit"):
            export_merged(*exports, tmp_path / "merged")
            return "✓"
        export_adapter(*exports, tmp_path / "out")
        with contextlib.suppress(UserError):  # no place for biases, in some families
            export_merged(*exports, tmp_path / "merged")
            return "✓"
        return "adapter"

    check(name, method, does)


@pytest.mark.slow
def test_all_stages_with_a_step_of_ppo(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family

    def does() -> str:
        settings = make_settings(folder, tmp_path)
        settings["ppo"] |= {"steps": 1}
        run = run_in_process(settings)
        (step,) = (row for row in figures(run) if "policy/loss" in row)
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float))
        assert (step["learner/optimizer_steps"], step["learner/skipped_steps"]) == (4, 0)
        assert step["policy/gradient_norm"] > 0
        assert step["value/gradient_norm"] > 0
        assert step["rollout/mismatch_max"] < 1e-3
        return "✓"

    check(name, "PPO step", does)


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_came_out() -> None:
    columns = ["log-probabilities", *METHODS, "PPO step"]
    if len(outcomes) < len(FAMILIES) * len(columns):
        pytest.skip("only with all the checks of this file")
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(outcomes[name, column] for column in columns)} |" for name in FAMILIES]
    table = "\n".join(lines)
    if os.environ.get("ALIGN_WRITE_DOCS"):
        text = TABLE.read_text()
        start, end = text.index("| family |"), text.rindex("|\n") + 2
        TABLE.write_text(text[:start] + table + "\n" + text[end:])
    assert table in TABLE.read_text(), "run this file with ALIGN_WRITE_DOCS=1"
