"""Documents and messages agree with the code: commands, settings, targets, files and links exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from align.config.load import load_experiment
from align.config.stage import stages_table
from tests.documents import (
    ROOT,
    SECTIONS,
    Block,
    blocks_of,
    documents,
    inline_code,
    parse_align,
    setting_exists,
    setting_names,
)

MINIMAL = ("name=documents", "model.path=my-model")
COMMENT = re.compile(r"(^|\s)#.*$")
OTHER_COMMANDS = (". .venv/bin/activate", ".ci/run", "git ", "pip install", "pre-commit ")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")
DOTTED = re.compile(rf"(?<![\w.:/-])(?:{'|'.join(SECTIONS)})(?:\.[A-Za-z_]+)+(?![\w(])")
FILE_ENDINGS = {"json", "jsonl", "py", "yaml", "md", "safetensors", "png", "html", "jinja", "txt"}
SETTING_IN_CODE = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)(?:=|: )\S.*")
TESTED_ELSEWHERE = {"docs/python.md"}
"""Its Python blocks have a test of their own."""
NOT_SETTINGS = {"model.generate", "model.config", "model.config.label_mean"}
"""Dotted names that begin as a section does, and are something else."""
SECTION_OF_PAGE = {"ppo.md": "ppo", "rollouts.md": "rollouts", "rewards.md": "reward"}
"""Pages that leave out the section of their settings."""


def all_blocks(language: str) -> list[Block]:
    blocks: list[Block] = []
    for path in documents():
        if not (language == "python" and str(path.relative_to(ROOT)) in TESTED_ELSEWHERE):
            blocks += [block for block in blocks_of(path) if block.language == language and not block.not_run]
    return blocks


def by_place(block: Block) -> str:
    return block.place


def test_every_block_is_run_or_says_why_not() -> None:
    checked = {"sh", "yaml"}
    for path in documents():
        for block in blocks_of(path):
            elsewhere = block.language == "python" and str(path.relative_to(ROOT)) in TESTED_ELSEWHERE
            assert block.not_run or block.language in checked or elsewhere, f"{block.place}: {block.language}"


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=by_place)
def test_settings_in_a_block_are_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = tmp_path / "experiments" / "mine"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(block.text)
    load_experiment(folder / "experiment.yaml", MINIMAL)


PARTS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "cluster"]
"""Parts of experiments, which `include:` names; what is in configs/cluster is for Ray and Kubernetes."""


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_a_config_is_valid(path: Path) -> None:
    load_experiment(path, MINIMAL)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/*.yaml")), ids=lambda path: path.name)
def test_an_experiment_file_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGN_MODEL", raising=False)
    monkeypatch.chdir(ROOT)
    model = load_experiment(path).model.path
    assert model.startswith("runs/") or re.fullmatch(r"[\w.-]+/[\w.-]+", model), f"{model} is not a hub name"


@pytest.mark.parametrize("block", all_blocks("sh"), ids=by_place)
def test_commands_in_a_block_exist(block: Block) -> None:
    for line in block.text.splitlines():
        command = COMMENT.sub("", line).strip()
        if command:
            assert command.startswith(OTHER_COMMANDS) or is_valid(command), f"{block.place}: {command}"


def is_valid(command: str) -> bool:
    """Whether a command line of ours is understood. Nothing is run."""
    program, *arguments = shlex.split(command)
    if program == "align":
        parse_align(arguments)
        return True
    if program == "make":
        targets = TARGET.findall((ROOT / "Makefile").read_text())
        return all("=" in argument or argument in targets for argument in arguments)
    if program.endswith("python"):
        file = next(argument for argument in arguments if not argument.startswith("-"))
        return (ROOT / file).is_file() or arguments[0] == "-m"
    return False


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_a_document_names_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        pytest.skip("it names settings of earlier versions")
    section = SECTION_OF_PAGE.get(path.name, "")
    known = setting_names()
    for code in inline_code(path):
        for key in dotted_keys(code):
            assert setting_exists(key), f"{path.name}: `{code}`: {key} is no setting"
        setting = SETTING_IN_CODE.fullmatch(code)
        if setting and section:
            assert setting[1].split(".")[-1] in known, f"{path.name}: `{code}`: {setting[1]} is no setting"


def test_settings_in_the_table_of_options_exist() -> None:
    table = (ROOT / "docs" / "ppo.md").read_text().partition("## Options")[2].partition("## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row):
            assert setting_exists(f"ppo.{name}"), name


def test_the_table_of_stages_is_that_of_the_registry() -> None:
    assert stages_table() in (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["align", "policies", "rewards", "rollouts"])
def test_settings_that_messages_name_exist(package: str) -> None:
    wrong: list[str] = []
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name in ("old_names.py", "foreign_names.py"):
            continue  # names that are refused; tests/align/config checks those that stand for them
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                unknown = [key for key in dotted_keys(node.value) if not setting_exists(key)]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {key}" for key in unknown]
    assert not wrong, "\n".join(wrong)


def dotted_keys(text: str) -> list[str]:
    """What looks like `section.key` in a text: not files, modules and methods."""
    keys: list[str] = []
    for match in DOTTED.finditer(text):
        key = match[0]
        section, name, *_ = key.split(".")
        is_module = (ROOT / section / f"{name}.py").is_file() or (ROOT / section / name).is_dir()
        if key.split(".")[-1] not in FILE_ENDINGS and key not in NOT_SETTINGS and not is_module:
            keys.append(key)
    return keys


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        linked = path.parent / target
        assert linked.exists(), f"{path.name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor[1:] in anchors(linked), f"{path.name}: {target}{anchor}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(words.replace(" ", "-"))
    return names


def test_a_wrong_setting_command_or_target_is_noticed() -> None:
    assert not setting_exists("ppo.batch")
    assert dotted_keys("set ppo.batch to 4") == ["ppo.batch"]
    assert setting_exists("reward.terms.mine.timeout")
    assert not is_valid("make lnt")
    assert not is_valid("python experiments/feedback/make.py")
    with pytest.raises(Exception, match="No such option"):
        parse_align(["run", "experiment.yaml", "--replce"])
