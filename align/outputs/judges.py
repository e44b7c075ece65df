"""Judges that reply over HTTP, or are loaded here."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from align.config.judge_settings import JudgeSettings
from align.evaluation.judge import Replies
from align.outputs.prompt_checks import check_room
from policies.build import build_trunk
from policies.errors import UserError, first_line
from policies.files.base_model import load_model_config, load_tokenizer, stop_ids
from policies.schema import ModelSettings, PolicySettings
from policies.text.encoder import TextEncoder
from policies.text.tokenization import Prompt, decode_response
from rewards.chat import ChatEndpoint
from rewards.http import open_session
from rollouts.engine import Sampling
from rollouts.trajectory import Request
from rollouts.transformers_engine import SAMPLER_ROLE, TransformersEngine

SEQUENCES = 16
"""Replies that a loaded judge writes at a time."""


def make_judge(settings: JudgeSettings) -> Replies:
    """The judge that the settings name.

    Raises:
        UserError: The environment variable `key_env` is not set, or the model cannot be loaded.
    """
    return _loaded(settings) if settings.url is None else _over_http(settings, settings.url)


def _over_http(settings: JudgeSettings, url: str) -> Replies:
    from requests import RequestException

    endpoint = ChatEndpoint(
        session=open_session(settings),
        url=url,
        model=settings.model,
        max_tokens=settings.max_tokens,
        timeout=settings.timeout,
    )

    def replies(messages: Sequence[str]) -> list[str]:
        try:
            with ThreadPoolExecutor(settings.parallel) as pool:
                return [str(reply or "") for reply in pool.map(endpoint.reply, messages)]
        except (RequestException, ValueError) as error:
            raise UserError(f"evaluation.judge: {settings.model} at {url}: {first_line(error)}") from error

    return replies


def _loaded(settings: JudgeSettings) -> Replies:
    """A model on this machine, whose replies are greedy; with a chat template, messages are those of a user."""
    tokenizer = load_tokenizer(settings.model)
    encoder = TextEncoder(tokenizer)
    positions = getattr(load_model_config(settings.model), "max_position_embeddings", None)
    trunk = build_trunk(ModelSettings(path=settings.model), PolicySettings(), (SAMPLER_ROLE,))
    engine = TransformersEngine(
        trunk=trunk,
        stop_ids=stop_ids(trunk.causal.generation_config, tokenizer),
        max_num_seqs=SEQUENCES,
        merge=False,  # the adapter is new, and changes nothing
    )

    def replies(messages: Sequence[str]) -> list[str]:
        requests = []
        for number, message in enumerate(messages, start=1):
            prompt: Prompt = [{"role": "user", "content": message}] if encoder.has_template else message
            try:
                ids = tuple(encoder.prompt(prompt))
            except ValueError as error:
                raise UserError(f"evaluation.judge: message {number}: {error}") from error
            check_room(f"evaluation.judge: message {number}", len(ids), settings.max_tokens, positions)
            requests.append(Request(prompt, ids, seed=0))
        trajectories = engine.generate(requests, Sampling(temperature=0.0, max_new_tokens=settings.max_tokens))
        return [decode_response(tokenizer, trajectory.response_ids) for trajectory in trajectories]

    return replies
