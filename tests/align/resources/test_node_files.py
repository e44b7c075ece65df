"""Files that actors read, looked for by real Ray tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from align.config.schema import ClusterSettings, Experiment
from align.resources.actors import RANK, WORKER
from align.resources.node_files import check_files_on_nodes, is_hub_name, paths_of_ranks, paths_of_workers
from align.resources.ray_cluster import ray_cluster
from policies.errors import UserError

LOSS = "def loss(logprobs, old_logprobs, advantages, ppo): ..."


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    """The id of the one node of a cluster."""
    with ray_cluster(ClusterSettings(), 1):
        yield ray.get_runtime_context().get_node_id()


def experiment(path: object, **ppo: Any) -> Experiment:
    return Experiment.model_validate({"name": "x", "model": {"path": str(path)}, "ppo": ppo})


def test_a_folder_that_a_node_lacks_is_named_with_the_node(node: str, tmp_path: Path) -> None:
    check_files_on_nodes(experiment(tmp_path), {RANK: {node}, WORKER: {node}})
    with pytest.raises(UserError) as caught:
        check_files_on_nodes(experiment(tmp_path / "none"), {WORKER: {node}})
    assert str(caught.value) == (
        f"model.path: no {tmp_path}/none on node {ray.util.get_node_ip_address()}: rollout workers read it there; "
        "put it there under the same path, or on a file system that all nodes share"
    )


def test_a_relative_path_is_said_to_be_looked_for_where_the_node_was_started(node: str) -> None:
    with pytest.raises(UserError, match=r"model.path: no \./none on node \S+, in the folder in which `ray start` was"):
        check_files_on_nodes(experiment("./none"), {RANK: {node}})


def test_kinds_without_nodes_are_not_looked_at() -> None:
    check_files_on_nodes(experiment("/none"), {})


def test_ranks_also_read_a_critic_and_the_functions_that_they_call(tmp_path: Path) -> None:
    file = tmp_path / "loss.py"
    file.write_text(LOSS)
    settings = experiment(
        tmp_path, critic={"kind": "model", "model": "/critic"}, policy_loss=f"{file}:loss", estimator="gae"
    )
    own = {"model.path": str(tmp_path)}
    assert paths_of_workers(settings) == own
    assert paths_of_ranks(settings) == own | {"ppo.critic.model": "/critic", "ppo.policy_loss": str(file)}
    assert paths_of_ranks(settings.model_copy(update={"stages": ["sft"]})) == own


def test_nothing_is_looked_for_that_is_on_the_hub() -> None:
    assert paths_of_ranks(experiment("no-such/model", critic={"kind": "model", "model": "no-such-critic"})) == {}


def test_a_hub_name_is_one_only_where_no_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("organisation/some-model-1.5", "model"):
        assert is_hub_name(name)
    for path in ("/organisation/model", "./model", "../model", "a/b/c"):
        assert not is_hub_name(path)
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    assert not is_hub_name("organisation/model")


def test_workers_read_a_chat_template_that_is_a_file(tmp_path: Path) -> None:
    settings = experiment(tmp_path)
    for name, read in {"plain": {}, "talk.jinja": {"model.chat_template": "talk.jinja"}}.items():
        model = settings.model.model_copy(update={"chat_template": name})
        with_template = settings.model_copy(update={"model": model})
        assert paths_of_workers(with_template) == {"model.path": str(tmp_path)} | read
        assert paths_of_ranks(with_template) == {"model.path": str(tmp_path)}
