"""Folders that actors read, looked for by real Ray tasks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from align.config.schema import ClusterSettings, Experiment
from align.resources.node_files import check_folder_on_nodes, check_model_on_nodes, is_hub_name
from align.resources.ray_cluster import ray_cluster
from policies.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterSettings(), 1):
        yield


def model(path: str) -> Experiment:
    return Experiment.model_validate({"name": "x", "model": {"path": path}})


def test_a_folder_that_a_node_lacks_is_named_with_the_node(tmp_path: Path) -> None:
    check_model_on_nodes(model(str(tmp_path)), gpus=False)
    with pytest.raises(UserError) as caught:
        check_model_on_nodes(model(f"{tmp_path}/none"), gpus=False)
    assert f"model.path: no folder {tmp_path}/none on node {ray.util.get_node_ip_address()}:" in str(caught.value)


def test_nodes_without_gpus_are_not_looked_at_where_actors_need_gpus() -> None:
    check_folder_on_nodes("model.path", "/none", gpus=True)


def test_a_hub_name_is_one_only_where_no_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("organisation/some-model-1.5")
    for path in ("/organisation/model", "./model", "../model", "model", "a/b/c"):
        assert not is_hub_name(path)
    (tmp_path / "organisation" / "model").mkdir(parents=True)
    assert not is_hub_name("organisation/model")
    check_model_on_nodes(model("no-such/model"), gpus=False)
