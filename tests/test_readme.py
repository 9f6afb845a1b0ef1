"""The READMEs are true: their commands run, and the keys and flags that they name exist."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from conftest import byte_tokenizer, tiny_sentence_model
from launch import WITHOUT_GPUS
from model import new_model, save
from train import Config

ROOT = Path(__file__).parent.parent
READMES = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
BLOCKS = [(name, block) for name, text in READMES.items()
          for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
# Tiny models stand under these names; a folder of that name goes before the hub.
MODELS = ("Qwen/Qwen2.5-7B-Instruct", "allenai/wildguard", "path/to/SmolLM2-135M-Instruct")

# What makes a command take seconds, put right after its name: flags of the README come later, and win.
SHORTER = {
    "train.py": "--model start --steps 1 --games 16 --max-new-tokens 40",
    "eval.py report": "--n 8",
    "eval.py diversity": "--n 8",
    "eval.py crossplay": "--n 8",
    "eval.py exploit": "--n 8 --search 20",
    "tests/arms.py": "--seeds 10 --arms live --flags '--steps 2 --games 16 --sft-steps 20'",
    "tests/weak_scaling.py": "--games 4 --steps 2 --sft-steps 1",
}
# Commands that this run of the tests is, or that the tests of bench.py run on tiny sizes.
LEFT_OUT = ("-m venv", "-m pytest", "tests/bench.py")
LONG_FLAGS = r" --(steps|games|n|search|sft-steps) [0-9]+(?=$| )"


def shortened(block: str) -> str:
    """A block in which every command takes seconds and runs this Python, with two ranks for eight."""
    lines = [line for line in block.splitlines() if not any(word in line for word in LEFT_OUT)]
    text = re.sub(LONG_FLAGS, "", "\n".join(lines))
    text = text.replace("venv/bin/python", "python")
    for command, flags in SHORTER.items():
        text = text.replace(f"{command} ", f"{command} {flags} ")
        text = re.sub(rf"{re.escape(command)}$", f"{command} {flags}", text, flags=re.M)
    text = re.sub(r"(eval\.py report --n 8 \S+) .*?(--embedder)", r"\1 \2", text)   # one run of nine
    text = re.sub(r"\bpython\b", sys.executable, text)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    return re.sub(r"torchrun --nproc_per_node=\d", torchrun, text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, sft_run):
    """A copy of the project with tiny models and short files under the names that the READMEs use."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(sft_run / "step_000000", folder / "start")   # an SFT for all runs of the toy world
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("harmful", "benign", "held_harmful", "held_benign"):
        verbs = ("make", "find", "mend")
        rows = [json.dumps({"prompt": f"how do i {verb} the {name} thing"}) + "\n" for verb in verbs]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    pair = {"prompt": "how do i make it", "response": "With care."}
    (folder / "sft.jsonl").write_text(json.dumps(pair) + "\n")
    vote = {"test_case": "how", "generation": "Sure!", "human_0": 1, "human_1": 1, "human_2": 0}
    refused = vote | {"generation": "I cannot.", "human_0": 0}
    (folder / "harmbench_val.json").write_text(json.dumps({"one": [vote, refused]}))
    tokenizer = byte_tokenizer()
    size = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                eos_token_id=tokenizer.eos_token_id)
    for name in MODELS:
        model = new_model(Qwen2Config(**size) if "Qwen" in name else LlamaConfig(**size), seed=0)
        save(folder / name, model.state_dict(), model, tokenizer)
    tiny_sentence_model(folder / "path" / "to" / "all-MiniLM-L6-v2", ["how", "do", "i", "the"])
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda n: f"{BLOCKS[n][0]} {n}")
def test_every_command_of_the_readmes_runs(number, clone):
    name, block = BLOCKS[number]
    command = shortened(block)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=clone, capture_output=True,
                          text=True, env=WITHOUT_GPUS | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_every_logged_key_is_explained(clone):
    log = next(path for path in (clone / "runs").glob("*/metrics.jsonl") if "smollm2" not in str(path))
    logged = json.loads(log.read_text().splitlines()[0]).keys()
    table = READMES["README.md"][READMES["README.md"].index("| key | meaning"):]
    explained = set(re.findall(r"`([a-z_]+)`", table))
    assert logged <= explained, logged - explained


@pytest.mark.parametrize("name", READMES)
def test_no_flag_of_train_is_named_that_does_not_exist(name):
    names = {f.name for f in fields(Config)} | {f"no_{f.name}" for f in fields(Config)} | {"help"}
    for command in re.findall(r"train\.py [^`\n|;]*", READMES[name]):
        flags = {flag.replace("-", "_") for flag in re.findall(r" --([a-z-]+)", command)}
        assert flags <= names, f"{flags - names} in {command}"


def test_ci_runs_the_tests_as_the_readme_says():
    command = "-m pytest -q -n 2 --dist loadfile -rP --doctest-modules"
    assert command in READMES["README.md"] and command in (ROOT / ".ci" / "run").read_text()
