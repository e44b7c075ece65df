"""Gradients of supervised objectives the slow way: in float64, example by example, and by formulas written out here.

Nothing of the learner, its forward passes or its losses is used: the base model is transformers' own, adapters are
added to its weights, and a response is a sequence of its own.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations, permutations, product
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid, softplus
from transformers import AutoModelForCausalLM

from align.data.examples import TokenizedDemonstration, TokenizedPreference
from align.learner.state import TrainedWeights
from rewards.preferences import Pair, PreferenceExample, Ranking, Rating
from rewards.schema import RewardSettings

PREFIX = "base_model.model."
A = ".lora_A.weight"
B = ".lora_B.weight"
Parts = dict[str, dict[str, Tensor]]
"""Tensors by part of what is trained (`adapter A`, `adapter B`, `heads`, `ties`, `links`), then by name."""


def parts_of(weights: TrainedWeights, role: str) -> Parts:
    """What is trained under a role, in float64."""
    parts: Parts = {}
    for name, tensor in weights.adapters.get(role, {}).items():
        part = "adapter A" if name.endswith(A) else "adapter B"
        parts.setdefault(part, {})[name] = tensor.double()
    for name, tensor in weights.heads.get(role, {}).items():
        parts.setdefault("heads", {})[name] = tensor.double()
    for name, tensor in weights.heads.get(f"{role}.loss", {}).items():
        parts.setdefault("ties" if name == "ties.free" else "links", {})[name] = tensor.double()
    return parts


def all_tensors(parts: Parts) -> Iterator[Tensor]:
    """The tensors of all parts."""
    return chain.from_iterable(part.values() for part in parts.values())


@dataclass(frozen=True)
class Plain:
    """A loss and its gradient, divided by the number of tokens or examples; and figures of the comparisons."""

    loss: float
    gradients: Parts
    accuracy: float = math.nan
    margin: float = math.nan


class PlainModel:
    """The base model in float64, with adapters that are added to its weights."""

    def __init__(self, path: Path, scale: float) -> None:
        """Load the model. `scale` multiplies the product of an adapter's matrices."""
        self.causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).requires_grad_(False)
        self.scale = scale
        for module in list(self.causal.modules()):
            for name, norm in list(module.named_children()):
                if "Norm" in type(norm).__name__:  # transformers' computes in float32
                    exact = nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
                    exact.weight.data.copy_(norm.weight)
                    setattr(module, name, exact.requires_grad_(False))

    def run(self, ids: Sequence[int], parts: Parts) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, H]` and logits `[T, V]` of a sequence `[T]`."""
        changed = {}
        for name, down in parts.get("adapter A", {}).items():
            up = parts["adapter B"][name.replace(A, B)]
            weight = name.removeprefix(PREFIX).replace(A, ".weight")
            changed[weight] = self.causal.get_parameter(weight) + self.scale * up @ down
        inputs = {"input_ids": torch.tensor([ids]), "output_hidden_states": True, "use_cache": False}
        outputs = functional_call(self.causal, changed, kwargs=inputs)
        return outputs.hidden_states[-1][0], outputs.logits[0]


def sft(model: PlainModel, parts: Parts, demonstrations: Sequence[TokenizedDemonstration]) -> Plain:
    """The negative log-likelihood of the trained tokens."""
    leaves = _leaves(parts)
    total = _Sum(leaves)
    tokens = 0
    for demonstration in demonstrations:
        _, logits = model.run(demonstration.ids, leaves)
        logprobs = logits.log_softmax(-1)  # [T, V]
        for start, end in demonstration.turns:
            for position in range(start, end):
                total.loss = total.loss - logprobs[position - 1, demonstration.ids[position]]
                tokens += 1
        total.differentiate()
    return total.over(tokens)


class PlainReward:
    """The loss of preference examples under the settings of a reward stage."""

    def __init__(
        self,
        model: PlainModel,
        settings: RewardSettings,
        examples: Sequence[TokenizedPreference],
        heldout: Sequence[TokenizedPreference],
    ) -> None:
        """Take the training examples, from which ties and ratings have their scales, and the held-out ones."""
        self.model = model
        self.settings = settings
        self.choices = _Choices([preference.example for preference in examples])
        self.rated: dict[str, list[float]] = {}
        for preference in (*examples, *heldout):
            if isinstance(preference.example.preference, Rating):
                for name, value in preference.example.preference.values.items():
                    self.rated.setdefault(name, []).append(value)

    def evaluate(self, parts: Parts, preferences: Sequence[TokenizedPreference], trains: bool = True) -> Plain:
        """The mean loss of a batch, with smoothing and centering if it is one of training examples."""
        leaves = _leaves(parts)
        total = _Sum(leaves)
        settings = self.settings
        smoothing = settings.label_smoothing if trains else 0.0
        differences: list[float] = []
        corrections = torch.zeros(self.choices.largest - 1, dtype=torch.float64)
        for preference in preferences:
            example = preference.example
            by_attribute = self._scores(preference, leaves)
            total.loss = total.loss + self._loss(by_attribute, example, leaves, smoothing)
            if trains and settings.centering:
                total.loss = total.loss + settings.centering * by_attribute[""].mean() ** 2
            total.differentiate()
            corrections += (1 - smoothing) * self.choices.excess(example.preference)
            differences += _differences(by_attribute, example)
        result = total.over(len(preferences))
        if "ties" in parts:
            ties = result.gradients["ties"]
            ties["ties.free"] = self.choices.scale * (ties["ties.free"] + corrections / len(preferences))
        right = [1.0 if difference > 0 else 0.5 * (difference == 0) for difference in differences]
        return Plain(
            loss=result.loss,
            gradients=result.gradients,
            accuracy=fmean(right) if right else math.nan,
            margin=fmean(differences) if differences else math.nan,
        )

    def _scores(self, preference: TokenizedPreference, parts: Parts) -> dict[str, Tensor]:
        """Scores `[K]` of the responses by attribute, and the overall ones."""
        heads = parts["heads"]
        scores = {}
        overall: Tensor | float = 0.0
        states = []
        for response in preference.responses_ids:
            hidden, _ = self.model.run(preference.prompt_ids + response, parts)
            states.append(hidden[-1])
        for number, (name, weight) in enumerate(self.settings.weights.items()):
            scores[name] = torch.stack(states) @ heads[f"{number}.weight"] + heads[f"{number}.bias"]
            overall = overall + weight * scores[name]
        return {**scores, "": torch.as_tensor(overall)}

    def _loss(
        self, by_attribute: Mapping[str, Tensor], example: PreferenceExample, parts: Parts, smoothing: float
    ) -> Tensor:
        preference = example.preference
        if isinstance(preference, Rating):
            total = torch.zeros((), dtype=torch.float64)
            for name, value in preference.values.items():
                total = total + self._rating_loss(by_attribute[name][0], name, value, parts["links"])
            return total
        scores = by_attribute[example.attribute]
        if isinstance(preference, Pair):
            difference = scores[0] - scores[1] - preference.margin
            right = preference.certainty * (1 - smoothing) + (1 - preference.certainty) * smoothing
            return -right * logsigmoid(difference) - (1 - right) * logsigmoid(-difference)
        log_ties = [torch.zeros((), dtype=torch.float64), *parts.get("ties", {}).get("ties.free", ())]
        likelihood = open_likelihood if preference.open else davidson_luce_likelihood
        loss = -likelihood(scores, preference.sizes, log_ties).log()
        reversed_loss = -likelihood(scores.flip(0), preference.sizes[::-1], log_ties).log()
        return (1 - smoothing) * loss + smoothing * reversed_loss

    def _rating_loss(self, score: Tensor, name: str, value: float, links: Mapping[str, Tensor]) -> Tensor:
        prefix = f"links.of {name}" if name else "links.overall"
        values = self.rated[name]
        if self.settings.ratings == "regression":
            expected = links[f"{prefix}.log_slope"].exp() * score + links[f"{prefix}.intercept"]
            return (expected - (value - fmean(values)) / pstdev(values)) ** 2 / 2
        gaps = [softplus(gap) for gap in links.get(f"{prefix}.gaps", ())]
        thresholds = [-torch.inf, *accumulate([*links[f"{prefix}.first"], *gaps])]
        cumulative = [torch.sigmoid(threshold - score) for threshold in (*thresholds, torch.inf)]
        level = sorted(set(values)).index(value)
        return -(cumulative[level + 1] - cumulative[level]).log()


class _Choices:
    """How often the training data's rankings choose how many responses at once, where ties are judgements."""

    def __init__(self, examples: Sequence[PreferenceExample]) -> None:
        sizes: list[int] = []
        for example in examples:
            sizes += _chosen(example.preference)
        self.largest = max(sizes, default=1)
        counts = Counter(sizes)
        seen = [max(counts[size], 0.5) for size in range(1, self.largest + 1)]
        self.shares = torch.tensor(seen, dtype=torch.float64) / sum(seen)
        self.scale = len(examples) / max(len(sizes), 1)

    def excess(self, preference: object) -> Tensor:
        """The ties of a ranking by size, less those of as many choices in the data."""
        chosen = _chosen(preference)
        counts = torch.tensor([float(chosen.count(size)) for size in range(2, self.largest + 1)])
        return counts.double() - len(chosen) * self.shares[1:]


def _chosen(preference: object) -> list[int]:
    """The sizes of the sets that a ranking chooses; the last response alone is no choice."""
    if not isinstance(preference, Ranking) or preference.open:
        return []
    return [*preference.sizes[:-1], *(size for size in preference.sizes[-1:] if size > 1)]


def davidson_luce_likelihood(scores: Tensor, sizes: Sequence[int], log_ties: Sequence[Tensor]) -> Tensor:
    """Each rank is a set of the remaining responses, chosen from all sets that are not too large."""
    likelihood = torch.ones((), dtype=torch.float64)
    remaining = list(range(len(scores)))
    for size in sizes:
        weights = {}
        for count, log_tie in enumerate(log_ties, start=1):
            for members in combinations(remaining, count):
                weights[members] = (log_tie + scores[list(members)].mean()).exp()
        likelihood = likelihood * weights[tuple(remaining[:size])] / sum(weights.values())
        remaining = remaining[size:]
    return likelihood


def open_likelihood(scores: Tensor, sizes: Sequence[int], _: Sequence[Tensor]) -> Tensor:
    """The sum over all orders of equal ranks, each chosen one by one."""
    responses = iter(range(len(scores)))
    groups = [[next(responses) for _ in range(size)] for size in sizes]
    total = torch.zeros((), dtype=torch.float64)
    for orders in product(*map(permutations, groups)):
        order = list(chain.from_iterable(orders))
        likelihood = torch.ones((), dtype=torch.float64)
        for start in range(len(order)):
            worths = scores[order[start:]].exp()
            likelihood = likelihood * worths[0] / worths.sum()
        total = total + likelihood
    return total


def _differences(by_attribute: Mapping[str, Tensor], example: PreferenceExample) -> list[float]:
    """Better minus worse score for each two responses of different rank."""
    preference = example.preference
    if isinstance(preference, Rating) or (isinstance(preference, Pair) and preference.certainty == 0.5):
        return []
    sizes = (1, 1) if isinstance(preference, Pair) else preference.sizes
    ranks = list(chain.from_iterable([rank] * size for rank, size in enumerate(sizes)))
    scores = by_attribute[example.attribute].tolist()
    differences = []
    for first, second in combinations(range(len(scores)), 2):
        if ranks[first] < ranks[second]:
            differences.append(scores[first] - scores[second])
    return differences


class _Sum:
    """A loss that grows example by example, and its gradient."""

    def __init__(self, leaves: Parts) -> None:
        self.leaves = leaves
        self.loss = torch.zeros((), dtype=torch.float64)
        self.total = 0.0

    def differentiate(self) -> None:
        """Add the gradient of the loss so far, and start again from 0."""
        self.loss.backward()
        self.total += self.loss.item()
        self.loss = torch.zeros((), dtype=torch.float64)

    def over(self, count: int) -> Plain:
        """Loss and gradient, divided by a number."""
        gradients: Parts = {}
        for part, tensors in self.leaves.items():
            gradients[part] = {}
            for name, tensor in tensors.items():
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                gradients[part][name] = gradient.detach() / count
        return Plain(self.total / count, gradients)


def _leaves(parts: Parts) -> Parts:
    leaves: Parts = {}
    for part, tensors in parts.items():
        leaves[part] = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    return leaves
