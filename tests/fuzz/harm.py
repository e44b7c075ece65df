"""Damage for fuzz tests: wrong values in trees of objects and lists, and changed bytes in files."""

import codecs
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.errors import UserError

SLOWEST = 20.0
"""Seconds that reading one small file may take on a busy machine."""

ODD_TEXT = (
    "", " ", "\0", "a\0b", "\x1b[2J", "\ud800", "a\udfff", "\ufeff", "\u202e", "é", "e\u0301", "💥", "../x", "/", "~",
    "~nobody/x", "x" * 5000, "true", "null", "1e5", "nan", "-", "${name}", "${", "$", "${oc.env:HOME}", "???", "%s",
    "{}", "{0.__class__}", "#", "\r\n", "\u2028", "0x", "0x_", "2024-13-45", "١", "[1, 2", "(" * 300, "a{99999999999}",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 10**18, -(10**18), 2**63, 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
odd_text = st.sampled_from(ODD_TEXT)
odd_number = st.sampled_from(ODD_NUMBERS)


def nested(depth: int, inside: Any = 1) -> Any:
    """Alternating lists and objects, nested to this depth."""
    for level in range(depth):
        inside = [inside] if level % 2 else {"a": inside}
    return inside


odd_value: st.SearchStrategy[Any] = st.one_of(
    odd_text,
    odd_number,
    st.sampled_from([None, True, False, [], {}, [[]], {"": ""}, [None], {"path": "x"}, {"kind": "model"}]),
    st.text(max_size=8),
    st.lists(st.one_of(odd_text, odd_number), max_size=3),
    st.dictionaries(odd_text, odd_number, max_size=3),
    st.sampled_from([3, 20, 40, 200]).map(nested),
)


def paths_in(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of objects and lists."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*prefix, key)
        yield from paths_in(value, (*prefix, key))


@st.composite
def altered(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = odd_value) -> Any:
    """A tree in which some values are replaced, removed or renamed, and others added."""
    tree = copy.deepcopy(tree)
    values = values.map(copy.deepcopy)
    for _ in range(draw(st.integers(0, 3))):
        paths = list(paths_in(tree))
        if not paths:
            break
        *parent_path, key = draw(st.sampled_from(paths))
        parent = tree
        for step in parent_path:
            parent = parent[step]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"]))
        if how == "replace":
            parent[key] = draw(values)
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(draw(values))
        else:
            parent[draw(odd_text)] = parent.pop(key) if how == "rename" else draw(values)
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are flipped, truncated, inserted, removed, doubled, or in another encoding."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["flip", "truncate", "insert", "remove", "double", "encode"]))
        if how == "flip" and position < len(data):
            data[position] ^= draw(st.integers(1, 255))
        elif how == "truncate":
            del data[position:]
        elif how == "insert":
            data[position:position] = draw(
                st.sampled_from([b"\0", b"\0" * 64, b"\xff", b"\xed\xa0\x80", b'"', b"[", b"{" * 99])
            )
        elif how == "remove":
            del data[position : position + draw(st.integers(1, 40))]
        elif how == "double":
            data[position:position] = data[: draw(st.integers(1, 200))]
        elif how == "encode":
            name = draw(st.sampled_from(["utf-16", "utf-32-be", "latin-1", "utf-8-sig"]))
            data[:] = codecs.encode(bytes(data).decode("utf-8", "replace"), name, "replace")
    return bytes(data)


def run(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    """Check this many examples, each within `SLOWEST` seconds."""

    def timed(example: Any) -> None:
        started = time.monotonic()
        check(example)
        assert time.monotonic() - started < SLOWEST, "it took too long"

    quiet = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    quiet(given(strategy)(timed))()


def refusal(act: Callable[[], Any]) -> str | None:
    """The message of the UserError that an action raises; None where it raises nothing."""
    try:
        act()
    except UserError as error:
        return str(error)
    return None


_watched: list[tuple[Path, list[str]]] = []
"""The folder of each open `confined` block, and what was done outside of it."""


def _record_outside_access(event: str, arguments: Sequence[Any]) -> None:
    if not _watched:
        return
    paths: Sequence[Any] = ()
    opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if opened or event in ("os.mkdir", "os.remove", "os.rmdir"):
        paths = arguments[:1]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = arguments[:2]
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"):
        _watched[-1][1].append(f"{event} {arguments}")
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike) and "__pycache__" not in str(path) and str(path) != os.devnull:
            folder, violations = _watched[-1]
            if not Path(os.fsdecode(path)).absolute().resolve().is_relative_to(folder):
                violations.append(f"{event} {path!r}")


sys.addaudithook(_record_outside_access)


@contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Fail if the block writes outside a folder, starts a process, opens a connection, or unpickles a name."""
    _watched.append((folder.resolve(), []))
    try:
        yield
    finally:
        _, violations = _watched.pop()
    assert not violations, violations[:5]


NOW = datetime(2024, 2, 29, tzinfo=UTC)
