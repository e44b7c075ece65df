"""Fills in the templates of the pages about runs; a page is one file, without an address outside."""

import re
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align.diagnosis.listing import evidence_text
from align.report.svg import MAX_POINTS

ASSETS = Path(__file__).parent / "assets"
LARGEST_PAGE = 1_000_000
"""Bytes of a page: a mail takes it, and a browser opens it at once."""
FEWEST_POINTS = 50
LINK = re.compile(r"\s*\(\[[^\]]*\]\([^)]*\)\)")
SETTING = re.compile(r"[a-z_]+(\.[a-zA-Z_*]+)*=\S+")


def render(template: str, **context: Any) -> str:
    """Fill in a template.

    Args:
        template: The name of its file in `assets/`, without `.html.jinja`.
        context: What it shows.
    """
    scripts = [_asset("watch.js")] if context.get("live") else []
    scripts.append(_asset("page.js"))
    shared = {
        "css": _asset("page.css"),
        "scripts": scripts,
        "script_hashes": [_script_hash(script) for script in scripts],
        "live": None,
        "version": version("align-rlhf"),
        "written": f"{datetime.now():%-d %B %Y, %H:%M}",
    }
    page: str = _environment().get_template(f"{template}.html.jinja").render(shared | context)
    return page


def render_within_limit(draw: Callable[[int], str]) -> str:
    """Draw a page with as many points per curve as its size allows.

    Args:
        draw: Draws the page with at most so many points per curve.

    Returns:
        The first page that is small enough, or the one with the fewest points.
    """
    limit = MAX_POINTS
    page = draw(limit)
    while len(page.encode(errors="replace")) > LARGEST_PAGE and limit > FEWEST_POINTS:
        limit //= 2
        page = draw(limit)
    return page


def short_title(section: str) -> str:
    """What a link to a section says."""
    return "SFT" if section == "sft" else section.replace("-", " ").capitalize()


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _script_hash(script: str) -> str:
    """What the page's security policy allows to run: this script and no other."""
    digest = sha256(script.encode()).digest()
    return f"sha256-{b64encode(digest).decode()}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["figure"] = _figure_text
    environment.filters["evidence"] = evidence_text
    environment.tests["setting"] = SETTING.fullmatch
    return environment


def _plain(meaning: str) -> str:
    """A meaning of the catalogue without the marks of Markdown."""
    return LINK.sub("", meaning).replace("`", "")


def _figure_text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
