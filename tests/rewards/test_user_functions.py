import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from policies.errors import UserError
from rewards.calls import Scores, call_function
from rewards.schema import RewardSettings
from rewards.terms.base import FunctionScorer, RewardStage, TermInput
from rewards.user_functions import load_function

KEY = "evaluation.gold"


def write(folder: Path, text: str, name: str = "score.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(where: str) -> str:
    with pytest.raises(UserError) as caught:
        load_function(where, KEY)
    assert str(caught.value).startswith(f"{KEY}: ")
    return str(caught.value)


def complaint(scores: object, responses: Sequence[str]) -> str:
    with pytest.raises(UserError) as caught:
        call_function(lambda *_: scores, ["p"] * len(responses), responses, [{}] * len(responses))  # type: ignore
    return str(caught.value)


def test_a_function_of_a_file_is_found_and_called(tmp_path: Path) -> None:
    path = write(tmp_path, "def lengths(prompts, responses, columns):\n    return [len(r) for r in responses]\n")
    assert call_function(load_function(f"{path}:lengths", KEY), ["p", "q"], ["a", "bcd"], [{}, {}]).values == [
        1.0,
        3.0,
    ]


def test_a_function_of_a_module_is_found() -> None:
    function: object = load_function("math:prod", KEY)
    assert function is math.prod


def test_the_function_gets_prompts_responses_and_columns() -> None:
    arguments = (["p"], ["r"], [{"answer": 5}])
    seen: list[object] = []

    def record(*call: object) -> list[float]:
        seen.extend(call)
        return [0.0]

    call_function(record, *arguments)
    assert seen == list(arguments)


def test_a_file_may_define_a_dataclass(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass D:\n    x: int\n"
    assert callable(load_function(f"{write(tmp_path, text)}:D", KEY))


def test_two_files_of_one_name_keep_their_own_functions(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = write(tmp_path, "def f(*_): return [1]\n"), write(tmp_path / "other", "def f(*_): return [2]\n")
    first, second = load_function(f"{one}:f", KEY), load_function(f"{two}:f", KEY)
    assert (first([], [], []), second([], [], [])) == ([1], [2])


@pytest.mark.parametrize("where", ["", "score", "score.py", "score.py:", "score.py:a-b", "score.py:a.b", "score.py:1"])
def test_a_name_that_is_not_a_function_is_refused(where: str) -> None:
    assert f"{where!r} is neither FILE.py:function nor module:function" in problem(where)


@pytest.mark.parametrize("where", [":f", ".score:f"])
def test_a_name_that_is_not_a_module_is_refused(where: str) -> None:
    problem(where)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"file {tmp_path}/nowhere.py does not exist" in problem(f"{tmp_path}/nowhere.py:f")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    assert "folder.py does not exist" in problem(f"{tmp_path}/folder.py:f")


@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module_at_all\n"])
def test_a_file_that_cannot_be_imported_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert f"{path} cannot be imported: " in problem(f"{path}:f")


def test_a_missing_module_is_named() -> None:
    assert "module no_such_module_at_all cannot be imported: No module named" in problem("no_such_module_at_all:f")


def test_a_module_with_a_mistake_in_its_syntax_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "def f(:\n", "badly_written_score.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "module badly_written_score cannot be imported: " in problem("badly_written_score:f")


def test_a_missing_function_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "number = 3\ndef f(*_): return []\n")
    assert f"{path} has no function g" in problem(f"{path}:g")


def test_a_value_that_is_not_a_function_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "x = 3\n")
    assert problem(f"{path}:x") == f"{KEY}: x in {path} is not a function"


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero", 2),
        ("def g():\n    return {}['a']\n\ng()\n", "KeyError: 'a'", 2),
        ("import json\njson.loads('')\n", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)", 2),
        ("\nimport no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'", 2),
        ("import sys\nsys.exit('no key')\n", "SystemExit: no key", 2),
        ("\ndef f(:\n", "SyntaxError: invalid syntax", 2),
    ],
)
def test_an_error_at_import_is_located_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str, line: int
) -> None:
    path = write(tmp_path, text, "raising_score.py")
    assert problem(f"{path}:f") == f"{KEY}: {path} cannot be imported: {reason} ({path}:{line})"
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert problem("raising_score:f") == f"{KEY}: module raising_score cannot be imported: {reason} ({path}:{line})"


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_wrong_number_of_scores_is_refused(scores: list[float]) -> None:
    assert f"returned {len(scores)} scores for 2 responses" in complaint(scores, ["a", "b"])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_response(score: float) -> None:
    assert f"returned {score} for the response 'bad'; a score must be finite" in complaint(
        [0.0, score], ["good", "bad"]
    )


@pytest.mark.parametrize("scores", [None, 1.0, [None], ["good"]])
def test_a_result_that_is_not_a_list_of_numbers_is_refused(scores: object) -> None:
    assert "<lambda> returned" in complaint(scores, ["a"])


def score(text: str, tmp_path: Path, count: int = 3, **settings: Any) -> Scores:
    function = load_function(f"{write(tmp_path, text)}:f", KEY)
    prompts = [f"p{i}" for i in range(count)]
    responses = [f"r{i}" for i in range(count)]
    return call_function(function, prompts, responses, [{}] * count, **settings)


RAISES = "def f(p, r, c):\n    return [1 / (x != 'r1') for x in r]\n"
EXITS = "import sys\ndef f(p, r, c):\n    if 'r1' in r: sys.exit(3)\n    return [5.0] * len(r)\n"
NANS = "def f(p, r, c): return [float('nan') if x == 'r1' else 2.0 for x in r]\n"
SHORT = "def f(p, r, c): return [1.0] * (len(r) - ('r1' in r))\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (RAISES, r"f raised ZeroDivisionError: .*\.py:2\); response 1 of the batch, prompt 'p1', response 'r1'"),
        (EXITS, r"f raised SystemExit: 3 \(.*\.py:3\); response 1 of the batch"),
        (NANS, r"f returned nan for the response 'r1'; a score must be finite; response 1"),
        (SHORT, r"f returned 2 scores for 3 responses; response 1"),
    ],
    ids=["raises", "exits", "nan", "count"],
)
def test_the_response_that_fails_is_named_or_gets_the_fallback(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        score(text, tmp_path)
    scores = score(text, tmp_path, fallback=-4.0)
    assert scores.values[1] == -4.0
    assert min(scores.values[0], scores.values[2]) >= 1.0
    assert scores.failed == (1,)


def test_a_function_that_fails_for_the_batch_alone_is_named(tmp_path: Path) -> None:
    text = "def f(p, r, c): return [1.0] * (len(r) if len(r) == 1 else 0)\n"
    with pytest.raises(
        UserError, match="f returned 0 scores for 3 responses, though not for any of the responses alone"
    ):
        score(text, tmp_path)
    assert score(text, tmp_path, fallback=0.0) == Scores([1.0, 1.0, 1.0])


def test_a_function_may_be_async(tmp_path: Path) -> None:
    text = "import asyncio\nasync def f(p, r, c):\n    await asyncio.sleep(0)\n    return [float(len(x)) for x in r]\n"
    assert score(text, tmp_path) == Scores([2.0, 2.0, 2.0])


def test_a_wrong_signature_is_located_at_the_definition(tmp_path: Path) -> None:
    reason = r"^f raised TypeError: f\(\) takes 1 positional argument but 3 were given \(.*/score\.py:2\); response 0"
    with pytest.raises(UserError, match=reason):
        score("\ndef f(p): return []\n", tmp_path)


def test_an_error_in_a_library_is_located_at_the_call_in_the_file(tmp_path: Path) -> None:
    text = "import json\ndef f(p, r, c):\n    return [json.loads('')]\n"
    with pytest.raises(UserError, match=r"^f raised JSONDecodeError: .* \(.*/score\.py:3\); response 0"):
        score(text, tmp_path)


@pytest.mark.parametrize(("value", "shown"), [("None", "None"), ("'good'", "'good'"), ("['good']", r"\['good'\]")])
def test_a_returned_value_is_shown_as_python_writes_it(tmp_path: Path, value: str, shown: str) -> None:
    with pytest.raises(UserError, match=rf"^f returned {shown}; a list with one number per response was expected"):
        score(f"def f(p, r, c): return {value}\n", tmp_path)


RESULTS = {
    "a tuple": ("return (1, 2, 3)", None),
    "a generator": ("return (float(x[1:]) + 1 for x in r)", None),
    "a NumPy array": ("import numpy; return numpy.array([1, 2, 3], dtype='float16')", None),
    "NumPy numbers": ("import numpy; return [numpy.float32(1), numpy.int8(2), numpy.array(3)]", None),
    "a tensor": ("import torch; return torch.tensor([1, 2, 3], dtype=torch.bfloat16, requires_grad=True)", None),
    "tensors": ("import torch; return [torch.tensor(float(i)) for i in (1, 2, 3)]", None),
    "other numbers": ("from decimal import Decimal; return [True, Decimal(2), 3]", None),
    "text": ("return '123'", "'123'"),
    "bytes": ("return bytes([1, 2, 3])", r"b'\\x01\\x02\\x03'"),
    "texts": ("return ['1', '2', '3']", r"\['1', '2', '3'\]"),
    "a dictionary": ("return {1: 'r0', 2: 'r1', 3: 'r2'}", r"\{1: 'r0', 2: 'r1', 3: 'r2'\}"),
    "a set": ("return {1, 2, 3}", r"\{1, 2, 3\}"),
    "nested lists": ("return [[1], [2], [3]]", r"\[\[1\], \[2\], \[3\]\]"),
    "a nested array": ("import numpy; return numpy.ones((3, 1))", r"array\(.*\) of shape \[3, 1\]"),
    "nested arrays": ("import numpy; return [numpy.ones(1)] * 3", r"\[array\(.*\)\]"),
    "a nested tensor": ("import torch; return torch.ones(3, 1)", r"tensor\(.*\) of shape \[3, 1\]"),
    "tensors of one number": ("import torch; return [torch.ones(1)] * 3", r"\[tensor\(.*\)\]"),
    "a single tensor": ("import torch; return torch.tensor(1.0)", r"tensor\(1\.\)"),
    "complex numbers": ("return [1j, 2j, 3j]", r"\[1j, 2j, 3j\]"),
    "a number that no float holds": ("return [1, 2, 10**400]", r"\[1, 2, 10*"),
}


@pytest.mark.parametrize(("body", "shown"), RESULTS.values(), ids=RESULTS)
def test_the_numbers_of_a_series_are_taken_and_everything_else_is_refused(
    tmp_path: Path, body: str, shown: str | None
) -> None:
    text = f"def f(p, r, c):\n    if len(r) < 3: return [0.0]\n    {body}\n"
    if shown is None:
        assert score(text, tmp_path) == Scores([1.0, 2.0, 3.0])
        return
    with pytest.raises(UserError, match=rf"^f returned {shown}; a list with one number per response was expected"):
        score(text, tmp_path)


def test_a_file_imports_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    write(tmp_path, "NUMBER = 4.0\n", "a_helper_in_this_folder.py")
    write(tmp_path, "1 / 0\n", "rollouts.py")
    text = "import rollouts\nfrom a_helper_in_this_folder import NUMBER\ndef f(p, r, c): return [NUMBER] * len(r)\n"
    assert score(text, tmp_path).values == [4.0, 4.0, 4.0]


def test_the_setting_and_the_file_of_a_failing_function_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(p, r, c): return 1 / 0\n")
    settings = {"terms": {"own": {"kind": "function", "function": f"{path}:f"}}}
    reward = RewardSettings.model_validate(settings)
    scorer = reward.terms["own"].make_scorer("own", RewardStage(reward, {}))
    assert isinstance(scorer, FunctionScorer)
    batch = TermInput(prompts=["p"], decode_responses=lambda: ["r"], columns=[{}], response_lengths=[1])
    with pytest.raises(UserError, match=rf"^reward\.terms\.own\.function: {path}:f raised ZeroDivisionError: "):
        scorer(batch)
    scorer.close()


def test_the_reason_for_a_fallback_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "def f(p, r, c): return [1 / (x != 'r0') for x in r]\n")
    settings = {"terms": {"own": {"kind": "function", "function": f"{path}:f", "fallback": -2}}}
    reward = RewardSettings.model_validate(settings)
    scorer = reward.terms["own"].make_scorer("own", RewardStage(reward, {}))
    assert isinstance(scorer, FunctionScorer)
    responses = ["r0", "r1", "r2"]
    batch = TermInput(prompts=["p"] * 3, decode_responses=lambda: responses, columns=[{}] * 3, response_lengths=[1] * 3)
    for _ in range(2):
        scores = scorer(batch)
        assert scores.values.tolist() == [-2.0, 1.0, 1.0]
        assert scores.notes["failed/own"].tolist() == [1.0, 0.0, 0.0]
    scorer.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"reward.terms.own.function: {path}:f raised ZeroDivisionError: division by zero ({path}:1); such responses "
        "get the fallback, -2, and are counted in reward/failed/own"
    )
