"""docs/architecture.md and its drawing are those that the script makes of the code."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("draw_architecture")


def test_drawing_again_changes_nothing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "architecture.md"
    document.write_text(script.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    committed = {"document": script.DOCUMENT.read_text(encoding="utf-8"), "drawing": script.DRAWING.read_text("utf-8")}
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(script, "DRAWING", tmp_path / "architecture.svg")
    script.main()
    assert document.read_text(encoding="utf-8") == committed["document"], "run `make docs`"
    assert (tmp_path / "architecture.svg").read_text(encoding="utf-8") == committed["drawing"], "run `make docs`"


def test_an_import_that_others_imply_is_not_drawn(script: ModuleType) -> None:
    imports = {"a": ["b", "c"], "b": ["c"], "c": []}
    assert script.without_implied(imports) == {"a": ["b"], "b": ["c"], "c": []}


def test_a_package_without_a_description_is_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(script.DESCRIPTIONS, "rewards")
    with pytest.raises(ValueError, match="rewards"):
        script.ordered_packages()
