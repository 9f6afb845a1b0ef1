"""The arms of tests/real_arms.py get what they are said to get; here on a tiny model and a few prompts."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import eval
import real_arms
import train
from conftest import byte_tokenizer
from model import new_model, save
from real_arms import rows_of
from selfplay import REWARDS

N = 6   # prompts of each file


class InTurn:
    """Threads that run one after the other, in the main thread, where a run of train.py needs to be."""

    def __init__(self, jobs: int):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        result = function(*args)
        return SimpleNamespace(result=lambda: result)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """All arms of one seed, two steps each, in this process."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         eos_token_id=tokenizer.eos_token_id)
    model = new_model(config, 0)
    save(folder / "model", model.state_dict(), model, tokenizer)
    (folder / "data").mkdir()
    for name, file in real_arms.FILES.items():
        real_arms.write_rows(folder / "data" / file, [{"prompt": f"{name} {n}"} for n in range(N)])
    for label in ("harmful", "benign"):
        rows = [{"vanilla": f"plain {label} {n}", "adversarial": f"{label} {n} in play {take}"}
                for n in range(N) for take in range(2)]
        rows[0]["adversarial"] = f"{label} attacks 0"   # so no version of plain 0 is held out
        rows[2]["vanilla"] = rows[3]["vanilla"] = f"{label} 1"   # nor of what is a seed
        real_arms.write_rows(folder / "data" / f"wildjailbreak_eval_{label}.jsonl", rows)
    lines = ["prompt,category", "harmful 2,x", *(f"toxic {n},x" for n in range(N))]
    (folder / "data" / "or_bench-toxic.csv").write_text("\n".join(lines))

    def run(command, **_):
        """train.py or eval.py as a function, in the folder of the runs."""
        words = [str(word) for word in command[2:]]
        if words[0] == "train":
            train.main(words[1:])
        else:
            assert words[0] == "bf16"
            eval.main(words[1:])
        return SimpleNamespace(stdout="", stderr="", returncode=0)

    before = os.getcwd()
    (folder / "runs").mkdir()
    os.chdir(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_arms.subprocess, "run", run)
        patch.setattr(real_arms, "ThreadPoolExecutor", InTurn)
        patch.setattr(sys, "argv", ["real_arms.py", "--model", str(folder / "model"), "--data",
                                    str(folder / "data"), "--out", str(folder / "runs"), "--seeds", "0",
                                    "--steps", "2", "--games", "8", "--tokens", "8", "--pairs", "4",
                                    "--n", "4"])
        real_arms.main()
    os.chdir(before)
    return folder / "runs"


def test_nothing_payoffs_are_zero_whatever_happens():
    nothing = REWARDS["none"]
    assert set(nothing.attacker.values()) == set(nothing.defender.values()) == {0.0} == {nothing.forfeit}


def test_prompts_are_held_out_if_no_version_of_their_request_was_trained_on(out):
    prompts = {test: [row["prompt"] for row in rows_of(out / f"{test}.jsonl")] for test in real_arms.HELD_OUT}
    assert prompts["plain_harmful"] == ["toxic 0", "toxic 1", "toxic 3", "toxic 4"]   # 4 of 6, evenly
    assert prompts["plain_benign"] == [f"plain benign {n}" for n in range(2, 6)]
    assert prompts["adversarial_harmful"] == [f"harmful {n} in play 0" for n in range(2, 6)]
    assert prompts["adversarial_benign"] == [f"benign {n} in play 0" for n in range(2, 6)]


def test_half_of_the_pairs_are_refusals_of_harmful_seeds(out):
    pairs = rows_of(out / "pairs.jsonl")
    refused = [pair["prompt"] for pair in pairs if pair["response"] in real_arms.REFUSALS]
    assert refused == ["harmful 0", "harmful 1"] and [pair["prompt"] for pair in pairs][:2] == ["benign 0",
                                                                                                  "benign 1"]


def test_a_pair_keeps_whole_sentences():
    assert real_arms.whole_sentences("Yes. You can!\n\nThen, put the") == "Yes. You can!"
    assert real_arms.whole_sentences("Sure.\n\n1. Take 3.5 g\n2.") == "Sure."
    assert real_arms.whole_sentences("and so on") == "and so on"


@pytest.mark.parametrize("arm", real_arms.ARMS)
def test_every_arm_makes_as_many_updates_with_the_supervised_pairs_it_is_said_to_have(out, arm):
    lines = rows_of(out / f"{arm}-0" / "metrics.jsonl")
    assert len(lines) == 2
    assert all(("loss_sft" in line) == (arm != "rl") for line in lines)
    games = rows_of(out / f"{arm}-0" / "games.jsonl")
    recorded = {row["attack"] for row in rows_of(out / "attacks.jsonl")}
    written = [game["harmful"] for game in games if game["attacker_reply"] is not None]
    asked_again = [game["harmful"] for game in games if game["seed"] in recorded]
    assert sum(game["harmful"] for game in games) == 8 and len(games) == 16
    assert sorted(written) == ([False] * 4 + [True] * 4) * (arm in ("rl", "self"))
    assert sorted(asked_again) == ([False] * 4 + [True] * 4) * (arm == "recorded")
    config = json.loads((out / f"{arm}-0" / "config.json").read_text())
    assert config["adapters"] == "roles" and config["balance"] and config["kl"] == 0.01


def test_only_supervised_pairs_move_the_supervised_arm(out):
    payoffs = [line["reward_defender"] for line in rows_of(out / "supervised-0" / "metrics.jsonl")]
    assert payoffs == [0.0, 0.0]


def test_start_and_arms_are_asked_every_held_out_prompt_and_the_starts_attacks(out):
    asked = sum(len(rows_of(out / f"{name}.jsonl")) for name in real_arms.TESTS)
    for name, expected in (("start", 1), ("0", len(real_arms.ARMS))):
        answers = rows_of(out / f"answers-{name}.jsonl")
        models = {line["model"] for line in answers}
        print(f"{name}: {asked} prompts, {len(models)} models, {len(answers)} answers")
        assert len(models) == expected and len(answers) == asked * expected


def test_a_folder_of_other_settings_is_refused(out, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["real_arms.py", "--model", str(out.parent / "model"), "--data",
                                    str(out.parent / "data"), "--out", str(out), "--tokens", "9"])
        with pytest.raises(SystemExit):
            real_arms.main()
    assert "choose another --out" in capsys.readouterr().err


def test_summary_has_means_over_seeds_and_differences_seed_by_seed(tmp_path, capsys):
    answered = {"supervised": (0.1, 0.2, 0.3), "rl": (0.2, 0.3, 0.4), "defender": (0.5, 0.5, 0.5),
                "recorded": (0.0, 0.0, 0.0), "self": (0.3, 0.2, 0.1)}   # of harmful prompts, by seed
    for seed in range(3):
        rates = {f"{arm}-{seed}": values[seed] for arm, values in answered.items()}
        numbers = {}
        for test in real_arms.TESTS:
            label = test.split("_")[1]
            key, value_of = ("asr", rates.get) if label == "harmful" else ("benign_answered", lambda _: 0.8)
            numbers[f"labelled prompts, {label}={test}.jsonl"] = {
                name: {key: {"value": value_of(name)}} for name in reversed(rates)}
            numbers[f"labelled prompts, {label}={test}.jsonl"]["start"] = {key: {"value": 0.9}}
        for name in (f"bench-{seed}", "bench-start"):
            (tmp_path / f"{name}.json").write_text(json.dumps(numbers))
        for name in rates:
            (tmp_path / name).mkdir()
            lines = [{"attack_refusal": 0.5 if name.startswith("self") else None, "asr": None, "asr_raw": 1,
                      "benign_answered": 0, "loss_sft": step} for step in range(60)]
            real_arms.write_rows(tmp_path / name / "metrics.jsonl", lines)
    real_arms.print_summary(SimpleNamespace(out=tmp_path, seeds=[0, 1, 2], model="start"))
    means, differences, training = capsys.readouterr().out.strip().split("\n\n")
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in means.splitlines()}
    spread = "± 0.248"   # 4.303 * 0.1 / 3 ** 0.5
    assert cells["| plain harmful, answered"][:2] == ["0.900", f"0.200 {spread} (0.100 0.200 0.300)"]
    assert cells["| plain, right"][:2] == ["0.500", "0.800 ± 0.124 (0.850 0.800 0.750)"]
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in differences.splitlines()}
    assert cells["| plain harmful, answered"][0] == "0.100 ± 0.000 (0.100 0.100 0.100)"
    assert cells["| adversarial, right"][3] == "0.000 ± 0.248 (-0.100 0.000 0.100) |"
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in training.splitlines()}
    assert cells["| attack_refusal"] == ["-", "-", "-", "-", "0.500 ± 0.000 (0.500 0.500 0.500) |"]
    assert cells["| loss_sft"][0] == "54.500 ± 0.000 (54.500 54.500 54.500)"   # the mean of 50 to 59
