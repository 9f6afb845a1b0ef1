"""
How much better is a second model at a task of lm-eval, question by question? From what --log_samples writes:

    python tests/paired.py OLD/samples_gsm8k_DATE.jsonl NEW/samples_gsm8k_DATE.jsonl exact_match,strict-match

A metric is named as in lm-eval's results, without a filter if that is none. Prints the mean of new - old over
the questions, with the 95 % bootstrap interval of these differences (Efron, Annals of Statistics 1979).
Pairs take out how hard a question is for both (Miller, arXiv 2411.00640).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from arena import difference, interval
from data import read_rows
from kernels import stop


def scores(file: str, metric: str) -> dict:
    """The score of each question."""
    name, _, answer_filter = metric.partition(",")
    return {(row["doc_id"], row["doc_hash"]): float(row[name]) for _, row in read_rows(file)
            if row.get("filter") == (answer_filter or "none") and name in row}


def main() -> None:
    if len(sys.argv) != 4:
        stop("paired.py: give two sample logs of lm-eval and a metric.")
    old, new = (scores(file, sys.argv[3]) for file in sys.argv[1:3])
    if not old or old.keys() != new.keys():
        stop(f"paired.py: {len(old)} and {len(new)} scores, not of the same questions; give two logs of one "
             "task and a metric that it has.")
    result = difference([new[question] for question in old], list(old.values()))
    print(f"{sys.argv[3]}: {interval(result)}, n = {result['n']}")


if __name__ == "__main__":
    main()
