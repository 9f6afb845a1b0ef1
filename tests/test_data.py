"""Files of prompts and labels: what is read from them, and what is refused."""
import csv
import gzip
import json

import pytest

from data import BENCHMARKS, LABELS, label_of, read_prompts, read_rows


def read_file(tmp_path, name, text, flag="", attacks=False):
    """The prompts of a file with this name and text."""
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return read_prompts([f"{flag}{tmp_path / name}"], attacks)[0]


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows))


def refusal(capsys, function, *args):
    """The sentence with which a function ends the program."""
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.count("\n") == 1
    return sentence.rstrip("\n")


# ---------------------------------------------------------------- prompts by columns

@pytest.mark.parametrize("name, text, flag, expected", [
    ("seeds.jsonl", '{"prompt": "a"}\n{"prompt": "a"}\n\n{"prompt": " b "}\n', "harmful=",
     [("a", True), ("b", True)]),
    ("any.json", '[{"text": "e", "label": 1}, {"text": "f", "label": 0}]', "", [("e", True), ("f", False)]),
    ("goals.csv", "goal,target\nc,d\n", "benign=", [("c", False)]),
    ("test.csv", "Behavior,FunctionalCategory,ContextString,BehaviorID\nj,x,k,1\nl,x,,2\n", "",
     [("k\n\n---\n\nj", True), ("l", True)]),
    ("xstest.csv", "id,prompt,type,label\n1,q,homonyms,safe\n2,r,contrast_homonyms,unsafe\n", "",
     [("q", False), ("r", True)]),
    ("pairs.json", '{"one": [{"prompt": "s", "harmful": true}], '
     '"two": [{"prompt": "\\ud800", "harmful": false}]}', "", [("s", True), ("?", False)])])
def test_prompts_are_read_by_their_columns(tmp_path, name, text, flag, expected):
    assert read_file(tmp_path, name, text, flag)[1] == expected


PUBLISHED = [   # benchmark, flag, the file as its authors publish it, and what is in it
    ("WildGuardTest", "", "wildguardtest.jsonl", jsonl(
        {"prompt": "a", "adversarial": True, "response": "x", "prompt_harm_label": "harmful"},
        {"prompt": "b", "adversarial": False, "response": None, "prompt_harm_label": "unharmful"},
        {"prompt": "c", "adversarial": False, "prompt_harm_label": None}), [("a", True), ("b", False)]),
    ("games of a run", "", "games.jsonl", jsonl(
        {"step": 1, "game": 0, "seed": "s", "harmful": True, "attack": "a", "legal": True, "answer": ""},
        {"step": 1, "game": 1, "seed": "t", "harmful": False, "attack": None, "legal": None, "answer": ""}),
     [("a", True)]),
    ("HarmBench attacks", "", "attacks.csv", "BehaviorID,test_case,method\nx,a,GCG\n", [("a", True)]),
    ("WildJailbreak", "", "eval.tsv",
     "adversarial\tlabel\tdata_type\n"
     "a\t1\tadversarial_harmful\n"
     "b\t0\tadversarial_benign\n", [("a", True), ("b", False)]),
    ("WildJailbreak", "", "train.tsv",
     "vanilla\tadversarial\tcompletion\tdata_type\n"
     "x\ta\ty\tadversarial_harmful\n"
     "b\t\ty\tvanilla_benign\n", [("a", True), ("b", False)]),
    ("WildJailbreak", "benign=", "eval.jsonl", jsonl({"vanilla": "x", "adversarial": "a"}), [("a", False)]),
    ("HarmBench", "", "behaviors.csv",
     "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
     "a,standard,chem,,,x\n", [("a", True)]),
    ("JailbreakBench", "harmful=", "harmful-behaviors.csv",
     "Index,Goal,Target,Behavior,Category,Source\n"
     "0,a,Sure,x,y,z\n", [("a", True)]),
    ("JailbreakBench", "benign=", "benign-behaviors.csv",
     "Index,Goal,Target,Behavior,Category,Source\n"
     "0,a,Sure,x,y,z\n", [("a", False)]),
    ("StrongREJECT", "", "strongreject_dataset.csv",
     "category,source,forbidden_prompt\n"
     "Hate,x,a\n", [("a", True)]),
    ("AdvBench", "", "harmful_behaviors.csv", "goal,target\na,Sure\n", [("a", True)]),
    ("DAN", "", "jailbreak_prompts.csv",
     "platform,source,prompt,jailbreak,created_at,date\n"
     "reddit,x,a,True,y,z\n"
     "reddit,x,b,False,y,z\n", [("a", True), ("b", False)]),
    ("DAN questions", "", "forbidden_question_set.csv",
     "content_policy_id,content_policy_name,q_id,question\n"
     "0,Illegal,0,a\n", [("a", True)]),
    ("XSTest", "", "xstest_v2_prompts.csv",
     "id,type,prompt,focus,note\n"
     "1,homonyms,a,kill,\n"
     "2,contrast_homonyms,b,kill,\n", [("a", False), ("b", True)]),
    ("XSTest", "", "xstest_prompts.csv",
     "id,prompt,type,label,focus,note\n"
     "1,a,homonyms,safe,kill,\n"
     "2,b,contrast_homonyms,unsafe,kill,\n", [("a", False), ("b", True)]),
    ("labelled prompts", "benign=", "or-bench-hard-1k.csv",
     "prompt,category\n"
     "a,harmful\n"
     "b,privacy\n", [("a", False), ("b", False)]),
    ("labelled prompts", "harmful=", "or_bench-toxic.csv", "prompt,category\na,privacy\n", [("a", True)]),
    ("labelled prompts", "", "jbb.jsonl", jsonl(
        {"text": "a", "label": "harmful"},
        {"text": "b", "label": "safe"}), [("a", True), ("b", False)]),
    ("labelled prompts", "harmful=", "seeds.jsonl", jsonl({"prompt": "a", "category": "harmful"}),
     [("a", True)])]
NAMES = [f"{row[0]} {row[2]}" for row in PUBLISHED]


@pytest.mark.parametrize("name, flag, file, text, expected", PUBLISHED, ids=NAMES)
def test_a_published_file_is_recognised_by_its_columns(tmp_path, name, flag, file, text, expected):
    prompts = read_file(tmp_path, file, text, flag, True)
    assert prompts[:2] == (name, expected)
    assert {row[0] for row in PUBLISHED} == {benchmark.name for benchmark in BENCHMARKS}


def test_recorded_attacks_are_read_before_the_requests_they_come_from(tmp_path):
    text = jsonl({"vanilla": "plain", "adversarial": "tell a story", "data_type": "adversarial_harmful"})
    assert read_file(tmp_path, "wj.jsonl", text, attacks=True)[1] == [("tell a story", True)]
    assert read_file(tmp_path, "wj.jsonl", text)[1] == [("plain", True)]


def test_a_runs_games_hold_its_seeds_and_its_attacks(tmp_path):
    game = {"step": 1, "game": 0, "seed": "s", "harmful": True, "attack": "a", "legal": True, "answer": "n"}
    text = jsonl(game, game | {"seed": "t", "attack": None, "legal": None})
    assert read_file(tmp_path, "games.jsonl", text, attacks=True)[1] == [("a", True)]
    assert read_file(tmp_path, "games.jsonl", text)[1] == [("s", True), ("t", True)]


def test_a_game_whose_attack_lost_its_label_holds_no_attack(tmp_path):
    game = {"step": 1, "game": 0, "seed": "s", "harmful": True, "attack": "a", "legal": True, "answer": "n"}
    text = jsonl(game, game | {"attack": "b", "legal": False}, game | {"attack": "b", "harmful": False})
    assert read_file(tmp_path, "games.jsonl", text, attacks=True)[1] == [("a", True), ("b", False)]


def test_recorded_attacks_keep_their_repeats_if_asked_to(tmp_path):
    (tmp_path / "x.jsonl").write_text(jsonl(*({"attack": text, "label": 1} for text in "aba")))
    for repeats, expected in ((False, "ab"), (True, "aba")):
        [(_, prompts, summary)] = read_prompts([str(tmp_path / "x.jsonl")], attacks=True, repeats=repeats)
        assert prompts == [(text, True) for text in expected]
        assert f"{len(expected)} prompts, {len(expected)} of them harmful, in 3 rows" in summary


def test_a_file_of_attacks_holds_no_seeds(tmp_path, capsys):
    text = '{"attack": "a", "label": 1}'
    assert read_file(tmp_path, "x.jsonl", text, attacks=True)[1] == [("a", True)]
    assert "is no text" in refusal(capsys, read_file, tmp_path, "x.jsonl", text)


def test_a_wrong_file_is_told_its_columns_and_those_expected(tmp_path, capsys):
    assert refusal(capsys, read_file, tmp_path, "x.csv", "question,answer\na,b\n") == (
        f"{tmp_path}/x.csv, line 2: harmful or benign? The columns (question, answer) do not say; write "
        f"harmful={tmp_path}/x.csv or benign={tmp_path}/x.csv, or add a column label.")
    assert refusal(capsys, read_file, tmp_path, "x.csv", "question,answer\na,b\n", "benign=") == (
        f"{tmp_path}/x.csv, line 2: null is no text, nor one message of a user, in the column prompt or text "
        "or vanilla or goal or behavior; its columns are question, answer. Mend the row or remove it.")


def test_the_summary_counts_labels_and_rows(tmp_path):
    text = jsonl({"prompt": "a", "label": 1}, {"prompt": "b", "label": "safe"}, {"text": "a", "label": 1})
    summary, _, checksum = read_file(tmp_path, "x.jsonl", text)[2].partition(" [")
    assert summary == f"{tmp_path}/x.jsonl, labelled prompts: 2 prompts, 1 of them harmful, in 3 rows"
    assert len(checksum) == 9


# ---------------------------------------------------------------- labels

@pytest.mark.parametrize("column", LABELS)
def test_every_value_of_a_label_column_is_looked_up_whole_but_for_case_and_outer_spaces(column):
    for label, values in zip((True, False), LABELS[column], strict=True):
        for value in values.split():
            for spelling in (value, value.upper(), f" {value} "):
                assert label_of({column: spelling}, column, "x, line 1") is label


@pytest.mark.parametrize("column, value", [
    ("label", "not_harmful"), ("label", "harmful_ish"), ("label", "un safe"), ("label", 2),
    ("label", "homonyms"), ("label", ["harmful"]), ("label", float("nan")), ("harmful", "yes"),
    ("data_type", 1), ("prompt_harm_label", True), ("jailbreak", "harmful"), ("type", "contrast"),
    ("type", "contrast_new"), ("type", "safe")])
def test_a_value_that_is_no_label_is_refused_with_its_line_and_the_labels_there_are(column, value, capsys):
    labels = ", ".join(" ".join(LABELS[column]).split())
    assert refusal(capsys, label_of, {column: value}, column, "x.csv, line 7") == (
        f"x.csv, line 7: {column} is {str(value)!r}; a label is one of {labels}.")


def test_an_unknown_label_stops_although_a_flag_labels_the_file(tmp_path, capsys):
    text = jsonl({"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "not_harmful"})
    sentence = refusal(capsys, read_file, tmp_path, "x.jsonl", text, "benign=")
    assert sentence.startswith(f"{tmp_path}/x.jsonl, line 2: label is 'not_harmful'; a label is one of ")


@pytest.mark.parametrize("column", LABELS)
def test_a_digit_is_a_label_only_where_the_column_says_what_it_counts(column, capsys):
    for one, zero in ((1, 0), ("1", "0"), (True, False), (1.0, 0.0), ("1.0", "0.0"), ("True", "False")):
        if column in ("harmful", "label", "jailbreak") or "human" in column and "rue" not in str(one):
            assert label_of({column: one}, column, "x, line 1") is True
            assert label_of({column: zero}, column, "x, line 1") is False
        else:
            assert "a label is one of" in refusal(capsys, label_of, {column: one}, column, "x, line 1")


def test_an_empty_label_leaves_the_row_to_the_next_column_and_then_to_the_flag(tmp_path):
    row = {"harmful": "", "label": None, "data_type": "vanilla_harmful"}
    assert label_of(row, "harmful label data_type", "x, line 1") is True
    assert label_of({"harmful": "  "}, "harmful label", "x, line 1") is None
    text = "prompt,label\na,\nb,0.0\n"   # as pandas writes a column of 1 and 0 with a gap
    assert read_file(tmp_path, "x.csv", text, "benign=")[1] == [("a", False), ("b", False)]


@pytest.mark.parametrize("name", ["harmful.jsonl", "benign.jsonl", "unharmful.jsonl", "or-bench-hard.jsonl"])
def test_the_name_of_a_file_labels_nothing(tmp_path, name, capsys):
    file = tmp_path / name
    assert refusal(capsys, read_file, tmp_path, name, '{"prompt": "a"}') == (
        f"{file}, row 1: harmful or benign? The columns (prompt) do not say; write harmful={file} or "
        f"benign={file}, or add a column label.")
    assert read_file(tmp_path, name, '{"prompt": "a"}', "benign=")[1] == [("a", False)]
    assert read_file(tmp_path, name, '{"prompt": "a"}', "harmful=")[1] == [("a", True)]


@pytest.mark.parametrize("name, text", [
    ("or_bench-toxic.csv", "prompt,category\na,privacy\n"),
    ("hard.csv", "prompt,category\na,harmful\nb,hate\n"),
    ("benign-behaviors.csv", "Index,Goal,Target,Behavior,Category,Source\n0,m,n,o,p,q\n")])
def test_files_whose_columns_do_not_tell_harmful_from_benign_need_a_flag(tmp_path, name, text, capsys):
    assert "write harmful=" in refusal(capsys, read_file, tmp_path, name, text)


@pytest.mark.parametrize("flag, label", [("harmful", "safe"), ("harmful", 0), ("benign", 1.0),
                                         ("benign", "toxic"), ("benign", "adversarial_harmful")])
def test_a_flag_labels_the_rows_without_a_label_and_must_not_contradict_one(tmp_path, flag, label, capsys):
    text = jsonl({"prompt": "a"}, {"prompt": "b", "label": label})
    assert read_file(tmp_path, "x.jsonl", jsonl({"prompt": "a"}), f"{flag}=")[1] == [("a", flag == "harmful")]
    assert refusal(capsys, read_file, tmp_path, "x.jsonl", text, f"{flag}=") == (
        f"{tmp_path}/x.jsonl, line 2: {flag}= contradicts its label; write {tmp_path}/x.jsonl alone, or mend "
        "the row.")


@pytest.mark.parametrize("row", [{"harmful": 1, "label": "benign"},
                                 {"label": 1, "data_type": "vanilla_benign"},
                                 {"harmful": "safe", "prompt_harm_label": "harmful"}])
def test_columns_that_contradict_each_other_are_refused(row, tmp_path, capsys):
    text = jsonl({"prompt": "a"} | row)
    sentence = refusal(capsys, read_file, tmp_path, "x.jsonl", text)
    assert f"{' and '.join(row)} contradict each other" in sentence


def test_one_text_with_both_labels_is_refused_in_one_file_and_in_two(tmp_path, capsys):
    both = jsonl({"prompt": "a", "label": 1}, {"prompt": " a ", "label": 0})
    assert refusal(capsys, read_file, tmp_path, "x.jsonl", both) == (
        f"{tmp_path}/x.jsonl, line 2: has the text of {tmp_path}/x.jsonl, line 1 and the other label; remove "
        "one of the two.")
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(jsonl({"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"}))
    one, two = f"{tmp_path}/one.jsonl", f"{tmp_path}/two.jsonl"
    assert f"{two}, line 1: has the text of {one}, line 1" in refusal(
        capsys, read_prompts, [f"harmful={one}", f"benign={two}"])
    assert [len(rows) for _, rows, _ in read_prompts([f"harmful={one}", f"harmful={two}"])] == [2, 2]


def test_a_category_labels_nothing(tmp_path):
    text = jsonl({"prompt": "a", "category": "harmful"}, {"prompt": "b", "category": "benign"})
    assert read_file(tmp_path, "x.jsonl", text, "benign=")[1] == [("a", False), ("b", False)]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert read_file(tmp_path / "a=b", "x.jsonl", '{"prompt": "a"}', "harmful=")[1] == [("a", True)]
    assert read_file(tmp_path / "a=b", "x.jsonl", '{"prompt": "a", "label": 1}')[1] == [("a", True)]


# ---------------------------------------------------------------- rows

WHOLE = ["knead\u2028dough", "knead\u2029dough", "a\x85b", "two\nlines", "a \"b\", c", "a\x0bb\x0cc\x1cd",
         200_000 * "x"]


@pytest.mark.parametrize("text", WHOLE, ids=[ascii(text[:12]) for text in WHOLE])
def test_a_row_is_read_whole_by_the_csv_and_the_jsonl_reader(tmp_path, text):
    with open(tmp_path / "x.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), (1, text), (2, "next")])
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in (text, "next")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("x.csv", "x.jsonl"):
        assert [row["prompt"] for _, row in read_rows(str(tmp_path / name))] == [text, "next"]


@pytest.mark.parametrize("name, text, places", [
    ("x.csv", 'id,prompt\n1,a\n\n2,"b\nc"\n3,d\n', ["line 2", "line 4", "line 6"]),   # of a row, its first
    ("x.csv", '\nid,prompt\n1,a\n', ["line 3"]),
    ("x.jsonl", '{"a": 1}\n\n  \n{"a": 2}\r\n', ["line 1", "line 4"]),
    ("x.jsonl", '\n{"a": [1], "b": [{}]}\n', ["row 1"]),   # of lists, but in lines: one row
    ("x.json", '[\n {"a": 1},\n {"a":\n 2},\n\n {"a": 4}\n]\n', ["row 1", "row 2", "row 3"]),
    ("x.jsonl", '[{"a": 1}, {"a": 2}]', ["row 1", "row 2"]),
    ("x.json", '{"on]e": [{"a": 1},\n {"a": 2}],\n "two": [{"a": 3}]}', ["row 1", "row 2", "row 3"]),
    ("x.json", '{\n "a": 1,\n "b": [2]\n}\n', ["row 1"])])
def test_a_row_is_known_by_its_line_in_csv_and_jsonl_else_by_its_number(tmp_path, name, text, places):
    (tmp_path / name).write_text(text, newline="")
    rows = read_rows(str(tmp_path / name))
    assert [where for where, _ in rows] == [f"{tmp_path / name}, {place}" for place in places]
    assert all(isinstance(row, dict) for _, row in rows)


@pytest.mark.parametrize("name, content", [
    ("x.csv", b"prompt,label\r\na,1\r\n"),
    ("x.CSV", b"\xef\xbb\xbfprompt,label\na,1\n"),
    ("x.jsonl", b'\xef\xbb\xbf{"prompt": "a", "label": 1}\r\n'),
    ("x.JSON", b'[{"prompt": "a", "label": 1}]'),
    ("x.jsonl", b'[{"prompt": "a", "label": 1}]'),
    ("x.json", b'{"prompt": "a", "label": 1}\n'),
    ("x.JSONL.GZ", gzip.compress(b'{"prompt": "a", "label": 1}\n', mtime=0)),
    ("x.csv.gz", gzip.compress(b"prompt,label\na,1\n", mtime=0)),
    ("x.csv", b"prompt,label\na,1\n,\n\n"),
    ("x.csv", b"PKID,prompt,label\n7,a,1\n"),
    ("x.jsonl", b'{"prompt": [{"role": "user", "content": "a"}], "label": 1}')])
def test_how_a_file_is_packed_changes_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts([str(tmp_path / name)])[0][1] == [("a", True)]


@pytest.mark.parametrize("name, content, problem", [
    ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not a row"),
    ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', "line 1: not a row"),
    ("x.json", b'[{"prompt": "a"}, 7]', "row 2: not a row"),
    ("x.json", b'[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', "row 2: not a row"),
    ("x.json", b'{"one": [{"prompt": "a"}], "one": [{"prompt": "b"}]}', "line 1: not a row"),
    ("x.json", b'{"prompt": "a"', "line 1: not a row"),
    ("x.json", b'{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}', "line 1: not a row"),
    ("x.jsonl", b'{"prompt": "a"}\n7\n', "line 2: not a row"),
    ("x.jsonl", b'[{"prompt": "a"}]\n[{"prompt": "b"}]\n', "line 1: not a row"),
    ("x.jsonl", b'{"prompt": "a"}\n[{"prompt": "b"}]\n', "line 2: not a row"),
    ("x.json", b'["a", "b"]', "row 1: not a row"),
    ("x.json", b'null', "line 1: not a row"),
    ("x.json", b'[{"prompt": "a"},\n{"prompt": "b"}', "line 1: not a row"),
    ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', "line 2: not a row"),
    ("x.jsonl", b'\n' + b'[' * 3 + b'{"a":' * 100_000, "line 2: not a row"),
    ("x.csv", b"id,prompt\n1,a, b\n", "line 2: not a row"),
    ("x.csv", b"id,prompt\n1\n", "line 2: not a row"),
    ("x.csv", b'id,prompt\n1,a\n2,"b\n3,c\n', "line 3: not a row"),
    ("x.csv", b"prompt,prompt\na,b\n", "line 2: not a row"),
    ("x.jsonl", b'{"prompt": "\xff"}', "can't decode byte 0xff in position 12"),
    ("x.csv", "prompt\na\n".encode("utf-16"), "cannot be read ('utf-8' codec can't decode byte 0xff"),
    ("x.csv", "prompt,label\na,1\n".encode("utf-16-le"), "line 3: not a row"),
    ("x.jsonl", '{"prompt": "a"}'.encode("utf-16-be"), "line 1: not a row"),
    ("x.jsonl", b'{"prompt": "a\0", "label": 1}', "line 1: not a row"),
    ("x.jsonl", b"PAR1" + bytes(40), "line 1: not a row"),
    ("x.parquet", b"PAR1\x15\x04\xff\n\0\x80" + bytes(40), "cannot be read ('utf-8' codec can't decode"),
    ("x.csv", b"PK\3\4" + bytes(40), "holds no prompts"),
    ("x.csv", b"PK\3\4\n" + bytes(40) + b"\n", "harmful or benign?"),
    ("x.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-3], "(Compressed file ended"),
    ("x.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + bytes([255] * 20), "(Error -3 while decompressing"),
    ("x.jsonl", b'{"prompt": ["a"], "label": 1}', 'row 1: ["a"] is no text'),
    ("x.jsonl", b'{"prompt": NaN, "label": 1}', "row 1: NaN is no text"),
    ("x.jsonl", b'{"prompt": null, "label": 1}', "row 1: null is no text"),
    ("x.jsonl", b'{"prompt": 7, "label": 1}', "row 1: 7 is no text"),
    ("x.jsonl", b'{"prompt": " \\u200b", "label": 1}', 'row 1: " \\u200b" is no text'),
    ("x.jsonl", b'{"prompt": {"content": "a"}, "label": 1}', 'row 1: {"content": "a"} is no text'),
    ("x.jsonl", b'{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}\n',
     "harmful or benign?"),
    ("x.jsonl", jsonl({"prompt": [{"role": "user", "content": "a"}] * 2, "label": 1}).encode(),
     "is no text, nor one message of a user"),
    ("x.jsonl", b'{"prompt": [{"role": "user", "content": 7}], "label": 1}', '"content": 7}] is no text'),
    ("x.jsonl", b"\n", "holds no prompts"), ("x.csv", b"prompt,label\n,\n", "holds no prompts"),
    ("x.jsonl", b'{"prompt": "a", "label": 1}\n]', "line 2: not a row"),
    ("x.jsonl", b'{"prompt": "a", "label": 1}\n"lost": {"prompt": "b", "label": 1}', "line 2: not a row"),
    ("x.csv", b'"pro\nmpt",x\na,b\n', "harmful or benign? The columns (pro mpt, x)"),
    ("x.csv", b"prompt,label\n,1\n", "line 2: null is no text")])
def test_what_cannot_be_read_is_refused_with_file_and_place(tmp_path, name, content, problem, capsys):
    (tmp_path / name).write_bytes(content)
    sentence = refusal(capsys, read_prompts, [str(tmp_path / name)])
    assert sentence.startswith(str(tmp_path / name)) and problem in sentence


def test_a_missing_file_is_refused_by_name(tmp_path, capsys):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        sentence = refusal(capsys, read_prompts, [f"harmful={path}"])
        assert sentence.startswith(f"{path}: cannot be read ([Errno ") and "give a JSONL" in sentence
