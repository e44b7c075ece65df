"""The engine on vLLM: its own batching and attention, with adapters swapped while it runs."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from policies.errors import UserError
from policies.files.adapters import load_adapter, save_adapter, tensor_digests, weights_digest
from policies.files.base_model import load_generation_config, load_model_tokenizer, stop_ids
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.schema import VLLM_RANKS, RolloutSettings
from rollouts.trajectory import Request, Trajectory

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # each worker is a process already
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers on one machine would bind the same cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's default of 4 is written in full at startup
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment variables that vLLM reads; those that the user has set are kept."""


class VllmEngine:
    """A vLLM engine in this process. Each request has its own seed; log-probabilities are those that vLLM computes."""

    def __init__(self, model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings) -> None:
        """Load the base model.

        Args:
            model: The base model.
            policy: The adapter method; vLLM serves LoRA.
            rollouts: Stop strings, sizes, and further arguments of `vllm.LLM`.

        Raises:
            UserError: vLLM is not installed.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not torch.cuda.is_available():
            torch._dynamo.config.disable = True  # compiling takes a minute, which a small model on a CPU never regains
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(f"rollouts.engine vllm: {error}. Install it with `pip install align-rlhf[vllm]`") from error
        self._vllm = vllm
        self._lora_request = LoRARequest
        self.policy = policy
        self.base = model.path
        self.stop_ids = sorted(stop_ids(load_generation_config(model.path), load_model_tokenizer(model)))
        self.stop = rollouts.stop
        self.llm = vllm.LLM(
            model=model.path,
            dtype=model.dtype_for(policy),
            enable_lora=True,
            max_lora_rank=min(rank for rank in VLLM_RANKS if rank >= policy.full_rank),
            max_loras=1,
            max_num_seqs=rollouts.max_num_seqs,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            load_format="safetensors",
            trust_remote_code=False,
            **rollouts.vllm,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="align-adapter-")
        self._load_count = 0
        self.version = 0

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Write the adapter to a folder, and have vLLM load it.

        Args:
            version: The version that new tokens carry.
            weights: The tensors of the adapter by name.

        Returns:
            The fingerprint of the adapter in that folder.
        """
        if self._load_count:
            self.llm.llm_engine.remove_lora(self._load_count)
        self._load_count += 1  # vLLM identifies an adapter by its number, so each load needs a new one
        folder = Path(self._folder.name) / str(self._load_count)
        save_adapter(folder, weights, self.policy, self.base)
        self._adapter = self._lora_request(f"version {version}", self._load_count, str(folder))
        self.llm.llm_engine.add_lora(self._adapter)
        self.version = version
        return weights_digest(tensor_digests(load_adapter(folder, self.policy)))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request, in the same order."""
        prompts = [{"prompt_token_ids": [*request.prompt_ids, *request.partial_response_ids]} for request in requests]
        parameters = [self._parameters(request, sampling) for request in requests]
        outputs = self.llm.generate(prompts, parameters, lora_request=self._adapter, use_tqdm=False)
        return [self._trajectory(request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]

    def _parameters(self, request: Request, sampling: Sampling) -> "SamplingParams":
        partial_length = len(request.partial_response_ids)
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.limit(request) - partial_length,
            # vLLM restarts its generator at each call: a continued response needs other draws than its first segment.
            seed=(request.seed + partial_length) % 2**63,
            logprobs=0,  # of the sampled token only
            stop_token_ids=self.stop_ids,
            stop=self.stop or None,
            include_stop_str_in_output=True,
            detokenize=bool(self.stop),
        )

    def _trajectory(self, request: Request, output: "CompletionOutput") -> Trajectory:
        logprobs: list[float] = []
        for token, candidates in zip(output.token_ids, output.logprobs, strict=True):
            logprobs.append(candidates[token].logprob)
        return Trajectory.from_tokens(
            request,
            tokens=output.token_ids,
            logprobs=logprobs,
            ended=output.finish_reason == "stop",
            version=self.version,
        )
