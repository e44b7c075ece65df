"""The engine on vLLM: its own batching, its own attention, adapters swapped while it runs."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from policies.errors import UserError
from policies.files.adapters import load_adapter, save_adapter, tensor_digests, weights_digest
from policies.files.base_model import load_generation_config, load_tokenizer, stop_ids
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.schema import RANKS, RolloutSettings
from rollouts.trajectory import Request, Trajectory

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a worker is a process of its own already
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers side by side would bind the same cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's own 4 are written at the start
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM is told by its environment, unless the user has."""

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams


class VllmEngine:
    """A vLLM engine in this process. Requests are seeded each by itself; their log-probabilities are vLLM's own."""

    def __init__(self, model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings) -> None:
        """Raises UserError where vLLM is not there."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not torch.cuda.is_available():
            torch._dynamo.config.disable = True  # it would compile, for a minute, what is small beside the rest
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"rollouts.engine vllm: {error}. `pip install align-rlhf[vllm]` brings it") from error
        self._vllm, self._lora_request = vllm, LoRARequest
        self.policy, self.base = policy, model.path
        self.stop_ids = sorted(stop_ids(load_generation_config(model.path), load_tokenizer(model.path)))
        self.stop = rollouts.stop
        self.llm = vllm.LLM(
            model=model.path,
            dtype=model.dtype,
            enable_lora=True,
            max_lora_rank=min(rank for rank in RANKS if rank >= policy.full_rank),
            max_loras=1,
            max_num_seqs=rollouts.max_num_seqs,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            load_format="safetensors",
            trust_remote_code=False,
            **rollouts.vllm,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="align-adapter-")
        self._loads, self.version = 0, 0

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Write the adapter where vLLM reads it. Returns the fingerprint of what lies there."""
        if self._loads:
            self.llm.llm_engine.remove_lora(self._loads)
        self._loads += 1  # vLLM knows an adapter by its number, so that each load needs another
        folder = Path(self._folder.name) / str(self._loads)
        save_adapter(folder, weights, self.policy, self.base)
        self._adapter = self._lora_request(f"version {version}", self._loads, str(folder))
        self.llm.llm_engine.add_lora(self._adapter)
        self.version = version
        return weights_digest(tensor_digests(load_adapter(folder, self.policy)))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        prompts = [{"prompt_token_ids": [*request.prompt_ids, *request.partial_response_ids]} for request in requests]
        parameters = [self._parameters(request, sampling) for request in requests]
        outputs = self.llm.generate(prompts, parameters, lora_request=self._adapter, use_tqdm=False)
        return [self._trajectory(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]

    def _parameters(self, request: Request, sampling: Sampling) -> "SamplingParams":
        begun = len(request.partial_response_ids)
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.limit(request) - begun,
            seed=(request.seed + begun) % 2**63,  # vLLM draws by the seed from its start each time
            logprobs=0,  # of the sampled token, and of no other
            stop_token_ids=self.stop_ids,
            stop=self.stop or None,
            include_stop_str_in_output=True,
            detokenize=bool(self.stop),
        )

    def _trajectory(self, request: Request, output: "CompletionOutput") -> Trajectory:
        logprobs = [place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)]
        return Trajectory.from_tokens(request, output.token_ids, logprobs, output.finish_reason == "stop", self.version)
