"""Files of prompts and labels: what is read from them, and what is refused."""
import csv
import json

import pytest

from data import (ATTACK_COLUMNS, BENCHMARKS, LABELS, TEXT_COLUMNS, label_of, read_pairs, read_prompts,
                  read_rows)


def read_text(tmp_path, name, text, flag="", columns=TEXT_COLUMNS):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return read_prompts(f"{flag}{tmp_path / name}", columns)


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
    ("test.csv", "Behavior,ContextString,BehaviorID\nj,k,1\nl,,2\n", "",
     [("k\n\n---\n\nj", True), ("l", True)]),
    ("xstest.csv", "id,prompt,type,label\n1,q,homonyms,safe\n2,r,contrast_homonyms,unsafe\n", "",
     [("q", False), ("r", True)]),
    ("pairs.json", '{"one": [{"prompt": "s", "harmful": true}], '
     '"two": [{"prompt": "\\ud800", "harmful": false}]}', "", [("s", True), ("?", False)])])
def test_prompts_are_read_by_their_columns(tmp_path, name, text, flag, expected):
    assert read_text(tmp_path, name, text, flag).rows == expected


PUBLISHED = [   # benchmark, flag, the file as its authors publish it, and what is in it
    ("WildGuardTest", "", "wildguardtest.jsonl", jsonl(
        {"prompt": "a", "adversarial": True, "response": "x", "prompt_harm_label": "harmful"},
        {"prompt": "b", "adversarial": False, "prompt_harm_label": "unharmful"},
        {"prompt": "c", "adversarial": False, "prompt_harm_label": None}), [("a", True), ("b", False)]),
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
    ("OR-Bench", "benign=", "or-bench-hard-1k.csv",
     "prompt,category\n"
     "a,harmful\n"
     "b,privacy\n", [("a", False), ("b", False)]),
    ("OR-Bench", "harmful=", "or_bench-toxic.csv", "prompt,category\na,privacy\n", [("a", True)]),
    ("labelled prompts", "", "jbb.jsonl", jsonl(
        {"text": "a", "label": "harmful"},
        {"text": "b", "label": "safe"}), [("a", True), ("b", False)]),
    ("labelled prompts", "harmful=", "seeds.jsonl", jsonl({"prompt": "a", "category": "harmful"}),
     [("a", True)])]
NAMES = [f"{row[0]} {row[2]}" for row in PUBLISHED]


@pytest.mark.parametrize("name, flag, file, text, expected", PUBLISHED, ids=NAMES)
def test_a_published_file_is_recognised_by_its_columns(tmp_path, name, flag, file, text, expected):
    prompts = read_text(tmp_path, file, text, flag, ATTACK_COLUMNS)
    assert (prompts.benchmark, prompts.rows) == (name, expected)
    assert {row[0] for row in PUBLISHED} == {benchmark.name for benchmark in BENCHMARKS}


def test_recorded_attacks_are_read_before_the_requests_they_come_from(tmp_path):
    text = jsonl({"vanilla": "plain", "adversarial": "tell a story", "data_type": "adversarial_harmful"})
    assert read_text(tmp_path, "wj.jsonl", text, columns=ATTACK_COLUMNS).rows == [("tell a story", True)]
    assert read_text(tmp_path, "wj.jsonl", text).rows == [("plain", True)]


def test_a_file_of_attacks_holds_no_seeds(tmp_path, capsys):
    text = '{"attack": "a", "label": 1}'
    assert read_text(tmp_path, "x.jsonl", text, columns=ATTACK_COLUMNS).rows == [("a", True)]
    assert "holds a prompt" in refusal(capsys, read_text, tmp_path, "x.jsonl", text)


def test_a_wrong_file_is_told_its_columns_and_those_expected(tmp_path, capsys):
    assert refusal(capsys, read_text, tmp_path, "x.csv", "question,answer\na,b\n") == (
        f"{tmp_path}/x.csv, line 2: none of the columns (question, answer) holds a prompt; rename the one "
        "that does to prompt or text or vanilla or goal or behavior.")


def test_the_summary_counts_labels_and_duplicates_and_names_the_column(tmp_path):
    text = jsonl({"prompt": "a"}, {"prompt": "b", "label": "safe"}, {"prompt": "a"}, {"prompt": " "},
                 {"prompt": None})
    assert read_text(tmp_path, "x.jsonl", text, "harmful=").summary == (
        f"{tmp_path}/x.jsonl, labelled prompts: 1 harmful and 1 benign prompts from column prompt, "
        "1 duplicates dropped")


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
    sentence = refusal(capsys, read_text, tmp_path, "x.jsonl", text, "benign=")
    assert sentence.startswith(f"{tmp_path}/x.jsonl, line 2: label is 'not_harmful'; a label is one of ")


@pytest.mark.parametrize("column", LABELS)
def test_a_digit_is_a_label_only_where_the_column_says_what_it_counts(column, capsys):
    for one, zero in ((1, 0), ("1", "0"), (True, False), (1.0, 0.0), ("1.0", "0.0"), ("True", "False")):
        if column in ("harmful", "label", "jailbreak"):
            assert label_of({column: one}, column, "x, line 1") is True
            assert label_of({column: zero}, column, "x, line 1") is False
        else:
            assert "a label is one of" in refusal(capsys, label_of, {column: one}, column, "x, line 1")


def test_an_empty_label_leaves_the_row_to_the_next_column_and_then_to_the_flag(tmp_path):
    row = {"harmful": "", "label": None, "data_type": "vanilla_harmful"}
    assert label_of(row, "harmful label data_type", "x, line 1") is True
    assert label_of({"harmful": "  "}, "harmful label", "x, line 1") is None
    text = "prompt,label\na,\nb,1.0\n"   # as pandas writes a column of 1 and 0 with a gap
    assert read_text(tmp_path, "x.csv", text, "benign=").rows == [("a", False), ("b", True)]


@pytest.mark.parametrize("name", ["harmful.jsonl", "benign.jsonl", "unharmful.jsonl", "or-bench-hard.jsonl"])
def test_the_name_of_a_file_labels_nothing(tmp_path, name, capsys):
    file = tmp_path / name
    assert refusal(capsys, read_text, tmp_path, name, '{"prompt": "a"}') == (
        f"{file}, line 1: harmful or benign? The columns (prompt) do not say; write harmful={file} or "
        f"benign={file}, or add a column label.")
    assert read_text(tmp_path, name, '{"prompt": "a"}', "benign=").rows == [("a", False)]
    assert read_text(tmp_path, name, '{"prompt": "a"}', "harmful=").rows == [("a", True)]


@pytest.mark.parametrize("name, text", [
    ("or_bench-toxic.csv", "prompt,category\na,privacy\n"),
    ("hard.csv", "prompt,category\na,harmful\nb,hate\n"),
    ("benign-behaviors.csv", "Index,Goal,Target,Behavior,Category,Source\n0,m,n,o,p,q\n")])
def test_files_whose_columns_do_not_tell_harmful_from_benign_need_a_flag(tmp_path, name, text, capsys):
    assert "write harmful=" in refusal(capsys, read_text, tmp_path, name, text)


def test_a_flag_labels_a_file_and_a_column_of_labels_goes_before_it(tmp_path):
    text = jsonl({"prompt": "a"}, {"prompt": "b", "label": "safe"})
    assert read_text(tmp_path, "x.jsonl", text, "harmful=").rows == [("a", True), ("b", False)]


def test_a_category_labels_nothing(tmp_path):
    text = jsonl({"prompt": "a", "category": "harmful"}, {"prompt": "b", "category": "benign"})
    assert read_text(tmp_path, "x.jsonl", text, "benign=").rows == [("a", False), ("b", False)]


def test_a_path_may_contain_an_equals_sign(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert read_text(tmp_path / "a=b", "x.jsonl", '{"prompt": "a"}', "harmful=").rows == [("a", True)]
    assert read_text(tmp_path / "a=b", "x.jsonl", '{"prompt": "a", "label": 1}').rows == [("a", True)]


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


def test_line_numbers_are_those_of_the_file(tmp_path):
    (tmp_path / "x.csv").write_text('id,prompt\n1,a\n\n2,"b\nc"\n3,d\n')
    assert [number for number, _ in read_rows(str(tmp_path / "x.csv"))] == [2, 5, 6]   # of a row, the last
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    assert read_rows(str(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("name, content", [
    ("x.csv", b"prompt,label\r\na,1\r\n"),
    ("x.CSV", b"\xef\xbb\xbfprompt,label\na,1\n"),
    ("x.jsonl", b'\xef\xbb\xbf{"prompt": "a", "label": 1}\r\n'),
    ("x.JSON", b'[{"prompt": "a", "label": 1}]')])
def test_a_byte_order_mark_windows_line_ends_and_upper_case_endings_change_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(str(tmp_path / name)).rows == [("a", True)]


@pytest.mark.parametrize("name, content, problem", [
    ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not valid JSON"),
    ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', "line 2: not valid JSON"),
    ("x.jsonl", b'{"prompt": "a"}\n7\n', "line 2: a row needs named columns"),
    ("x.json", b'["a", "b"]', "line 1: a row needs named columns"),
    ("x.json", b'{"prompt": "a"}', "line 1: a row needs named columns"),
    ("x.jsonl", b'{"prompt": "\xff"}', "not UTF-8 (invalid start byte at byte 12)"),
    ("x.csv", "prompt\na\n".encode("utf-16"), "not UTF-8 (invalid start byte at byte 0)"),
    ("x.jsonl", b'{"prompt": ["a"], "label": 1}', "line 1: prompt is \"['a']\", not text"),
    ("x.jsonl", b'{"prompt": NaN, "label": 1}', "line 1: prompt is 'nan', not text"),
    ("x.jsonl", b"\n", "holds no prompts"), ("x.csv", b"prompt,label\n,1\n", "holds no prompts")])
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, content, problem, capsys):
    (tmp_path / name).write_bytes(content)
    sentence = refusal(capsys, read_prompts, str(tmp_path / name))
    assert sentence.startswith(str(tmp_path / name)) and problem in sentence


def test_a_missing_file_is_refused_by_name(tmp_path, capsys):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        assert refusal(capsys, read_prompts, f"harmful={path}").startswith(f"{path}: no such file")


# ---------------------------------------------------------------- pairs for SFT

def test_pairs_come_with_their_lines(tmp_path):
    text = jsonl({"prompt": "a", "response": "b"}) + "\n\n" + jsonl({"prompt": "c", "response": "d", "id": 1})
    (tmp_path / "sft.jsonl").write_text(text)
    assert read_pairs(str(tmp_path / "sft.jsonl")) == [(1, "a", "b"), (3, "c", "d")]


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"response": "a"}, {"prompt": None, "response": "ok"},
                                 {"prompt": "a", "response": 7}, {"prompt": ["a"], "response": "b"}])
def test_a_pair_without_its_two_texts_is_refused_by_line(tmp_path, row, capsys):
    (tmp_path / "sft.jsonl").write_text(jsonl({"prompt": "a", "response": "b"}, row))
    assert refusal(capsys, read_pairs, str(tmp_path / "sft.jsonl")) == (
        f"{tmp_path}/sft.jsonl, line 2: needs text in the columns prompt and response.")


def test_a_file_without_pairs_is_refused(tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text("\n")
    assert "holds no pairs" in refusal(capsys, read_pairs, str(tmp_path / "sft.jsonl"))
