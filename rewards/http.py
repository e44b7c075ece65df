"""What terms that call a service over HTTP share: settings, and a session that retries."""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from policies.errors import UserError
from policies.schema import Settings
from rewards.terms.base import CallSettings

if TYPE_CHECKING:  # settings are loaded without requests
    from requests import Session

SECRET = re.compile("key|token|secret|passw|credential", re.IGNORECASE)
"""Matches the names of variables and parameters that hold secrets."""

RETRIED_STATUS = (429, 500, 502, 503, 504)
LONGEST_WAIT = 60
"""Longest wait between two attempts, in seconds, that a server may demand."""


class ConnectionSettings(Settings):
    """How a service at a `url` is called over HTTP."""

    timeout: float | None = Field(30.0, gt=0, description="seconds that one request may take")
    retries: int = Field(
        3, ge=0, description="further attempts after a lost connection or status 429, 500, 502, 503, 504"
    )
    key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="the environment variable that holds the key, sent as a bearer token; never written anywhere",
    )

    @field_validator("url", check_fields=False)
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError("an http:// or https:// address was expected")
        parts = urlsplit(url)
        if "@" in parts.netloc or SECRET.search(parts.query):
            raise ValueError("a key in an address would be written to config.yaml and W&B: use key_env")
        return url


class HttpSettings(ConnectionSettings, CallSettings):
    """The settings of terms that call a service over HTTP."""


def open_session(settings: ConnectionSettings) -> "Session":
    """Open a session that retries, after exponentially growing waits or as long as the server says.

    Args:
        settings: The number of retries, and the variable that holds the key.

    Raises:
        UserError: The environment variable `key_env` is not set.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(
        total=settings.retries,
        backoff_factor=0.5,
        status_forcelist=RETRIED_STATUS,
        allowed_methods=None,
        raise_on_status=False,
        retry_after_max=LONGEST_WAIT,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=64))
    if settings.key_env:
        if settings.key_env not in os.environ:
            raise UserError(f"key_env: the environment variable {settings.key_env} is not set")
        key = os.environ[settings.key_env]

        def authorise(request: Any) -> Any:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        session.auth = authorise  # a plain header would be overridden by ~/.netrc
    return session


def post(session: "Session", url: str, body: Mapping[str, Any], timeout: float | None) -> Any:
    """Post a JSON body, and return the decoded JSON reply. Raises the exceptions of `requests`."""
    reply = session.post(url, json=body, timeout=timeout)
    reply.raise_for_status()
    return reply.json()
