"""Writes the outcomes in the XML of `pytest --junitxml` into the table of docs/cluster.md."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
TABLE = re.compile(r"(?<=<!-- outcomes -->\n).*?(?=<!-- end of outcomes -->)", re.DOTALL)
HEADER = "| what happens | outcome | seconds | message |\n|---|---|---|---|\n"
FOLDER = re.compile(r"(?:/[\w.-]+)+/(?=runs/|model\b)")
"""The temporary folder of a test, in messages."""
ACTOR = re.compile(r"[0-9a-f]{32}")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: table.py FILE, which `pytest --junitxml` has written")
    table = HEADER + "".join(map(written, outcomes(sys.argv[1])))
    DOCUMENT.write_text(TABLE.sub(lambda _: table, DOCUMENT.read_text()))


def outcomes(path: str) -> Iterator[dict[str, str]]:
    """The properties of each test that has any."""
    for test in ElementTree.parse(path).iter("testcase"):
        row = {element.attrib["name"]: element.attrib["value"] for element in test.iter("property")}
        if row:
            yield row


def written(row: dict[str, str]) -> str:
    message = ACTOR.sub("…", FOLDER.sub("", row["message"])).replace("|", "\\|")
    return f"| {row['scenario']} | {row['outcome']} | {row['seconds']} | {message} |\n"


if __name__ == "__main__":
    main()
