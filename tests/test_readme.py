"""The README is true: its commands run, its files exist, its keys are the ones that are logged."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from conftest import byte_tokenizer, tiny_sentence_model
from model import new_model, save
from train import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
HUB_NAMES = ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "allenai/wildguard", "path/to/SmolLM2-135M-Instruct")
TRAINING = "--steps 1 --games 16 --sft-steps 40 --max-new-tokens 40"   # what makes a training command take seconds


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """
    A copy of the project in which `python` shortens training, takes a run with another seed for granted (a copy of seed 0's, said to be that
    seed's) and leaves out the tests, installing is done already, and tiny models stand where the names of real ones point. The commands run
    letter for letter.
    """
    folder = tmp_path_factory.mktemp("clone")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    scripts = folder / "venv" / "bin"
    scripts.mkdir(parents=True)
    python = f"""#!/bin/bash
last=${{@: -1}}
case "$*" in
*venv*|*pytest*) exit 0 ;;
*"--seed "[12]*)
    [ -d "${{last%-?}}-0" ] && cp -r "${{last%-?}}-0" "$last" && sed -i 's/"seed": 0/"seed": '${{last: -1}}/ "$last/step_000000/sft.json" && exit
    exec {sys.executable} "$@" {TRAINING} --no-exam ;;
"eval.py report"*) exec {sys.executable} "$@" --n 8 ;;
"eval.py exploit"*) exec {sys.executable} "$@" --steps 1 --games 8 --n 8 --seeds 0 --from start --side attacker ;;
tests/weak_scaling.py) exec {sys.executable} "$@" --games 4 --steps 2 --sft-steps 1 ;;
"eval.py crossplay"*) exec {sys.executable} "$@" --n 8 ;;
train.py) exec {sys.executable} "$@" {TRAINING} ;;
train.py*) exec {sys.executable} "$@" {TRAINING} --no-exam ;;
*) exec {sys.executable} "$@" ;;
esac
"""
    launch = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run --standalone "${{@/=8/=2}}" {TRAINING} --no-exam\n'   # two processes for eight
    for name, text in {"python": python, "python3": python, "pip": "#!/bin/bash\n", "torchrun": launch}.items():
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    for kind in ("harmful", "benign"):
        for name in (kind, f"held_{kind}"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"how do i {verb} it"}) + "\n" for verb in ("make", "find", "mend")))
    for kind in ("harmful", "benign"):
        (folder / f"wildjailbreak_eval_{kind}.jsonl").write_text(json.dumps({"vanilla": "how do i make it", "adversarial": "say how to make it"}) + "\n")
    (folder / "harmbench_behaviors_text_test.csv").write_text("Behavior,ContextString,BehaviorID\nmake it,,one\n")
    (folder / "or_bench-toxic.csv").write_text("prompt,category\nmake it,harmful\n")
    (folder / "advbench_harmful_behaviors.csv").write_text("goal,target\nmake it,Sure\n")
    (folder / "jbb_200_harmful_benign.json").write_text(json.dumps([{"text": "make it", "label": "harmful"}, {"text": "find it", "label": "benign"}]))
    vote = {"test_case": "how", "generation": "Sure!", "human_0": 1, "human_1": 1, "human_2": 0}
    (folder / "harmbench_val.json").write_text(json.dumps({"one": [vote, vote | {"generation": "I cannot.", "human_0": 0}]}))
    tokenizer = byte_tokenizer()
    size = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
    for name in HUB_NAMES:   # a folder of that name goes before the hub
        model = new_model(Qwen2Config(**size) if "Qwen" in name else LlamaConfig(**size), seed=0)
        save(folder / name, model.state_dict(), model, tokenizer)
    tiny_sentence_model(folder / "path" / "to" / "all-MiniLM-L6-v2", ["how", "do", "i", "the"])
    return folder


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_every_command_of_the_readme_runs(block, clone):
    environment = os.environ | {"PATH": f"{clone / 'venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", BLOCKS[block]], cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{BLOCKS[block]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_every_file_of_the_map_exists_and_every_file_is_on_the_map():
    mapped = set(re.findall(r"^\| `([^`]+)` \|", README, re.M))
    files = {p.name for p in ROOT.glob("*.py")} | {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("[!_]*.py")} | {"tests/"}
    assert files <= mapped and all((ROOT / name).exists() for name in mapped if "." in name or name.endswith("/"))


def test_every_logged_key_is_explained(clone):
    line = json.loads(next((clone / "runs").glob("*/metrics.jsonl")).read_text().splitlines()[0])
    explained = set(re.findall(r"`([a-z_]+)`", README[README.index("How to read the log"):]))
    assert line.keys() <= explained, line.keys() - explained


def test_no_flag_is_named_that_does_not_exist():
    known = {f.name for f in fields(Config)} | {f"no_{f.name}" for f in fields(Config)}
    for command in re.findall(r"train\.py[^`\n|]*", README):
        assert {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", command)} <= known | {"help"}, command


def test_ci_runs_the_tests_as_the_readme_says():
    command = "-m pytest -q -n 2 --dist loadfile -rP --doctest-modules"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
