"""Draw docs/images/architecture.svg and write the tables of docs/architecture.md, from the imports of the code.

    python docs/draw_architecture.py

Packages stand in the order that import-linter's contracts in pyproject.toml prescribe; the arcs are imports. Of two
ways from one package to another only the longer is drawn, so an arc that other arcs imply is left out.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
DRAWING = ROOT / "docs" / "images" / "architecture.svg"
TOP_PACKAGES = ("align", "policies", "rewards", "rollouts")
ALIGN_CONTRACT = "packages of align import only those below them"

DESCRIPTIONS = {
    "align.cli": "the command `align`",
    "align.api": "the Python interface",
    "align.report": "pages about runs",
    "align.outputs": "model card, export, trained runs, the list of runs",
    "align.choice": "which technique fits, and an experiment to start with",
    "align.stages": "SFT, reward model, PPO, and the pipeline of stages",
    "align.jobs": "runs as jobs of a Ray cluster",
    "align.resources": "plan, memory and Ray cluster of a run; checks of an installation",
    "align.evaluation": "evaluation of policies and reward models",
    "align.ppo": "PPO's objectives and loop, its metrics, checkpoints and checks",
    "align.supervised": "the objectives and the loop of SFT and reward training",
    "align.learner": "DeepSpeed ranks: gradients, optimizer steps and state, for every objective",
    "align.diagnosis": "what a run's metrics say about its health",
    "align.scoring": "the reward at run time",
    "align.runs": "a run's folder, fingerprint, checkpoints, tracking",
    "align.roles": "policy, reference, critic and reward model in one process",
    "align.algorithms": "advantages, losses, KL: functions of tensors",
    "align.data": "readers and tokenised data sets",
    "align.config": "settings, and the registries of stages and estimators",
    "align.runtime": "files, signals, seeds, progress",
    "rewards": "preference examples, reward models, reward terms",
    "rollouts": "engines, workers, trajectories",
    "policies": "base models, adaptation methods, forward passes",
}
"""What each package is for."""


@dataclass(frozen=True)
class Step:
    """One step of the data flow: what it turns the step before into, and the module that does it."""

    result: str
    module: str


DATA_FLOW = (
    Step("prompts", "align.ppo.prompts"),
    Step("trajectories: tokens, log-probabilities, version of the weights", "rollouts.pool"),
    Step("role outputs: log-probabilities, values, reward heads", "align.roles.scoring"),
    Step("scores, composed of the reward's terms", "align.scoring.reward"),
    Step("advantages and returns", "align.algorithms.estimators"),
    Step("episodes, sharded over the learner's ranks", "align.algorithms.episodes"),
    Step("gradients and optimizer steps", "align.ppo.learner"),
    Step("adapter weights of the next version, sent to the workers", "rollouts.weight_transfer"),
)


def main() -> None:
    """Write both files."""
    graph = grimp.build_graph(*TOP_PACKAGES, cache_dir=None)
    packages = ordered_packages()
    imports = package_imports(graph, packages)
    DRAWING.write_text(drawing(packages, imports), encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    text = replace_between(text, "packages", packages_table(packages, imports))
    text = replace_between(text, "data flow", data_flow_table(graph.modules))
    DOCUMENT.write_text(text, encoding="utf-8")


def ordered_packages() -> list[str]:
    """All packages, each above those that it may import.

    Raises:
        ValueError: DESCRIPTIONS lacks one of them, or has one too many.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == ALIGN_CONTRACT)
    names = [f"align.{layer}" for layer in layers if layer != "__main__"]
    packages = [*names, "rewards", "rollouts", "policies"]
    if set(packages) != set(DESCRIPTIONS):
        raise ValueError(f"DESCRIPTIONS does not fit the packages: {sorted(set(packages) ^ set(DESCRIPTIONS))}")
    return packages


def package_imports(graph: grimp.ImportGraph, packages: Sequence[str]) -> dict[str, list[str]]:
    """For each package, those that it imports, in the same order."""
    imports: dict[str, list[str]] = {}
    for importer in packages:
        imported: set[str] = set()
        for module in graph.modules:
            if is_in(module, importer):
                for target in graph.find_modules_directly_imported_by(module):
                    imported |= {package for package in packages if is_in(target, package)}
        imports[importer] = [package for package in packages if package in imported and package != importer]
    return imports


def is_in(module: str, package: str) -> bool:
    """Whether a module is the package or lies in it."""
    return module == package or module.startswith(f"{package}.")


def without_implied(imports: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The imports that no chain of other imports implies."""
    reached = {package: reachable(package, imports) for package in imports}
    direct: dict[str, list[str]] = {}
    for package, targets in imports.items():
        implied: set[str] = set()
        for target in targets:
            implied |= reached[target]
        direct[package] = [target for target in targets if target not in implied]
    return direct


def reachable(package: str, imports: Mapping[str, Sequence[str]]) -> set[str]:
    """All packages that a package imports, directly or through others."""
    reached: set[str] = set()
    pending = list(imports[package])
    while pending:
        target = pending.pop()
        if target not in reached:
            reached.add(target)
            pending += imports[target]
    return reached


# --- The drawing ----------------------------------------------------------------------------------------------------

WIDTH = 790
BOX_WIDTH = 500
BOX_HEIGHT = 26
ROW_HEIGHT = 36
MARGIN = 12
COLOURS = {"align": "#dbe9f6", "rewards": "#fbe5d0", "rollouts": "#dff0d8", "policies": "#ece2f3"}


def drawing(packages: Sequence[str], imports: Mapping[str, Sequence[str]]) -> str:
    """An SVG with a box per package and an arc per import that others do not imply."""
    height = 2 * MARGIN + ROW_HEIGHT * len(packages)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>',
    ]
    rows = {package: row for row, package in enumerate(packages)}
    for package, row in rows.items():
        lines += box(package, MARGIN + ROW_HEIGHT * row)
    for package, targets in without_implied(imports).items():
        lines += [arc(rows[package], rows[target]) for target in targets]
    return "\n".join([*lines, "</svg>", ""])


def box(package: str, top: int) -> list[str]:
    """A package with its description."""
    colour = COLOURS[package.partition(".")[0]]
    baseline = top + 17
    description = DESCRIPTIONS[package].replace("`", "")
    return [
        f'<rect x="{MARGIN}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4" '
        f'fill="{colour}" stroke="#888"/>',
        f'<text x="{MARGIN + 8}" y="{baseline}" font-weight="bold">{package}</text>',
        f'<text x="{MARGIN + 130}" y="{baseline}">{description}</text>',
    ]


def arc(start: int, end: int) -> str:
    """A curve from the right side of one row's box to that of a lower one; the farther, the wider."""
    x = MARGIN + BOX_WIDTH
    y_start = MARGIN + ROW_HEIGHT * start + 2 * BOX_HEIGHT // 3
    y_end = MARGIN + ROW_HEIGHT * end + BOX_HEIGHT // 3
    bulge = x + 20 + 17 * (end - start)
    return (
        f'<path d="M{x} {y_start} C{bulge} {y_start} {bulge} {y_end} {x} {y_end}" fill="none" stroke="#555" '
        f'marker-end="url(#tip)"/>'
    )


# --- The tables -----------------------------------------------------------------------------------------------------


def packages_table(packages: Sequence[str], imports: Mapping[str, Sequence[str]]) -> str:
    """What each package is for and what it imports, in Markdown."""
    lines = ["| package | what it is for | imports |", "|---|---|---|"]
    for package in packages:
        names = [f"`{target.removeprefix('align.')}`" for target in imports[package]]
        lines.append(f"| `{package}` | {DESCRIPTIONS[package]} | {', '.join(names) or '–'} |")
    return "\n".join(lines)


def data_flow_table(modules: Iterable[str]) -> str:
    """The data flow, in Markdown. Raises ValueError for a module that does not exist."""
    missing = {step.module for step in DATA_FLOW} - set(modules)
    if missing:
        raise ValueError(f"DATA_FLOW names modules that do not exist: {sorted(missing)}")
    lines = ["| step | gives | module |", "|---|---|---|"]
    for number, step in enumerate(DATA_FLOW, start=1):
        path = f"{step.module.replace('.', '/')}.py"
        lines.append(f"| {number} | {step.result} | [{path}](../{path}) |")
    return "\n".join(lines)


def replace_between(text: str, name: str, table: str) -> str:
    """Put a table between its two markers in a document."""
    begin = f"<!-- {name}: written by draw_architecture.py -->\n"
    end = f"\n<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{DOCUMENT} has no markers for {name}")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}{table}{end}{tail}"


if __name__ == "__main__":
    main()
