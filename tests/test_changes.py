"""
The README's table "Change one thing" is true: each of its changes is made on a copy of the project and run.

    copy the files -> replace lines -> python train.py, two steps -> its logs show the change

A change has at most MOST_LINES lines. It touches no file and no function that its row of the table does not
name. The unchanged project runs with the same seed for comparison.
"""
import ast
import difflib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from conftest import byte_tokenizer, measured
from launch import games, metrics, rows, run
from model import new_model, save

ROOT = Path(__file__).parent.parent
MOST_LINES = 12
SHORT = ["--steps", "2", "--games", "8", "--max-new-tokens", "24", "--seed", "5", "--no-exam"]


# ---------------------------------------------------------------- the table

@dataclass(frozen=True)
class Row:
    """A row of the table: what it changes, and the names in each file that it sends the reader to."""
    title: str
    places: dict[str, list[str]]


def table() -> dict[str, Row]:
    """
    The rows of "Change one thing" by their first cell. The second cell has names in backticks: a file, then
    what to touch in it. Flags are in backticks, too, and are left out.
    """
    section = re.split(r"^#+ ", (ROOT / "README.md").read_text(), flags=re.M)
    text = next(part for part in section if part.startswith("Change one thing"))
    body = re.split(r"^\|[ :|-]+\n", text, flags=re.M)[1]   # what is below the line of dashes
    by_title = {}
    for line in re.findall(r"^\| .*$", body, re.M):
        title, cell = line.strip("| ").split(" | ")[:2]
        places: dict[str, list[str]] = {}
        for word in re.findall(r"`([\w./]+)`", cell):
            if word.endswith((".py", ".md")):
                names = places.setdefault(word, [])
            else:
                names.append(word)
        by_title[title] = Row(title, places)
    return by_title


def definitions(code: str) -> dict[str, range]:
    """The lines of every function, class and constant at the top level of a file, by its name."""
    lines = {}
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for target in targets:
            name = getattr(target, "name", None) or getattr(target, "id", "")
            lines[name] = range(node.lineno, node.end_lineno + 1)
    lines.pop("", None)
    return lines


# ---------------------------------------------------------------- a change

@dataclass(frozen=True)
class Edit:
    """Exact text in a file, which occurs in it once, and what replaces it."""
    file: str
    old: str
    new: str


def copy_project(folder: Path, start: Path) -> Path:
    """Copy the project's files, and a model of the embedded world into the folder `start`."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(start / "step_000000", folder / "start")
    return folder


def changed_lines(old: str, new: str) -> list[int]:
    """The numbers, in the new text, of the lines that a change adds or alters."""
    numbers = []
    matcher = difflib.SequenceMatcher(a=old.splitlines(), b=new.splitlines(), autojunk=False)
    for kind, _, _, begin, end in matcher.get_opcodes():
        numbers += range(begin + 1, end + 1) if kind != "equal" else ()
    return numbers


def make_change(project: Path, row: Row, edits: list[Edit]) -> None:
    """Replace the lines; the change must be short, and the row must name each place that it touches."""
    n_lines = 0
    for file in dict.fromkeys(edit.file for edit in edits):
        assert file in row.places, f"the row {row.title!r} does not name {file}"
        before = after = (project / file).read_text()
        for edit in [edit for edit in edits if edit.file == file]:
            assert after.count(edit.old) == 1, f"{file} has {after.count(edit.old)} times {edit.old!r}"
            after = after.replace(edit.old, edit.new)
        (project / file).write_text(after)
        numbers = changed_lines(before, after)
        n_lines += len(numbers)
        if file.endswith(".py"):
            new = definitions(after).keys() - definitions(before).keys()
            for name, lines in definitions(after).items():
                if name not in new and not set(lines).isdisjoint(numbers):
                    assert name in row.places[file], f"the row {row.title!r} does not name {file}: {name}"
    print(f"\n    {row.title}: {n_lines} lines, allowed {MOST_LINES}", end="")
    assert n_lines <= MOST_LINES


def run_script(project: Path, args: list[str], rank: int) -> None:
    """
    Run a script of a copy as the main program. The process is a fork of one that has imported torch and this
    project's modules; it forgets the latter, so that the script imports those of the copy.
    """
    product = {"kernels", *(file.stem for file in project.glob("*.py"))}
    for name in [name for name in sys.modules if name.partition(".")[0] in product]:
        del sys.modules[name]
    os.chdir(project)
    sys.path.insert(0, str(project))
    sys.argv = args
    runpy.run_path(args[0], run_name="__main__")


def run_python(project: Path, *args: object) -> str:
    """Run a script of a copy; returns what it printed."""
    done = run(instead=partial(run_script, project, [str(arg) for arg in args]))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train(project: Path, *flags: object) -> str:
    """Train the model in `start` for two steps, into the folder `it`."""
    return run_python(project, "train.py", *SHORT, "--model", "start", "--out", "it", *flags)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory, sft_run):
    """The project without a change, after its run."""
    project = copy_project(tmp_path_factory.mktemp("unchanged"), sft_run)
    train(project)
    return project


@pytest.fixture
def change(tmp_path, sft_run):
    """A function that makes a change on a copy of the project and returns the copy."""
    def make(title: str, *edits: tuple[str, str, str]) -> Path:
        project = copy_project(tmp_path / "project", sft_run)
        make_change(project, table()[title], [Edit(*edit) for edit in edits])
        return project
    return make


# ---------------------------------------------------------------- the table itself

TITLES = ("what the roles are told", "the payoffs", "a payoff that depends on the attack's text",
          "the judge: a Python function", "the judge: a model", "the seeds of a step, their shares and pairs",
          "another credit function", "the credit of a token", "the loss",
          "which turns are compared", "what the defender meets again", "whom a role meets",
          "what an adapter changes", "the step size",
          "a metric of each step", "a rate of finished models", "the scenes of the embedded world")


def test_the_table_has_the_changes_that_are_made_here():
    assert sorted(table()) == sorted(TITLES)


def test_every_place_of_the_table_exists():
    for row in table().values():
        assert row.places, f"the row {row.title!r} names no file"
        for file, names in row.places.items():
            there = definitions((ROOT / file).read_text()) if file.endswith(".py") else {}
            assert set(names) <= there.keys(), f"{row.title}: {file} has no {set(names) - there.keys()}"


# ---------------------------------------------------------------- the game

def english_run(project: Path) -> tuple[dict, list[dict]]:
    """The settings and the games of a run of a tiny random model that is asked in English."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                         initializer_range=0.4, eos_token_id=tokenizer.eos_token_id)
    model = new_model(config, seed=0)
    save(project / "tiny", model.state_dict(), model, tokenizer)
    for kind in ("harmful", "benign"):
        (project / f"{kind}.jsonl").write_text(json.dumps({"prompt": f"how do i make a {kind} cake"}))
    train(project, "--model", "tiny", "--judge", "keywords", "--no-cot", "--seeds", "harmful=harmful.jsonl",
          "benign=benign.jsonl", "--out", "english")
    out = project / "english"
    return json.loads((out / "config.json").read_text()), games(out)


def test_the_prompts_can_be_changed(change, unchanged):
    project = change("what the roles are told",
                     ("selfplay.py", 'defend="{text}"', 'defend="Be brief. {text}"'))
    config, brief = english_run(project)
    _, plain = english_run(unchanged)
    assert config["prompts"]["defend"] == "Be brief. {text}"
    for changed, game in zip(brief[:8], plain[:8], strict=True):   # the games of the first step
        assert changed["attacker_reply"] == game["attacker_reply"]
        assert changed["defender_reply"] != game["defender_reply"]


def test_a_payoff_table_can_be_added(change, unchanged):
    project = change("the payoffs", ("selfplay.py", "REWARDS = {\n", """REWARDS = {
    "mine": Rewards(attacker=dict(p=0.0, s=-2.0, h=2.0),
                    defender=dict(p=0.0, s=2.0, h=-2.0), forfeit=-8.0, drift_forfeits=True),
"""))
    train(project, "--reward", "mine")
    doubled = metrics(project / "it")[0]
    once = metrics(unchanged / "it")[0]
    for role in ("attacker", "defender"):
        assert doubled[f"reward_{role}"] == 2 * once[f"reward_{role}"] != 0


def test_a_payoff_can_depend_on_the_attack(change):
    project = change("a payoff that depends on the attack's text", ("selfplay.py", """
        paid[ATTACKER] = payoff(rewards.attacker, sign)
""", """
        paid[ATTACKER] = payoff(rewards.attacker, sign)
        if paid[ATTACKER] is not None:
            paid[ATTACKER] -= 0.01 * len(game.asked.split())   # a word costs 0.01
"""))
    # any attack that is passed on is legal to this judge; few are, after so short an SFT
    train(project, "--judge", "keywords", "--games", "32")
    words = Counter({1: 0, 2: 0})
    for game in games(project / "it"):
        words[game["step"]] += len(game["attack"].split()) if game["legal"] else 0
    assert words.total() > 0
    for step in metrics(project / "it"):
        error = abs(step["zero_sum_gap"] + 0.01 * words[step["step"]])
        measured("sum of payoffs and of the cost", error, 1e-9)


def test_a_function_can_be_the_judge_of_the_embedded_world(change):
    project = change("the judge: a Python function", ("judge.py", """
JUDGES: dict[str, Judge] = {"keywords": keywords}""", '''
def is_long(prompt: str, response: str) -> bool:
    """A judge that suspects long answers."""
    return len(response) > 12


JUDGES: dict[str, Judge] = {"keywords": keywords, "mine": from_function(is_long)}'''))
    train(project, "--judge", "mine", "--games", "32")
    assert json.loads((project / "it" / "config.json").read_text())["prompts"]["defend"] == "{text}"
    harmful = [game for game in games(project / "it") if game["harmful"]]
    verdicts = [game["verdict"]["response_harmful"] for game in harmful]
    assert verdicts == [len(game["answer"]) > 12 for game in harmful]
    assert set(verdicts) == {True, False}


def test_a_format_of_judge_models_can_be_added(change, judge_stand_in):
    project = change("the judge: a model", ("judge.py", "FORMATS = {\n", '''FORMATS = {
    "mine": (   # WildGuard's template, but only the first line of its reply counts
        JudgePrompt(wildguard_template, ("prompt", "response"), (
            Field("Harmful request", YES_NO, "prompt_harmful"),)),),
'''))
    stand_in = judge_stand_in
    save(project / "judge", stand_in.model.state_dict(), stand_in.model, stand_in.tokenizer)
    train(project, "--judge", "mine:judge", "--games", "32")
    verdicts = [game["verdict"] for game in games(project / "it") if game["answer"]]
    labels = [verdict["prompt_harmful"] for verdict in verdicts if verdict["readable"]]
    print(f"\n    {len(labels)} of {len(verdicts)} verdicts are readable", end="")
    assert labels and None not in labels
    assert all(verdict["response_harmful"] is None for verdict in verdicts)
    assert all((verdict["refusal"] is None) == (not verdict["readable"]) for verdict in verdicts)


# ---------------------------------------------------------------- the seeds of a step

SHARES = ("selfplay.py", "    share = games // (len(pools) * repeat)\n",
          "    pools = [pools[n] for n in (0, 0, 0, 2)]   # all for the attacker, three in four harmful\n"
          "    share = games // (len(pools) * repeat)\n")
PAIRS = ("selfplay.py", 'stream("seeds", seed, epoch, i)', 'stream("seeds", seed, epoch, i // 2)')


def test_the_shares_of_the_kinds_of_seeds_can_be_changed(change):
    project = change("the seeds of a step, their shares and pairs", SHARES)
    train(project)
    played = games(project / "it")
    assert all(game["attacker_reply"] is not None for game in played)
    assert sum(game["harmful"] for game in played) == 12, "of 16"


def test_seeds_can_be_paired(change, unchanged):
    project = change("the seeds of a step, their shares and pairs", PAIRS)
    train(project)
    for folder, paired in ((project, True), (unchanged, False)):
        played = games(folder / "it")
        for attacked, raw in zip(played[::2], played[1::2], strict=True):
            assert attacked["attacker_reply"] is not None and raw["attacker_reply"] is None
            assert (attacked["seed"] == raw["seed"]) == paired, "each seed is asked both attacked and raw"


# ---------------------------------------------------------------- credit and loss

def largest_loss(project: Path) -> float:
    """The largest loss of a run's steps. With centred advantages it is 0, but for rounding errors."""
    return max(abs(step["loss"]) for step in metrics(project / "it"))


def gradient_norm(project: Path) -> float:
    """That of the first step, in which every change plays the same games."""
    return metrics(project / "it")[0]["grad_norm"]


GRPO = ("selfplay.py", """CREDITS = {
""", """CREDITS = {
    "grpo": partial(whiten, floor=1e-4, kind=lambda e: (e.turn.role, *e.turn.prompt_ids)),
""")
BEST = ("selfplay.py", """CREDITS = {
""", '''def best_of_group(values: list[np.ndarray], experiences: list[Experience]) -> list[np.ndarray]:
    """Learn from the best turn of each prompt alone."""
    advantages = [np.zeros_like(value_T) for value_T in values]
    for group in groups_of(experiences):
        best = max(group, key=lambda n: experiences[n].payoff)
        advantages[best] = np.ones_like(values[best])
    return advantages


CREDITS = {
    "best": best_of_group,
''')
TWICE = ["--attacks-per-seed", "2"]


def test_a_credit_can_be_added_as_a_row_of_what_is_there(change):
    """GRPO (Shao et al., arXiv 2402.03300): centred and divided within each group of turns of one prompt."""
    project = change("another credit function", GRPO)
    train(project, *TWICE, "--credit", "grpo")
    grpo = gradient_norm(project)
    assert largest_loss(project) < 1e-6, "every group has the mean 0"
    played = games(project / "it")
    twice = list(zip(played[::2], played[1::2], strict=True))
    assert all(first["seed"] == second["seed"] for first, second in twice)
    assert any(first["attacker_reply"] != second["attacker_reply"] for first, second in twice)
    train(project, *TWICE, "--credit", "group", "--out", "group")
    group = metrics(project / "group")[0]["grad_norm"]
    print(f"\n    gradient norm {grpo:.3f}; not divided, of the payoffs' scale: {group:.3f}", end="")
    assert not np.isclose(grpo, group, rtol=1e-2)


def test_a_credit_can_be_added_as_a_function(change):
    """Advantages of 1 and 0: the loss is minus the share of tokens that belong to the best turns."""
    project = change("another credit function", BEST)
    train(project, *TWICE, "--credit", "best", "--no-balance")   # a token is a token
    shares = [-step["loss"] for step in metrics(project / "it")]
    print(f"\n    shares of tokens in the best turn of their prompt: {shares}", end="")
    assert all(0.3 < share < 1 for share in shares)


def test_advantages_need_not_be_centred(change, unchanged):
    project = change("the credit of a token", ("selfplay.py", """CREDITS = {
""", """CREDITS = {
    "returns": lambda values, experiences: values,
"""))
    train(project, "--credit", "returns")
    assert largest_loss(unchanged) < 1e-6 and largest_loss(project) > 1e-2


def test_the_deviation_can_have_another_floor(change, unchanged):
    project = change("the credit of a token", ("selfplay.py", "floor=2.0", "floor=20.0"))
    train(project)
    assert gradient_norm(project) < 0.3 * gradient_norm(unchanged), "payoffs that differ little teach less"


def test_returns_can_be_discounted(change, unchanged):
    project = change("the credit of a token", ("selfplay.py", """
    return reward_T[::-1].cumsum()[::-1].copy()""", """
    following_T = np.arange(len(reward_T))[::-1]
    return 0.9 ** following_T * reward_T[::-1].cumsum()[::-1]"""))
    train(project)
    assert not np.isclose(gradient_norm(project), gradient_norm(unchanged), rtol=1e-2)
    assert largest_loss(project) < 1e-6, "they are centred as before"


def test_all_attacks_on_a_label_can_be_one_group(change, unchanged):
    """Then attacks on different seeds are compared, and fewer groups earn the same."""
    project = change("which turns are compared", (
        "selfplay.py", "groups[e.turn.role, *e.turn.prompt_ids]", "groups[e.turn.role, e.harmful]"))
    flags = ["--credit", "group", "--attacks-per-seed", "2", "--games", "32"]
    train(project, *flags)
    train(unchanged, *flags, "--out", "groups")
    changed, same_seed = (metrics(out)[0]["equal_groups"] for out in (project / "it", unchanged / "groups"))
    print(f"\n    equal groups: {changed:.2f}, of attacks on one seed {same_seed:.2f}", end="")
    assert changed < same_seed and gradient_norm(project) > 0


def test_the_defender_can_meet_the_latest_attacks_alone(change):
    project = change("what the defender meets again",
                     ("selfplay.py", "for attack in past if", "for attack in past[-1:] if"))
    train(project, "--judge", "keywords", "--games", "32", "--steps", "4", "--replay", "1")
    played = games(project / "it")
    for step in range(2, 5):
        replayed = {game["seed"] for game in played if game["step"] == step and game["recorded"]}
        earlier = [game["attack"] for game in played if game["step"] < step and game["legal"]]
        assert replayed <= set(earlier[-1:])
    assert any(game["recorded"] for game in played)


def test_a_role_can_meet_the_start_alone(change):
    project = change("whom a role meets", (
        "train.py", "folders, weights = mixtures.get(role, (own, None))", "folders, weights = own[:1], None"))
    train(project, "--opponent", "past", "--opponent-share", "1", "--save-every", "1")
    deviations = [line["payoff_deviation_attacker"] is None for line in metrics(project / "it")]
    assert deviations == [True, False], "the start attacks, then it defends"


def test_an_adapter_can_have_another_scale(change, unchanged):
    project = change("what an adapter changes", ("model.py", "LORA_SCALE = 2 ", "LORA_SCALE = 1 "))
    for folder in (project, unchanged):
        train(folder, "--adapter-rank", "4", "--out", "adapted")
    half, whole = (metrics(folder / "adapted")[0]["grad_norm"] for folder in (project, unchanged))
    measured("gradient at half the scale, over half the gradient, minus 1", abs(2 * half / whole - 1), 1e-3)


def test_the_step_size_can_stay_at_its_peak(change, unchanged):
    project = change("the step size", ("train.py", "(0.1 + 0.9 * cosine)", "1"))
    train(project, "--steps", "3")
    assert [line["lr"] for line in metrics(project / "it")] == [5e-4] * 3


def test_the_loss_can_be_plain_reinforce(change, unchanged):
    project = change("the loss", (
        "train.py", "gain_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)",
        "gain_BT = logprob_BT * advantage_BT"))
    train(project)
    assert largest_loss(project) > 1e-2
    error = abs(gradient_norm(project) / gradient_norm(unchanged) - 1)
    measured("gradient of both losses where the ratio is 1", error, 1e-4)


# ---------------------------------------------------------------- what is measured

def test_a_metric_can_be_logged_printed_drawn_and_explained(change):
    project = change(
        "a metric of each step",
        ("selfplay.py", """
            "forfeit": mean(""", """
            "asks_how": mean(["how" in g.asked.split() for g in attempts if g.attacked]),
            "forfeit": mean("""),
        ("train.py", '("forfeit", "forfeit")', '("forfeit", "forfeit"), ("asks how", "asks_how")'),
        ("eval.py", r"""
    "kl": "KL to the start\n(nats per token)"}""", r"""
    "kl": "KL to the start\n(nats per token)",
    "asks_how": "attacks that ask how"}"""),
        ("README.md", "\n| `drift` |", "\n| `asks_how` | attacks with the word how | |\n| `drift` |"))
    printed = train(project, "--judge", "keywords")
    for step in metrics(project / "it"):
        attacks = [game["attack"] for game in games(project / "it") if game["step"] == step["step"]]
        asks_how = ["how" in attack.split() for attack in attacks if attack]
        assert step["asks_how"] == (np.mean(asks_how) if asks_how else None)
        shown = f"{step['asks_how']:.0%}" if asks_how else "--"
        assert re.search(rf"step +{step['step']}/2 .*\| asks how +{shown} \|", printed)
        explained = re.findall(r"`([a-z_]+)`", (project / "README.md").read_text())
        assert step.keys() <= set(explained), step.keys() - set(explained)
    titles = titles_of_panels(project)
    assert len(titles) == 6 and titles[-1] == "attacks that ask how"


PANELS = """
import json, runpy, sys
from matplotlib.figure import Figure
drawn, save = [], Figure.savefig
Figure.savefig = lambda figure, *args, **flags: (drawn.append(figure), save(figure, *args, **flags))
sys.argv = ["eval.py", "plot", "it"]
runpy.run_path("eval.py", run_name="__main__")
print(json.dumps([panel.get_title() for panel in drawn[0].axes]))
"""


def titles_of_panels(project: Path) -> list[str]:
    """The titles of the panels that `eval.py plot` draws, read from matplotlib's figure."""
    (project / "panels.py").write_text(PANELS)
    titles = json.loads(run_python(project, "panels.py").splitlines()[-1])
    assert (project / "it" / "curves.png").stat().st_size > 0
    return titles


def test_a_rate_of_finished_models_can_be_added(change):
    project = change("a rate of finished models", ("eval.py", """
    result["unreadable"] = rate([""", """
    result["sorry"] = rate(["sorry" in (line["response"] or "") for line in lines])
    result["unreadable"] = rate(["""), (
        "eval.py", "RATES = HEADLINE | {", 'RATES = HEADLINE | {"sorry": "says sorry", '))
    asked = [{"prompt": f"how do i {verb} it", "harmful": verb == "burn"} for verb in ("burn", "paint")]
    (project / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    printed = run_python(project, "eval.py", "bench", "start", "--prompts", "prompts.jsonl",
                         "--transcripts", "answers.jsonl", "--json", "rates.json")
    [rates] = json.loads((project / "rates.json").read_text()).values()
    expected = np.mean(["sorry" in line["response"] for line in rows(project / "answers.jsonl")])
    assert "says sorry" in printed and rates["start"]["sorry"]["value"] == expected


# ---------------------------------------------------------------- the embedded world

PARSE = """
import toy
text = toy.Request(("burn", "castle"), ("king",), toy.FRAMES[-1]).text
print(f"{len(toy.FRAMES)} frames; {toy.parse(text).depth}; {toy.tactics_in(text)}")
"""


def test_a_scene_can_be_added(change):
    project = change("the scenes of the embedded world",
                     ("toy.py", '"play": "write a play"}', '"play": "write a play", "poem": "write a poem"}'))
    train(project, "--model", "toy", "--sft-steps", "2")   # other words, so another tokenizer and SFT
    assert '"poem"' in (project / "it" / "step_000002" / "tokenizer.json").read_text()
    (project / "parse.py").write_text(PARSE)
    assert run_python(project, "parse.py") == "33 frames; 1; ('write a poem', 1)\n"
