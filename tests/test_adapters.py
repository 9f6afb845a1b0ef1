"""
LoRA adapters: the model with them, PEFT's files, the update of a role, whole runs, the memory plan, mistakes.

Where a test needs adapters that change something, both of their matrices are random: a new one has B = 0.
"""
import copy
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import arena
import eval
import model as m
import train
from conftest import measured
from data import pack
from launch import games, largest_difference, metrics, run, succeeds
from model import load, merge, new_model, save, score
from sample import sample, uniforms
from selfplay import ATTACKER, DEFENDER
from test_model import CONFIGS, all_logits, every_architecture, random_ids
from test_train import ONE_PROCESS, some_experiences
from train import Config

ROLES, SHARED = ("attacker", "defender"), "attacker-defender"   # the names of adapters
SMALL = ["--adapter-rank", "4", "--steps", "4", "--games", "8", "--seed", "5", "--save-every", "2",
         "--max-new-tokens", "40", "--lr", "2e-3", "--no-exam"]


def with_adapters(model, names, rank=3):
    """A copy of a model with random adapters of these names; their matrices B are not zero."""
    model = copy.deepcopy(model).requires_grad_(False)
    for seed, name in enumerate(names):
        model.add_adapter(name, rank, seed)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if key.endswith(f"lora_B.{name}"):
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def weights_of(model):
    """The adapters of a model, as a run saves them."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def of_role(model, role):
    """Copies of the parameters of a role's adapter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(f".{role}")}


def adapter(out, name, step=4):
    """The tensors of an adapter in a run's checkpoint."""
    return load_file(out / f"step_{step:06d}" / name / "adapter_model.safetensors")


# ---------------------------------------------------------------- the model

@every_architecture
@torch.no_grad()
def test_merged_weights_give_the_logits_of_the_base_with_its_adapter(name):
    model = with_adapters(new_model(CONFIGS[name], 0), ROLES)
    ids_BT = random_ids(2, 9, seed=0)
    base_BTV = model(ids_BT, all_logits)
    model.use(DEFENDER)
    unmerged_BTV = model(ids_BT, all_logits)
    assert (unmerged_BTV - base_BTV).abs().max() > 0.1
    once = new_model(CONFIGS[name], 1)
    once.load_state_dict(merge(model, DEFENDER))
    error = (once(ids_BT, all_logits) - unmerged_BTV).abs().max() / unmerged_BTV.abs().max()
    measured(f"{name}, merged against unmerged, over the largest logit", error, 1e-5)


@torch.no_grad()
def test_the_reference_equals_the_base_bit_for_bit(tiny):
    """Adapters of both roles, active or not: for no role, the model is what it was."""
    ids_BT = random_ids(2, 9, seed=0, vocab=tiny.config.vocab)
    for names in ([SHARED], ROLES):
        model = with_adapters(tiny, names)
        for role in (ATTACKER, DEFENDER):
            model.use(role)
            assert not torch.equal(model(ids_BT, all_logits), tiny(ids_BT, all_logits))
        model.use("")
        assert torch.equal(model(ids_BT, all_logits), tiny(ids_BT, all_logits))


@torch.no_grad()
def test_a_new_adapter_changes_no_logit_and_its_matrices_a_are_as_large_as_pefts(tiny):
    model = copy.deepcopy(tiny)
    model.add_adapter(SHARED, 64)
    model.use(DEFENDER)
    ids_BT = random_ids(2, 9, seed=0, vocab=tiny.config.vocab)
    measured("logits", (model(ids_BT, all_logits) - tiny(ids_BT, all_logits)).abs().max(), 0.0)
    linear = model.layers[0].mlp.down_proj
    variance = linear.lora_A[SHARED].var().item()
    measured("variance of A over 1 / (3 D), minus 1", abs(variance * 3 * linear.in_features - 1), 0.1)


@torch.no_grad()
def test_the_sampler_and_the_trainer_agree_under_an_adapter(tiny):
    model = with_adapters(tiny, ROLES)
    prompts = [random_ids(1, n, n, vocab=tiny.config.vocab)[0].tolist() for n in (7, 1, 12, 3)]
    for role in ROLES:
        model.use(role)
        replies = sample(model, prompts, uniforms(0, 0, range(4), 0, 24), stops=list(range(20)))
        ids_BT, mask_BT, drawn_BT = pack(prompts, [r.ids for r in replies], [[r.logprobs for r in replies]])
        difference_BT = score(model, ids_BT, mask_BT)[0] - drawn_BT
        measured(f"{role}, sampler against trainer", difference_BT[mask_BT].abs().max(), 1e-5)


@every_architecture
@torch.no_grad()
def test_peft_opens_what_we_write_and_gives_our_logits(name, tmp_path, tokenizer):
    peft = pytest.importorskip("peft", reason="pip install peft")
    base = new_model(CONFIGS[name], 0)
    save(tmp_path / "step_000000", base.state_dict(), base, tokenizer)
    model = with_adapters(base, ROLES)
    save(tmp_path / "step_000002", weights_of(model), model, tokenizer)
    ids_BT = random_ids(2, 9, seed=0)
    for role in ROLES:
        model.use(role)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "step_000000")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "step_000002" / role)
        ours_BTV = model(ids_BT, all_logits)
        error = (theirs(ids_BT).logits - ours_BTV).abs().max() / ours_BTV.abs().max()
        measured(f"{name}, {role}, over the largest logit", error, 1e-5)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "step_000002" / role)  # it finds the base
        measured("opened by transformers", (opened(ids_BT).logits - theirs(ids_BT).logits).abs().max(), 1e-5)


@torch.no_grad()
def test_a_checkpoint_with_adapters_opens_here_bit_for_bit(tmp_path, tokenizer):
    base = new_model(CONFIGS["qwen2"], 0)
    save(tmp_path / "step_000000", base.state_dict(), base, tokenizer)
    for names in ([SHARED], ROLES):
        model = with_adapters(base, names)
        folder = tmp_path / f"step_{len(names):06d}"
        save(folder, weights_of(model), model, tokenizer)
        again = load(str(folder))
        assert again.adapters == model.adapters and again.state_dict().keys() == model.state_dict().keys()
        measured("parameters", largest_difference(again.state_dict(), model.state_dict()), 0.0)


# ---------------------------------------------------------------- the update

def one_update(model, optimizer, roles):
    """An update by turns of these roles alone."""
    experiences, advantage = some_experiences(model)
    chosen = [i for i, e in enumerate(experiences) if e.turn.role in roles]
    batch = [[values[i] for i in chosen] for values in (experiences, advantage)]
    old = [np.array(e.turn.logprobs) for e in batch[0]]
    return train.update(model, optimizer, batch[0], old, batch[1], [], Config(), ONE_PROCESS)


@pytest.mark.parametrize("role, other", [(ATTACKER, DEFENDER), (DEFENDER, ATTACKER)])
def test_an_update_of_one_role_changes_nothing_of_the_other(role, other, tiny):
    """Not even when Adam has moments for both: the other's adapter has no gradient, not one of zero."""
    model = with_adapters(tiny, ROLES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    one_update(model, optimizer, ROLES)
    before, others = of_role(model, role), of_role(model, other)
    one_update(model, optimizer, [role])
    measured("the other's adapter", largest_difference(others, of_role(model, other)), 0.0)
    assert largest_difference(before, of_role(model, role)) > 1e-3
    measured("the base", largest_difference(tiny.state_dict(), {
        name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}), 0.0)


def test_an_update_changes_the_very_next_draw(tiny):
    model = with_adapters(tiny, ROLES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def draw(role):
        model.use(role)
        return sample(model, [[5, 6, 7]], uniforms(0, 0, range(1), 0, 9), stops=[])[0].logprobs[0]
    drawn = {role: draw(role) for role in ROLES}
    one_update(model, optimizer, [ATTACKER])
    assert draw(ATTACKER) != drawn[ATTACKER] and draw(DEFENDER) == drawn[DEFENDER]


def test_a_shared_adapter_gets_one_gradient_from_both_roles_whatever_the_micro_batches(tiny):
    gradients = []
    for micro_tokens in (10_000, 20):
        model = with_adapters(tiny, [SHARED])
        experiences, advantage = some_experiences(tiny)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        old = [np.array(e.turn.logprobs) for e in experiences]
        before = of_role(model, SHARED)
        cfg = Config(micro_tokens=micro_tokens)
        train.update(model, optimizer, experiences, old, advantage, [], cfg, ONE_PROCESS)
        gradients.append({name: before[name] - p for name, p in of_role(model, SHARED).items()})
    measured("one batch against many", largest_difference(*gradients), 1e-6)


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder of two runs on one process, "shared" and "roles", that begin with the model of "sft"."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(sft_run, folder / "sft")
    SMALL.extend(["--model", folder / "sft" / "step_000000"])
    for adapters in ("shared", "roles"):
        succeeds(*SMALL, "--adapters", adapters, "--out", folder / adapters)
    return folder


FOLDERS = {"shared": [SHARED], "roles": ["attacker", "defender"]}
shared_and_roles = pytest.mark.parametrize("adapters", FOLDERS)


@shared_and_roles
def test_a_checkpoint_of_an_fp32_run_holds_adapters_in_fp32_their_optimizer_and_no_base(adapters, runs):
    folder = runs / adapters / "step_000004"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*FOLDERS[adapters], "optimizer"}
    assert not list(folder.glob("*.safetensors"))
    for name in FOLDERS[adapters]:
        tensors = adapter(runs / adapters, name)
        assert len(tensors) == 2 * 7 * train.load(str(folder)).config.layers
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    states = [load_file(file) for file in (folder / "optimizer").glob("*.safetensors")]
    assert all("lora" in key for state in states for key in state)


@shared_and_roles
def test_two_processes_equal_one(adapters, runs):
    """
    With the step size of full weights: where a gradient is a rounding error, AdamW steps as far as anywhere.
    At ten times that size, 2 of 45,056 numbers differed by 3e-5.
    """
    outs = [runs / f"{adapters}_of_{ranks}" for ranks in (1, 2)]
    for ranks, out in enumerate(outs, 1):
        succeeds(*SMALL, "--adapters", adapters, "--lr", "2e-4", "--out", out, ranks=ranks)
    for name in FOLDERS[adapters]:
        one, two = (adapter(out, name) for out in outs)
        measured(f"{name}, 2 processes against 1", largest_difference(one, two), 1e-5)
    assert games(outs[0]) == games(outs[1])
    measured("mismatch", max(line["mismatch"] for line in metrics(outs[1])), 1e-5)


@shared_and_roles
@pytest.mark.parametrize("precision, ranks", [("fp32", 1), ("bf16", 2)])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(adapters, precision, ranks, runs):
    whole, resumed = (runs / f"{adapters}_{precision}_{ranks}_{name}" for name in ("whole", "resumed"))
    succeeds(*SMALL, "--adapters", adapters, "--precision", precision, "--out", whole, ranks=ranks)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "step_000004")
    succeeds("--resume", "--out", resumed, ranks=ranks)
    for name in FOLDERS[adapters]:
        measured(f"{name}", largest_difference(adapter(whole, name), adapter(resumed, name)), 0.0)
        assert largest_difference(adapter(whole, name), adapter(whole, name, 2)) > 1e-4
    assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4]


def say_what_is_opened(rank):
    open_sharded = train.open_sharded

    def opening(name, *args, **settings):
        print("<open>", name)
        return open_sharded(name, *args, **settings)
    train.open_sharded = opening


def test_the_reference_is_no_second_model(runs):
    counts = []
    for rank in ("0", "4"):
        flags = [*SMALL, "--steps", "1", "--adapter-rank", rank, "--out", runs / f"opened_{rank}"]
        counts.append(succeeds(*flags, before=say_what_is_opened).stdout.count("<open>"))
    assert counts == [2, 1]
    first = metrics(runs / "opened_4")[0]
    measured("kl of the first step: adapters that change nothing yet", abs(first["kl"]), 1e-6)


@pytest.mark.parametrize("play, learns", [("attacker", "attacker"), ("defender", "defender")])
def test_a_role_that_does_not_learn_has_no_adapter_and_plays_as_the_start(play, learns, runs):
    out = runs / f"play_{play}"
    succeeds(*SMALL, "--adapters", "roles", "--play", play, "--out", out)
    assert [file.parent.name for file in (out / "step_000004").glob(m.ADAPTER_FILES)] == [learns]
    assert load(str(out)).adapters == {learns: learns}


def test_a_run_with_adapters_is_an_opponent_in_its_role(runs):
    """The defender that it meets has its adapter on: with it off, the games are others."""
    flags = [*SMALL[2:], "--play", "attacker", "--opponent"]
    succeeds(*flags, runs / "roles", "--out", runs / "against_roles")
    succeeds(*flags, runs / "sft" / "step_000000", "--out", runs / "against_start")
    opponent = arena.open_eval_model(str(runs / "roles"))
    assert set(opponent.model.adapters) == set(ROLES)
    answers = [[game["answer"] for game in games(runs / f"against_{name}")] for name in ("roles", "start")]
    assert answers[0] != answers[1]
    hashes = {arena.weights_hash(str(runs / "roles" / f"step_{step:06d}")) for step in (0, 2, 4)}
    assert len(hashes) == 3, "the start, and two checkpoints on it"


@torch.no_grad()
@pytest.mark.parametrize("role", ROLES)
def test_a_merged_folder_opens_in_transformers_and_gives_the_roles_logits(role, runs, monkeypatch, capsys):
    out = runs / f"merged_{role}"
    words = ["model.py", "--merge", str(runs / "roles"), "--role", role, "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    m.main()
    ours = load(str(runs / "roles"))
    ours.use(role)
    ids_BT = random_ids(2, 9, seed=0, vocab=ours.config.vocab)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ours_BTV = ours(ids_BT, all_logits)
    measured(f"{role}, merged, in transformers", (theirs(ids_BT).logits - ours_BTV).abs().max(), 1e-4)
    ours.use("")
    assert (ours(ids_BT, all_logits) - ours_BTV).abs().max() > 1e-3
    with pytest.raises(SystemExit):   # the folder is there now
        m.main()
    assert "a new folder" in capsys.readouterr().err


# ---------------------------------------------------------------- the memory plan

LARGE = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
             num_hidden_layers=32)
LLAMA_8B = LlamaConfig(**LARGE, vocab_size=128256)
MISTRAL_7B = MistralConfig(**LARGE, vocab_size=32768, sliding_window=None)
LLAMA_3B = LlamaConfig(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, head_dim=128,
                       num_key_value_heads=8, num_hidden_layers=28, vocab_size=128256,
                       tie_word_embeddings=True)


def peak(folder, config, judge="keywords", **settings):
    """The last row of --plan for one GPU."""
    config.save_pretrained(folder / "policy")
    table = eval.show_plan(Config(model=str(folder / "policy"), judge=judge, **settings), 1)
    print("\n" + table, end="")
    return next(line for line in table.splitlines() if "peak" in line)


@pytest.mark.parametrize("adapters", ["shared", "roles"])
def test_an_8b_model_with_a_7b_judge_fits_80_gb_and_a_3b_fits_24_gb_with_adapters_alone(adapters, tmp_path):
    MISTRAL_7B.save_pretrained(tmp_path / "judge")
    judge = f"wildguard:{tmp_path / 'judge'}"
    settings = {"adapter_rank": 16, "adapters": adapters}
    large = peak(tmp_path, LLAMA_8B, judge, **settings)
    assert any(f"fits {gb} GB" in large for gb in (24, 40, 48, 80))
    assert "fits 24 GB" in peak(tmp_path, LLAMA_3B, **settings)
    assert "fits 24 GB" not in peak(tmp_path, LLAMA_3B)
    assert "fits 180 GB" in peak(tmp_path, LLAMA_8B, judge)


def test_the_plan_counts_the_weights_that_learn_as_they_are(tmp_path):
    """Twelve bytes for each number of two adapters of rank 128 in 28 layers, on every GPU."""
    expected = 0
    q_k_v_o = [(3072, 3072), (3072, 1024), (3072, 1024), (3072, 3072)]
    for D, M in [*q_k_v_o, (3072, 8192), (3072, 8192), (8192, 3072)]:
        expected += 2 * 28 * 128 * (D + M) * 12
    LLAMA_3B.save_pretrained(tmp_path / "policy")
    cfg = Config(model=str(tmp_path / "policy"), judge="keywords", adapter_rank=128, adapters="roles")
    for n_gpus in (1, 8):
        row = re.search(r"Adam moments, fp32 \| (\S+)", eval.show_plan(cfg, n_gpus))
        measured(f"GiB on {n_gpus} GPUs", abs(float(row[1]) - expected / 2 ** 30), 0.05)


def test_the_plan_counts_whole_opponents_but_not_a_past_adapter(tmp_path):
    LLAMA_3B.save_pretrained(tmp_path / "policy")
    cfg = Config(model=str(tmp_path / "policy"), judge="keywords", adapter_rank=16, steps=50, save_every=10)
    held = {}
    for opponent in ("", "past", "mixture.json"):
        table = eval.show_plan(replace(cfg, opponent=opponent), 1)
        held[opponent] = float(re.search(r"reference, judge, opponent \| (\S+)", table)[1])
    assert held[""] == held["past"] and held["mixture.json"] > 1.9 * held[""]
    for opponent, keep, n in (("past", 2, 5), ("", 2, 3), ("", 9, 5)):   # five saves in 50 steps
        assert f"{n} of them at most" in eval.show_plan(replace(cfg, opponent=opponent, keep=keep), 1)


# ---------------------------------------------------------------- bad input

def refused(done, *words):
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    assert all(word in done.stderr for word in words), done.stderr


def test_a_bad_combination_is_refused_in_one_sentence(runs, capsys):
    refused(run("--adapters", "roles", "--out", runs / "x"), "Add --adapter-rank")
    refused(run("--adapter-rank", "-1", "--out", runs / "x"), "from 0 to 1024")
    refused(run("--adapters", "both", "--out", runs / "x"), "--adapters")
    refused(run("--model", runs / "roles", "--out", runs / "x"), "holds adapters", "model.py --merge")
    refused(run("--resume", "--out", runs / "roles", "--adapter-rank", "8"), "was begun with 4")
    refused(run("--resume", "--out", runs / "roles", "--adapters", "shared"), "was begun with roles")
    refused(run("--resume", "--out", runs / "roles", "--play", "attacker"), "was begun with self")
    assert not (runs / "x").exists()


def spoil_json(file):
    file.with_name("adapter_config.json").write_text('{"r": 3}')


def spoil_nan(file):
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)


def spoil_missing(file):
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file)


DAMAGE = {"another rank": (spoil_json, "differ in shape"), "NaN": (spoil_nan, "NaN"),
          "a matrix is missing": (spoil_missing, "lack 1"),
          "cut short": (lambda file: file.write_bytes(file.read_bytes()[:99]), "cannot be read"),
          "no base": (lambda file: shutil.rmtree(file.parents[2] / "step_000000"), "step_000000: no such")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_refused_in_one_sentence(damage, runs, tmp_path, capsys):
    shutil.copytree(runs / "roles", tmp_path / "run")
    spoil, word = DAMAGE[damage]
    spoil(tmp_path / "run" / "step_000004" / "defender" / "adapter_model.safetensors")
    with pytest.raises(SystemExit):
        load(str(tmp_path / "run"))
    sentences = capsys.readouterr().err.splitlines()
    assert len(sentences) == 1 and word in sentences[0], sentences


def test_the_default_step_size_of_adapters_is_ten_times_that_of_full_weights(capsys):
    real = ["--model", "M", "--judge", "keywords", "--seeds", "S"]
    for flags in ([], real):
        full, adapted = (train.parse_config([*flags, *more]).lr for more in ([], ["--adapter-rank", "8"]))
        measured("ratio of the defaults, minus 10", abs(adapted / full - 10), 1e-9)
    assert train.parse_config(["--adapter-rank", "8", "--lr", "1"]).lr == 1.0
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    assert "thinkingmachines.ai/blog/lora" in capsys.readouterr().out
