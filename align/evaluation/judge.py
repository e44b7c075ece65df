"""A language model as a judge of two responses: in both orders, by the criteria of a rubric."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.config.judge_settings import JudgeSettings
from align.evaluation.intervals import share_with_interval
from align.evaluation.length_control import length_controlled_win_rate
from policies.errors import UserError
from rewards.terms.judge import fill

VERDICT = re.compile(r"\[\[([ABC])\]\]")
"""A verdict, as judges are told to give it (Zheng et al. 2023, "Judging LLM-as-a-judge")."""
VALUES = {"A": 1.0, "B": 0.0, "C": 0.5}
"""What a verdict is worth for the response that is shown first."""

Replies = Callable[[Sequence[str]], list[str]]
"""Gives the judge's reply to each message."""


@dataclass(frozen=True)
class Comparisons:
    """The verdicts of a judge on the responses of two policies to n prompts.

    Attributes:
        first: By criterion, `[2, n]` float64: how far the response that is shown first is better, 1, ½ or 0; in the
            first row that is the first policy's, in the second row the other's.
        weights: The weight of each criterion.
        longer: Tokens of the first policy's response less those of the other's, `[n]`.
        without_verdict: Replies that had no verdict, and count as ties.
    """

    first: Mapping[str, Tensor]
    weights: Mapping[str, float]
    longer: Tensor
    without_verdict: int

    def figures(self) -> dict[str, Any]:
        """The figures of the first policy against the second, with 95 % intervals over prompts.

        Returns:
            `win_rate`: the share of comparisons that it wins, ties one half, as the mean over both orders and the
            weighted mean over the criteria; where it can be estimated `length_controlled_win_rate`; `criteria`, the
            win rate by each; `first_share`, the share that the response shown first wins, one half without position
            bias; `agreement`, the share of comparisons with one verdict in both orders; and `without_verdict`.
        """
        wins = {name: torch.stack([first[0], 1 - first[1]]) for name, first in self.first.items()}  # [2, n] each
        total = sum(self.weights.values())
        overall = torch.stack([self.weights[name] / total * own.mean(0) for name, own in wins.items()]).sum(0)  # [n]
        figures: dict[str, Any] = share_with_interval("win_rate", overall)
        if controlled := length_controlled_win_rate(overall, self.longer):
            name = "length_controlled_win_rate"
            figures |= {name: controlled.win_rate, f"{name}_low": controlled.low, f"{name}_high": controlled.high}
        figures["criteria"] = {name: share_with_interval("win_rate", own.mean(0)) for name, own in wins.items()}
        figures |= share_with_interval("first_share", torch.stack(list(self.first.values())).mean((0, 1)))
        agreements = torch.stack([(own[0] == own[1]).double() for own in wins.values()])  # [criteria, n]
        figures |= share_with_interval("agreement", agreements.mean(0))
        return figures | {"without_verdict": self.without_verdict}


def judge_pairs(
    replies: Replies, settings: JudgeSettings, prompts: Sequence[str], policy: Sequence[str], against: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """Have a judge compare the responses of two policies, each pair in both orders, by each criterion.

    Args:
        replies: The judge.
        settings: The instruction and the rubric.
        prompts: n prompts.
        policy: The responses of the first policy.
        against: Those of the second.

    Returns:
        `first` and `without_verdict` of `Comparisons`.

    Raises:
        UserError: A reply has no verdict, and that is an error.
    """
    messages = []
    for criterion in settings.rubric.values():
        for first, second in ((policy, against), (against, policy)):
            for index, prompt in enumerate(prompts):
                fields = {
                    "criterion": criterion.description,
                    "prompt": prompt,
                    "first": first[index],
                    "second": second[index],
                }
                messages.append(fill(settings.instruction, fields))
    values = [_value(reply) for reply in replies(messages)]
    without_verdict = values.count(None)
    if without_verdict and settings.on_no_verdict == "error":
        raise UserError(
            f"evaluation.judge: {without_verdict} of {len(values)} replies of {settings.model} have no verdict, [[A]], "
            "[[B]] or [[C]]: ask for it in the instruction, allow longer replies by max_tokens, or set on_no_verdict "
            "to tie"
        )
    ties = [VALUES["C"] if value is None else value for value in values]
    by_criterion = torch.tensor(ties, dtype=torch.float64).view(len(settings.rubric), 2, len(prompts))
    return dict(zip(settings.rubric, by_criterion, strict=True)), without_verdict


def _value(reply: str) -> float | None:
    """What the last verdict in a reply is worth for the first response; None without one."""
    verdicts = VERDICT.findall(reply)
    return VALUES[verdicts[-1]] if verdicts else None
