import os
import platform
import tempfile
from pathlib import Path

import pytest
import ray
from ray._private.utils import check_version_info
from ray.exceptions import AuthenticationError

from align.config.schema import ClusterSettings, Experiment
from align.resources import ray_cluster as module
from align.resources.ray_cluster import compute_settings, head_address, ray_cluster
from align.runtime.failures import ClusterLost
from policies.device import ComputeSettings
from policies.errors import UserError


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ({}, "", ComputeSettings(None, None)),
        ({}, "5", ComputeSettings(5, None)),
        ({}, "many", ComputeSettings(None, None)),
        ({"deterministic": True, "cluster": {"threads": 3}}, "5", ComputeSettings(3, True)),
        ({"cluster": {"address": "10.0.0.1:6379"}}, "5", ComputeSettings(None, None)),
    ],
)
def test_the_controller_computes_as_the_experiment_and_the_environment_say(
    settings: dict[str, object], environment: str, expected: ComputeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    experiment = Experiment.model_validate({"name": "x", "model": {"path": "x"}} | settings)
    assert compute_settings(experiment) == expected


def temporary_folder(within: Path, length: int) -> str:
    """A new folder whose path has this many bytes."""
    folder = within
    while (missing := length - len(os.fsencode(folder))) > 1:
        folder /= "x" * min(missing - 1, 200)
    folder.mkdir(parents=True)
    return str(folder)


def started_in(folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start a cluster with this folder as TMPDIR. Gives the folder of its files, which are gone again."""
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with ray_cluster(ClusterSettings(), 1):
        files = Path(ray._private.worker._global_node.get_session_dir_path())
        pid = ray.get(ray.remote(lambda: os.getpid()).remote())
        assert pid != os.getpid()
    assert not files.parent.exists()
    return files.parent


def test_a_tmpdir_that_is_too_long_for_sockets_is_replaced_with_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = temporary_folder(tmp_path, 150)
    assert started_in(folder, monkeypatch).parent == Path("/tmp")
    message = caplog.messages[0]
    assert message == f"TMPDIR {folder} is too long a path for Ray's sockets: Ray's files go to /tmp"


def test_the_longest_tmpdir_that_sockets_allow_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="x") as short:
        folder = temporary_folder(Path(short), module.LONGEST_TMPDIR)
        assert started_in(folder, monkeypatch).parent == Path(folder)
    assert not caplog.messages


def test_without_a_short_folder_the_message_says_what_would_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", temporary_folder(tmp_path, 150))
    monkeypatch.setattr(module, "SHORT_FOLDERS", (str(tmp_path / "nowhere"),))
    with pytest.raises(UserError, match=f"set TMPDIR to a folder whose path has at most {module.LONGEST_TMPDIR} bytes"):
        ray_cluster(ClusterSettings(), 1).__enter__()


def refusal() -> Exception:
    """What Ray raises where it has sent a wrong token, or none, to the head of a cluster."""
    error = ConnectionError("Failed to connect to Ray cluster at host:1")
    error.__cause__ = RuntimeError("Failed to connect to GCS. Last connection error: RPC error: InvalidAuthToken")
    return error


@pytest.mark.parametrize("error", [refusal(), AuthenticationError("no token was found")], ids=["wrong", "none"])
def test_what_is_to_be_set_is_said_where_a_token_is_missing_or_wrong(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError) as caught:
        ray_cluster(ClusterSettings(address="ray://host:10001"), 1).__enter__()
    assert str(caught.value) == f"cluster.address ray://host:10001 cannot be joined: {module.WRONG_TOKEN}"


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_found_cluster_is_named_before_it_is_joined(
    address: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    settings = ClusterSettings(address=address)
    assert settings.address_to_join == address
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert settings.address_to_join == (address or "127.0.0.1:1")
    module._tell_once.cache_clear()
    with pytest.raises(UserError, match=r"^cluster\.address \S+:1 cannot be reached"):
        ray_cluster(settings, 1).__enter__()
    (message,) = caplog.messages
    how = "auto: joining the Ray cluster at" if address else "is not set: joining the cluster of this Ray job, at"
    assert message.startswith(f"cluster.address {how} ")  # Ray replaces a loopback address by that of the node


def test_versions_that_differ_from_those_of_the_head_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        check_version_info({"ray_version": "2.59.1", "python_version": "3.10.2"}, "node 10.0.0.1")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError) as caught:
        ray_cluster(ClusterSettings(address="ray://host:10001"), 1).__enter__()
    assert str(caught.value) == (
        "cluster.address ray://host:10001 cannot be joined: its head has Ray 2.59.1 and Python 3.10.2, this machine "
        f"Ray {ray.__version__} and Python {platform.python_version()}: install the head's versions here, or these "
        "there"
    )


def test_a_cluster_that_does_not_start_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("the raylet has not started")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(module, "_folder_for_sockets", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="the raylet has not started"):
        ray_cluster(ClusterSettings(), 1).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_client_connects_to_the_head_through_its_own_port() -> None:
    assert head_address(ClusterSettings(address="ray://host:10001")) == "host:10001"


def test_a_start_that_takes_too_long_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(address: str) -> None:
        raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(ClusterLost, match="Ray has not started on this machine in 30 s"):
        module._start({})
