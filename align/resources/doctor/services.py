"""Checks the servers that some runs need: the Hugging Face hub, and Weights & Biases."""

import os
from concurrent.futures import ThreadPoolExecutor

from align.resources.doctor.finding import Finding, ok, problem, warning
from policies.errors import first_line

ANSWER_SECONDS = 5.0
"""Seconds in which a server must answer."""


def check_hub() -> Finding:
    """Whether the hub answers."""
    from huggingface_hub import constants

    needed = "needed only for models and data that are named by their hub names and not in the cache"
    if constants.HF_HUB_OFFLINE:
        return ok(f"HF_HUB_OFFLINE is set: models and data come from folders and the cache {constants.HF_HUB_CACHE}")
    if fault := why_no_answer(constants.ENDPOINT):
        return warning(
            f"{constants.ENDPOINT}: {fault}; {needed}",
            "set HTTPS_PROXY or HF_ENDPOINT to a proxy or mirror that answers, or HF_HUB_OFFLINE=1",
        )
    return ok(f"{constants.ENDPOINT} answers")


def check_wandb() -> Finding:
    """Whether runs can be tracked online."""
    import wandb

    from align.config.schema import TrackingSettings
    from align.runs.wandb_run import stop_wandb, tracking_mode

    try:
        server = wandb.setup().settings.base_url
        mode = tracking_mode(TrackingSettings())
        has_key = mode == "online" and wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        words = " ".join(str(error).partition("[type=")[0].split())  # pydantic repeats the value after this
        return problem(f"W&B cannot start: {words}", "set the variables WANDB_… as it says, or tracking.wandb=disabled")
    finally:
        stop_wandb()
    if mode != "online":
        reason = "as WANDB_MODE says" if os.environ.get("WANDB_MODE") else "because there is no API key for W&B"
        return ok(f"runs are tracked {mode}, {reason}")
    if not has_key:
        return problem("WANDB_MODE is online, and there is no API key", "wandb login, or set WANDB_MODE to offline")
    if fault := why_no_answer(server):
        return warning(
            f"there is an API key, but {server}: {fault}; runs are tracked offline",
            "set HTTPS_PROXY or WANDB_BASE_URL to a server that answers, or tracking.wandb=offline",
        )
    return ok(f"runs are tracked online: there is an API key, and {server} answers")


def why_no_answer(address: str) -> str | None:
    """Why a server does not answer in time; None where it does, whatever it says."""
    import requests

    # A thread, because the resolution of the server's name has no time limit.
    request = ThreadPoolExecutor(1).submit(requests.head, address, timeout=ANSWER_SECONDS)
    try:
        request.result(ANSWER_SECONDS)
    except (TimeoutError, requests.Timeout):
        return f"no answer within {ANSWER_SECONDS:g} s"
    except requests.exceptions.ProxyError:
        return "the proxy cannot be reached"
    except requests.exceptions.SSLError:
        return "its certificate is not accepted"
    except requests.ConnectionError:
        return "it cannot be reached"
    except requests.RequestException as error:
        return first_line(error)
    return None
