"""
What lm-eval, the field's harness for benchmarks of knowledge, sees of a folder that model.save wrote: the
log-likelihoods that our own score gives, and, from two of its logs, a difference with its interval.
"""
import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import LlamaConfig

import paired
from conftest import byte_tokenizer, measured
from data import pack
from launch import WITHOUT_GPUS
from model import load, new_model, save, score
from sample import open_tokenizer

CHOICES = ["bread with the fox", "fox with the bread", "the fox with bread"]   # of like lengths
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
RUN = """
import sys
from lm_eval.__main__ import cli_evaluate
folder, *names = sys.argv[1:]
for name in names:
    model = f"pretrained={folder}/{name},dtype=float32"
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", "tiny",
                "--include_path", folder, "--output_path", f"{folder}/logs", "--log_samples",
                "--device", "cpu", "--batch_size", "4"]
    cli_evaluate()
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A folder with two models of ours, and lm-eval's log of the task for each: {model: file}."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval accelerate")
    folder = tmp_path_factory.mktemp("capable")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                         max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)
    for seed, name in enumerate(("old", "new")):
        model = new_model(config, seed)
        save(folder / name, model.state_dict(), model, tokenizer)
    answers = np.random.default_rng(1).integers(3, size=40).tolist()
    rows = [{"question": f"the {n} quick brown fox asks how to bake bread:", "choices": CHOICES,
             "answer": answer} for n, answer in enumerate(answers)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(TASK.format(file=folder / "tiny.jsonl"))
    offline = WITHOUT_GPUS | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, folder, "old", "new"], env=offline, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {name: next((folder / "logs").rglob(f"*{name}/samples_tiny_*.jsonl"))
                    for name in ("old", "new")}


def test_lm_eval_gives_the_log_likelihoods_of_our_own_score(logged):
    folder, files = logged
    model, tokenizer = load(str(folder / "new")), open_tokenizer(str(folder / "new"))
    errors = []
    for line in map(json.loads, files["new"].read_text().splitlines()):
        for choice, [theirs, _] in zip(CHOICES, line["filtered_resps"], strict=True):
            prompt = tokenizer(line["doc"]["question"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{line['doc']['question']} {choice}", add_special_tokens=False).input_ids
            ids_BT, mask_BT = pack([prompt], [whole[len(prompt):]])
            ours = (score(model, ids_BT, mask_BT)[0] * mask_BT).sum().item()
            errors.append(abs(ours - float(theirs)))
    assert len(errors) == 120
    measured("log-likelihoods of choices, lm-eval's against ours, nats", max(errors), 1e-4)


def run_paired(*words):
    """Run tests/paired.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paired.py", *map(str, words)])
        paired.main()


def test_two_logs_become_a_difference(logged, capsys):
    _, files = logged
    old, new = (np.array([json.loads(line)["acc"] for line in files[name].read_text().splitlines()])
                for name in ("old", "new"))
    assert old.sum() != new.sum(), "else the test shows nothing"
    run_paired(files["old"], files["new"], "acc")
    printed = capsys.readouterr().out
    assert printed.startswith(f"acc: {(new - old).mean():.3f} [") and printed.endswith("n = 40\n")


# ---------------------------------------------------------------- without lm-eval

def write_log(file, values, filters=("none",)):
    """A sample log with these scores of a metric, for each filter."""
    rows = [{"doc_id": n, "doc_hash": f"h{n}", "filter": name, "exact_match": value}
            for n, value in enumerate(values) for name in filters]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_interval_is_that_of_paired_differences(tmp_path, capsys):
    """It is the normal one, 1.96 standard errors of the differences; that of two samples is wider."""
    rng = np.random.default_rng(0)
    old = (rng.random(400) < 0.5).astype(float)
    new = np.where(rng.random(400) < 0.1, 1 - old, old)   # a tenth of the answers change
    files = write_log(tmp_path / "old.jsonl", old), write_log(tmp_path / "new.jsonl", new)
    run_paired(*files, "exact_match")
    printed = capsys.readouterr().out
    low, high = map(float, printed.partition("[")[2].partition("]")[0].split(", "))
    mean, half = (new - old).mean(), 1.96 * (new - old).std(ddof=1) / 20
    error = max(abs(low - mean + half), abs(high - mean - half))
    measured("ends of the interval against the normal ones", error, 0.1 * half)
    apart = 1.96 * (old.var() / 400 + new.var() / 400) ** 0.5
    print(f"\n    half the interval: paired {half:.3f}, as two samples {apart:.3f}", end="")
    assert high - low < 2 * apart


def test_a_filter_is_chosen_by_its_name(tmp_path, capsys):
    old = write_log(tmp_path / "old.jsonl", [0, 1, 0, 1], ("strict-match", "flexible-extract"))
    run_paired(old, old, "exact_match,strict-match")
    printed = capsys.readouterr().out
    assert printed.startswith("exact_match,strict-match: 0.000 [") and printed.endswith("n = 4\n")


@pytest.mark.parametrize("words, sentence", [
    (["old.jsonl"], "give two sample logs of lm-eval and a metric"),
    (["old.jsonl", "other.jsonl", "exact_match"], "4 and 3 scores, not of the same questions"),
    (["old.jsonl", "old.jsonl", "acc"], "0 and 0 scores"),
    (["old.jsonl", "missing.jsonl", "exact_match"], "missing.jsonl: cannot be read")])
def test_logs_that_are_no_pair_are_one_sentence(words, sentence, tmp_path, capsys):
    write_log(tmp_path / "old.jsonl", [0, 1, 0, 1])
    write_log(tmp_path / "other.jsonl", [0, 1, 0])
    with pytest.raises(SystemExit) as stopped:
        run_paired(*(tmp_path / word if "json" in word else word for word in words))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in printed and printed.count("\n") == 1
