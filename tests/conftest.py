"""What the tests share: one tiny random model that speaks the toy language, and a ruler that prints what it measures."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")   # for models this small one thread is fastest, and tests may run side by side

import pytest
import torch
from transformers import LlamaConfig

import toy
from model import new_model
from selfplay import Setting


def measured(what: str, error: float, bound: float) -> None:
    """Print how large an error is and how large it may be, then insist."""
    error = torch.as_tensor(error).detach().item()
    print(f"\n    {what}: {error:.2e}, allowed {bound:.0e}", end="")
    assert error <= bound, f"{what}: {error:.3e} > {bound:.0e}"


@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="session")
def setting(tokenizer):
    return Setting(tokenizer, toy.PROMPTS, cot=True)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """Two layers of width 32 with random weights, spread widely enough that its choices differ."""
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True, initializer_range=0.4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return new_model(config, seed=0)
