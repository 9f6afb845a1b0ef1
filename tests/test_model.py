"""The transformer, against transformers."""
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import model as m
from conftest import measured
from model import Cache, unfuse, last_logits, load, new_model, save, score
from sample import sample, uniforms

SIZES = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {"llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, max_position_embeddings=64), "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True), "llama, untied": LlamaConfig(**SIZES), "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
           "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None), "qwen2": Qwen2Config(**SIZES), "qwen3": Qwen3Config(**SIZES, head_dim=16)}


def all_logits(hidden_BTD, weight_VD):
    return hidden_BTD @ weight_VD.T


def both(name, folder, **saving):
    """A random model of transformers, saved, and ours opened from that folder."""
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter_name, parameter in theirs.named_parameters():   # biases and norms are born as 0 and 1, which would hide a mistake
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    theirs.save_pretrained(folder, **saving)
    return load(str(folder)), theirs


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_with_padding_on_either_side(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    ids_BT = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    left, right = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    left[1, :5], right[1, 7:] = 0, 0
    error_left = (ours(ids_BT, all_logits, pad_B=torch.tensor([0, 5])) - theirs(ids_BT, attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(min=0)).logits)[left == 1]
    error_right = (ours(ids_BT, all_logits) - theirs(ids_BT, attention_mask=right).logits)[right == 1]
    measured(f"{name}, padded left", error_left.abs().max(), 1e-4)
    measured(f"{name}, padded right", error_right.abs().max(), 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_greedy_continuations_of_64_tokens_equal_those_of_transformers(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    prompt = torch.randint(300, (1, 7), generator=torch.Generator().manual_seed(4))
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    assert sample(ours, [prompt[0].tolist()], torch.zeros(1, 64), [], temperature=0.0)[0].ids == expected


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sampled_log_probs_equal_teacher_forced_ones_of_transformers(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    errors = []
    for prompt, reply in zip(prompts, sample(ours, prompts, uniforms(0, 0, range(2), 0, 24), [])):
        logp_TV = torch.log_softmax(theirs(torch.tensor([prompt + reply.ids])).logits[0, len(prompt) - 1:-1], -1)
        errors.append((logp_TV.gather(1, torch.tensor(reply.ids)[:, None]).squeeze(1) - torch.tensor(reply.logprobs)).abs().max())
    measured(f"{name}, sampled against teacher-forced", max(errors), 1e-4)


@torch.no_grad()
def test_llama_3_positions_hold_beyond_the_original_context(tmp_path):
    """The original context is 16 positions; 60 are run. Without scaling the logits differ, so the test can tell."""
    ours, theirs = both("llama 3", tmp_path)
    ids_BT = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(5))
    measured("60 positions", (ours(ids_BT, all_logits) - theirs(ids_BT).logits).abs().max(), 1e-4)
    unscaled = m.rope_rates(replace(ours.config, rope_scaling=None), torch.device("cpu"))
    assert (m.rope_rates(ours.config, torch.device("cpu")) < unscaled * 0.99).any()


@torch.no_grad()
def test_a_sharded_checkpoint_equals_a_single_file_and_stray_files_are_left_alone(tmp_path):
    one, theirs = both("llama, untied", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    save_file({"tok_embeddings.weight": torch.zeros(1)}, tmp_path / "many" / "consolidated.safetensors")   # Mistral's folders have both
    many = load(str(tmp_path / "many"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_a_checkpoint_with_a_missing_shard_is_refused(tmp_path, capsys):
    _, theirs = both("llama, untied", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(SystemExit):
        load(str(tmp_path / "many"))
    assert "cannot be read" in capsys.readouterr().err


@torch.no_grad()
def test_cached_equals_uncached(tiny):
    ids_BT, pad_B = torch.randint(tiny.config.vocab, (3, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 2])
    whole = tiny(ids_BT, all_logits, pad_B=pad_B)
    cache = Cache(tiny.config, 3, 9, pad_B, torch.float32)
    steps = [tiny(ids_BT[:, :5], last_logits, cache=cache)] + [tiny(ids_BT[:, t:t + 1], last_logits, cache=cache) for t in range(5, 9)]
    error = max((step - whole[:, 4 + i]).abs().max() for i, step in enumerate(steps))
    measured("cached against uncached logits, relative to the largest", error / whole.abs().max(), 1e-5)


@torch.no_grad()
def test_a_prefix_that_all_rows_share_may_be_run_once(tiny):
    ids_BT, pad_B = torch.randint(tiny.config.vocab, (3, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 1])
    prefix_1P = torch.tensor([[9, 8, 7, 6, 5]])
    common, cache = Cache(tiny.config, 1, 5, torch.zeros(1, dtype=torch.long), torch.float32), Cache(tiny.config, 3, 14, pad_B, torch.float32, shared=5)
    tiny(prefix_1P, last_logits, cache=common)
    cache.begin_with(common)
    steps = [tiny(ids_BT[:, :6], last_logits, cache=cache)] + [tiny(ids_BT[:, t:t + 1], last_logits, cache=cache) for t in range(6, 9)]
    for b in range(3):
        whole = tiny(torch.cat([prefix_1P, ids_BT[b:b + 1, pad_B[b]:]], 1), all_logits)[0, -4:]
        measured(f"row {b}", max((step[b] - w).abs().max() for step, w in zip(steps, whole)) / whole.abs().max(), 1e-5)


@torch.no_grad()
def test_score_is_aligned_with_its_tokens(tiny):
    ids_BT = torch.randint(tiny.config.vocab, (2, 7), generator=torch.Generator().manual_seed(2))
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
    again, theirs = load(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in ours.state_dict().items())
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in unfuse(ours.state_dict(), ours.config).items())
    assert theirs.keys() - {"lm_head.weight"} == unfuse(ours.state_dict(), ours.config).keys() - {"lm_head.weight"}
    if "llama" in name:   # for Qwen2, transformers puts Qwen's own tokenizer in the place of ours
        assert AutoTokenizer.from_pretrained(tmp_path)("burn the castle").input_ids == tokenizer("burn the castle").input_ids


@pytest.mark.parametrize("field, value", [("hidden_act", "gelu"), ("mlp_bias", True), ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
                                          ("attention_dropout", 0.1), ("quantization_config", {"bits": 4}), ("model_type", "gpt2"),
                                          ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})])
def test_what_is_not_implemented_is_refused_by_name(field, value, capsys):
    config = LlamaConfig(**SIZES)
    setattr(config, field, value)
    with pytest.raises(SystemExit) as stopped:
        m.read_config(config, "some/model")
    assert stopped.value.code == 2
    named = field if "rope" not in field else "partial_rotary_factor" if value["rope_type"] == "default" else "rope_type"
    assert f"{named} = " in capsys.readouterr().err


@pytest.mark.parametrize("config", [Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1), MistralConfig(**SIZES, sliding_window=8)],
                         ids=lambda c: c.model_type)
def test_sliding_windows_are_refused(config, capsys):
    with pytest.raises(SystemExit):
        m.read_config(config, "some/model")
    assert "sliding_window = " in capsys.readouterr().err


def test_every_field_that_transformers_reads_is_read_checked_or_has_no_effect():
    for config in CONFIGS.values():
        fields = config.to_dict().keys() - PreTrainedConfig().to_dict().keys() - m.READ - m.WITHOUT_EFFECT
        assert fields <= m.FIXED.keys() | {"layer_types"}, fields


def test_a_newborn_model_is_a_function_of_its_seed():
    a, b, c = (new_model(CONFIGS["qwen3"], seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)


@torch.no_grad()
def test_a_real_model_equals_transformers_in_fp32_and_is_as_close_in_bf16_as_transformers_itself(smollm2):
    ids_BT = torch.randint(m.load(smollm2).shape.vocab, (16, 16), generator=torch.Generator().manual_seed(0))   # what bf16 costs one text is tmp_dir chance
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :9] = 0
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype).eval()
        logits["theirs", dtype] = theirs(ids_BT, attention_mask=mask_BT, position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0)).logits[mask_BT == 1].float()
        logits["ours", dtype] = load(smollm2, dtype)(ids_BT, all_logits, pad_B=(mask_BT == 0).sum(1))[mask_BT == 1].float()
    exact = logits["theirs", torch.float32]
    measured("fp32, largest difference", (logits["ours", torch.float32] - exact).abs().max(), 1e-3)
    error = {who: (logits[who, torch.bfloat16] - exact).square().mean(-1).sqrt().log().mean().exp() for who in ("ours", "theirs")}
    measured("bf16, root mean square error over that of transformers, geometric mean over tokens", error["ours"] / error["theirs"], 1.1)


@torch.no_grad()
def test_a_real_model_continues_greedily_like_transformers(smollm2):
    ours, theirs = load(smollm2), AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(smollm2)("The three primary colours are").input_ids
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    assert sample(ours, [prompt], torch.zeros(1, 64), [], temperature=0.0)[0].ids == expected
