"""
How files of prompts and labels are read, and what is refused.

    file -> rows -> which published file it is, by its columns -> (prompt, harmful) of each row, once each

A label is exact: the whole value of a label column is looked up in LABELS, and a value that is not there ends
the program with its file, its line and the values that are. A file's name never labels its rows. Where no
column does (OR-Bench, JailbreakBench), the user writes harmful=FILE or benign=FILE.

    python -c "import data; print(data.read_prompts('harmful=or_bench-toxic.csv').summary)"
"""
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from model import stop
from sample import clean_text

# ---------------------------------------------------------------- files that people publish

HARMFUL = "harmful unsafe toxic vanilla_harmful adversarial_harmful"
BENIGN = "benign safe unharmful vanilla_benign adversarial_benign"
LABELS = {   # column: values that mean harmful, values that mean benign
    "harmful": (f"{HARMFUL} true 1 1.0", f"{BENIGN} false 0 0.0"),   # pandas writes 1.0 if a row is empty
    "label": (f"{HARMFUL} true 1 1.0", f"{BENIGN} false 0 0.0"),
    "jailbreak": ("true 1 1.0", "false 0 0.0"),
    "prompt_harm_label": (HARMFUL, BENIGN),
    "data_type": (HARMFUL, BENIGN),
    "type": ("contrast_homonyms contrast_figurative_language contrast_safe_targets contrast_safe_contexts "
             "contrast_definitions contrast_discr contrast_historical_events contrast_privacy",
             "homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr "
             "nons_group_real_discr historical_events privacy_public privacy_fictional")}


@dataclass(frozen=True)
class Benchmark:
    """A published file: the columns that it is known by, those of its prompts and those of its labels."""
    name: str
    columns: str                    # the file has all of these
    texts: str                      # the first that is not empty is the prompt: an attack before its request
    labels: str = "harmful label data_type"   # the first that is not empty is the label
    default: bool | None = None     # the label where neither a column nor the user gives one
    skip_unlabelled: bool = False   # leave rows without a label out: their annotators did not agree
    categories: str = ""            # the column `category` holds at least one of these


BENCHMARKS = (   # the first that fits a file; the last fits all
    Benchmark("WildGuardTest", "prompt adversarial prompt_harm_label", "prompt", "prompt_harm_label",
              skip_unlabelled=True),
    Benchmark("WildJailbreak", "adversarial data_type", "adversarial vanilla"),
    Benchmark("WildJailbreak", "adversarial vanilla", "adversarial vanilla"),
    Benchmark("HarmBench", "Behavior BehaviorID", "Behavior", default=True),
    Benchmark("JailbreakBench", "Goal Behavior", "Goal"),   # two files, harmful and benign, look alike
    Benchmark("StrongREJECT", "forbidden_prompt", "forbidden_prompt", default=True),
    Benchmark("AdvBench", "goal target", "goal", default=True),
    Benchmark("DAN", "prompt jailbreak platform", "prompt", "jailbreak"),
    Benchmark("DAN questions", "question content_policy_name", "question", default=True),
    Benchmark("XSTest", "prompt type focus", "prompt", "label type"),
    Benchmark("OR-Bench", "prompt category", "prompt",   # files of harmful and of benign prompts
              categories="deception harassment hate illegal privacy self-harm sexual unethical violence"),
    Benchmark("labelled prompts", "", "attack prompt text adversarial vanilla goal behavior"))
ATTACKS = ("attack", "adversarial")   # who wants the requests behind attacks leaves these columns out
ALL_TEXTS = dict.fromkeys(" ".join(benchmark.texts for benchmark in BENCHMARKS).split())
TEXT_COLUMNS = tuple(column for column in ALL_TEXTS if column not in ATTACKS)
ATTACK_COLUMNS = (*ATTACKS, *TEXT_COLUMNS)


def benchmark_of(rows: list[dict]) -> Benchmark:
    """The published file that these rows are from."""
    columns = set().union(*rows)
    categories = {str(row.get("category")) for row in rows}
    fits = [b for b in BENCHMARKS if columns.issuperset(b.columns.split())]
    return next(b for b in fits if not b.categories or not categories.isdisjoint(b.categories.split()))


# ---------------------------------------------------------------- files to rows

def read_rows(path: str) -> list[tuple[int, dict]]:
    """
    (line, row) of a JSONL, JSON, CSV or TSV file in UTF-8. A row of CSV may span lines; its number is that of
    the last. Rows of JSON are counted from 1. What cannot be read ends the program with its file and line.
    """
    if not Path(path).is_file():
        stop(f"{path}: no such file; give a JSONL, CSV or JSON file.")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        stop(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as text in UTF-8.")
    ending = Path(path).suffix.lower()
    if ending in (".csv", ".tsv"):
        csv.field_size_limit(len(text) + 1)   # Python's own limit is 131,072 characters
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]
    lines = text.split("\n")   # splitlines would also split a text at U+2028
    try:
        if ending == ".json":
            content = json.loads(text)
            parts = content.values() if isinstance(content, dict) else [content]   # HarmBench's votes: a dict
            lists = [part if isinstance(part, list) else [part] for part in parts]
            rows = list(enumerate(sum(lists, []), 1))
        else:
            rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except json.JSONDecodeError as error:
        line = error.lineno if ending == ".json" else lines.index(error.doc) + 1
        stop(f"{path}, line {line}: not valid JSON ({error.msg}); mend the line or remove it.")
    for number, row in rows:
        if not isinstance(row, dict):
            stop(f'{path}, line {number}: a row needs named columns, such as {{"prompt": "..."}}.')
    return rows


# ---------------------------------------------------------------- rows to prompts

def label_of(row: dict, columns: str, where: str) -> bool | None:
    """
    Whether a row is harmful by the first of these columns that is not empty; None if all are empty.
    A value that LABELS does not have ends the program with a sentence that begins with `where`.

    >>> label_of({"data_type": "adversarial_benign"}, "label data_type", "x.tsv, line 2")
    False
    """
    for column in columns.split():
        value = "" if row.get(column) is None else str(row[column]).strip()
        harmful, benign = (values.split() for values in LABELS[column])
        if value.lower() in harmful + benign:
            return value.lower() in harmful
        if value:
            stop(f"{where}: {column} is {value[:40]!r}; a label is one of {', '.join(harmful + benign)}.")
    return None


def text_column(row: dict, columns: list[str], where: str) -> str | None:
    """The first of these columns that holds text; None if all are empty. A row must have one of them."""
    if row.keys().isdisjoint(columns):
        stop(f"{where}: none of the columns ({', '.join(map(str, row))}) holds a prompt; rename the one that "
             f"does to {' or '.join(columns)}.")
    for column in columns:
        text = row.get(column)
        if not isinstance(text, str | None):
            stop(f"{where}: {column} is {str(text)[:40]!r}, not text.")
        if text and text.strip():
            return column
    return None


@dataclass(frozen=True)
class PromptFile:
    """(text, harmful) of each prompt, how they were read in a line, and the name of the benchmark."""
    rows: list[tuple[str, bool]]
    summary: str
    benchmark: str


def read_prompts(path: str, columns: tuple[str, ...] = TEXT_COLUMNS) -> PromptFile:
    """
    A file's prompts, from those of its text columns that are in `columns`, without empty rows and duplicates.
    `harmful=FILE` and `benign=FILE` label the rows that no column labels.
    """
    flag, _, file = path.partition("=")
    by_flag = {"harmful": True, "benign": False}.get(flag)
    file = path if by_flag is None else file
    rows = read_rows(file)
    benchmark = benchmark_of([row for _, row in rows])
    texts = [column for column in benchmark.texts.split() if column in columns]
    prompts: dict[str, bool] = {}
    used, n_rows = set(), 0
    for number, row in rows:
        where = f"{file}, line {number}"
        column = text_column(row, texts, where)
        labels = label_of(row, benchmark.labels, where), by_flag, benchmark.default   # the first wins
        label = next((label for label in labels if label is not None), None)
        if column is None or label is None and benchmark.skip_unlabelled:
            continue
        if label is None:
            stop(f"{where}: harmful or benign? The columns ({', '.join(map(str, row))}) do not say; write "
                 f"harmful={file} or benign={file}, or add a column label.")
        context = row.get("ContextString")   # HarmBench: what the request is about
        text = f"{context}\n\n---\n\n{row[column]}" if context else row[column]
        prompts.setdefault(clean_text(text).strip(), label)
        used.add(column)
        n_rows += 1
    if not prompts:
        stop(f"{file}: holds no prompts; give a file with at least one.")
    harmful = sum(prompts.values())
    summary = (f"{file}, {benchmark.name}: {harmful} harmful and {len(prompts) - harmful} benign prompts "
               f"from column {', '.join(sorted(used))}, {n_rows - len(prompts)} duplicates dropped")
    return PromptFile(list(prompts.items()), summary, benchmark.name)


def read_pairs(path: str) -> list[tuple[int, str, str]]:
    """(line, prompt, response) of an SFT file, which has text in these two columns."""
    pairs = [(number, row.get("prompt"), row.get("response")) for number, row in read_rows(path)]
    for number, *texts in pairs:
        if not all(isinstance(text, str) for text in texts):
            stop(f"{path}, line {number}: needs text in the columns prompt and response.")
    if not pairs:
        stop(f"{path}: holds no pairs; give a file with at least one.")
    return pairs
