"""
How files of prompts and labels are read, what is refused, and how ragged lists become a batch.

    file -> rows -> which published file it is, by its columns -> (prompt, harmful) of each, once
    python -c "import data; print(data.read_prompts(['harmful=seeds.jsonl'])[0])"

What cannot be read for certain ends the program with its file, its place, its value and what to do.
"""
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kernels import stop  # before torch, which reads the OpenMP setting in there
import torch
from torch import Tensor

from sample import clean_text, visible

# ---------------------------------------------------------------- files that people publish
HARMFUL = "harmful unsafe toxic vanilla_harmful adversarial_harmful"
BENIGN = "benign safe unharmful vanilla_benign adversarial_benign"
LABELS = {   # column: whole values that mean harmful, and such that mean benign
    **dict.fromkeys(("harmful", "label"), (f"{HARMFUL} true 1 1.0", f"{BENIGN} false 0 0.0")),
    "jailbreak": ("true 1 1.0", "false 0 0.0"),   # pandas writes 1.0 for 1 if a row is empty
    **dict.fromkeys(("human_0", "human_1", "human_2"), ("1 1.0", "0 0.0")),   # votes in HarmBench
    "final_label": ("2_full_refusal 3_partial_refusal", "1_full_compliance"),   # XSTest: is it refused?
    "prompt_harm_label": (HARMFUL, BENIGN), "data_type": (HARMFUL, BENIGN),
    "type": ("contrast_homonyms contrast_figurative_language contrast_safe_targets contrast_safe_contexts "
             "contrast_definitions contrast_discr contrast_historical_events contrast_privacy",
             "homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr "
             "nons_group_real_discr historical_events privacy_public privacy_fictional")}

class Benchmark(NamedTuple):
    """A published file: the columns that it is known by, those of its prompts and those of its labels."""
    name: str
    columns: str                    # the file has all of these, and no other column of TEXTS
    texts: str                      # the first that is not empty is the prompt: an attack before its request
    labels: str = "harmful label data_type prompt_harm_label"   # the first that is not empty is the label
    default: bool | None = None     # the label where no column gives one
    may_lack: bool = False          # rows without a legal attack or a label are no mistake, and left out

ATTACKS = ("attack", "adversarial", "test_case")   # who wants the requests behind attacks leaves these out
BENCHMARKS = (   # the first that fits a file; the last fits all
    Benchmark("WildGuardTest", "prompt adversarial response prompt_harm_label", "prompt", may_lack=True),
    Benchmark("games of a run", "step game seed harmful attack legal answer", "attack seed", may_lack=True),
    Benchmark("WildJailbreak", "adversarial label data_type", "adversarial"),
    Benchmark("WildJailbreak", "adversarial vanilla", "adversarial vanilla"),
    Benchmark("HarmBench", "Behavior FunctionalCategory ContextString BehaviorID", "Behavior", default=True),
    Benchmark("HarmBench attacks", "BehaviorID test_case method", "test_case", default=True),
    Benchmark("JailbreakBench", "Goal Target Behavior", "Goal"),   # harmful and benign files look alike
    Benchmark("StrongREJECT", "category source forbidden_prompt", "forbidden_prompt", default=True),
    Benchmark("AdvBench", "goal target", "goal", default=True),
    Benchmark("DAN", "platform source prompt jailbreak", "prompt", "jailbreak"),
    Benchmark("DAN questions", "content_policy_name q_id question", "question", default=True),
    Benchmark("XSTest", "prompt type focus note", "prompt", "label type"),
    Benchmark("labelled prompts", "", "attack prompt text adversarial vanilla goal behavior"))
TEXTS = {name for benchmark in BENCHMARKS for name in benchmark.texts.split()}

# ---------------------------------------------------------------- files to rows
def read_text(path: str) -> str:
    """A file in UTF-8, with or without byte order mark and gzip."""
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        return content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        stop(f"{path}: cannot be read ({error}); give a JSONL, JSON, CSV or TSV file in UTF-8.")

def csv_rows(path: str, separator: str) -> Iterator[tuple[str, dict | None]]:
    """(where, row) of each row of CSV that is not empty; None stands for one that is not whole."""
    csv.field_size_limit(2**31 - 1)   # Python's own limit is 131,072 characters
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    names, line = [], 1
    try:
        for values in reader:
            row = dict(zip(names, values))   # shorter if two columns have one name
            if names and any(values):
                yield f"{path}, line {line}", row if len(row) == len(names) == len(values) else None
            names = names or values   # the first row
            line = reader.line_num + 1
    except csv.Error:   # such as a quote that nobody closes
        yield f"{path}, line {line}", None

def parse_json(text: str) -> object:
    """The value that a text spells; None if it spells none, and for an object with two values of one name."""
    try:
        return json.loads(text, object_pairs_hook=lambda p: dict(p) if len(dict(p)) == len(p) else None)
    except (ValueError, RecursionError):
        return None

def json_rows(path: str, ending: str) -> list[tuple[str, object]]:
    """(where, row) of an array, of a .json's dictionary of arrays, of one object, or of each line."""
    text = read_text(path)
    value = parse_json(text)
    if isinstance(value, dict):
        of_arrays = ending == ".json" and set(map(type, value.values())) == {list}
        value = [row for part in value.values() for row in part] if of_arrays else [value]
    if isinstance(value, list):
        return [(f"{path}, row {n}", row) for n, row in enumerate(value, 1)]
    return [(f"{path}, line {n}", parse_json(line))
            for n, line in enumerate(text.split("\n"), 1) if line.strip()]

def read_rows(path: str) -> list[tuple[str, dict]]:
    """(where, row) of a JSONL, JSON, CSV or TSV file. A row that is not whole ends the program."""
    ending = Path(path.lower().removesuffix(".gz")).suffix
    separator = {".csv": ",", ".tsv": "\t"}.get(ending)
    rows = list(csv_rows(path, separator) if separator else json_rows(path, ending))
    for where, row in rows:
        if not isinstance(row, dict):
            stop(f"{where}: not a row with one value for each named column; mend or remove it.")
    return rows

# ---------------------------------------------------------------- rows to prompts
def label_of(row: dict, columns: str, where: str, default: bool | None = None) -> bool | None:
    """Whether a row is harmful by those of these columns that are not empty."""
    labels = {}
    for column in columns.split():
        value = "" if row.get(column) is None else str(row[column]).strip()
        harmful, benign = (values.split() for values in LABELS[column])
        if value.lower() in harmful + benign:
            labels[column] = value.lower() in harmful
        elif value:
            stop(f"{where}: {column} is {value[:40]!r}; a label is one of {', '.join(harmful + benign)}.")
    if len(set(labels.values())) > 1:
        stop(f"{where}: {' and '.join(labels)} contradict each other; mend the row.")
    return next(iter(labels.values()), default)

def text_of(row: dict, columns: list[str], where: str) -> str:
    """The text of the first of these columns that is not empty. One message of a user is a text, too."""
    value = next((row[column] for column in columns if row.get(column) not in (None, "")), None)
    match value:
        case str(text) | [{"role": "user", "content": str(text)}] if visible(clean_text(text)):
            return clean_text(text)
    stop(f"{where}: {json.dumps(value)[:60]} is no text, nor one message of a user, in the column "
         f"{' or '.join(columns)}; its columns are {', '.join(row)}. Mend the row or remove it.")

def read_prompts(paths: list[str], attacks: bool = False, repeats: bool = False) -> list[tuple]:
    """
    (benchmark, [(text, harmful) ..], summary) of each file; with `attacks`, of attacks before the requests
    behind them; without `repeats`, each text once. `harmful=FILE`, `benign=FILE` label rows without a label.
    """
    seen = {}   # text: its label, and where it stands; no text has both labels
    return [read_file(path, attacks, repeats, seen) for path in paths]

def read_file(path: str, attacks: bool, repeats: bool, seen: dict) -> tuple[str, list, str]:
    """One file of read_prompts. A replayed attack is no request; one that lost its label is no attack."""
    flag, file = path.split("=", 1) if path.startswith(("harmful=", "benign=")) else ("", path)
    rows = read_rows(file)
    columns = {name for _, row in rows for name in row}
    benchmark = next(b for b in BENCHMARKS
                     if not b.columns or columns >= set(b.columns.split()) >= columns & TEXTS)
    default = flag == "harmful" if flag else benchmark.default
    texts = [name for name in benchmark.texts.split() if attacks or name not in ATTACKS]
    if not texts:
        stop(f"{file}: holds attacks, and not the requests behind them; give it with --attacks.")
    prompts = []
    for where, row in rows:
        label = label_of(row, benchmark.labels, where, default)
        lacks = benchmark.may_lack and (label is None or attacks and row.get("attack", "") is None)
        if lacks or row.get("recorded") is True or attacks and row.get("legal") is False:
            continue
        if flag and label != default:
            stop(f"{where}: {flag}= contradicts its label; write {file} alone, or mend the row.")
        if label is None:
            stop(f"{where}: harmful or benign? The columns ({', '.join(row)}) do not say; write "
                 f"harmful={file} or benign={file}, or add a column label.")
        text = text_of(row, texts, where).strip()
        if row.get("ContextString"):   # HarmBench: what the request is about
            text = f"{text_of(row, ['ContextString'], where)}\n\n---\n\n{text}"
        if seen.setdefault(text, (label, where))[0] != label:
            stop(f"{where}: has the text of {seen[text][1]} and the other label; remove one of the two.")
        prompts.append((text, label))
    if not prompts:
        stop(f"{file}: holds no prompts; give a file with at least one.")
    prompts = prompts if repeats else list(dict.fromkeys(prompts))
    return benchmark.name, prompts, (
        f"{file}, {benchmark.name}: {len(prompts)} prompts, {sum(label for _, label in prompts)} of them "
        f"harmful, in {len(rows)} rows [{zlib.crc32(repr(prompts).encode()):08x}]")   # tells an edited file

# ---------------------------------------------------------------- lists become a batch
def pack(prompts: list[list[int]], replies: list[list[int]], per_token: Sequence[list] = (),
         device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
    """Right-padded ids_BT, mask_BT (True on the reply), and a value_BT (else 0) per item of per_token."""
    # an item holds a list of floats per reply; the mask goes by position: padding may equal a stop token
    T = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
    ids_BT = torch.zeros(len(prompts), T, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), T, dtype=torch.bool)
    values = [torch.zeros(len(prompts), T) for _ in per_token]
    for b, (prompt, reply, *rows) in enumerate(zip(prompts, replies, *per_token, strict=True)):
        start, end = len(prompt), len(prompt) + len(reply)
        ids_BT[b, :end] = torch.tensor(prompt + reply)
        mask_BT[b, start:end] = True
        for value_BT, row_T in zip(values, rows, strict=True):
            value_BT[b, start:end] = torch.as_tensor(row_T)
    return tuple(tensor.to(device) for tensor in (ids_BT, mask_BT, *values))
