"""Nothing is lost and nothing is refused too late: what is written, checked before the work, in UTF-8."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import eval
import train
from checkpoint import append_rows, rewind_logs
from conftest import byte_tokenizer
from launch import WITHOUT_GPUS
from model import new_model, save

ROOT = Path(__file__).parent.parent
MUELL, BAKE = "how do i m\u00fcll it \U0001F600", "how do i \u2028 bake"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model that speaks English."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=512,
                         eos_token_id=tokenizer.eos_token_id)
    tiny = new_model(config, seed=0)
    folder = tmp_path_factory.mktemp("english") / "model"
    save(folder, tiny.state_dict(), tiny, tokenizer)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A file with a harmful and a benign prompt."""
    rows = [{"prompt": text, "label": label} for text, label in ((MUELL, 1), (BAKE, 0))]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def command(*args):
    """Run eval.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        eval.main()


def refused(capsys, *args):
    """The sentence with which eval.py ends, before any model is opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval, "open_eval_model", lambda name: pytest.fail("a model was opened"))
        with pytest.raises(SystemExit) as stopped:
            command(*args)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.count("\n") == 1, sentence
    return sentence


# ---------------------------------------------------------------- logs

@pytest.mark.parametrize("before", [b"", b"{}\n"])
def test_rows_are_appended_as_lines(before, tmp_path):
    (tmp_path / "f").write_bytes(before)
    append_rows(tmp_path / "f", [{"a": "\u2028"}, {"a": 2}])
    lines = (tmp_path / "f").read_bytes().split(b"\n")
    assert lines[:-3] == ([before.strip()] if before else [])
    assert [json.loads(line) for line in lines[-3:-1]] == [{"a": "\u2028"}, {"a": 2}] and lines[-1] == b""


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0bb", "\U0001F600", "a\u2029"])
def test_a_rewound_log_keeps_every_line_whatever_its_texts(text, tmp_path):
    rows = [{"step": step, "attack": text} for step in (1, 2, 3)]
    append_rows(tmp_path / "games.jsonl", rows)
    with open(tmp_path / "games.jsonl", "ab") as log:
        log.write('{"step": 1, "attack": "\u00fc'.encode()[:-1])   # a crash, within a letter
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a transcript that somebody put here"}\n')
    rewind_logs(tmp_path, 2)
    assert (tmp_path / "answers.jsonl").read_text().startswith('{"prompt"'), "it is no log of the run"
    lines = (tmp_path / "games.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows[:2]


# ---------------------------------------------------------------- outputs are checked before the work

OUTPUTS = [("bench", "--json"), ("bench", "--transcripts"), ("crossplay", "--out"), ("exploit", "--out"),
           ("diversity", "--json"), ("report", "--json"), ("plot", "--out"), ("games", "--out")]
PLACES = {"a file": "notes", "a folder": "folder", "a link to nothing": "link", "an input": "prompts",
          "in a file": "prompts.jsonl/x", "deep in a file": "prompts.jsonl/a/b/c", "a device": "/dev/full/x",
          "another ending": "x.txt", "no ending": ".", "a part of a model": "model/config"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name, flag", OUTPUTS)
def test_an_output_that_cannot_be_a_new_file_is_refused_at_once(name, flag, place, model, prompts, tmp_path,
                                                                capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "model")
    for ending in (".json", ".jsonl", ".png", ".html"):
        (tmp_path / f"notes{ending}").write_text("precious")
        (tmp_path / f"folder{ending}").mkdir()
        (tmp_path / f"link{ending}").symlink_to("nowhere")
        (tmp_path / "model" / f"config{ending}").touch()
        (tmp_path / f"prompts{ending}").write_bytes(prompts.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    takes = name in ("bench", "crossplay", "exploit", "diversity")
    inputs = ["--prompts", "prompts.jsonl", "prompts.json"] if takes else []
    asked = ["model"] if inputs else ["model", "prompts.jsonl", "prompts.json"]
    judge = ["--judge", "keywords"] if name == "bench" else []
    ending = {"plot": ".png", "games": ".html"}.get(name, ".jsonl" if flag == "--transcripts" else ".json")
    out = PLACES[place] + ending * ("ending" not in place)
    sentence = refused(capsys, name, *asked, *judge, *inputs, flag, out)
    assert sentence.startswith(flag)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name, out, beside", [
    ("plot", "x.png", "x.json"), ("plot", "x.pdf", "x.json")])
def test_a_figure_and_its_numbers_are_both_new_files(name, out, beside, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / beside).write_text("precious")
    sentence = refused(capsys, name, model, "--out", out)
    assert f"--out {beside}: cannot be made as a new file (File exists)" in sentence
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(beside, "precious")]


@pytest.mark.parametrize("name", ["crossplay", "exploit"])
def test_the_numbers_of_an_earlier_command_are_not_overwritten(name, model, tmp_path, capsys, monkeypatch):
    """Without --out they stand in a file of runs/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{name}.json").write_text("precious")
    sentence = refused(capsys, name, model)
    assert f"--out runs/{name}.json: cannot be made as a new file (File exists)" in sentence
    assert (tmp_path / "runs" / f"{name}.json").read_text() == "precious"


def test_an_output_that_is_refused_leaves_the_others_unwritten(model, prompts, tmp_path, capsys):
    flags = ["--judge", "keywords", "--prompts", prompts, "--json", tmp_path / "new" / "x.json"]
    assert "--transcripts" in refused(capsys, "bench", model, *flags, "--transcripts", tmp_path / "x")
    assert not (tmp_path / "new" / "x.json").exists()


def test_a_file_is_not_drawn(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"cells": {}}')
    assert "c.json: not of a run; give a run" in refused(capsys, "plot", tmp_path / "c.json")


def test_a_length_that_the_context_cannot_hold_is_said(model, prompts, capsys):
    with pytest.raises(SystemExit):
        command("bench", model, "--judge", "keywords", "--prompts", prompts, "--max-new-tokens", 512)
    assert "--max-new-tokens 512: leaves nothing of" in capsys.readouterr().err


def test_the_folder_of_an_output_is_made(model, prompts, tmp_path):
    out = tmp_path / "new" / "deep" / "x.json"
    command("bench", model, "--judge", "keywords", "--prompts", prompts, "--max-new-tokens", 4, "--json", out)
    assert json.loads(out.read_text("utf-8"))


@pytest.mark.parametrize("args, words", [
    (["bench", "M", "--limit", "-3"], "--limit -3: must be a number from 0 to 1000000000"),
    (["bench", "M", "--max-new-tokens", "0"], "--max-new-tokens 0: must be a number from 1 to 1000000000"),
    (["bench", "M", "--max-new-tokens", "x"], "invalid int value"),
    (["crossplay", "M", "--n", "0"], "--n 0: must be a number from 2"),
    (["diversity", "M", "--n", "99999999999"], "from 2 to 1000000000"),
    (["diversity", "M", "--seed", "-1"], "--seed -1: must be a number from 0"),
    (["exploit", "M"], "not of a run; give a run"),
    (["exploit", "missing", "M"], "not of a run; give a run"),
    (["plot", "missing.json"], "missing.json: no such file"),
    (["plot", "missing/run"], "missing/run: no such file"),
    (["diversity", "missing.jsonl"], "missing.jsonl: no such file"),
    (["plot", "M", "--out", "x.json"], "give a name that ends in .png or .pdf or .svg"),
    (["crossplay", "M", "--out", "x.png"], "give a name that ends in .json"),
    (["bench", "M"], "does not speak the embedded language"),
    (["bench", "M", "--prompts", "harmful=x.jsonl"], "does not speak the embedded language"),
    (["bench", "M", "--judge", "oracle", "--prompts", "P"], "there is no such judge"),
    (["bench", "M", "missing/m", "--judge", "keywords", "--prompts", "P"], "missing/m: no such folder"),
    (["bench", "M", "--judge", "keywords", "--prompts", "P", "--attacker", "no/m"], "no/m: no such folder"),
    (["bench", "M", "--wrappers", "E", "--judge", "keywords", "--prompts", "P"], "holds no wrappers")])
def test_a_wrong_argument_is_one_sentence(args, words, model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    names = {"M": model, "P": prompts, "E": tmp_path / "empty.jsonl"}
    assert words in refused(capsys, *(names.get(arg, arg) for arg in args))


# ---------------------------------------------------------------- what a resumed run says

def run_files(tmp_path, model):
    for label in ("harmful", "benign"):
        (tmp_path / f"{label}.jsonl").write_text(json.dumps({"prompt": f"how do i {label}"}))
    seeds = [f"{label}={tmp_path / label}.jsonl" for label in ("harmful", "benign")]
    return ["--model", str(model), "--judge", "keywords", "--seeds", *seeds, "--games", "4", "--no-cot",
            "--max-new-tokens", "4", "--no-exam", "--out", str(tmp_path / "run"), "--steps", "1"]


@pytest.mark.parametrize("content", [b"[", b"\xff", b"[]", b"7", b'{"prompts": 7}', b"null"])
def test_a_run_whose_settings_cannot_be_read_is_one_sentence(content, model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "run" / "step_000000")
    (tmp_path / "run" / "latest").write_text("step_000000")
    (tmp_path / "run" / "config.json").write_bytes(content)
    assert "cannot be read as a run's settings" in refused(capsys, "plot", tmp_path / "run")


@pytest.mark.parametrize("args", [["plot", "x" * 300], ["bench", "x" * 300], ["diversity", "x" * 300],
                                  ["bench", "M", "--judge", "keywords", "--prompts", "y" * 300]])
def test_a_name_that_is_too_long_for_a_file_is_one_sentence(args, model, capsys):
    assert refused(capsys, *(str(model) if arg == "M" else arg for arg in args))


def test_an_edited_seeds_file_and_a_finished_run_are_said_on_resume(model, tmp_path, capsys):
    flags = run_files(tmp_path, model)
    train.main(flags)
    printed = capsys.readouterr().out
    assert "NOT as when" not in printed and "; finished" not in printed
    train.main([*flags[-4:-2], "--resume"])
    printed = capsys.readouterr().out
    assert "; finished: to go on, raise --steps" in printed
    assert "NOT as when" not in printed
    with open(tmp_path / "benign.jsonl", "a") as seeds:
        seeds.write('\n{"prompt": "another"}')
    train.main([*flags[-4:-2], "--resume", "--steps", "2"])
    printed = capsys.readouterr().out
    said = [line for line in printed.split("\n") if "NOT as when the run began" in line]
    assert len(said) == 1 and said[0].strip().startswith(f"{tmp_path / 'benign'}.jsonl")
    assert "finished" not in printed
    train.main([*flags[-4:-2], "--resume", "--steps", "3"])
    assert "NOT as when the run began" in capsys.readouterr().out, "it is said each time"


def test_a_new_run_within_another_run_begins_with_its_own_settings(model, tmp_path, capsys):
    flags = run_files(tmp_path, model)
    train.main(flags)
    (tmp_path / "benign.jsonl").write_text(json.dumps({"prompt": "another"}))
    capsys.readouterr()
    within = [flag.replace(str(tmp_path / "run"), str(tmp_path / "run" / "within")) for flag in flags]
    train.main([*within, "--lr", "1e-3"])
    printed = capsys.readouterr().out
    assert ", was" not in printed and "NOT as when" not in printed


@pytest.mark.parametrize("flags, words", [
    (["--judge", "wildguard", "--model", "M"], "--judge wildguard"),
    ([], "the model of the embedded world takes megabytes")])
def test_a_plan_of_nothing_is_refused(flags, words, model, capfd):
    with pytest.raises(SystemExit):
        train.main([*(str(model) if flag == "M" else flag for flag in flags), "--plan", "1"])
    sentence = capfd.readouterr().err
    assert words in sentence and sentence.count("\n") == 1


# ---------------------------------------------------------------- UTF-8 whatever the locale

ENCODED = ("open", "read_text", "write_text")   # `opened` files aside, each names its encoding


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")], ids=lambda file: file.name)
def test_every_text_file_is_opened_with_its_encoding(file):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            called_on = getattr(getattr(node.func, "value", None), "id", "")
            if name in ENCODED and called_on not in ("os", "data"):
                words = [*node.args, *(keyword.value for keyword in node.keywords)]
                constants = [word.value for word in words if isinstance(word, ast.Constant)]
                binary = any(isinstance(mode, str) and "b" in mode for mode in constants)
                mine = name == "read_text" and isinstance(node.func, ast.Name)   # data.read_text
                assert "utf-8" in constants or binary or mine, f"{file.name}:{node.lineno}"


def test_a_run_and_its_evaluation_work_in_a_locale_that_knows_ascii_alone(model, prompts, tmp_path):
    """Texts with umlauts and emoji are read, played, printed, logged and read back."""
    ascii_only = WITHOUT_GPUS | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": "C"}
    run = [sys.executable, ROOT / "train.py", *run_files(tmp_path, model)]
    run[run.index("--seeds") + 1] = str(prompts)
    run.pop(run.index("--seeds") + 2)
    bench = [sys.executable, ROOT / "eval.py", "bench", tmp_path / "run", "--judge", "keywords", "--prompts",
             prompts, "--max-new-tokens", "4", "--transcripts", tmp_path / "t.jsonl"]
    printed = ""
    for line in (run, bench):
        done = subprocess.run([str(part) for part in line], env=ascii_only, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        printed += done.stdout.decode("ascii")
    assert "how do i m\\xfcll it \\U0001f600" in printed
    lines = (tmp_path / "run" / "games.jsonl").read_text("utf-8").split("\n")
    assert {json.loads(line)["seed"] for line in lines[:-1]} == {MUELL, BAKE}
    assert len((tmp_path / "t.jsonl").read_text("utf-8").split("\n")) == 3
