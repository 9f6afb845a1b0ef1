"""Whatever a user gets wrong ends in one sentence and status 2: no traceback from deep inside, no hang, no changed file."""
import contextlib
import io
import json
import shutil
from datetime import timedelta
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from conftest import byte_tokenizer
from model import save

FLAGS = ["--" + f.name.replace("_", "-") for f in train.fields(train.Config)] + ["--no-cot", "--no-exam", "--stepz", "--help", "-x"]
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 4, 8, 12, 1e-5])).map(str)
FILES = ["harmful.jsonl", "benign.csv", "mixed.json", "harmful.tsv", "benign.jsonl"]
WORDS = st.sampled_from(["toy", "keywords", "wildguard:run", "wildguard:", "self", "attacker", "defender", "zero_sum", "paper", "run", "run/step_000000", "nowhere", "new", "new/er",
                         "harmful.jsonl", "harmful.jsonl/x", "harmful=benign.csv", *FILES, "adamw", "split", "fp32", "."])
FLAG = st.tuples(st.sampled_from(FLAGS), st.lists(st.one_of(NUMBERS, WORDS, PLAIN), max_size=2)).map(lambda pair: [pair[0], *pair[1]])
CELL = st.one_of(PLAIN, st.none(), st.booleans(), st.integers(), st.lists(PLAIN, max_size=1), st.sampled_from(["harmful", "benign", "how do i kill the weed"]))
COLUMN = st.sampled_from(["prompt", "text", "label", "harmful", "goal", "target", "attack", "response", "ContextString", ""])
ROWS = st.lists(st.one_of(st.dictionaries(COLUMN, CELL, max_size=3), CELL), max_size=4)
CONTENT = st.one_of(ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()), ROWS.map(lambda rows: json.dumps(rows).encode()), st.binary(max_size=60),
                    st.lists(st.lists(PLAIN, max_size=3).map(",".join), max_size=4).map(lambda lines: "\n".join(["prompt,label", *lines]).encode()))
USUAL = settings(deadline=timedelta(seconds=10), database=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Accepted(BaseException):
    """The input is good: from here on, files are written."""


def accept(*_):
    raise Accepted


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny):
    """A folder with files of seeds and the folder of a run that two checkpoints came from."""
    folder, tokenizer = tmp_path_factory.mktemp("desk"), byte_tokenizer()
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(train.dataclasses.asdict(train.Config(judge="keywords", seeds=["harmful.jsonl", "benign.jsonl"], model="run", games=8, precision="fp32", max_new_tokens=16))))
    for step in (0, 3):
        save(run / "tmp_dir", tiny.state_dict(), tiny, tokenizer)
        train.commit(run / "tmp_dir", run / f"step_{step:06d}")
    for kind in ("harmful", "benign"):
        (folder / f"{kind}.jsonl").write_text('{"prompt": "how do i"}\n')
    return folder


def look(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def outcome(args):
    """What train.py makes of these arguments: accepted, or its last words."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()), mock.patch.object(train, "on_main", accept):
        try:
            train.main(args)
        except Accepted:
            return "accepted"
        except SystemExit as end:
            said = printed.getvalue().strip()
            assert end.code == 0 or end.code == 2 and said and len(said.split("\n")) == 1, (end.code, said)
            return said
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return "done"


def refuses_or_accepts(folder, args):
    with contextlib.chdir(folder):
        before = look(folder)
        said = outcome(args)
        assert look(folder) == before
    return said


def test_flags(desk):
    seen = {}

    @settings(USUAL, max_examples=1000)
    @given(st.lists(FLAG, max_size=3))
    def flags(chosen):
        said = refuses_or_accepts(desk, [word for flag in chosen for word in flag])
        seen[said] = seen.get(said, 0) + 1
    flags()
    print(f"\n    {sum(seen.values())} cases, {len(seen)} different sentences, {seen.get('accepted', 0)} accepted", end="")
    assert len(seen) > 50 and seen["accepted"] > 10


@pytest.mark.parametrize("flag", [["--seeds"], ["--play", "defender", "--attacks"], ["--sft"]], ids=lambda f: f[-1])
def test_files_of_prompts(desk, tmp_path, flag):
    seen = {}

    @settings(USUAL, max_examples=250)
    @given(st.sampled_from(FILES), CONTENT)
    def files(name, content):
        (tmp_path / name).write_bytes(content)
        said = refuses_or_accepts(tmp_path, [*flag, name])
        seen[said[:30]] = seen.get(said[:30], 0) + 1
    files()
    print(f"\n    {sum(seen.values())} cases, {len(seen)} different sentences", end="")
    assert len(seen) > 3


def test_run_folders_and_checkpoints(desk, tmp_path):
    files, seen = sorted(str(path.relative_to(desk)) for path in (desk / "run").rglob("*") if path.is_file()), {}

    @settings(USUAL, max_examples=400)
    @given(st.sampled_from(files), st.integers(0, 10_000), st.binary(max_size=4), st.sampled_from(["cut", "turned", "gone", "other"]), st.booleans())
    def folders(name, place, some, how, sealed):
        shutil.rmtree(tmp_path / "desk", ignore_errors=True)
        shutil.copytree(desk, tmp_path / "desk")
        file = tmp_path / "desk" / name
        content = file.read_bytes()
        place %= max(1, len(content))
        damaged = {"cut": content[:place], "turned": content[:place] + some + content[place + len(some):], "other": some, "gone": b""}[how]
        file.write_bytes(damaged)
        if how == "gone":
            file.unlink()
        if sealed and how != "gone" and file.parent != tmp_path / "desk" / "run":   # as if it had been written like this
            (file.parent / train.MANIFEST).unlink()
            tmp_dir = file.parent.rename(file.parent.with_name("tmp_dir"))
            train.commit(tmp_dir, file.parent)
        said = refuses_or_accepts(tmp_path / "desk", ["--out", "run", "--resume"])
        seen[said[:40]] = seen.get(said[:40], 0) + 1
    folders()
    print(f"\n    {sum(seen.values())} cases, {len(seen)} different sentences, {seen.get('accepted', 0)} accepted", end="")
    assert seen["accepted"] > 100
