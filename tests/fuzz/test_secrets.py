"""Keys stay in the environment: they reach no file, no message and not W&B."""

from pathlib import Path

import pytest
import yaml

from align.config.load import dump_experiment, load_experiment
from policies.errors import UserError
from rewards.calls import call_function
from rewards.terms.endpoint import EndpointTerm

KEY = "sk-very-secret"


def write(folder: Path, url: str = "http://127.0.0.1:9", key_env: str = "GRADER_KEY") -> Path:
    term = {"kind": "endpoint", "url": url, "key_env": key_env, "retries": 0, "timeout": 1}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "model": {"path": "m"}, "reward": {"terms": {"far": term}}}))
    return path


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADER_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("PLACE", "here")


def test_a_key_is_read_from_the_environment_and_written_nowhere(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path))
    dump_experiment(experiment, tmp_path / "config.yaml")
    assert KEY not in (tmp_path / "config.yaml").read_text()
    assert KEY not in str(experiment.model_dump(mode="json"))  # what is sent to W&B
    term = experiment.reward.terms["far"]
    assert isinstance(term, EndpointTerm)
    with pytest.raises(UserError) as caught:  # nothing listens there
        call_function(term.make_function("far"), ["p"], ["r"], [{}])
    assert KEY not in str(caught.value)
    assert "GRADER_KEY" not in str(caught.value)


@pytest.mark.parametrize("name", ["GRADER_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("form", ["${oc.env:%s}", "x${oc.env:%s,default}", "${oc.env:${tracking.project}}"])
def test_a_secret_is_not_inserted_into_a_setting(tmp_path: Path, name: str, form: str) -> None:
    runs = form % name if "%s" in form else form
    with pytest.raises(UserError, match=f"runs: .*{name} seems to hold a secret.*key_env") as caught:
        load_experiment(write(tmp_path), [f"runs={runs}", f"tracking.project={name}"])
    assert KEY not in str(caught.value)


def test_other_variables_are_inserted(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path), ["runs=${oc.env:PLACE}"]).runs == "here"
    assert load_experiment(write(tmp_path), ["runs=${oc.env:NOT_SET_HERE,there}"]).runs == "there"
    with pytest.raises(UserError, match="the environment variable NOT_SET_HERE is not set"):
        load_experiment(write(tmp_path), ["runs=${oc.env:NOT_SET_HERE}"])


@pytest.mark.parametrize(
    ("url", "key_env"),
    [
        (f"https://user:{KEY}@host/", "GRADER_KEY"),
        (f"https://host/?api_key={KEY}", "GRADER_KEY"),
        (f"ftp://{KEY}", "GRADER_KEY"),
        ("https://host/", KEY),
        ("https://host/", "${oc.env:GRADER_KEY}"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(tmp_path: Path, url: str, key_env: str) -> None:
    with pytest.raises(UserError, match=r"reward\.terms\.far\.(endpoint\.)?(url|key_env)") as caught:
        load_experiment(write(tmp_path, url, key_env))
    assert KEY not in str(caught.value)
