from pathlib import Path

import pytest
import torch

from policies.errors import UserError
from policies.files.adapters import PROMPT, load_adapter
from policies.files.prompt_table import add_task, read_task
from policies.schema import PolicySettings

METADATA = {"base": "a-model", "kind": "embeddings"}
SETTINGS = PolicySettings(method="prompt_tuning", virtual_tokens=3)


def test_tasks_are_looked_up_by_name_and_added_without_touching_the_others(tmp_path: Path) -> None:
    table = tmp_path / "prompts.safetensors"
    first, second = torch.randn(3, 8), torch.randn(5, 8)
    add_task(table, "refunds", first, METADATA)
    add_task(table, "thanks", second, METADATA)
    assert torch.equal(read_task(f"{table}#refunds"), first)
    assert torch.equal(read_task(f"{table}#thanks"), second)
    assert torch.equal(load_adapter(f"{table}#refunds", SETTINGS)[PROMPT], first)
    assert [path.name for path in tmp_path.iterdir()] == [table.name]


def test_mistakes_are_named_and_change_nothing(tmp_path: Path) -> None:
    table = tmp_path / "prompts.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        read_task(f"{table}#refunds")
    add_task(table, "refunds", torch.zeros(3, 8), METADATA)
    before = table.read_bytes()
    with pytest.raises(UserError, match="has no task 'thanks': it has refunds"):
        read_task(f"{table}#thanks")
    with pytest.raises(UserError, match="has a task 'refunds' already"):
        add_task(table, "refunds", torch.ones(3, 8), METADATA)
    with pytest.raises(UserError, match="is for base a-model, but this prompt for another"):
        add_task(table, "thanks", torch.ones(3, 8), METADATA | {"base": "another"})
    assert table.read_bytes() == before
    table.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="is damaged"):
        read_task(f"{table}#refunds")
