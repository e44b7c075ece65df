"""Evaluations and diagnostics as tables for the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from align.runtime.consoles import escaped
from align.runtime.wording import counted

FIGURES = (
    ("score_mean", "score, mean", "{:.3f}"),
    ("score_std", "score, standard deviation", "{:.3f}"),
    ("spread_mean", "spread of the ensemble, mean", "{:.3f}"),
    ("gold_mean", "gold score, mean", "{:.3f}"),
    ("score_gain", "change of the score", "{:+.3f}"),
    ("gold_gain", "change of the gold score", "{:+.3f}"),
    ("win_rate", "win rate by score", "{:.1%}"),
    ("gold_win_rate", "win rate by gold score", "{:.1%}"),
    ("length_controlled_win_rate", "length-controlled win rate by score", "{:.1%}"),
    ("gold_length_controlled_win_rate", "length-controlled win rate by gold score", "{:.1%}"),
    ("kl_per_sequence", "KL, nats per sequence", "{:.2f}"),
    ("kl_per_token", "KL, nats per token", "{:.3f}"),
    ("length_mean", "length, tokens", "{:.1f}"),
    ("distinct_2", "distinct-2", "{:.3f}"),
    ("eos_share", "ended by EOS", "{:.1%}"),
)
"""Key in `evaluation.json`, label, format."""
INVARIANCE = {
    "batched": "in a microbatch of several",
    "beside_a_long_row": "beside a long sequence",
    "shared": "after a shared prompt",
}
"""How the scores were computed that are compared with those of each response alone, by key in `diagnostics.json`."""


JUDGE_FIGURES = (
    ("win_rate", "win rate by judge", "{:.1%}"),
    ("length_controlled_win_rate", "length-controlled win rate by judge", "{:.1%}"),
    ("first_share", "judge prefers the response shown first", "{:.1%}"),
    ("agreement", "judge agrees with itself in both orders", "{:.1%}"),
)
"""The same of a judge."""
PASS_AT_K = re.compile(r"pass_at_(\d+)")
"""The first part of the key of pass@K; that of an end of its interval is another."""

PERPLEXITY_FIGURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("bits_per_byte", "bits per byte", "{:.3f}"),
    ("perplexity_ratio", "perplexity over base", "{:.3f}"),
)
"""The same of a model's likelihood of texts."""

LABEL_FIGURES = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("f1_macro", "macro F1", "{:.3f}"),
    ("rmse", "RMSE", "{:.4g}"),
    ("mae", "MAE", "{:.4g}"),
    ("pearson", "Pearson's r", "{:.3f}"),
    ("spearman", "Spearman's r", "{:.3f}"),
)
"""The same of a classifier or regression model."""
MAX_CLASSES = 30
"""Classes that have rows in a table of the terminal: as many as a screen shows."""


def evaluation_table(evaluation: dict[str, Any]) -> RenderableType:
    """Show the contents of `evaluation.json`: classifier, the reward model's accuracy, then the models side by side."""
    parts: list[RenderableType] = []
    if classifier := evaluation.get("classifier"):
        parts += _label_tables(classifier)
    if reward_model := evaluation.get("reward_model"):
        low = reward_model["accuracy_low"]
        high = reward_model["accuracy_high"]
        parts.append(
            f"reward model: accuracy {reward_model['accuracy']:.1%} on {_judged(reward_model)} "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )
    if "policy" in evaluation:
        parts.append(_models_table(evaluation))
    if perplexity := evaluation.get("perplexity"):
        parts.append(perplexity_table(perplexity))
    times = "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in evaluation.get("seconds", {}).items())
    return Group(*parts, f"time: {times or 'nothing ran'}")


def _label_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """The figures of a classifier or regression model with their 95 % intervals, then those of each class."""
    title = f"{figures['task']}: {counted(figures['rows'], 'held-out row')}, with 95 % intervals"
    whole = Table(show_header=False, box=None, padding=(0, 0, 0, 2))
    for label, cell in label_rows(figures):
        whole.add_row(label, cell)
    by_class: Mapping[str, Any] = figures.get("by_class", {})
    if not 0 < len(by_class) <= MAX_CLASSES:
        return [title, whole]
    columns = ("class", "rows", "precision", "recall", "F1")
    table = Table(*columns, box=None, padding=(0, 0, 0, 2))
    for name, own in by_class.items():
        shares = [_cell(own, key, "{:.1%}") for key in ("precision", "recall")]
        table.add_row(escaped(name), f"{own['rows']:,}", *shares, _cell(own, "f1", "{:.3f}"))
    return [title, whole, table]


def label_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and formatted cell of each figure that a classifier or regression model has."""
    return [(label, _cell(figures, key, form)) for key, label, form in LABEL_FIGURES if key in figures]


def _models_table(evaluation: dict[str, Any]) -> Table:
    columns = {"reference": evaluation["reference"], "policy": evaluation["policy"]}
    if best := evaluation.get("best_of"):
        columns[f"best of {best['n']}"] = best
    for name, figures in evaluation.get("prompt_styles", {}).items():
        # The win rates are the policy's against this column, and would be taken for the column's own.
        columns[f"reference, {name}"] = {key: value for key, value in figures.items() if "win" not in key}
    title = f"{evaluation['prompts']} held-out prompts; policy of step {evaluation['policy']['step']}"
    table = Table("", *columns, title=title, title_justify="left", box=None, padding=(0, 0, 0, 2))
    for label, cells in figure_rows(list(columns.values())):
        table.add_row(label, *cells)
    return table


def perplexity_table(section: Mapping[str, Any]) -> Table:
    """The likelihood of each set of texts, and of held-out demonstrations, under each model."""
    title = f"perplexity, read in windows of {counted(section['window'], 'token')}, with 95 % intervals"
    headings = [label for _, label, _ in PERPLEXITY_FIGURES]
    table = Table(
        "", "documents", "model", *headings, title=title, title_justify="left", box=None, padding=(0, 0, 0, 2)
    )
    named = dict(section["texts"])
    named |= {f"held-out {name}": figures for name, figures in section["heldout"].items()}
    for name, figures in named.items():
        first = [escape(name), f"{figures['documents']:,}"]
        for model, own in figures["models"].items():
            cells = [_cell(own, key, form) for key, _, form in PERPLEXITY_FIGURES]
            table.add_row(*first, model, *cells)
            first = ["", ""]
    return table


FRONTIER_FIGURES = (
    ("kl", "KL, nats", "{:.2f}"),
    ("score_gain", "gain of score", "{:+.3f}"),
    ("gold_gain", "of gold score", "{:+.3f}"),
    ("score_efficiency", "efficiency", "{:.1%}"),
    ("gold_efficiency", "of gold score", "{:.1%}"),
)
"""Key in the section `frontier` of `evaluation.json`, heading, format."""


def frontier_table(section: Mapping[str, Any]) -> Table:
    """The best policy at each KL, best-of-n of the reference, and the run's policy at some scales."""
    rows = [("best policy", point) for point in section["points"]]
    rows += [(f"best of {draws['n']}", draws) for draws in section["best_of"]]
    rows += [(f"policy, scale {policy['scale']:g}", policy) for policy in section["policies"]]
    present: set[str] = set().union(*(figures for _, figures in rows))
    shown = [entry for entry in FRONTIER_FIGURES if entry[0] in present]
    samples = counted(section["samples"], "sample")
    title = f"{counted(section['prompts'], 'held-out prompt')}, {samples} of the reference for each, 95 % intervals"
    headings = [heading for _, heading, _ in shown]
    table = Table("", *headings, title=title, title_justify="left", box=None, padding=(0, 0, 0, 2))
    for name, figures in rows:
        table.add_row(name, *(_cell(figures, key, form) for key, _, form in shown))
    return table


def comparison_table(facts: dict[str, Any]) -> Table:
    """The policies of two runs side by side, each figure with its 95 % interval."""
    names = [escape(path) for path in facts["runs"]]
    title = f"{facts['prompts']} held-out prompts of {names[0]}, 95 % intervals"
    table = Table("", *names, title=title, title_justify="left", box=None, padding=(0, 0, 0, 2))
    for label, cells in figure_rows([facts["policy"], facts["against"]]):
        table.add_row(label, *cells)
    for label, cell in _judge_rows(facts.get("judge", {})):
        table.add_row(label, cell, "")
    return table


def _judge_rows(judge: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and cell of each figure of a judge that has compared two runs; none without a judge."""
    rows = [(label, _cell(judge, key, form)) for key, label, form in JUDGE_FIGURES if key in judge]
    criteria: Mapping[str, Any] = judge.get("criteria", {})
    if len(criteria) > 1:
        for name, figures in criteria.items():
            rows.append((f"win rate by judge, {name}", _cell(figures, "win_rate", "{:.1%}")))
    if judge.get("without_verdict"):
        rows.append(("replies of the judge without a verdict", f"{judge['without_verdict']:,}"))
    return rows


def figure_rows(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and formatted cells of each figure that any column has; the cell is empty where a column lacks it."""
    rows = []
    for key, label, form in (*FIGURES, *_rule_figures(columns)):
        cells = [_cell(column, key, form) for column in columns]
        if any(cells):
            rows.append((label, cells))
    return rows


def _rule_figures(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The same as `FIGURES` of accuracy and pass@k by the terms that any column has."""
    keys: dict[str, None] = {}  # a set that keeps the order
    for column in columns:
        keys |= dict.fromkeys(key for key in column if "/" in key)
    rows = []
    for key in keys:
        kind, _, term = key.partition("/")
        if kind == "accuracy":
            rows.append((key, f"right by {term}", "{:.1%}"))
        elif kind == "accuracy_gain":
            rows.append((key, f"change of right by {term}", "{:+.1%}"))
        elif match := PASS_AT_K.fullmatch(kind):
            rows.append((key, f"pass@{match[1]} by {term}", "{:.1%}"))
    return rows


def _cell(figures: Mapping[str, Any], key: str, form: str) -> str:
    """A figure, with its 95 % interval where it has one; empty where it is missing."""
    if key not in figures:
        return ""
    cell = form.format(figures[key])
    kind, slash, term = key.partition("/")
    low = f"{kind}_low{slash}{term}"
    high = f"{kind}_high{slash}{term}"
    if low in figures:
        cell += f" ({form.format(figures[low])} to {form.format(figures[high])})"
    return cell


def diagnostics_table(facts: dict[str, Any]) -> Table:
    """The main figures of `diagnostics.json`."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    if "labelled_steps" in facts:
        _add_step_rows(table, facts)
    elif "accuracy" in facts:
        _add_comparison_rows(table, facts)
    for row in _subset_rows(facts):
        table.add_row(*row)
    for name in ("agreement", "rank_correlation", "rating_correlation"):
        if name in facts:
            table.add_row(name.replace("_", " "), f"{facts[name]:.3f}")
    if "invariance" in facts:
        differences = []
        for name, difference in facts["invariance"].items():
            differences.append(f"{difference:.1g} {INVARIANCE[name]}")
        table.add_row("largest change of a score", ", ".join(differences))
    return table


def _add_comparison_rows(table: Table, facts: Mapping[str, Any]) -> None:
    """The figures of a reward model on comparisons."""
    table.add_row("accuracy, 95 % interval", f"{_accuracy(facts)} of {facts['pairs']:,} comparisons")
    for name, baseline in facts["baselines"].items():
        table.add_row(f"length alone: {name.replace('_', ' ')}", _accuracy(baseline))
    _add_calibration_rows(table, facts)
    for group in facts["by_length_difference"]:
        table.add_row(f"better response {_length_range(group['from'], group['to'])}", _accuracy(group))


def _add_calibration_rows(table: Table, facts: Mapping[str, Any]) -> None:
    table.add_row("log loss, Brier score", f"{facts['log_loss']:.4f} nats, {facts['brier']:.4f}")
    table.add_row("expected calibration error", f"{facts['calibration_error']:.3f}")


def _judged(facts: Mapping[str, Any]) -> str:
    """What a reward model's accuracy is over."""
    if "labelled_steps" in facts:
        return f"{facts['labelled_steps']:,} held-out steps"
    return f"{facts['pairs']:,} held-out pairs"


def _add_step_rows(table: Table, facts: Mapping[str, Any]) -> None:
    """The figures of a process reward model."""
    steps = counted(facts["labelled_steps"], "step")
    constant = facts.get("baselines", {}).get("constant")
    if "rmse" in facts:
        table.add_row("root mean squared error", f"{facts['rmse']:.4g} of {steps}")
        if constant:
            table.add_row("the mean label for every step", f"{constant['rmse']:.4g}")
        return
    table.add_row("accuracy, 95 % interval", f"{_accuracy(facts)} of {steps}")
    for name in ("right_steps", "wrong_steps"):
        if name in facts:
            number = counted(facts[name]["labelled_steps"], "step")
            table.add_row(f"of {name.replace('_', ' ')}", f"{_accuracy(facts[name])} of {number}")
    if constant:
        table.add_row("one judgement for every step", _accuracy(constant))
    for name in ("with_error", "without_error"):
        if found := facts.get("first_error", {}).get(name):
            label = "first error found, responses " + name.replace("_", " ")
            table.add_row(label, f"{_accuracy(found)} of {counted(found['rows'], 'row')}")
    if "f1" in facts.get("first_error", {}):
        table.add_row("F1 of the first error", f"{facts['first_error']['f1']:.3f}")
    _add_calibration_rows(table, facts)


def _subset_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and cell of the accuracy on each subset of a benchmark, and of their mean."""
    rows = []
    for name, accuracy in facts.get("subsets", {}).items():
        rows.append((f"subset {escape(name)}", f"{_accuracy(accuracy)} of {counted(accuracy['pairs'], 'row')}"))
    if ties := facts.get("ties"):
        rows.append(("weighted score of ties", f"{_cell(ties, 'score', '{:.1%}')} of {counted(ties['pairs'], 'pair')}"))
    if "subset_mean" in facts:
        rows.append(("mean over subsets", f"{facts['subset_mean']:.1%}"))
    return rows


def _length_range(low: float, high: float) -> str:
    """How much longer a response is than another, from `low` to `high` tokens; negative: shorter."""
    if low < 0 < high:
        return f"between {counted(-low, 'token')} shorter and {counted(high, 'token')} longer"
    direction = "longer" if high > 0 else "shorter"
    least, most = sorted((abs(low), abs(high)))
    if most == 0:
        return "of the same length"
    if least == most:
        return f"{direction} by {counted(most, 'token')}"
    return f"{direction} by {least:g} to {counted(most, 'token')}"


def _accuracy(figures: Mapping[str, Any]) -> str:
    """Accuracy with its interval."""
    return f"{figures['accuracy']:.1%} ({figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%})"


def scores_table(summary: dict[str, Any]) -> Table:
    """Number, mean and standard deviation of the scores of a file, and the mean of each term."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("responses", f"{summary['count']:,}")
    table.add_row("score, mean", f"{summary['mean']:.3f}")
    table.add_row("score, standard deviation", f"{summary['std']:.3f}")
    for name, mean in summary["terms"].items():
        table.add_row(f"{name}, mean", f"{mean:.3f}")
    return table
