"""
How files of prompts and labels are read, and what is refused.
"""
import csv
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from model import stop
from sample import clean_text

@dataclass(frozen=True)
class Benchmark:
    """A published file as its columns give it away: where the prompt stands, which columns label it, and its label if none does."""
    columns: tuple[str, ...]
    texts: tuple[str, ...]              # the first that holds text, so a disguise goes before the request in it
    labels: tuple[str, ...] = ()
    otherwise: bool | None = None
    named: tuple[str, ...] = ("",)      # one of these must be in the file's name



BENCHMARKS = {
    "WildGuardTest": Benchmark(("prompt", "adversarial", "prompt_harm_label"), ("prompt",), ("prompt_harm_label",)),   # there, a flag
    "WildJailbreak": Benchmark(("adversarial",), ("adversarial", "vanilla"), ("data_type", "label", "harmful", "category")),
    "HarmBench": Benchmark(("Behavior", "BehaviorID"), ("Behavior",), otherwise=True),
    "JailbreakBench": Benchmark(("Goal", "Behavior"), ("Goal",)),
    "StrongREJECT": Benchmark(("forbidden_prompt",), ("forbidden_prompt",), otherwise=True),
    "AdvBench": Benchmark(("goal", "target"), ("goal",), otherwise=True),
    "DAN": Benchmark(("prompt", "jailbreak", "platform"), ("prompt",), ("jailbreak",)),
    "DAN questions": Benchmark(("question", "content_policy_name"), ("question",), otherwise=True),
    "XSTest": Benchmark(("prompt", "type", "focus"), ("prompt",), ("label", "type"), otherwise=False),   # unsafe: contrast_...
    "OR-Bench": Benchmark(("prompt", "category"), ("prompt",), named=("or-bench", "or_bench")),   # of its categories, one is "harmful"
    "labelled prompts": Benchmark((), ("attack", "prompt", "text", "vanilla", "goal", "behavior"),
                                  ("harmful", "label", "data_type", "category", "type")),
}



WORDS = {"harmful": True, "unsafe": True, "toxic": True, "contrast": True, "benign": False, "unharmful": False, "safe": False}



BITS = {"true": True, "1": True, "false": False, "0": False}   # a 1 says harmful in a column of that name, and nothing in a category



BIT_COLUMNS = ("harmful", "label", "jailbreak")



NAMES = {"benign": False, "or-bench-hard": False, "or_bench-hard": False, "or-bench-80k": False, "toxic": True, "harmful": True}



DISGUISES = ("attack", "adversarial")                          # columns of attacks; who wants the requests behind them leaves these out



TEXT_COLUMNS = tuple(dict.fromkeys(text for benchmark in BENCHMARKS.values() for text in benchmark.texts if text not in DISGUISES))



ATTACK_COLUMNS = (*DISGUISES, *TEXT_COLUMNS)



def read_rows(path: str) -> Iterator[tuple[int, dict]]:
    """(line or row number, row) of a JSONL, JSON, CSV or TSV file; what cannot be read is refused by file and line."""
    if not Path(path).is_file():
        stop(f"{path}: no such file; give a JSONL, CSV or JSON file.")
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if path.endswith((".csv", ".tsv")):
        yield from enumerate(csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.endswith(".tsv") else ","), 2)
        return
    try:
        if path.endswith(".json"):
            content = json.loads(text)
            lists = content.values() if isinstance(content, dict) else [content]   # HarmBench's validation set: lists by behaviour
            yield from enumerate((row for rows in lists for row in (rows if isinstance(rows, list) else [rows])), 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        line = error.lineno if path.endswith(".json") else number
        stop(f"{path}, line {line}: not valid JSON ({error.msg}); mend the line or remove it.")



def benchmark_of(file: str, columns: Collection[str]) -> str | None:
    """
    The benchmark whose file has these columns, or None.

    >>> benchmark_of("x.csv", {"Behavior", "ContextString", "BehaviorID"})
    'HarmBench'
    """
    fits = lambda known: set(known.columns) <= set(columns) and set(known.texts) & set(columns)
    named = lambda known: any(word in Path(file).name.lower() for word in known.named)
    return next((name for name, known in BENCHMARKS.items() if fits(known) and named(known)), None)



def label_of(row: dict, by_file: bool | None, benchmark: Benchmark = BENCHMARKS["labelled prompts"]) -> bool | None:
    """
    Harmful or benign: by a column that says so, by the file, or by the benchmark that the row is from.

    >>> label_of({"prompt": "?", "data_type": "adversarial_benign"}, None), label_of({"prompt": "?", "category": 1}, None)
    (False, None)
    """
    said = [(column, word) for column in benchmark.labels for word in str(row.get(column, "")).lower().split("_")]
    means = lambda column, word: WORDS.get(word, BITS.get(word) if column in BIT_COLUMNS else None)
    stated = next((label for pair in said if (label := means(*pair)) is not None), None)
    return next((label for label in (stated, by_file, benchmark.otherwise) if label is not None), None)



@dataclass(frozen=True)
class PromptFile:
    """A file of prompts: (text, harmful) without duplicates and rows that have no text, how it was read in a line, and what it is."""
    rows: list[tuple[str, bool]]
    summary: str
    benchmark: str



def label_by_name(path: str) -> tuple[str, bool | None]:
    """The file behind `harmful=FILE`, `benign=FILE` or `FILE`, and what that, or its name, says of all its rows."""
    flag, _, file = path.rpartition("=") if path.startswith(("harmful=", "benign=")) else ("", "", path)
    said = {label for word, label in NAMES.items() if word in Path(file).name.lower()}
    return file, WORDS[flag] if flag else said.pop() if len(said) == 1 else None



def read_prompts(path: str, columns: tuple[str, ...] = TEXT_COLUMNS) -> PromptFile:
    """Read prompts by the columns that the file has. `harmful=FILE` or `benign=FILE` labels all rows that no column labels."""
    file, by_file = label_by_name(path)
    found: dict[str, bool] = {}
    names, used, n_rows = set(), set(), 0
    for number, row in read_rows(file):
        row = row if isinstance(row, dict) else {}
        name = benchmark_of(file, row.keys())
        if name is None or not set(BENCHMARKS[name].texts) & set(columns) & row.keys():
            known = "; ".join(f"{title} ({', '.join(b.columns or b.texts)})" for title, b in BENCHMARKS.items())
            there = ", ".join(map(str, row)) or "no columns"
            stop(f"{file}, line {number}: none of the columns found ({there}) holds a prompt; expected those of {known}; rename one.")
        column = next((c for c in BENCHMARKS[name].texts if c in columns and row.get(c)), None)
        label = label_of(row, by_file, BENCHMARKS[name])
        if label is None and "prompt_harm_label" in row:
            continue                                                 # WildGuardTest: the annotators did not agree
        if label is None:
            stop(f"{file}, line {number}: harmful or benign? Add a column 'label', or write harmful={file} or benign={file}.")
        if column and str(row[column]).strip():
            context = row.get("ContextString")                       # HarmBench: what the request is about
            text = (f"{context}\n\n---\n\n" if context else "") + str(row[column])
            found.setdefault(clean_text(text).strip(), label)
            names.add(name)
            used.add(column)
            n_rows += 1
    if not found:
        stop(f"{file}: holds no prompts; give a file with at least one.")
    harmful, names = sum(found.values()), " and ".join(sorted(names))
    return PromptFile(list(found.items()), f"{file}, {names}: {harmful} harmful and {len(found) - harmful} benign prompts from column "
                                         f"{', '.join(sorted(used))}, {n_rows - len(found)} duplicates dropped", names)

