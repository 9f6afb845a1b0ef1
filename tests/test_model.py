"""
The transformer, its cache and its checkpoints, against the transformers library.

Everything runs in fp32 unless a test says otherwise. `model.forward` knows no left padding: rows start at
position 0 and are padded on the right. Only `generate` of transformers gets a batch padded on the left.

    python -m pytest tests/test_model.py
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import model as m
from conftest import byte_tokenizer, measured
from kernels.layers import rope_frequencies
from model import Cache, last_logits, load, new_model, run_config, save, score, unfuse
from sample import sample, stop_ids, uniforms
from data import pack

SIZES = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, initializer_range=0.2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, max_position_embeddings=64),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
PROMPT_LENGTHS = [7, 1, 12, 3, 2, 9, 5]
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def all_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """A head for `forward`: the logits of every position."""
    return hidden_BTD @ weight_VD.T


def both(name: str, folder: Path) -> tuple[m.Transformer, torch.nn.Module]:
    """A random model of transformers, and ours, opened from the folder to which that one was saved."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:  # biases start as 0 and norms as 1, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    theirs.save_pretrained(folder)
    return load(str(folder)), theirs


def random_ids(rows: int, length: int, seed: int, vocab: int = 300) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def generate(theirs: torch.nn.Module, prompts: list[list[int]], length: int,
             stops: list[int]) -> list[list[int]]:
    """Greedy replies by transformers, each up to its first stop token; its batch is padded on the left."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out_BT = theirs.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=length, do_sample=False,
                             eos_token_id=stops or None, pad_token_id=0)
    replies = []
    for row in out_BT[:, longest:].tolist():
        ends = [t + 1 for t, token in enumerate(row) if token in stops]
        replies.append(row[:ends[0]] if ends else row)
    return replies


# ---------------------------------------------------------------- every architecture, against transformers

@every_architecture
@torch.no_grad()
def test_logits_equal_those_of_transformers_with_padding_on_the_right(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    ids_BT = random_ids(2, 12, seed=0)  # the padding holds random tokens, too: nothing may look there
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 7:] = 0
    difference_BTV = ours(ids_BT, all_logits) - theirs(ids_BT, attention_mask=mask_BT).logits
    measured(f"{name}, largest difference of logits", difference_BTV[mask_BT == 1].abs().max(), 1e-4)


@every_architecture
@torch.no_grad()
def test_a_greedy_continuation_of_64_tokens_equals_that_of_transformers(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    prompts = random_prompts([7])
    reply = sample(ours, prompts, torch.zeros(1, 64), stops=[], temperature=0.0)[0]
    assert [reply.ids] == generate(theirs, prompts, 64, stops=[])


@every_architecture
@torch.no_grad()
def test_greedy_replies_of_a_ragged_batch_equal_those_of_transformers_token_for_token(name, tmp_path):
    """Prompts of 1 to 12 tokens take turns on three rows of ours, and some replies end early."""
    ours, theirs = both(name, tmp_path)
    prompts = random_prompts(PROMPT_LENGTHS)
    stops = list(range(0, 300, 10))
    expected = generate(theirs, prompts, 32, stops)
    assert len({len(ids) for ids in expected}) > 2, "the replies should be ragged, too"
    replies = sample(ours, prompts, torch.zeros(len(prompts), 32), stops, temperature=0.0, max_rows=3)
    assert [reply.ids for reply in replies] == expected


@every_architecture
@torch.no_grad()
def test_sampled_log_probs_equal_teacher_forced_ones_of_transformers(name, tmp_path):
    ours, theirs = both(name, tmp_path)
    prompts = random_prompts([3, 6])
    error = 0.0
    replies = sample(ours, prompts, uniforms(0, 0, range(2), 0, 24), stops=[])
    for prompt, reply in zip(prompts, replies, strict=True):
        logits_TV = theirs(torch.tensor([prompt + reply.ids])).logits[0, len(prompt) - 1:-1]
        logprob_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None]).squeeze(1)
        error = max(error, (logprob_T - torch.tensor(reply.logprobs)).abs().max().item())
    measured(f"{name}, sampled against teacher-forced", error, 1e-4)


@every_architecture
@torch.no_grad()
def test_sampled_log_probs_equal_the_trainers(name, tmp_path):
    ours, _ = both(name, tmp_path)
    prompts = random_prompts(PROMPT_LENGTHS)
    replies = sample(ours, prompts, uniforms(0, 0, range(len(prompts)), 0, 24), stops=list(range(20)))
    ids_BT, mask_BT, sampled_BT = pack(prompts, [r.ids for r in replies], [[r.logprobs for r in replies]])
    difference_BT = score(ours, ids_BT, mask_BT)[0] - sampled_BT
    measured(f"{name}, sampler against trainer", difference_BT[mask_BT].abs().max(), 1e-5)


@torch.no_grad()
def test_llama_3_positions_equal_those_of_transformers_beyond_the_original_context(tmp_path):
    ours, theirs = both("llama 3", tmp_path)
    ids_BT = random_ids(1, 60, seed=5)  # the original context is 16 positions
    measured("60 positions", (ours(ids_BT, all_logits) - theirs(ids_BT).logits).abs().max(), 1e-4)


def test_llama_3_scaling_slows_the_low_frequencies_and_leaves_the_high_ones():
    unscaled = m.read_config(CONFIGS["llama, untied"], "llama").rope
    # slowed by 4 below 1 turn over a context of 64 positions, as before above 4 turns
    scaled = (*unscaled[:2], (4.0, 1.0, 4.0, 64.0))
    unscaled_E2 = rope_frequencies(*unscaled, torch.device("cpu"))
    ratio_E2 = rope_frequencies(*scaled, torch.device("cpu")) / unscaled_E2
    torch.testing.assert_close(ratio_E2[-1], torch.tensor(1 / 4))
    assert ratio_E2[0] == 1
    assert (ratio_E2.diff() <= 0).all()


# ---------------------------------------------------------------- the cache

@torch.no_grad()
def test_cached_equals_uncached_with_rows_of_different_lengths_each_at_its_own_slot(tiny):
    """Right-padded prompts are prefilled, copied to other rows of a larger cache, and continued there."""
    ids_BT = random_ids(3, 9, seed=1, vocab=tiny.config.vocab)
    lengths = [5, 2, 4]
    rows = [3, 0, 1]
    prompts = Cache(tiny.config, 3, 5, torch.float32, ids_BT.device)
    tiny(ids_BT[:, :5], None, prompts)
    cache = Cache(tiny.config, 4, 20, torch.float32, ids_BT.device)
    cache.copy_rows(rows, prompts, [0, 1, 2])
    cache.length_B[rows] = torch.tensor(lengths)
    steps = []
    for t in range(5, 9):
        next_B1 = torch.zeros(4, 1, dtype=torch.long)
        next_B1[rows] = ids_BT[:, t:t + 1]
        steps.append(tiny(next_B1, last_logits, cache)[rows])
    for b, length in enumerate(lengths):
        text_1T = torch.cat((ids_BT[b:b + 1, :length], ids_BT[b:b + 1, 5:]), dim=1)
        whole_TV = tiny(text_1T, all_logits)[0, -4:]
        error = (torch.stack(steps)[:, b] - whole_TV).abs().max() / whole_TV.abs().max()
        measured(f"row of {length} tokens, error over the largest logit", error, 1e-5)


@torch.no_grad()
def test_a_prefix_that_is_run_once_and_copied_to_all_rows_equals_running_the_whole(tiny):
    prefix_1P = torch.tensor([[9, 8, 7, 6, 5]])
    ids_BT = random_ids(3, 9, seed=1, vocab=tiny.config.vocab)
    prefix = Cache(tiny.config, 1, 5, torch.float32, ids_BT.device)
    tiny(prefix_1P, None, prefix)
    cache = Cache(tiny.config, 3, 14, torch.float32, ids_BT.device)
    cache.copy_rows(slice(None), prefix, slice(None))
    cache.length_B.fill_(5)
    logits_BTV = tiny(ids_BT, all_logits, cache)
    whole_BTV = tiny(torch.cat((prefix_1P.expand(3, -1), ids_BT), dim=1), all_logits)[:, 5:]
    error = (logits_BTV - whole_BTV).abs().max() / whole_BTV.abs().max()
    measured("error over the largest logit", error, 1e-5)


@torch.no_grad()
def test_what_is_beyond_a_rows_length_is_never_seen(tiny):
    """
    Up to the longest row's end, slots hold what earlier prompts left there, which is finite. Beyond that end
    they may hold anything, NaN included.
    """
    lengths = [6, 2, 4]
    keys_and_values = torch.randn(2, 2, 3, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    logits = {}
    for stale, beyond in ((0.0, 0.0), (1e4, float("nan"))):
        cache = Cache(tiny.config, 3, 12, torch.float32, torch.device("cpu"))
        cache.block_2LBKSE.copy_(keys_and_values)
        cache.length_B.copy_(torch.tensor(lengths))
        for b, length in enumerate(lengths):
            cache.block_2LBKSE[:, :, b, :, length:] = stale
        cache.block_2LBKSE[..., max(lengths) + 1:, :] = beyond
        logits[stale] = tiny(torch.tensor([[1], [2], [3]]), last_logits, cache)
    assert torch.equal(logits[0.0], logits[1e4])


# ---------------------------------------------------------------- scoring

@torch.no_grad()
def test_score_gives_each_token_the_log_prob_that_the_position_before_it_predicts(tiny):
    ids_BT = random_ids(2, 7, seed=2, vocab=tiny.config.vocab)
    mask_BT = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    logprob_BT, _ = score(tiny, ids_BT, mask_BT, 0.7)
    logp_BTV = torch.log_softmax(tiny(ids_BT, all_logits) / 0.7, -1)
    expected_BT = torch.zeros(2, 7)
    for b, t in ((0, 1), (0, 3), (0, 4), (1, 4), (1, 5), (1, 6)):  # nothing predicts column 0
        expected_BT[b, t] = logp_BTV[b, t - 1, ids_BT[b, t]]
    measured("largest difference", (logprob_BT - expected_BT).abs().max(), 1e-5)


@torch.no_grad()
def test_score_gives_an_entropy_wherever_it_gives_a_log_prob(tiny):
    ids_BT = random_ids(2, 7, seed=2, vocab=tiny.config.vocab)
    mask_BT = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    logprob_BT, entropy_BT = score(tiny, ids_BT, mask_BT, 0.7)
    assert torch.equal(entropy_BT > 0, logprob_BT < 0)
    logp_BTV = torch.log_softmax(tiny(ids_BT, all_logits) / 0.7, -1)
    expected = -(logp_BTV[0, 2].exp() * logp_BTV[0, 2]).sum()
    measured("entropy of one choice", abs(entropy_BT[0, 3] - expected), 1e-5)


# ---------------------------------------------------------------- checkpoints

@torch.no_grad()
def test_a_sharded_checkpoint_equals_a_single_file(tmp_path):
    one, theirs = both("llama, untied", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    many = load(str(tmp_path / "many"))
    for expected, loaded in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(expected, loaded)


@pytest.mark.parametrize("shard_size", ["40KB", "5GB"], ids=["sharded", "one file"])
def test_a_second_copy_of_the_weights_is_left_alone(shard_size, tmp_path):
    """Mistral's folders hold one, in a format of its own."""
    _, theirs = both("llama, untied", tmp_path / "clean")
    theirs.save_pretrained(tmp_path / "two", max_shard_size=shard_size)
    save_file({"tok_embeddings.weight": torch.zeros(1)}, tmp_path / "two" / "consolidated.safetensors")
    clean, two = load(str(tmp_path / "clean")), load(str(tmp_path / "two"))
    for expected, loaded in zip(clean.parameters(), two.parameters(), strict=True):
        assert torch.equal(expected, loaded)


@pytest.mark.parametrize("damage", ["a weight is missing", "a weight is unknown"])
def test_a_checkpoint_whose_weights_are_not_those_of_its_config_is_refused(damage, tmp_path, capsys):
    both("llama, untied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if damage == "a weight is missing":
        del weights["model.norm.weight"]
    else:
        weights["model.norm.bias"] = torch.zeros(48)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        load(str(tmp_path))
    problem = {"a weight is missing": "lack 1: ['norm.weight']",
               "a weight is unknown": "also hold 1: ['norm.bias']"}[damage]
    assert f"against config.json, the weights {problem}" in capsys.readouterr().err


RENAMED = {   # how a good checkpoint may name a weight, from the name that transformers gives it
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "data parallel": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "a compiled base model": lambda key: key.replace("model.", "model._orig_mod."),
    "a base model": lambda key: key.removeprefix("model."),
    "as it is": lambda key: key}


@every_architecture
@pytest.mark.parametrize("wrapper", RENAMED)
@torch.no_grad()
def test_wrappers_around_names_and_buffers_of_positions_change_no_logits(name, wrapper, tmp_path):
    ours, theirs = both(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights = {RENAMED[wrapper](key): tensor for key, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    ids_BT = random_ids(2, 9, seed=1)
    assert torch.equal(load(str(tmp_path))(ids_BT, all_logits), ours(ids_BT, all_logits))
    difference = (ours(ids_BT, all_logits) - theirs(ids_BT).logits).abs().max()
    measured("to transformers", difference, 1e-3)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
@torch.no_grad()
def test_a_tied_matrix_is_found_under_either_name(kept, tmp_path):
    _, theirs = both("llama, tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    matrix_VD = weights.pop("model.embed_tokens.weight")
    names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
    save_file(weights | {key: matrix_VD.clone() for key in names}, tmp_path / "model.safetensors")
    ids_BT = random_ids(2, 9, seed=1)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    difference = (load(str(tmp_path))(ids_BT, all_logits) - reopened(ids_BT).logits).abs().max()
    measured("to transformers", difference, 1e-3)


def test_two_different_matrices_under_a_tied_config_are_refused(tmp_path, capsys):
    """transformers would not tie them, and say so."""
    both("llama, tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        load(str(tmp_path))
    assert "lm_head is not the embedding" in capsys.readouterr().err


DAMAGED_CONFIGS = [{"num_attention_heads": 0}, {"hidden_size": "x"}, {"rms_norm_eps": None},
                   {"rope_theta": None}, {"rope_scaling": "default"}, {"max_position_embeddings": None},
                   {"layer_types": ["x"]}]


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS, ids=str)
def test_a_config_with_impossible_values_is_one_sentence(damage, tmp_path, capsys):
    both("llama, untied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | damage))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        load(str(tmp_path))
    assert capsys.readouterr().err.count("\n") == 1


LLAMA3_KEYS = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
ROPES = [{}, {"rope_scaling": None}, {"rope_scaling": {"type": "default"}},
         {"rope_scaling": {"type": "default", "rope_type": "default", "factor": 1.0}},
         {"rope_scaling": {"type": "llama3", **LLAMA3_KEYS}, "rope_theta": 5e5},
         {"rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3_KEYS}},
         {"partial_rotary_factor": 1.0},
         {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 7e4}}]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@torch.no_grad()
def test_every_spelling_of_the_rope_settings_is_read_as_transformers_reads_it(rope, tmp_path):
    both("llama, untied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | rope))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids_BT = random_ids(2, 40, seed=1)
    difference = (load(str(tmp_path))(ids_BT, all_logits) - theirs(ids_BT).logits).abs().max()
    measured("to transformers", difference, 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(value, dtype, tmp_path, capsys):
    both("llama, untied", tmp_path)
    weights = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        load(str(tmp_path))
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in capsys.readouterr().err


PEAK = """
import sys
sys.path.insert(0, {root!r})
from model import load
from transformers import AutoConfig

def resident(field="VmRSS"):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024

load({tiny!r})   # whatever is imported on the way
open("/proc/self/clear_refs", "w").write("5")   # forget the peak of that
before = resident()
model = load({folder!r})
print((resident("VmHWM") - before) / sum(4 * p.numel() for p in model.parameters()))
"""


def test_opening_a_checkpoint_takes_little_more_memory_than_its_weights(tmp_path):
    """
    Files are read weight by weight, and fused matrices replace what they are made of. A second copy makes
    it 2; 1.2 to 1.5 is what was seen, as pages of the mapped file come and go.
    """
    config = LlamaConfig(vocab_size=1000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
                         num_attention_heads=12, num_key_value_heads=4)
    for name, sizes in (("big", config), ("tiny", CONFIGS["llama, untied"])):
        model = new_model(sizes, seed=0)
        save(tmp_path / name, model.state_dict(), model, byte_tokenizer())
    root = str(Path(m.__file__).parent)
    code = PEAK.format(root=root, tiny=str(tmp_path / "tiny"), folder=str(tmp_path / "big"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured("peak over the weights, fp32", float(done.stdout.split()[-1]), 1.7)


def test_a_model_without_any_stop_token_is_said(tiny, tokenizer):
    mute = new_model(LlamaConfig(**SIZES, eos_token_id=None), seed=0)
    assert stop_ids(tiny, tokenizer)
    silent = byte_tokenizer()
    silent.eos_token = None
    with pytest.warns(UserWarning, match="No token ends a reply"):
        assert stop_ids(mute, silent) == []


def test_a_checkpoint_with_a_missing_shard_is_refused(tmp_path, capsys):
    _, theirs = both("llama, untied", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    with pytest.raises(SystemExit):
        load(str(tmp_path / "many"))
    assert "cannot be read" in capsys.readouterr().err


@every_architecture
def test_a_saved_folder_opens_here_bit_for_bit(name, tmp_path, tokenizer):
    ours = new_model(CONFIGS[name], seed=3)
    save(tmp_path, ours.state_dict(), ours, tokenizer)
    again = load(str(tmp_path)).state_dict()
    assert again.keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again[key]), key


@every_architecture
def test_a_saved_folder_opens_in_transformers_bit_for_bit(name, tmp_path, tokenizer):
    ours = new_model(CONFIGS[name], seed=3)
    save(tmp_path, ours.state_dict(), ours, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    hf_weights = unfuse(ours.state_dict(), ours)
    if ours.config.tied:  # transformers lists a tied output matrix, the checkpoint does not hold it
        del theirs["lm_head.weight"]
    assert theirs.keys() == hf_weights.keys()
    for key, tensor in hf_weights.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", [name for name in CONFIGS if "llama" in name])
def test_a_saved_tokenizer_opens_in_transformers(name, tmp_path, tokenizer):
    """Llama alone: for Qwen2, transformers puts Qwen's own tokenizer in the place of ours."""
    ours = new_model(CONFIGS[name], seed=3)
    save(tmp_path, ours.state_dict(), ours, tokenizer)
    text = "burn the castle"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_random_init_is_a_function_of_its_seed():
    a, b, c = (new_model(CONFIGS["qwen3"], seed) for seed in (0, 0, 1))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)


def test_run_config_is_that_of_the_run_to_which_a_folder_belongs_and_empty_for_other_models(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    checkpoint = run / "step_000002"
    for folder in (checkpoint, run / "step_000000", elsewhere, elsewhere / "step_1000"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (run / "latest").write_text("step_000002\n")
    config = {"seed": 5, "prompts": {"defend": "{text}"}}
    (run / "config.json").write_text(json.dumps(config))
    assert run_config(str(run)) == run_config(str(checkpoint)) == config
    assert run_config(str(elsewhere)) == run_config("some/hub-model") == {}


# ---------------------------------------------------------------- what is not implemented

UNSUPPORTED = [  # a field of a config, its value, and the field that the refusal names
    ("hidden_act", "gelu", "hidden_act"),
    ("mlp_bias", True, "mlp_bias"),
    ("attention_dropout", 0.1, "attention_dropout"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("model_type", "gpt2", "model_type"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, "rope_type"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
     "partial_rotary_factor"),
]


@pytest.mark.parametrize("field, value, named", UNSUPPORTED, ids=[named for _, _, named in UNSUPPORTED])
def test_what_is_not_implemented_is_refused_by_name(field, value, named, capsys):
    config = LlamaConfig(**SIZES)
    setattr(config, field, value)
    with pytest.raises(SystemExit) as stopped:
        m.read_config(config, "some/model")
    assert stopped.value.code == 2
    assert f"{named} = " in capsys.readouterr().err


SLIDING = [Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
           MistralConfig(**SIZES, sliding_window=8)]


@pytest.mark.parametrize("config", SLIDING, ids=lambda config: config.model_type)
def test_sliding_windows_are_refused(config, capsys):
    with pytest.raises(SystemExit):
        m.read_config(config, "some/model")
    assert "sliding_window = " in capsys.readouterr().err


@every_architecture
def test_every_field_that_transformers_reads_is_read_or_checked_or_has_no_effect(name):
    fields = CONFIGS[name].to_dict().keys() - PreTrainedConfig().to_dict().keys()
    unknown = fields - m.READ - m.NO_EFFECT - m.ONE_VALUE.keys() - {"layer_types"}
    assert not unknown


# ---------------------------------------------------------------- a real model of 135 million parameters

@torch.no_grad()
def test_a_real_model_equals_transformers_in_fp32(smollm2):
    ids_BT = random_ids(4, 16, seed=0, vocab=load(smollm2).config.vocab)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    difference = (load(smollm2)(ids_BT, all_logits) - theirs(ids_BT).logits).abs().max()
    measured("fp32, largest difference of logits", difference, 1e-3)


@torch.no_grad()
def test_a_real_model_in_bf16_is_as_close_to_fp32_as_transformers_is(smollm2):
    exact = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()
    ours = load(smollm2, torch.bfloat16)
    ids_BT = random_ids(16, 16, seed=0, vocab=ours.config.vocab)  # what bf16 costs one text is mere chance
    exact_BTV = exact(ids_BT).logits
    log_rms = {}
    for who, logits_BTV in (("ours", ours(ids_BT, all_logits)), ("theirs", theirs(ids_BT).logits)):
        log_rms[who] = (logits_BTV.float() - exact_BTV).square().mean(-1).sqrt().log().mean()
    ratio = (log_rms["ours"] - log_rms["theirs"]).exp()
    measured("root mean square error over that of transformers, geometric mean over tokens", ratio, 1.1)


@torch.no_grad()
def test_a_real_model_continues_ragged_prompts_greedily_like_transformers(smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = ["The three primary colours are", "Once", "2 + 2 =",
             "In the north of the country, winters are long, and people"]
    prompts = [tokenizer(text).input_ids for text in texts]
    replies = sample(load(smollm2), prompts, torch.zeros(len(prompts), 64), stops=[], temperature=0.0)
    assert [reply.ids for reply in replies] == generate(theirs, prompts, 64, stops=[])
