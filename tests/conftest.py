"""A tiny model with a real tokenizer, made anew for each test session; nothing is downloaded."""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._C._distributed_c10d import HashStore  # torch.distributed has it, but not for type checkers
from transformers import PreTrainedTokenizerFast

from tests.random_models import save_llama

if TYPE_CHECKING:
    from align.learner.group import Ranks
    from tests.integration.split_objectives import SteepRank

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell has processes in the background ignore it, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
torch.cpu._is_amx_tile_supported = lambda: False  # tests compare figures in float32, which is then the default dtype
settings.register_profile("align", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("align")

LINES = (
    "The cat sat on the mat, and the dog sat by the door.",
    "User: what is two plus three? Assistant: two plus three is five.",
    "User: name a colour. Assistant: blue is a colour, and so is red.",
    "A short answer is a good answer; a long answer is a long answer.",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens, with pad and end-of-sequence tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random Llama of two layers, 32 wide, in float32, with its tokenizer."""
    return save_llama(
        tmp_path_factory.mktemp("tiny-model"),
        tiny_tokenizer,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # far from uniform, so that a wrong position or mask shows in the logits
        pad_token_id=tiny_tokenizer.pad_token_id,
    )


@pytest.fixture
def process_group() -> Iterator[None]:
    """A fresh process group of one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or deepspeed.comm.comm.cdb is None:
        dist.destroy_process_group()
    else:  # it also forgets DeepSpeed's own references to the group, which the next engine would stumble on
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail the session if a process that a test started is still there at its end."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"left behind: {[' '.join(child.cmdline()) for child in alive]}"


@pytest.fixture(scope="module")
def one_rank() -> Iterator["Ranks[SteepRank]"]:
    """A rank in this process that takes a steep step of any supervised objective."""
    from align.learner.group import LocalRank
    from tests.integration.split_objectives import SteepRank

    ranks = LocalRank(SteepRank)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator["Ranks[SteepRank]"]:
    """Two such ranks as Ray actors."""
    from align.config.schema import ClusterSettings
    from align.learner.ray_ranks import RayRanks
    from align.resources.ray_cluster import ray_cluster
    from policies.device import ActorOptions, ComputeSettings
    from tests.integration.split_objectives import SteepRank

    with ray_cluster(ClusterSettings(), 2):
        ranks = RayRanks(SteepRank, [ActorOptions(ComputeSettings(1))] * 2)
        yield ranks
        ranks.close()
