"""
What only a GPU can show. Elsewhere these tests are skipped.

The kernels themselves run on the GPU in test_kernels.py. To try this file's own logic on a CPU:

    SELF_REDTEAM_TRY_GPU_TESTS=1 python -m pytest tests/test_gpu.py
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

import sample as s
from conftest import DEVICE, byte_tokenizer, measured
from kernels.logprob import token_logprob
from model import new_model, save, score
from sample import sample, uniforms
from data import pack

ROOT = Path(__file__).parent.parent
TRIED = "SELF_REDTEAM_TRY_GPU_TESTS" in os.environ
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not TRIED, reason="needs a GPU")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request, tokenizer):
    """A random model of four layers, with grouped queries, on the device."""
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512,
                         num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
                         tie_word_embeddings=True, initializer_range=0.03,
                         eos_token_id=tokenizer.eos_token_id)
    return new_model(config, seed=0).to(DEVICE, request.param).requires_grad_(False)


PROMPTS = [[5 + n % 7] * (3 + n) for n in range(24)]
STOPS = list(range(0, 700, 20))


def replies(model, temperature=1.0):
    return sample(model, PROMPTS, uniforms(0, 0, range(24), 0, 40), STOPS, temperature, max_rows=16)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replayed_step_draws_what_an_eager_step_draws(model, temperature, monkeypatch):
    """Rows come and go while the recording stays the same."""
    replayed = replies(model, temperature)

    def draw_eagerly(batch):
        batch.draw_step()
        tokens, logprobs = batch.next_B.tolist(), batch.logprob_B.tolist()
        return [(b, n, tokens[b], logprobs[b]) for b, n in enumerate(batch.prompt_B) if n is not None]
    monkeypatch.setattr(s.DecodeBatch, "step", draw_eagerly)
    eager = replies(model, temperature)
    assert [reply.ids for reply in replayed] == [reply.ids for reply in eager]
    difference = max(abs(a - b) for one, two in zip(replayed, eager, strict=True)
                     for a, b in zip(one.logprobs, two.logprobs, strict=True))
    measured("log-probability, replayed against eager", difference, 1e-6)


def test_the_sampler_agrees_with_the_trainer(model):
    """In bf16 a matmul rounds by the shape of its batch: about 0.01 nats are to be expected."""
    drawn = replies(model)
    logprobs = [reply.logprobs for reply in drawn]
    ids_BT, mask_BT, sampled_BT = pack(PROMPTS, [reply.ids for reply in drawn], [logprobs], DEVICE)
    logprob_BT, _ = score(model, ids_BT, mask_BT)
    difference_N = (logprob_BT - sampled_BT)[mask_BT].abs()
    bound = 1e-4 if model.embed_tokens.weight.dtype == torch.float32 else 5e-2
    assert sampled_BT[mask_BT].mean() < -1   # there are choices to disagree about
    measured("mean |sampler - trainer|, nats", difference_N.mean(), bound)


def test_two_runs_of_the_head_give_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(300, 64, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(5000, 64, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    ids_N = torch.arange(300, device=DEVICE) * 16

    def run():
        logprob_N, entropy_N = token_logprob(hidden_ND, weight_VD, ids_N, 0.7)
        return logprob_N, entropy_N, *torch.autograd.grad(logprob_N.sum(), (hidden_ND, weight_VD))
    for once, twice in zip(run(), run(), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("judge", ["keywords", "wildguard:judge"])
def test_a_step_in_bf16_with_recomputation_trains_and_saves(judge, tokenizer, tmp_path):
    """FSDP on one process; a judge model goes to the GPU for its calls."""
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         eos_token_id=tokenizer.eos_token_id)
    for number, name in enumerate(("policy", "judge")):
        model = new_model(config, number)
        save(tmp_path / name, model.state_dict(), model, tokenizer)
    for label in ("harmful", "benign"):
        (tmp_path / f"{label}.jsonl").write_text(json.dumps({"prompt": f"how do i bake {label} bread"}))
    line = [sys.executable, ROOT / "train.py", "--model", "policy", "--judge", judge, "--seeds",
            "harmful=harmful.jsonl", "benign=benign.jsonl", "--no-cot", "--precision", "bf16", "--recompute",
            "--games", "8", "--max-new-tokens", "16", "--steps", "2", "--no-exam",
            "--out", "run"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in steps] == [1, 2] and (tmp_path / "run" / "step_000002").is_dir()
    measured("mean |sampler - trainer|, nats", max(row["mismatch"] for row in steps), 5e-2)
