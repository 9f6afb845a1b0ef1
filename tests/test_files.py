"""
What people's files look like: every row is read right, or one sentence names the file and the place.

Rows are drawn, written by Python's own writers in some packaging, and read back. SELF_REDTEAM_CASES=10000
draws that many files instead of two thousand.
"""
import csv
import gzip
import io
import json
import os
from collections import Counter
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

import train
from conftest import byte_tokenizer
from data import LABELS, read_prompts
from eval import logged_games
from judge import read_human
from selfplay import ENGLISH, ChatFormat

CASES = int(os.environ.get("SELF_REDTEAM_CASES", 2000))
SHARED = Path(os.environ.get("SELF_REDTEAM_DATA", "no data here"))


def cases(share):
    """Settings of a test that draws this share of all cases."""
    return hypothesis.settings(max_examples=int(CASES * share), database=None, derandomize=True,
                               deadline=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- rows, and how they are written

ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\n", "\r\n", ",", "\"", "'", "\t", ";", "\ufeff",
       "\\", "{", "}", "[", "]", ": ", "=", "\u200b", "<|im_end|>", "</think>", "nan", "null", "\U0001F600"]
ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=6)
TEXT = st.lists(st.one_of(st.sampled_from(ODD), ANY), min_size=1, max_size=5).map(
    lambda pieces: f"how {''.join(pieces)}?")
BIG = st.integers(0, 40).map(lambda n: "long " * (30_000 if n == 0 else 1))   # more than 131,072 characters


@st.composite
def label(draw, column="label"):
    """(spelling, harmful) of a label in one of its spellings."""
    harmful = draw(st.booleans())
    word = draw(st.sampled_from(LABELS[column][not harmful].split()))
    spelling = draw(st.sampled_from([word, word.upper(), word.title(), f" {word} ", f"{word}\t"]))
    return spelling, harmful


@st.composite
def table(draw):
    """Rows {"id", "prompt", "label"} with different prompts, and what a reader should make of them."""
    texts = draw(st.lists(TEXT, min_size=1, max_size=5, unique_by=str.strip))
    texts[0] = draw(BIG) + texts[0]
    rows, expected = [], []
    for i, text in enumerate(texts):
        spelling, harmful = draw(label())
        rows.append({"id": str(i), "prompt": text, "label": spelling})
        expected.append((text.strip(), harmful))
    return rows, expected


def write_csv(rows, separator, line_end):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_lines(rows, ascii_only, line_end):
    return line_end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


PACKAGINGS = {   # file name, and how its text is made of rows
    "csv": ("x.csv", lambda rows: write_csv(rows, ",", "\r\n")),
    "csv, unix": ("X.CSV", lambda rows: write_csv(rows, ",", "\n")),
    "tsv": ("x.tsv", lambda rows: write_csv(rows, "\t", "\n")),
    "jsonl": ("x.jsonl", lambda rows: write_lines(rows, False, "\n")),
    "jsonl, ascii, windows": ("x.JSONL", lambda rows: write_lines(rows, True, "\r\n") + "\r\n\r\n"),
    "array": ("x.json", lambda rows: json.dumps(rows)),
    "array, indented": ("x.json", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False)),
    "array in a jsonl": ("x.jsonl", lambda rows: json.dumps(rows, ensure_ascii=False)),
    "dictionary": ("x.json", lambda rows: json.dumps({"on]e": rows[:1], "t\"wo": rows[1:]}, indent=1)),
    "jsonl in a json": ("x.json", lambda rows: write_lines(rows, False, "\n"))}
PACKAGING = st.tuples(st.sampled_from(sorted(PACKAGINGS)), st.booleans(), st.booleans())


def write(folder, rows, packaging):
    """Write rows as one of PACKAGINGS, with a byte order mark or not, compressed or not; returns the path."""
    kind, mark, compressed = packaging
    name, text_of_rows = PACKAGINGS[kind]
    content = (b"\xef\xbb\xbf" if mark else b"") + text_of_rows(rows).encode()
    file = folder / (name + ".gz" * compressed)
    file.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    return str(file)


def places(rows, packaging):
    """Where each row is, by other means than the reader's: the line on which it begins, or its number."""
    text_of_rows = PACKAGINGS[packaging[0]][1]
    if "csv" in packaging[0] or packaging[0] == "tsv":   # one line after all that is written before it
        before = [text_of_rows(rows[:n] or rows[:1]) for n in range(len(rows))]
        before[0] = before[0].split("\n")[0] + "\n"     # the header alone
        return [f"line {len(io.StringIO(text, newline='').readlines()) + 1}" for text in before]
    in_lines = "jsonl" in packaging[0] and "array" not in packaging[0] and len(rows) > 1
    return [f"{'line' if in_lines else 'row'} {n}" for n in range(1, len(rows) + 1)]


def last_words(function, *args):
    """What a function returns, or the one sentence with which it ends the program; no file changes."""
    printed = io.StringIO()
    with redirect_stderr(printed):
        try:
            return function(*args)
        except SystemExit as end:
            sentence = printed.getvalue()
            assert end.code == 2 and sentence.count("\n") == 1, sentence
            return sentence


def read_pairs(file):
    """The pairs of an SFT file, as train.py reads them, for a model that does not think."""
    chat = ChatFormat(byte_tokenizer(), ENGLISH, cot=False)
    return train.read_sft(train.Config(sft=file, cot=False), chat, context=10 ** 6)


READERS = {
    "seeds": lambda file: read_prompts([file]),
    "harmful seeds": lambda file: read_prompts([f"harmful={file}"]),
    "attacks": lambda file: read_prompts([file], attacks=True), "sft": read_pairs, "votes": read_human,
    "games": logged_games}


# ---------------------------------------------------------------- good files, and files with one bad row

@cases(0.2)
@hypothesis.given(table(), PACKAGING)
def test_every_row_is_read_right_however_it_is_packed(tmp_path_factory, table, packaging):
    rows, expected = table
    file = write(tmp_path_factory.getbasetemp(), rows, packaging)
    assert read_prompts([file])[0][1] == expected


@cases(0.1)
@hypothesis.given(table(), PACKAGING, st.booleans())
def test_a_flag_that_contradicts_a_row_is_refused_with_its_place(tmp_path_factory, table, packaging, harmful):
    rows, expected = table
    file = write(tmp_path_factory.getbasetemp(), rows, packaging)
    result = last_words(read_prompts, [f"{'harmful' if harmful else 'benign'}={file}"])
    against = [n for n, (_, label) in enumerate(expected) if label != harmful]
    if against:
        assert result.startswith(f"{file}, {places(rows, packaging)[against[0]]}: ")
        assert "contradicts its label" in result
    else:
        assert result[0][1] == expected


KNOWN = " ".join(LABELS["label"]).split()
UNKNOWN = ["not_harmful", "harmful!", "un safe", "unsafe/safe", "2", "-1", "0.5", "yes", "none", "nan",
           "harmful,benign", "saf", "1.00"]
NO_LABELS = st.one_of(st.sampled_from(UNKNOWN), ANY).filter(
    lambda value: value.strip() and value.strip().lower() not in KNOWN)


@cases(0.1)
@hypothesis.given(table(), PACKAGING, NO_LABELS, st.integers(0, 4),
                  st.sampled_from(["", "harmful=", "benign="]))
def test_a_label_that_is_none_is_refused_with_its_place(tmp_path_factory, table, packaging, value, n, flag):
    rows, expected = table
    n %= len(rows)
    rows[n]["label"] = value
    rows = rows[:n + 1] if not flag else rows[n:n + 1]   # before it, rows may contradict the flag
    file = write(tmp_path_factory.getbasetemp(), rows, packaging)
    sentence = last_words(read_prompts, [flag + file])
    place = places(rows, packaging)[len(rows) - 1]
    assert sentence.startswith(f"{file}, {place}: label is ") and "a label is one of" in sentence


@cases(0.1)
@hypothesis.given(table(), PACKAGING, st.booleans(), st.integers(0, 4))
def test_one_text_under_two_labels_is_refused_with_both_places(tmp_path_factory, table, packaging, inner, n):
    rows, expected = table
    n %= len(rows)
    text, harmful = expected[n]
    other = "safe" if harmful else "unsafe"
    rows.append({"id": "x", "prompt": f" {text} " if inner else text, "label": other})
    file = write(tmp_path_factory.getbasetemp(), rows, packaging)
    sentence = last_words(read_prompts, [file])
    where = [f"{file}, {place}" for place in places(rows, packaging)]
    assert sentence.startswith(f"{where[-1]}: has the text of {where[n]} and ")


SHORT = st.text(max_size=3)
PACK = partial(gzip.compress, mtime=0)
NOT_TEXT = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.just(float("nan")), st.lists(SHORT, max_size=2),
    st.dictionaries(SHORT, SHORT), st.sampled_from(["", " ", "\u200b", "\ufeff\n"]),
    st.just([{"role": "assistant", "content": "a"}]), st.just([{"role": "user", "content": None}]),
    st.just([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
JSON_ONLY = PACKAGING.filter(lambda packaging: "csv" not in packaging[0] and packaging[0] != "tsv")
USES = {   # what a file is read as: the column of its text, and what else a row needs
    "seeds": ("prompt", {}), "attacks": ("attack", {}), "sft": ("response", {"prompt": "how"}),
    "votes": ("test_case", {"generation": "", "human_0": 1, "human_1": 1, "human_2": 0})}


@cases(0.15)
@hypothesis.given(table(), JSON_ONLY, NOT_TEXT, st.sampled_from(sorted(USES)))
def test_what_is_no_text_is_refused_with_its_place_wherever_one_belongs(tmp_path_factory, table, packaging,
                                                                       value, use):
    column, others = USES[use]
    texts = [row["prompt"].replace("</think>", "") for row in table[0]]   # a pair that thinks is refused, too
    rows = [{column: text, "label": row["label"]} | others for text, row in zip(texts, table[0], strict=True)]
    rows[-1][column] = value
    file = write(tmp_path_factory.getbasetemp(), rows, packaging)
    sentence = last_words(READERS[use], file)
    place = places(rows, packaging)[-1]
    assert isinstance(sentence, str), (value, sentence)
    assert sentence.startswith(f"{file}, {place}: ") and "is no text" in sentence


# ---------------------------------------------------------------- any bytes at all

CELL = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.lists(TEXT, max_size=1),
    st.sampled_from(["harmful", "benign", "1", "0.0", ""]), st.dictionaries(TEXT, TEXT, max_size=1))
COLUMN = st.sampled_from("""
    prompt text label harmful goal target attack response ContextString category test_case generation human_0
    human_1 human_2 completion final_label type seed verdict legal BehaviorID method adversarial
    vanilla""".split() + [""])
ROWS = st.lists(st.one_of(st.dictionaries(COLUMN, CELL, max_size=8), CELL), max_size=4)
GAME = {"step": 1, "game": 0, "seed": "s", "harmful": True, "legal": True, "answer": "", "verdict": {}}
WHOLE = table().map(lambda drawn: [row | {"response": "sure"} for row in drawn[0]])
CONTENT = st.one_of(
    WHOLE.map(lambda rows: write_lines(rows, False, "\n").encode()),
    st.lists(CELL, max_size=3).map(
        lambda cells: write_lines([GAME | {"attack": cell} for cell in cells], True, "\n").encode()),
    ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ROWS.map(lambda rows: json.dumps(rows, indent=1).encode()),
    st.dictionaries(COLUMN, ROWS).map(lambda tables: json.dumps(tables).encode()),
    st.binary(max_size=60), st.binary(max_size=60).map(PACK),
    st.lists(st.lists(TEXT, max_size=3).map(",".join), max_size=4).map(
        lambda lines: "\n".join(["prompt,label", *lines]).encode()),
    st.text(max_size=20).map(lambda text: text.encode("utf-16")))


@pytest.mark.parametrize("reader", READERS)
def test_any_bytes_are_read_or_refused_in_a_sentence_and_stay_as_they_are(tmp_path, reader):
    outcomes = Counter()

    @cases(0.35 / len(READERS))
    @hypothesis.given(CONTENT, st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".txt"]))
    def any_bytes(content, ending):
        file = tmp_path / f"x{ending}"
        file.write_bytes(content)
        result = last_words(READERS[reader], str(file))
        outcomes["refused" if isinstance(result, str) else "read"] += 1
        assert file.read_bytes() == content
    any_bytes()
    print(f"\n    {reader}: {dict(outcomes)}", end="")
    assert outcomes["refused"]


# ---------------------------------------------------------------- real files

COUNTED = {   # file: how it is given, its prompts by an independent parser: (harmful, benign)
    "advbench_harmful_behaviors.csv": ("", "goal", None),
    "harmbench_behaviors_text_test.csv": ("", "Behavior", None),
    "or_bench-toxic.csv": ("harmful=", "prompt", None),
    "jbb_200_harmful_benign.json": ("", "text", "label"),
    "wildjailbreak_vanilla_harmful_256.jsonl": ("harmful=", "prompt", None),
    "wildjailbreak_vanilla_benign_256.jsonl": ("benign=", "prompt", None),
    "wildjailbreak_adversarial_harmful_256.jsonl": ("harmful=", "prompt", None),
    "wildjailbreak_adversarial_benign_128.jsonl": ("benign=", "prompt", None),
    "wildjailbreak_eval_harmful.jsonl": ("harmful=", "adversarial", None),
    "wildjailbreak_eval_benign.jsonl": ("benign=", "adversarial", None)}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_by_label_equal_those_of_pandas(name):
    """Another parser, on the files that their authors publish, where there are some."""
    file = SHARED / name
    if not file.exists():
        pytest.skip(f"{name} is not in {SHARED}; set SELF_REDTEAM_DATA to the folder of such files")
    pandas = pytest.importorskip("pandas")
    flag, column, label_column = COUNTED[name]
    read = {".csv": pandas.read_csv, ".json": pandas.read_json,
            ".jsonl": lambda path: pandas.read_json(path, lines=True)}[file.suffix]
    frame = read(file)
    frame["prompt text"] = frame[column].str.strip()
    if "ContextString" in frame:
        frame["prompt text"] = frame["ContextString"].fillna("") + "|" + frame["prompt text"]
    frame["harmful"] = frame[label_column] == "harmful" if label_column else flag != "benign="
    counts = frame.groupby("harmful")["prompt text"].nunique().to_dict()
    rows = read_prompts([f"{flag}{file}"], attacks=True)[0][1]
    ours = Counter(harmful for _, harmful in rows)
    print(f"\n    {name}: {dict(ours)}", end="")
    assert ours == counts
