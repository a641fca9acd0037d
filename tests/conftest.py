"""What several test files share: no network, one thread, a tiny tokenizer and tiny random models.

The fixtures of session scope are not to be changed by a test: take `copy.deepcopy` of what you alter.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.tinyworld.documents import documents
from rlhf.tokenizer import prepare_for_chat, token_info, train_bpe

# real data beside the checkout, where there is any
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# property tests try the same examples every time and leave nothing on the disk
settings.register_profile(
    "tests",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")

VOCAB_SIZE = 384
CONTEXT = 64


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 384 tokens, trained on the built-in world's documents; without chat template."""
    return train_bpe(itertools.islice(documents("train", seed=0), 500), VOCAB_SIZE)


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same with our chat template, `<|end|>` as EOS and `<|pad|>` as pad."""
    prepared = copy.deepcopy(tokenizer)
    prepare_for_chat(prepared, "rlhf")
    return prepared


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Llama in eval mode: 2 layers, 32 wide, 64 positions, weights large enough to have opinions."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        **token_info(tokenizer),
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_gpt2(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random GPT-2 of the same size: learned positions, so that a wrong position shows. No dropout."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **token_info(tokenizer),
    )
    return GPT2LMHeadModel(config).eval()


ROOT = Path(__file__).resolve().parent.parent
TINY_RECIPE = Path(__file__).parent / "tiny.yaml"


def rlhf(*arguments: str, cwd: Path, code: int = 0) -> str:
    """What the command line says; it must end with this exit code and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def finished_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny chain has run once, in runs/tiny; not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("chain")
    rlhf("run", "all", "--recipe", str(TINY_RECIPE), cwd=folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the tiny models in turn."""
    model: PreTrainedModel = request.getfixturevalue(f"tiny_{request.param}")
    return model
