import subprocess
import sys
from typing import Any

import pytest
import torch

from align.runtime.compilation import compiled_on_first_call


def test_functions_are_compiled_at_their_first_call_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_(function: Any, **options: Any) -> Any:
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile_)
    with compiled_on_first_call():

        @torch.compile
        def twice(x: int) -> int:
            return 2 * x

        @torch.compile(dynamic=True)
        def thrice(x: int) -> int:
            return 3 * x

    assert vars(torch)["compile"] is compile_
    assert not compiled
    assert [twice(1), twice(2), thrice(1)] == [3, 5, 4]
    assert compiled == [("twice", {}), ("thrice", {"dynamic": True})]


def test_peft_does_not_load_the_compiler() -> None:
    code = (
        "import sys\nfrom align.runtime.compilation import compiled_on_first_call\n"
        "with compiled_on_first_call():\n    import peft\n"
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "True False"
