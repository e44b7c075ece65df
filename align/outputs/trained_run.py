"""A trained run, whose policy and reward model can be used or evaluated again without a learner."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from align.config.schema import Experiment, SourceSettings
from align.data.datasets import Datasets, context_length, read_preferences, read_step_labels
from align.data.documents import read_documents
from align.data.examples import TokenizedPreference
from align.evaluation.comparison import ScoredResponses
from align.evaluation.reward_model import compute_diagnostics
from align.outputs.artifacts import classifier_folder, scaled_policy
from align.outputs.export import Exported, Product, export_run
from align.outputs.frontier import measure_frontier
from align.outputs.predictions import Prediction, predict_labels
from align.outputs.prompt_checks import check_fits, check_lists, check_prompt, check_room, check_text
from align.outputs.response_stream import ResponseStream
from align.roles.text_classifier import TextClassifier, load_text_classifier
from align.runs.folder import RunFolder, find_run, read_facts
from align.runs.products import missing_product
from align.runtime.atomic_files import write_json
from align.runtime.seeds import seed_for
from align.stages.perplexity import measure_perplexity
from align.stages.pipeline import load_datasets
from align.stages.policy_evaluation import LoadedReward
from align.stages.reward import (
    classifier_scores,
    evaluate_models,
    evaluate_process_model,
    folded_moments,
    load_models,
)
from policies.build import build_trunk
from policies.errors import UserError
from policies.files.base_model import load_model_tokenizer
from policies.files.safe_reading import read_object
from policies.scaling import ScaledAdapter
from policies.text.columns import tools as tools_in
from policies.text.encoder import Exchange, TextEncoder, Tools
from policies.text.tokenization import Prompt, decode_response
from rewards.classifier import Classifier
from rewards.preferences import OVERALL
from rollouts.engine import Sampling
from rollouts.trajectory import Request, Trajectory, lengths
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine, make_transformers_engine


def open_run(path: Path | str, overrides: Sequence[str] = (), scale: float = 1.0) -> "TrainedRun":
    """Open a run to use what it has trained.

    Args:
        path: The run's folder, or its name under `runs/`.
        overrides: Settings that replace the run's, as `key.path=value`.
        scale: a of the policy, reference + a · (policy - reference): 0 is the reference, 1 the policy as trained.

    Returns:
        The run.

    Raises:
        UserError: There is no such run.
    """
    folder, experiment = find_run(str(path), overrides=overrides)
    return TrainedRun(experiment, folder, scale)


class TrainedRun:
    """A run and the models that it has trained so far, which are loaded when they are first used.

    Attributes:
        experiment: The run's settings.
        folder: The paths inside the run's folder.
        scale: a of the policy, reference + a · (policy - reference).
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, scale: float = 1.0) -> None:
        self.experiment = experiment
        self.folder = folder
        self.scale = scale
        self.tokenizer = load_model_tokenizer(experiment.model)
        self.encoder = TextEncoder(self.tokenizer, experiment.data.special_tokens)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def evaluation(self) -> dict[str, Any]:
        """The contents of `evaluation.json`; empty before the run has written it."""
        return self.folder.read_evaluation()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        tools: Sequence[Tools | None] | None = None,
    ) -> list[str]:
        """Sample responses of the policy, or of the SFT model if PPO has not finished.

        Args:
            prompts: Texts, which are continued as they are; or lists of messages with `role` and `content`, which the
                chat template renders.
            temperature: Sampling temperature, 0 for greedy; None: `rollouts.temperature`.
            max_new_tokens: Length of the longest response, in tokens; None: `rollouts.max_new_tokens`.
            seed: Seed of the sampling; the same seed gives the same responses.
            tools: Per prompt, the functions that the assistant may call, for the chat template; None: none.

        Returns:
            One response per prompt, without special tokens.

        Raises:
            UserError: The run has neither policy nor SFT model yet; or a prompt is not text or messages, contains
                special tokens, is refused by the chat template, or leaves no room for the response.
            TypeError: A text is given instead of a list of prompts.
        """
        check_lists(prompts=prompts, tools=tools or None)
        sampling = self._sampling(temperature, max_new_tokens)
        requests = []
        for index, prompt in enumerate(prompts):
            functions = tools[index] if tools else None
            prompt_ids = self._prompt_ids(prompt, functions, f"prompt {index + 1}", sampling.max_new_tokens)
            requests.append(Request(prompt, prompt_ids, seed_for(seed, "generate", index)))
        trajectories = self._engine.generate(requests, sampling)
        return [decode_response(self.tokenizer, trajectory.response_ids) for trajectory in trajectories]

    def stream(
        self,
        prompt: Prompt,
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> ResponseStream:
        """Sample one response piece by piece: the text that `generate` gives for this prompt alone.

        Args:
            prompt: As for `generate`.
            temperature: As for `generate`.
            max_new_tokens: As for `generate`.
            seed: As for `generate`.

        Returns:
            An iterable of pieces of text, each generated when it is asked for. Afterwards, its attribute `truncated`
            tells whether the response reached `max_new_tokens` before it ended.

        Raises:
            UserError: As for `generate`.
        """
        sampling = self._sampling(temperature, max_new_tokens)
        prompt_ids = self._prompt_ids(prompt, None, "the prompt", sampling.max_new_tokens)
        request = Request(prompt, prompt_ids, seed_for(seed, "generate", 0))
        return ResponseStream(self.tokenizer, self._engine.stream(request, sampling))

    def load(self) -> None:
        """Load the policy now instead of at its first use.

        Raises:
            UserError: The run has neither policy nor SFT model yet.
        """
        _ = self._engine

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """Score responses by the run's reward, all its terms included, before PPO's KL and length penalties.

        Args:
            prompts: One per response.
            responses: Complete responses, without EOS.
            columns: Columns per prompt, for the reward's terms, and `tools` for the chat template; None: no columns.

        Returns:
            One score per response.

        Raises:
            UserError: The run has no reward yet; there are no responses, or not one per prompt; or a prompt or a
                response is not text, contains special tokens, or does not fit the model's context.
            TypeError: A text is given instead of a list.
        """
        return self.score_terms(prompts, responses, columns)[0]

    def score_terms(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Score responses as `score` does, and by each term of the reward.

        Args:
            prompts: As for `score`.
            responses: As for `score`.
            columns: As for `score`.

        Returns:
            One score per response; and by term its values, one per response, normalised and clipped as the term's
            settings say, but not weighted.

        Raises:
            UserError: As for `score`.
            TypeError: As for `score`.
        """
        trajectories = self._trajectories(prompts, responses, columns)
        total, terms = self._reward.score(trajectories)
        return total.tolist(), {name: values.tolist() for name, values in terms.items()}

    def score_by_model(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """Score responses by the run's reward model alone, before the term's normalisation, clipping and weight.

        Args:
            prompts: As for `score`.
            responses: As for `score`.
            columns: Columns per prompt, of which `tools` are read; None: no columns.

        Returns:
            One score per response.

        Raises:
            UserError: The run has no reward model; or as for `score`.
            TypeError: As for `score`.
        """
        if not self.experiment.reward.has_model:
            raise UserError(
                f"the reward of run {self.path} has no term of kind model or process: score by the reward as a whole"
            )
        return self._loaded_reward.score_by_model(self._trajectories(prompts, responses, columns)).tolist()

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Sample one response of the policy, or of the SFT model, per request."""
        return self._engine.generate(requests, sampling)

    def score_trajectories(self, trajectories: Sequence[Trajectory]) -> ScoredResponses:
        """Score sampled responses by the run's reward and, where it has one, by its gold score."""
        scores, _ = self._reward.score(trajectories)
        gold = None
        if self._reward.scorers.gold is not None:
            gold = torch.tensor(self._reward.scorers.gold(trajectories), dtype=torch.float64)
        return ScoredResponses(scores=scores, lengths=lengths(trajectories).double(), gold=gold)

    def _trajectories(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Sequence[Mapping[str, Any]] | None
    ) -> list[Trajectory]:
        """Responses that were not sampled, for the scorers."""
        check_lists(prompts=prompts, responses=responses, columns=columns)
        if not prompts:
            raise UserError("there are no responses to score")
        if columns is None:
            columns = [{}] * len(prompts)
        trajectories: list[Trajectory] = []
        for prompt, response, prompt_columns in zip(prompts, responses, columns, strict=True):
            exchange = self._exchange(prompt, response, prompt_columns, len(trajectories) + 1)
            request = Request(prompt, tuple(exchange.prompt_ids), seed=0, columns=dict(prompt_columns))
            ids = exchange.response_ids
            # Nothing was sampled: the sampler's log-probabilities and the version are not read.
            trajectories.append(Trajectory.from_tokens(request, ids, torch.zeros(len(ids)), ended=True, version=0))
        return trajectories

    def classify(self, texts: Sequence[Prompt]) -> list[Prediction]:
        """Label texts by the run's classifier or regression model.

        Args:
            texts: Texts, or lists of messages with `role` and `content`.

        Raises:
            UserError: The run has no classifier; or a text is not text or messages, or contains special tokens.
            TypeError: A text is given instead of a list.
        """
        check_lists(texts=texts)
        for number, text in enumerate(texts, start=1):
            check_prompt(text, f"text {number}")
        return predict_labels(self._text_classifier, self.encoder, texts)

    def evaluate(self) -> dict[str, Any]:
        """Compare the policy with its reference on the held-out prompts again, and update `evaluation.json`.

        With another `scale` than 1, the file stays as it is.

        Returns:
            The contents of `evaluation.json`, with these figures.

        Raises:
            UserError: PPO has not finished.
        """
        if not self.folder.policy.is_dir():
            raise missing_product(self.experiment, self.folder, "ppo")
        datasets = load_datasets(self.experiment)
        evaluation = self.evaluation | evaluate_run(self.experiment, self.folder, datasets, self._policy)
        if self.scale == 1:
            write_json(self.folder.evaluation, evaluation)
        return evaluation

    def frontier(self, samples: int = 256, scales: Sequence[float] = (1.0,)) -> dict[str, Any]:
        """Estimate the best policy at each distance from the reference, and compare the run's policy with it.

        The figures become the section `frontier` of `evaluation.json`, and a plot is written to `frontier/`.

        Args:
            samples: Responses of the reference to each held-out prompt; an even number. They are kept for later calls.
            scales: a of each policy that is compared, reference + a · (policy - reference).

        Returns:
            The section (see `align.outputs.frontier.measure_frontier`).

        Raises:
            UserError: The reward changes while it is maximised, or the run has no policy that can be scaled like this.
        """
        datasets = load_datasets(self.experiment)
        figures = measure_frontier(self.experiment, self.folder, datasets, samples, scales)
        write_json(self.folder.evaluation, self.evaluation | {"frontier": figures})
        return figures

    def measure_perplexity(self, texts: Sequence[Path | str] = ()) -> dict[str, Any]:
        """Measure the perplexity of texts under the base model and each product, and update `evaluation.json`.

        It is also measured on the texts of `evaluation.texts` and on the held-out demonstrations.

        Args:
            texts: Files or folders with texts or demonstrations, as SFT reads them.

        Returns:
            The section `perplexity` of `evaluation.json`; the texts have the names of their files.

        Raises:
            UserError: A text cannot be read, or there is nothing to measure on.
            TypeError: A text is given instead of a list of files.
        """
        check_lists(texts=texts)
        sft = self.experiment.sft
        datasets = load_datasets(self.experiment)
        for text in map(str, texts):
            datasets.texts[text] = read_documents(SourceSettings(path=text), self.encoder, sft, "perplexity")
        perplexity = measure_perplexity(self.experiment, self.folder, datasets)
        write_json(self.folder.evaluation, self.evaluation | {"perplexity": perplexity})
        return perplexity

    def export(self, to: Path | str, merge: bool = False, dtype: str = "float32") -> Exported:
        """Export the policy for other programs, with tokenizer and model card, and compare it with the run's own.

        Args:
            to: The folder to write; it must not exist.
            merge: Write a complete model instead of an adapter in PEFT's layout.
            dtype: Dtype of a complete model's weights: float32, bfloat16 or float16.

        Returns:
            What was written, and its largest difference from the run's policy after reloading, in nats.

        Raises:
            UserError: The folder exists, or the policy cannot be exported in this way.
            RuntimeError: The difference is larger than rounding explains.
        """
        if Path(to).exists():
            raise UserError(f"{to} already exists: choose a new folder")
        product: Product = "model" if merge else "adapter"
        return export_run(self.experiment, self.folder, Path(to), product, dtype=dtype, scale=self.scale)

    def _sampling(self, temperature: float | None, max_new_tokens: int | None) -> Sampling:
        rollouts = self.experiment.rollouts
        return Sampling(
            temperature=rollouts.temperature if temperature is None else temperature,
            max_new_tokens=max_new_tokens or rollouts.max_new_tokens,
        )

    def _prompt_ids(self, prompt: Prompt, tools: Tools | None, name: str, max_new_tokens: int) -> tuple[int, ...]:
        check_prompt(prompt, name)
        try:
            ids = tuple(self.encoder.prompt(prompt, tools))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        check_room(name, len(ids), max_new_tokens, self._context_length)
        return ids

    def _exchange(self, prompt: Prompt, response: str, columns: Mapping[str, Any], number: int) -> Exchange:
        check_prompt(prompt, f"prompt {number}")
        check_text(response, f"response {number}")
        try:
            functions = None if isinstance(prompt, str) else tools_in(columns, prompt)
            exchange = self.encoder.exchange(prompt, response, functions)
        except ValueError as error:
            raise UserError(f"response {number} or its prompt: {error}") from error
        tokens = len(exchange.prompt_ids) + len(exchange.response_ids)
        check_fits(f"response {number} and its prompt have", tokens, self._context_length)
        return exchange

    @cached_property
    def _text_classifier(self) -> TextClassifier:
        folder = classifier_folder(self.experiment, self.folder)
        return load_text_classifier(self.experiment.model, self.experiment.policy, folder)

    @cached_property
    def _context_length(self) -> int | None:
        return context_length(self.experiment)

    @cached_property
    def _policy(self) -> ScaledAdapter:
        return scaled_policy(self.experiment, self.folder, self.scale)

    @cached_property
    def _engine(self) -> TransformersEngine:
        trunk = build_trunk(self.experiment.model, self._policy.settings, (SAMPLER_ROLE,))
        engine = make_transformers_engine(trunk, self.tokenizer, self.experiment.rollouts)
        engine.load_adapter(0, self._policy.weights)
        return engine

    @cached_property
    def _reward(self) -> LoadedReward:
        """The reward, in the state in which the policy was evaluated."""
        self._loaded_reward.restore(self.folder)
        return self._loaded_reward

    @cached_property
    def _loaded_reward(self) -> LoadedReward:
        if self.experiment.reward.has_model and not self.folder.done("reward"):
            raise missing_product(self.experiment, self.folder, "reward")
        return LoadedReward(self.experiment, self.folder)


def evaluate_run(experiment: Experiment, run: RunFolder, datasets: Datasets, policy: ScaledAdapter) -> dict[str, Any]:
    """Compare the run's policy with its reference again.

    Args:
        experiment: The run's settings.
        run: The run.
        datasets: Its data, of which the held-out prompts are used.
        policy: The policy.

    Returns:
        The sections of `evaluation.json` that `Evaluator.evaluate` returns.
    """
    reward = LoadedReward(experiment, run, policy.settings)
    reward.restore(run)
    step = read_object(run.policy / "evaluation.json")["policy"]["step"]
    try:
        return reward.compare(policy.weights, step, datasets.prompts_heldout).sections
    finally:
        reward.close()


def evaluate_on_file(
    experiment: Experiment, run: RunFolder, data: Path | None, classifier: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the run's reward model, or a classifier in its place, on preferences or on labels of steps.

    Args:
        experiment: The run's settings.
        run: The run.
        data: A file of rows such as the model learns from; None: the run's held-out ones.
        classifier: Folder or hub name of a sequence-classification model; None: the run's reward model.

    Returns:
        The figures of `diagnostics.json`, and the worst errors.

    Raises:
        UserError: The rows cannot be used, or a classifier is to judge steps.
    """
    if experiment.reward.process is None:
        return evaluate_reward_model(experiment, run, read_preferences(experiment, data), classifier)
    if classifier:
        raise UserError("--classifier scores whole responses, and the reward of this run is of kind process")
    examples = read_step_labels(experiment, data)
    (model,) = load_models(experiment, run.reward)
    return evaluate_process_model(model, read_facts(run.reward), examples)


def evaluate_reward_model(
    experiment: Experiment, run: RunFolder, preferences: Sequence[TokenizedPreference], classifier: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the run's reward model, or a classifier in its place, on preference examples.

    Args:
        experiment: The run's settings.
        run: The run.
        preferences: The preference examples.
        classifier: Folder or hub name of a sequence-classification model; None: the run's reward model.

    Returns:
        The figures of `diagnostics.json`, and the worst errors.
    """
    path = classifier or read_facts(run.reward).get("classifier")
    if path:
        scores = classifier_scores(Classifier(path, "--classifier"), preferences)
        return compute_diagnostics(preferences, scores, {OVERALL: 1.0})
    models = load_models(experiment, run.reward)
    moments = folded_moments(experiment.reward, run.reward, len(models))
    return evaluate_models(models, moments, preferences)
