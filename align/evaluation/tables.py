"""The evaluation of a run as a table on the terminal."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

FIGURES = (
    ("score_mean", "score, mean", "{:.3f}"),
    ("score_std", "score, deviation", "{:.3f}"),
    ("spread_mean", "spread of the ensemble, mean", "{:.3f}"),
    ("gold_mean", "gold score, mean", "{:.3f}"),
    ("win_rate", "wins over the reference by score", "{:.1%}"),
    ("gold_win_rate", "wins over the reference by gold score", "{:.1%}"),
    ("kl_per_sequence", "KL to the reference, nats a sequence", "{:.2f}"),
    ("kl_per_token", "KL to the reference, nats a token", "{:.3f}"),
    ("length_mean", "length, tokens", "{:.1f}"),
    ("distinct_2", "distinct-2", "{:.3f}"),
    ("eos_share", "ended by EOS", "{:.1%}"),
)
"""Key in `evaluation.json`, name for people, format."""


def evaluation_table(evaluation: dict[str, Any]) -> RenderableType:
    """What `evaluation.json` holds: the reward model's accuracy, then the sides beside each other."""
    parts: list[RenderableType] = []
    if model := evaluation.get("reward_model"):
        low, high = model["accuracy_low"], model["accuracy_high"]
        parts.append(
            f"reward model: accuracy {model['accuracy']:.1%} on {model['pairs']:,} held-out pairs "
            f"(95 % interval {low:.1%} to {high:.1%})"
        )
    if "policy" in evaluation:
        parts.append(_sides(evaluation))
    spent = "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in evaluation.get("seconds", {}).items())
    return Group(*parts, f"time: {spent or 'nothing ran'}")


def _sides(evaluation: dict[str, Any]) -> Table:
    best = evaluation.get("best_of")
    sides = {"reference": evaluation["reference"], "policy": evaluation["policy"]}
    if best:
        sides[f"best of {best['n']}"] = best
    for name, figures in evaluation.get("prompt_styles", {}).items():
        sides[f"reference, {name}"] = {key: value for key, value in figures.items() if "win" not in key}
    title = f"{evaluation['prompts']} held-out prompts; policy of step {evaluation['policy']['step']}"
    table = Table("", *sides, title=title, title_justify="left", box=None, padding=(0, 2))
    for key, name, form in FIGURES:
        cells = [form.format(side[key]) if key in side else "" for side in sides.values()]
        if any(cells):
            table.add_row(name, *cells)
    return table


def diagnostics_table(facts: dict[str, Any]) -> Table:
    """Whether to trust a reward model, in a few lines."""
    table = Table(show_header=False, box=None, padding=(0, 2))

    def share(known: dict[str, Any]) -> str:
        return f"{known['accuracy']:.1%} ({known['accuracy_low']:.1%} to {known['accuracy_high']:.1%})"

    if "accuracy" in facts:
        table.add_row("accuracy, 95 % interval", f"{share(facts)} of {facts['pairs']:,} comparisons")
        for name, known in facts["baselines"].items():
            table.add_row(f"the length alone: {name.replace('_', ' ')}", share(known))
        table.add_row("log loss, Brier score", f"{facts['log_loss']:.4f} nats, {facts['brier']:.4f}")
        table.add_row("expected calibration error", f"{facts['calibration_error']:.3f}")
        for row in facts["by_length_difference"]:
            table.add_row(f"better one longer by {row['from']:g} to {row['to']:g} tokens", share(row))
    for name in ("agreement", "rank_correlation", "rating_correlation"):
        if name in facts:
            table.add_row(name.replace("_", " "), f"{facts[name]:.3f}")
    if "invariance" in facts:
        table.add_row("scores move by", ", ".join(f"{gap:.1g} {name}" for name, gap in facts["invariance"].items()))
    return table
