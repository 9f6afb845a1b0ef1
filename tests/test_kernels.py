"""The log-probability of given tokens, against fp64 and the whole matrix of logits."""
import pytest
import torch

import kernels.logprob
from conftest import measured
from kernels.logprob import log_policy, token_logprob


def dense(hidden, weight, ids, temperature):
    """The definition in fp64, with the matrix that the real one never makes."""
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def inputs(N, D=32, V=1153, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(N)
    hidden, weight = torch.randn(N, D, generator=generator) * scale, torch.randn(V, D, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("N", [1, 7, 8, 20])
def test_log_probability_and_entropy_equal_fp64_for_every_number_of_chunks(N, monkeypatch):
    monkeypatch.setattr(kernels.logprob, "CHUNK", 8)
    hidden, weight, ids = inputs(N)
    for name, ours, exact in zip(("log-probability", "entropy"), token_logprob(hidden, weight, ids, 0.7), dense(hidden, weight, ids, 0.7)):
        measured(f"{name}, N={N}", (ours - exact).abs().max(), 2e-5)


def test_gradients_equal_those_of_the_dense_formula(monkeypatch):
    monkeypatch.setattr(kernels.logprob, "CHUNK", 8)
    hidden, weight, ids = inputs(20)
    upstream = torch.linspace(-1, 1, 20)
    ours = torch.autograd.grad((token_logprob(hidden, weight, ids, 0.7)[0] * upstream).sum(), (hidden, weight))
    exact = torch.autograd.grad((dense(hidden, weight, ids, 0.7)[0] * upstream).sum(), (hidden, weight))
    for name, a, b in zip(("hidden", "weight"), ours, exact):
        measured(f"gradient of {name}", (a - b).abs().max() / b.abs().max(), 1e-5)


def test_bf16_inputs_are_never_rounded_on_the_way():
    hidden, weight, ids = inputs(64, dtype=torch.bfloat16)
    exact = dense(hidden, weight, ids, 1.0)[0]
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[:, None]).squeeze(-1)
    ours = (token_logprob(hidden, weight, ids)[0] - exact).abs().max()
    measured("bf16 log-probability over one with rounded logits", ours / (rounded - exact).abs().max(), 1e-2)


def test_no_tokens_give_no_log_probabilities():
    hidden, weight, ids = inputs(0)
    logprob_N, entropy_N = token_logprob(hidden, weight, ids)
    assert logprob_N.shape == entropy_N.shape == (0,)
    logprob_N.sum().backward()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(log_policy(logits, 1.0)).all()


def test_the_matrix_of_logits_never_exists_as_a_whole(monkeypatch):
    monkeypatch.setattr(kernels.logprob, "CHUNK", 8)
    seen, policy = [], kernels.logprob.log_policy
    monkeypatch.setattr(kernels.logprob, "log_policy", lambda logits, temperature: (seen.append(len(logits)), policy(logits, temperature))[1])
    hidden, weight, ids = inputs(50)
    token_logprob(hidden, weight, ids)[0].sum().backward()
    assert max(seen) == 8 and sum(seen) == 100, "each chunk once forward and once more backward"
