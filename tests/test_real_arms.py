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
        if "test" in name:   # the first benchmark row is also a training prompt, in one of its two versions
            shared = "harmful 0" if "harmful" in name else "benign attacks 0"
            rows = [{"vanilla": shared, "adversarial": f"{name}, shared"}]
            rows += [{"vanilla": f"{name} {n}", "adversarial": f"{name} {n}, in play"} for n in range(N)]
            rows.append(rows[1] | {"adversarial": f"{name} 0, in another play"})   # one plain text twice
        else:
            rows = [{"prompt": f"{name} {n}"} for n in range(N)]
        real_arms.write_rows(folder / "data" / file, rows)

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


def test_prompts_are_held_out_if_no_version_of_them_was_trained_on(out):
    plain = [row["prompt"] for row in rows_of(out / "plain_harmful.jsonl")]
    assert plain == [f"harmful test {n}" for n in range(4)]   # not the first row, whose plain text is a seed
    assert [row["prompt"] for row in rows_of(out / "adversarial_benign.jsonl")] == [
        f"benign test {n}, in play" for n in range(4)]


def test_half_of_the_pairs_are_refusals_of_harmful_seeds(out):
    pairs = rows_of(out / "pairs.jsonl")
    refused = [pair["prompt"] for pair in pairs if pair["response"] in real_arms.REFUSALS]
    assert refused == ["harmful 0", "harmful 1"] and [pair["prompt"] for pair in pairs][:2] == ["benign 0",
                                                                                                  "benign 1"]


def test_a_pair_keeps_whole_sentences():
    assert real_arms.whole_sentences("Yes. You can!\n\nThen, put the") == "Yes. You can!"
    assert real_arms.whole_sentences("and so on") == "and so on"


@pytest.mark.parametrize("arm", real_arms.ARMS)
def test_every_arm_makes_as_many_updates_with_the_supervised_pairs_it_is_said_to_have(out, arm):
    lines = rows_of(out / f"{arm}-0" / "metrics.jsonl")
    assert len(lines) == 2
    assert all(("loss_sft" in line) == (arm != "rl") for line in lines)
    games = rows_of(out / f"{arm}-0" / "games.jsonl")
    assert len(games) == 16
    has_attacker = arm in ("rl", "self")
    assert any(game["attacker_reply"] is not None for game in games) == has_attacker
    recorded = {row["attack"] for row in rows_of(out / "attacks.jsonl")}
    assert any(game["seed"] in recorded for game in games) == (arm == "recorded")


def test_only_supervised_pairs_move_the_supervised_arm(out):
    payoffs = [line["reward_defender"] for line in rows_of(out / "supervised-0" / "metrics.jsonl")]
    assert payoffs == [0.0, 0.0]


def test_start_and_arms_are_asked_every_held_out_prompt_and_the_starts_attacks(out):
    asked = sum(len(rows_of(out / f"{name}.jsonl")) for name in real_arms.TESTS)
    for name, expected in (("start", 1), ("0", len(real_arms.ARMS))):
        answers = rows_of(out / f"answers-{name}.jsonl")
        numbers = json.loads((out / f"bench-{name}.json").read_text())
        models = {line["model"] for line in answers}
        print(f"{name}: {asked} prompts, {len(models)} models, {len(answers)} answers")
        assert len(numbers) == len(real_arms.TESTS)
        assert len(models) == expected and len(answers) <= asked * len(models)
        assert all(len(by_model) == len(models) for by_model in numbers.values())


def test_summary_has_means_over_seeds_of_what_was_answered(tmp_path, capsys):
    rates = {"start": [[0.9]], "0": [[0.1, 0.2, 0.3, 0.4, 0.5]], "1": [[0.2, 0.2, 0.3, 0.4, 0.7]],
             "2": [[0.3, 0.2, 0.3, 0.4, 0.9]]}
    for name, [values] in rates.items():
        numbers = {}
        for test in real_arms.TESTS:
            label = test.split("_")[1]
            key = "asr" if label == "harmful" else "benign_answered"
            numbers[f"labelled prompts, {label}={test}.jsonl"] = {
                str(n): {key: {"value": value}} for n, value in enumerate(values)}
        (tmp_path / f"bench-{name}.json").write_text(json.dumps(numbers))
    real_arms.print_summary(SimpleNamespace(out=tmp_path, seeds=[0, 1, 2]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(real_arms.TESTS)
    cells = lines[2].split(" | ")
    assert cells[1] == "0.900"
    assert cells[2] == "0.200 ± 0.248 (0.100 0.200 0.300)"   # 4.303 * 0.1 / 3 ** 0.5
    assert cells[3] == "0.200 ± 0.000 (0.200 0.200 0.200)"
