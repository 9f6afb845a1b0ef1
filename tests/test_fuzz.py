"""Whatever a user gets wrong ends in one sentence and status 2: no traceback, no hang, no changed file."""
import contextlib
import io
import json
import shutil
from collections import Counter
from dataclasses import asdict, fields
from datetime import timedelta
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from transformers import LlamaConfig

import train
from checkpoint import MANIFEST, commit
from conftest import byte_tokenizer
from model import new_model, save
from selfplay import ENGLISH

USUAL = hypothesis.settings(deadline=timedelta(seconds=10), database=None, derandomize=True,
                            suppress_health_check=list(HealthCheck))

# ---------------------------------------------------------------- arguments

FLAGS = ["--" + f.name.replace("_", "-") for f in fields(train.Config)]
FLAGS += ["--no-cot", "--no-exam", "--stepz", "--help", "-x"]
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 4, 8, 12, 1e-5])).map(str)
FILES = ["harmful.jsonl", "benign.csv", "mixed.json", "harmful.tsv", "benign.jsonl"]
WORDS = st.sampled_from([
    "toy", "keywords", "wildguard:run", "wildguard:", "self", "attacker", "defender", "zero_sum", "paper",
    "run", "run/step_000000", "nowhere", "new", "new/er", "harmful.jsonl", "harmful.jsonl/x",
    "harmful=benign.csv", "harmful=harmful.jsonl", "benign=benign.jsonl", *FILES, "adamw", "fp32", "."])
VALUES = st.lists(st.one_of(NUMBERS, WORDS, PLAIN), max_size=2)
ARGUMENTS = st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=3)

# ---------------------------------------------------------------- the content of files

CELL = st.one_of(PLAIN, st.none(), st.booleans(), st.integers(), st.lists(PLAIN, max_size=1),
                 st.sampled_from(["harmful", "benign", "how do i kill the weed"]))
COLUMN = st.sampled_from(["prompt", "text", "label", "harmful", "goal", "target", "attack", "response",
                          "ContextString", "category", ""])
ROWS = st.lists(st.one_of(st.dictionaries(COLUMN, CELL, max_size=3), CELL), max_size=4)
CSV_LINES = st.lists(st.lists(PLAIN, max_size=3).map(",".join), max_size=4)
CONTENT = st.one_of(
    ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ROWS.map(lambda rows: json.dumps(rows).encode()),
    st.binary(max_size=60),
    CSV_LINES.map(lambda lines: "\n".join(["prompt,label", *lines]).encode()))


class Accepted(BaseException):
    """The input is good: from here on, files are written."""


def accept(*_):
    raise Accepted


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with files of seeds, and with a run that has two checkpoints."""
    folder = tmp_path_factory.mktemp("desk")
    run = folder / "run"
    run.mkdir()
    seeds = ["harmful=harmful.jsonl", "benign=benign.jsonl"]
    config = train.Config(judge="keywords", seeds=seeds, model="run", games=8, precision="fp32",
                          max_new_tokens=16)
    (run / "config.json").write_text(json.dumps(asdict(config) | {"prompts": asdict(ENGLISH)}))
    tokenizer = byte_tokenizer()
    model = new_model(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=2), seed=0)
    for step in (0, 3):
        save(run / "tmp_dir", model.state_dict(), model, tokenizer)
        commit(run / "tmp_dir", run / f"step_{step:06d}")
    for kind in ("harmful", "benign"):
        (folder / f"{kind}.jsonl").write_text(json.dumps({"prompt": f"how do i do {kind} things"}) + "\n")
    return folder


def outcome(args):
    """What train.py makes of these arguments: "accepted", or its last words."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(train, "on_main", accept):   # the first to write to the disk
        try:
            train.main(args)
        except Accepted:
            return "accepted"
        except SystemExit as end:
            sentence = printed.getvalue().strip()
            if end.code != 0:
                assert end.code == 2 and sentence and sentence.count("\n") == 0, (end.code, sentence)
            return sentence
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return "done"


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refuses_or_accepts(folder, args):
    """The outcome of these arguments in this folder, in which no file has changed."""
    with contextlib.chdir(folder):
        before = modified(folder)
        sentence = outcome(args)
        assert modified(folder) == before
    return sentence


def report(outcomes):
    print(f"\n    {outcomes.total()} cases, {len(outcomes)} different sentences, "
          f"{outcomes['accepted']} accepted", end="")


def test_flags(desk):
    outcomes = Counter()

    @hypothesis.settings(USUAL, max_examples=1000)
    @hypothesis.given(ARGUMENTS)
    def flags(arguments):
        words = [word for flag, values in arguments for word in (flag, *values)]
        outcomes[refuses_or_accepts(desk, words)] += 1
    flags()
    report(outcomes)
    assert len(outcomes) > 50 and outcomes["accepted"] > 10


@pytest.mark.parametrize("flags", ["--judge toy --seeds", "--play defender --attacks", "--sft"])
def test_files_of_prompts(tmp_path, flags):
    outcomes = Counter()

    @hypothesis.settings(USUAL, max_examples=250)
    @hypothesis.given(st.sampled_from(FILES), CONTENT, st.sampled_from(["", "harmful=", "benign="]))
    def files(name, content, label):
        (tmp_path / name).write_bytes(content)
        label = "" if flags == "--sft" else label
        outcomes[refuses_or_accepts(tmp_path, [*flags.split(), label + name])[:30]] += 1
    files()
    report(outcomes)
    assert len(outcomes) > 3


DAMAGES = {   # how a file is damaged, from its bytes, an offset in them and some other bytes
    "cut": lambda content, offset, some: content[:offset],
    "changed": lambda content, offset, some: content[:offset] + some + content[offset + len(some):],
    "replaced": lambda content, offset, some: some,
    "gone": lambda content, offset, some: None}


def damage(file, how, offset, some):
    content = file.read_bytes()
    damaged = DAMAGES[how](content, offset % max(1, len(content)), some)
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)


def test_run_folders_and_checkpoints(desk, tmp_path):
    files = sorted(str(path.relative_to(desk)) for path in (desk / "run").rglob("*") if path.is_file())
    outcomes = Counter()

    @hypothesis.settings(USUAL, max_examples=400)
    @hypothesis.given(st.sampled_from(files), st.integers(0, 10_000), st.binary(max_size=4),
                      st.sampled_from(sorted(DAMAGES)), st.booleans())
    def folders(name, offset, some, how, sealed):
        shutil.rmtree(tmp_path / "desk", ignore_errors=True)
        shutil.copytree(desk, tmp_path / "desk")
        file = tmp_path / "desk" / name
        damage(file, how, offset, some)
        if sealed and how != "gone" and file.parent.name != "run":   # as if it had been written like this
            (file.parent / MANIFEST).unlink()
            tmp_dir = file.parent.rename(file.parent.with_name("tmp_dir"))
            commit(tmp_dir, file.parent)
        outcomes[refuses_or_accepts(tmp_path / "desk", ["--out", "run", "--resume"])[:40]] += 1
    folders()
    report(outcomes)
    assert outcomes["accepted"] > 100
