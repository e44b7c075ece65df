from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from policies.build import make_trunk
from policies.errors import UserError
from policies.export import export_merged
from policies.files.adapters import save_adapter
from policies.files.base_model import load_base
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import Trunk
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import TransformersEngine

POLICY = PolicySettings(rank=4, alpha=8.0, dropout=0.5)
PROMPTS = [tuple(range(start, start + 2 + start % 7)) for start in range(5, 250, 20)]
TOKENS = 20


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> ModelSettings:
    return ModelSettings(path=str(tiny_model))


@pytest.fixture(scope="module")
def trunk(settings: ModelSettings) -> Trunk:
    """A live trunk whose policy is far from its base."""
    trunk = make_trunk(load_base(settings), POLICY, ("critic", "policy"))
    generator = torch.Generator().manual_seed(1)
    for role in trunk.roles:
        weights = {n: 0.15 * torch.randn(p.shape, generator=generator) for n, p in trunk.adapter(role).items()}
        trunk.write_adapter(role, weights)
    return trunk


@pytest.fixture(scope="module")
def exported(
    settings: ModelSettings,
    trunk: Trunk,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, float]:
    """The folder of the merged model, and the difference that the export measured."""
    root = tmp_path_factory.mktemp("export")
    save_adapter(root / "policy", trunk.read_adapter("policy"), trunk.settings, trunk.base)
    difference = export_merged(settings, POLICY, root / "policy", tiny_tokenizer, root / "merged")
    return root / "merged", difference


def continuations(trunk: Trunk, role: str) -> list[tuple[int, ...]]:
    engine = TransformersEngine(trunk, frozenset(), max_num_seqs=4)
    requests = [Request("", prompt, seed=0) for prompt in PROMPTS]
    return [t.response_ids for t in engine.generate(requests, Sampling(0.0, TOKENS), role)]


def test_the_merged_model_continues_as_the_live_policy_does(exported: tuple[Path, float], trunk: Trunk) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "eos_token_id": -1}
    merged: list[tuple[int, ...]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        sequences = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        merged.append(tuple(sequences[0, len(prompt) :].tolist()))
    assert merged == continuations(trunk, "policy")


def test_the_policy_of_these_tests_continues_differently_from_its_base(trunk: Trunk) -> None:
    assert all(one != other for one, other in zip(continuations(trunk, "policy"), continuations(trunk, "")))


def test_the_difference_is_measured_and_is_rounding(exported: tuple[Path, float]) -> None:
    assert 0 < exported[1] < 1e-4


def test_the_folder_has_the_tokenizer_and_no_adapter(
    exported: tuple[Path, float], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "The cat sat on the mat."
    assert AutoTokenizer.from_pretrained(exported[0])(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert not list(exported[0].glob("adapter*"))


def test_the_merged_weights_have_the_names_of_the_base(exported: tuple[Path, float], tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged = AutoModelForCausalLM.from_pretrained(exported[0])
    assert base.state_dict().keys() == merged.state_dict().keys()


@pytest.mark.parametrize(
    ("weight", "said"), [(float("nan"), "holds NaN or infinite numbers"), (1e30, "differs from the policy")]
)
def test_a_policy_whose_outputs_are_not_finite_is_refused(
    settings: ModelSettings,
    trunk: Trunk,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    weight: float,
    said: str,
) -> None:
    weights = {name: torch.full_like(tensor, weight) for name, tensor in trunk.read_adapter("policy").items()}
    save_adapter(tmp_path / "policy", weights, trunk.settings, trunk.base)
    with pytest.raises((RuntimeError, UserError), match=said):
        export_merged(settings, POLICY, tmp_path / "policy", tiny_tokenizer, tmp_path / "merged")
