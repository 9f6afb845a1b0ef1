"""The transformer, against transformers."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import model as m
from conftest import measured
from model import Cache, last_logits, load, new_model, save, score

SIZES = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2)
CONFIGS = {"llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True), "llama, untied": LlamaConfig(**SIZES), "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
           "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None), "qwen2": Qwen2Config(**SIZES), "qwen3": Qwen3Config(**SIZES, head_dim=16)}


def all_logits(hidden_BTD, weight_VD):
    return hidden_BTD @ weight_VD.T


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_with_padding_on_either_side(name, tmp_path):
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter_name, parameter in theirs.named_parameters():   # biases and norms are born as 0 and 1, which would hide a mistake
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    theirs.save_pretrained(tmp_path)
    ours, ids_BT = load(str(tmp_path)), torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    left[1, :5], right[1, 7:] = 0, 0
    error_left = (ours(ids_BT, all_logits, pad_B=torch.tensor([0, 5])) - theirs(ids_BT, attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(min=0)).logits)[left == 1]
    error_right = (ours(ids_BT, all_logits) - theirs(ids_BT, attention_mask=right).logits)[right == 1]
    measured(f"{name}, padded left", error_left.abs().max(), 1e-4)
    measured(f"{name}, padded right", error_right.abs().max(), 1e-4)


@torch.no_grad()
def test_cached_equals_uncached(tiny):
    ids_BT, pad_B = torch.randint(tiny.shape.vocab, (3, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 2])
    whole = tiny(ids_BT, all_logits, pad_B=pad_B)
    cache = Cache(tiny.shape, 3, 9, pad_B, torch.float32)
    steps = [tiny(ids_BT[:, :5], last_logits, cache=cache)] + [tiny(ids_BT[:, t:t + 1], last_logits, cache=cache) for t in range(5, 9)]
    error = max((step - whole[:, 4 + i]).abs().max() for i, step in enumerate(steps))
    measured("cached against uncached logits, relative to the largest", error / whole.abs().max(), 1e-5)


@torch.no_grad()
def test_score_is_aligned_with_its_tokens(tiny):
    ids_BT = torch.randint(tiny.shape.vocab, (2, 7), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    logprob_BT, entropy_BT = score(tiny, ids_BT, mask_BT, 0.7)
    logp_BTV = torch.log_softmax(tiny(ids_BT, all_logits) / 0.7, -1)
    for b in range(2):
        for t in range(7):
            expected = logp_BTV[b, t - 1, ids_BT[b, t]] if mask_BT[b, t] and t > 0 else torch.tensor(0.0)
            assert abs(logprob_BT[b, t] - expected) < 1e-5
    assert ((entropy_BT > 0) == (mask_BT & (torch.arange(7) > 0))).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_folder_opens_here_and_in_transformers_bit_for_bit(name, tmp_path, tokenizer):
    ours = new_model(CONFIGS[name], seed=3)
    save(tmp_path, ours.state_dict(), ours, tokenizer)
    again, theirs = load(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, tensor in ours.state_dict().items():
        their_key = key if key.startswith("lm_head") else f"model.{key}"
        assert torch.equal(tensor, again.state_dict()[key]) and torch.equal(tensor, theirs.state_dict()[their_key]), key
    if "llama" in name:   # for Qwen2, transformers puts Qwen's own tokenizer in the place of ours
        assert AutoTokenizer.from_pretrained(tmp_path)("burn the castle").input_ids == tokenizer("burn the castle").input_ids


@pytest.mark.parametrize("field, value", [("hidden_act", "gelu"), ("mlp_bias", True), ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
                                          ("attention_dropout", 0.1)])
def test_what_is_not_implemented_is_refused_by_name(field, value, capsys):
    config = LlamaConfig(**SIZES)
    setattr(config, field, value)
    with pytest.raises(SystemExit) as stopped:
        m.shape_of(config, "some/model")
    assert stopped.value.code == 2
    assert ("rope_type" if "rope" in field else field) in capsys.readouterr().err


def test_a_newborn_model_is_a_function_of_its_seed():
    a, b, c = (new_model(CONFIGS["qwen3"], seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
