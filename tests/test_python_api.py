"""The Python interface: docs/python.md is run block by block, and `import align` stays light."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

import align
from align.runs.record_files import METRICS, read_lines
from align.stages.reward import load_models
from policies.text.encoder import TextEncoder
from tests.integration.tiny_run import make_settings

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[str]:
    """The Python blocks of the document, each at its own line numbers so that a traceback names its place."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, match.start(1))
        found.append("\n" * lines_before + match[1])
    return found


@pytest.fixture
def folder_of_the_document(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the `experiment.yaml` that the document expects, as the working directory."""
    settings = make_settings(tiny_model, tmp_path) | {"runs": "runs"}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documents_blocks_run_from_top_to_bottom(folder_of_the_document: Path) -> None:
    namespace: dict[str, object] = {"__name__": "document"}
    for block in blocks():
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    assert (folder_of_the_document / "runs" / "tiny" / "report" / "index.html").is_file()


@pytest.mark.parametrize("name", align.__all__)
def test_every_stable_name_is_importable_documented_and_shown(name: str) -> None:
    assert getattr(align, name).__doc__
    assert f"`{name}`" in DOCUMENT.read_text(encoding="utf-8")
    assert name in dir(align)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        align.trainer  # noqa: B018


def test_importing_align_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "pydantic", "ray", "typer"
    code = f"import sys, align; print([name for name in {heavy!r} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_a_run_is_not_overwritten_without_replace(folder_of_the_document: Path) -> None:
    experiment = align.load_experiment("experiment.yaml", ["stages=[sft]"])
    trained = align.run(experiment)
    with pytest.raises(align.UserError, match="holds a run"):
        align.run(experiment)
    assert align.run(experiment, replace=True).path == trained.path


def test_scores_are_those_of_the_trained_reward_model(
    folder_of_the_document: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = align.run(align.load_experiment("experiment.yaml", ["stages=[sft, reward]"]))
    prompts, responses = ["User: red cat Assistant:", "User: two"], [" blue door.", " three short dogs."]
    (model,) = load_models(trained.experiment, trained.folder.reward)
    encoder = TextEncoder(tiny_tokenizer)
    exchanges = [encoder.exchange(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    prompt_ids = [exchange.prompt_ids for exchange in exchanges]
    response_ids = [exchange.response_ids for exchange in exchanges]
    expected = model.score(prompt_ids, response_ids, 256).tolist()
    assert trained.score(prompts, responses) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(align.UserError, match="not 2 prompts, 1 responses"):
        trained.score(prompts, responses[:1])
    with pytest.raises(align.UserError, match="no responses to score"):
        trained.score([], [])
    with pytest.raises(align.UserError, match="response 1 is nothing; text was expected"):
        trained.score(["a"], [None])  # type: ignore[list-item]
    with pytest.raises(align.UserError, match="prompt 2: `prompt` has a message"):
        trained.score(["a", [{"role": "user"}]], ["b", "c"])
    with pytest.raises(align.UserError, match=r"response 1 and its prompt have \d+ tokens, .* length is 2048"):
        trained.score(["a"], ["two " * 2500])
    with pytest.raises(TypeError, match=r"prompts is one text; a list was expected: \['abc'\]"):
        trained.generate("abc")


def test_stepping_ppo_by_hand_gives_the_metrics_of_a_run(folder_of_the_document: Path) -> None:
    trained = align.run(align.load_experiment("experiment.yaml"))
    lines = [line for line in read_lines(trained.path / METRICS) if line["stage"] == "ppo"]
    expected = [line["reward/mean"] for line in lines if "reward/mean" in line]
    shutil.copytree(trained.path, trained.path.with_name("by-hand"), ignore=shutil.ignore_patterns("policy", "ppo"))
    with align.build_ppo(align.load_experiment("experiment.yaml", ["name=by-hand"])) as ppo:
        assert [ppo.metrics(step)["reward/mean"] for step in ppo.steps()] == expected


def test_ppo_by_hand_needs_a_run_that_has_finished_the_other_stages(folder_of_the_document: Path) -> None:
    experiment = align.load_experiment("experiment.yaml")
    with pytest.raises(align.UserError, match="still needs: sft, reward, ppo"), align.build_ppo(experiment):
        pass


def test_what_a_run_has_not_trained_yet_is_refused(folder_of_the_document: Path) -> None:
    trained = align.run(align.load_experiment("experiment.yaml", ["stages=[sft]"]))
    assert len(trained.generate(["User: name a colour. Assistant:"])) == 1
    with pytest.raises(align.UserError, match="has no reward/, because it ends after the stages sft"):
        trained.score(["a"], ["b"])
    with pytest.raises(align.UserError, match="has no policy/, because it ends after the stages sft"):
        trained.evaluate()
    (folder_of_the_document / "taken").mkdir()
    with pytest.raises(align.UserError, match="already exists"):
        trained.export("taken")
