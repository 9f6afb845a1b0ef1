"""The benchmarks with tiny sizes: every section runs, and both sides of each comparison compute the same."""
import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

import bench
import bench_gpu
from conftest import measured
from model import Transformer
from sample import DecodeBatch

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
    assert all(row["ratio"] > 0 for row in rows)
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    printed = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in printed if line.startswith("|")} == {9}, "a table of eight columns"


def test_a_section_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["heads"], TINY)
    assert "no section heads; there are head, sampler, step" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_both_sides_have_the_same_weights_and_score_the_same_tokens(tied):
    config = bench.sized(LlamaConfig, 64, 32, 64, 2, 4, 2, 0.3, tied)
    pair = bench.Pair(config, WORKLOAD, TINY)
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


def test_a_comparison_that_takes_long_stops_after_two_rounds():
    times = bench.time_in_turns({"ours": lambda: 1}, replace(TINY, rounds=9, patience_s=0))
    assert len(times["ours"]) == 2


# ---------------------------------------------------------------- what runs on a GPU

FIRST, SECOND, THIRD = bench_gpu.GPU.models
SMALL = replace(TINY, models={
    FIRST: (bench.sized(Qwen2Config, 64, 32, 64, 2, 4, 2, 0.3, tied=True), WORKLOAD),
    SECOND: (bench.sized(LlamaConfig, 64, 32, 64, 2, 4, 2, 0.3), WORKLOAD),
    THIRD: (bench.sized(Qwen2Config, 64, 32, 64, 2, 4, 2, 0.3), WORKLOAD)})


class Replay:
    """In the place of a CUDA graph, which a CPU cannot record."""
    def replay(self):
        pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Small ceilings and decode steps on the CPU, and stand-ins for what only a GPU has."""
    for module in (bench, bench_gpu):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    for name, value in {"MATMUL": 64, "COPY": 1000, "ROWS": 4, "CONTEXT": 16}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    stand_ins = {"CUDAGraph": Replay, "graph": lambda graph, **options: nullcontext(),
                 "get_device_name": lambda: "no GPU", "reset_peak_memory_stats": lambda: None}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("too small")


def test_on_a_gpu_the_same_command_runs_the_sections_of_a_gpu(monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bench_gpu", SimpleNamespace(main=lambda: ran.append("bench_gpu")))
    runpy.run_path(bench.__file__, run_name="__main__")
    assert ran == ["bench_gpu"]


def test_every_section_of_a_gpu_runs_through(tmp_path, capsys):
    rows = bench_gpu.main(["--json", str(tmp_path / "rows.json")], SMALL)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {9}, "a table of eight columns"
    assert [row["section"] for row in rows if row["measured"] is None] == ["step"], "what is left out"
    reached = {row["goal"].partition(":")[0] for row in rows}
    assert reached >= {"H1", "H2", "H7", "H8", "D1", "D2", "D3", "D4", "M1", "S2"}
    goal = {row["what"]: row["goal"] for row in rows}
    assert goal[f"decode step, {FIRST}"] == "D2: >= 0.35" and goal[f"decode step, {SECOND}"] == "D1: >= 0.60"


def test_the_goals_are_those_of_the_performance_report():
    bounds = {(goal[:2], *goal.split()[1:3]) for goal in bench_gpu.GOALS.values()}
    assert bounds == {
        ("H1", ">=", "0.70"), ("H2", ">=", "0.68"), ("H5", ">=", "0.95"), ("H6", ">=", "0.50"),
        ("H7", "<=", "0.6"), ("H8", "<=", "1e-4"), ("D1", ">=", "0.60"), ("D2", ">=", "0.35"),
        ("D3", ">=", "8"), ("D3", ">=", "3"), ("D4", ">=", "0.70"), ("M1", "<=", "5e-3"),
        ("S2", ">=", "0.35"), ("S2", ">=", "0.45")}


def test_a_goal_is_for_a_row_that_exists():
    shapes = [" x ".join(map(str, shape)) for shape in bench_gpu.GPU.heads]
    for name in bench_gpu.GOALS:
        subject = name.partition(", ")[2]
        assert not subject or subject in (*shapes, *bench_gpu.GPU.models)


@pytest.mark.parametrize("what, measured_ms, floor, met", [
    ("forward", 10.0, 7.0, "yes"), ("forward", 10.0, 6.9, "no"), ("forward", None, 7.0, ""),
    ("memory", 0.6, None, "yes"), ("memory", 0.61, None, "no"), ("memory", None, None, ""),
    ("largest error", float("nan"), None, "no"), ("score", 10.0, 7.0, "")])
def test_a_goal_is_met_by_a_measurement_alone(what, measured_ms, floor, met):
    assert bench_gpu.print_row("any", what, "any", measured_ms, "ms", floor)["met"] == met


# ---------------------------------------------------------------- floors

@pytest.fixture
def h200():
    """The ceilings that the performance report computes with: 790 TFLOP/s and 4.3 TB/s."""
    measurements = bench_gpu.Measurements(SMALL)
    measurements.flops_per_ms, measurements.bytes_per_ms = 790e9, 4.3e9
    return measurements


@pytest.mark.parametrize("name, step_ms, attention_ms", [
    # weights / BW or 2 P B / R, and keys and values / BW, from the report's table of rooflines
    (FIRST, 1.07, 256 * 1024 * 12288 / 4.3e9),
    (SECOND, 12.85, 256 * 1024 * 131072 / 4.3e9),
    (THIRD, 8.08, 256 * 1024 * 57344 / 4.3e9)])
def test_the_floor_of_a_decode_step_is_the_reports(h200, monkeypatch, name, step_ms, attention_ms):
    monkeypatch.setattr(bench_gpu, "ROWS", 256)
    monkeypatch.setattr(bench_gpu, "CONTEXT", 1024)
    with torch.device("meta"):
        model = Transformer(bench_gpu.GPU.models[name][0]).to(torch.bfloat16)
    floor, attention = h200.decode_floor(model)
    assert floor == pytest.approx(step_ms, abs=0.006)
    assert attention == pytest.approx(attention_ms)


def test_the_floor_of_the_head_is_two_flops_a_product_and_four_times_that_with_the_backward_pass(h200):
    h200.flops_per_ms = 1000.0
    parts = h200.head("64 x 16 x 100")
    assert parts["forward"].args[2] == 2 * 64 * 16 * 100 / 1000 and parts["both passes"].args[2] == 819.2


def test_the_floor_of_an_update_is_six_flops_a_parameter_and_token(h200):
    h200.flops_per_ms = 1.0
    parts = h200.step(FIRST)
    pair = bench.Pair(SMALL.models[FIRST][0], SMALL.step, SMALL)
    replies = sum(len(reply.ids) for reply in pair.sample())
    tokens = replies + sum(len(prompt) for prompt in pair.prompts)
    # a layer: queries, keys and values with their bias; output; gate and up; down; two norms
    layer = 64 * 32 + 64 + 32 * 32 + 128 * 32 + 32 * 64 + 2 * 32
    assert parts["update"].args[2] == 6 * (2 * layer * tokens + 64 * 32 * replies)
    assert parts["score"].args[2] * 3 == parts["update"].args[2] and parts["update"].args[1] == replies


def test_a_decode_step_stays_at_its_context():
    model = bench.random_model(SMALL.models[FIRST][0], torch.float32)
    batch = DecodeBatch(model, 4, 16, torch.rand(4, 2, dtype=torch.float64), 1.0)
    batch.cache.length_B.fill_(15)
    for _ in range(5):   # more steps than there are uniform numbers
        batch.step()
        assert batch.cache.length_B.tolist() == [15] * 4


# ---------------------------------------------------------------- what cannot be measured

def test_what_runs_out_of_memory_is_written_down_and_the_next_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(bench.HEADS, "dense", out_of_memory)
    rows = bench_gpu.main(["head"], SMALL)
    notes = {row["what"].partition(",")[0]: row["note"] for row in rows}
    assert notes.pop("dense vs ours") == "out of memory" and "| out of memory |" in capsys.readouterr().out
    assert len(notes) >= 4 and "out of memory" not in notes.values()


def test_a_model_that_does_not_fit_is_written_down_and_the_next_goes_on(monkeypatch):
    make = {FIRST: bench.random_model, SECOND: out_of_memory, THIRD: bench.random_model}
    configs = [config for config, _ in SMALL.models.values()]

    def random_model(config, dtype):
        name = list(make)[configs.index(config)]
        return make[name](config, dtype)
    monkeypatch.setattr(bench, "random_model", random_model)
    rows = bench_gpu.main(["decode"], SMALL)
    assert [row["what"] for row in rows if row["note"] == "out of memory"] == [f"all, {SECOND}"]
    assert [row["what"] for row in rows][-1] == f"attention, {THIRD}" and len(rows) == 5


def test_a_section_whose_time_is_over_says_so(monkeypatch):
    monkeypatch.setitem(bench_gpu.UNTIL_S, "head", 0)
    rows = bench_gpu.main(["ceilings", "head"], SMALL)
    assert [row["note"] for row in rows[2:]] == ["not measured: no time was left"] * len(SMALL.heads)
    assert all(row["measured"] > 0 and row["met"] == "" for row in rows[:2])
