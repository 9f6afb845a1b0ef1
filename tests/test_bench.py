"""bench.py with tiny sizes: every section runs, and both sides of each comparison compute the same."""
import json

import pytest
import torch
from transformers import LlamaConfig

import bench
from conftest import measured

WORKLOAD = bench.Workload(prompts=8, prefixes=(5,), own=(4, 6), new_tokens=4, end_chance=1 / 4, rows=4)
TINY = bench.Sizes(
    dtype=torch.float32,
    heads=[(64, 16, 100)],
    models={"tiny": (bench.sized(LlamaConfig, 64, 32, 64, 2, 4, 2, 0.3), WORKLOAD)},
    step=WORKLOAD,
    micro_tokens=64,
    rounds=2,
)


def test_every_section_gives_rows_and_writes_them(tmp_path, capsys):
    rows = bench.main(["--json", str(tmp_path / "rows.json")], TINY)
    assert {row["section"] for row in rows} == {"head", "sampler", "step"}
    assert all(row["ratio"] > 0 for row in rows if row["note"] != "not installed")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    printed = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in printed if line.startswith("|")} == {9}, "a table of eight columns"


def test_a_section_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["heads"], TINY)
    assert "no section heads; there are head, sampler, step" in capsys.readouterr().err


@torch.no_grad()
def test_both_sides_have_the_same_weights_and_score_the_same_tokens():
    pair = bench.Pair(*TINY.models["tiny"], TINY)
    batch = pair.generate()[0]
    drawn_BT = batch.whole_BS[:, -4:]
    replies = [drawn_T[reply_T].tolist() for drawn_T, reply_T in zip(drawn_BT, batch.reply_BT, strict=True)]
    ids_BT, mask_BT = bench.pack(pair.prompts[:4], replies)
    ours_N = bench.score(pair.ours, ids_BT, mask_BT)[0][mask_BT]
    measured("log-probability", (ours_N - batch.score(pair.theirs)[batch.reply_BT]).abs().max(), 1e-5)


def test_both_sides_draw_from_the_same_distribution():
    """The mean log-probability of what is drawn is minus the entropy: the same on both sides."""
    workload = bench.Workload(prompts=512, prefixes=(), own=(4, 4), new_tokens=2, end_chance=0.0)
    pair = bench.Pair(TINY.models["tiny"][0], workload, TINY)
    ours = torch.tensor([p for reply in pair.sample() for p in reply.logprobs])
    theirs = torch.cat([batch.logprob_BT[batch.reply_BT] for batch in pair.generate()])
    assert len(ours) == len(theirs) == 1024
    deviation = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    distance = (ours.mean() - theirs.mean()).abs() / deviation
    measured("distance of the means, in standard deviations", distance, 4)
