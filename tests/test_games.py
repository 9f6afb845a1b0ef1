"""The page of games, in a real browser: what players wrote stays text, filters and counts are right."""
import html
import json
import re
import shutil
import subprocess
import sys

import pytest

import eval
from launch import games, metrics, succeeds
from test_outputs import refused

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
EVIL = '</script><script>document.title = "owned"</script>'
IMAGE = '<!--<script><img src="x" onerror="document.title = `owned`">'


def verdict(harmful, refusal, response_harmful, readable=True):
    return {"prompt_harmful": harmful, "refusal": refusal, "response_harmful": response_harmful,
            "readable": readable}


WON, HELD, ANSWERED = verdict(True, False, True), verdict(True, True, False), verdict(False, False, False)
UNREADABLE = verdict(None, None, None, readable=False)


def game(step, number, of_judge, attack="try this", harmful=True, legal=True, recorded=False):
    """A line of games.jsonl. An attack of None and a `legal` of None make a raw game."""
    raw = legal is None
    return {"step": step, "game": number, "seed": f"seed {step}.{number}", "harmful": harmful,
            "recorded": recorded, "attack": attack, "legal": legal, "answer": "an answer",
            "verdict": of_judge,
            "attacker_reply": None if raw else f"a plan </think> <answer> {attack} </answer>",
            "defender_reply": "a thought </think> <answer> an answer </answer>"}


GAMES = [game(1, 0, WON, attack=EVIL), game(1, 1, HELD, attack=IMAGE), game(1, 2, WON, None, legal=None),
         game(1, 3, ANSWERED, harmful=False), game(1, 4, UNREADABLE),
         game(2, 0, HELD, attack="the king"), game(2, 1, HELD, None, legal=False),
         game(3, 0, WON), game(3, 1, WON, None, legal=None, recorded=True), game(3, 2, HELD),
         game(3, 3, HELD, legal=False)]
# harmful answers among readable attacks that were passed on, on harmful seeds: counted by hand
BARS = ["step 1: 1 of 2", "step 2: 0 of 1", "step 3: 1 of 3"]


def write_page(folder, rows):
    """The page of a run with these games."""
    folder.mkdir(exist_ok=True)
    (folder / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", "games", str(folder)])
        eval.main()
    return folder / "games.html"


def test_the_page_of_a_file_of_games_is_beside_it(tmp_path, monkeypatch):
    (tmp_path / "attacks.jsonl").write_text(json.dumps(GAMES[0]))
    monkeypatch.chdir(tmp_path)
    eval.main(["games", "attacks.jsonl"])
    assert (tmp_path / "games.html").exists()


def opened(page, script=""):
    """The page's HTML after its code and, at its end, this script have run in a browser without a network."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text("utf-8") + f"<script>{script}</script>", "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
             f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shown(dom):
    """(step, game) of each game on the screen."""
    return [tuple(map(int, pair)) for pair in re.findall(r"<small>step (\d+), game (\d+)</small>", dom)]


def choose(**values):
    """A script that sets filters, as a person would."""
    return "".join(f"at('{name}').value = '{value}'; at('{name}').oninput();"
                   for name, value in values.items())


def test_an_attack_that_spells_a_script_stays_text_in_a_browser(tmp_path):
    dom = opened(write_page(tmp_path / "run", GAMES))
    assert "<title>Games of" in dom and "<title>owned" not in dom and "<img" not in dom
    for text in (EVIL, IMAGE):
        assert f"<span>{html.escape(text, quote=False)}</span>" in dom, "as it was written"
    assert "a plan &lt;/think&gt; &lt;answer&gt;" in dom, "and so are the tags of replies"


def test_no_text_of_a_game_can_end_the_script_it_stands_in(tmp_path):
    """Without a browser: beside the data, the page is the template."""
    page = write_page(tmp_path / "run", GAMES).read_text("utf-8")
    before, after = eval.GAMES_PAGE.read_text().split("DATA")
    data = page.removeprefix(before).removesuffix(after)
    assert "<" not in data and json.loads(data)["games"] == GAMES
    assert not re.search(r"https?:|src=|href=|@import|fetch\(", before + after), "nothing is loaded"


def test_the_chart_counts_harmful_answers_to_attacks_by_step(tmp_path):
    dom = opened(write_page(tmp_path / "run", GAMES))
    assert re.findall(r'<a title="(step [^"]*)"', dom) == BARS
    assert re.findall(r'<i style="height: ([\d.]+)%', dom) == ["50", "0", "33.3333"]


def test_a_run_without_attacks_charts_its_raw_harmful_requests(tmp_path):
    rows = [game(1, 0, WON, None, legal=None), game(1, 1, HELD, None, legal=None),
            game(1, 2, ANSWERED, None, harmful=False, legal=None)]
    dom = opened(write_page(tmp_path / "run", rows))
    assert 'title="step 1: 1 of 2"' in dom and "harmful answers to raw harmful requests" in dom


ALL = [(row["step"], row["game"]) for row in GAMES]
CLICK = "document.querySelectorAll('#chart a')[1].click();"
FILTERS = {   # what a person does: the games that are left, by hand
    "nothing": ("", ALL),
    "a click": (CLICK, [(2, 0), (2, 1)]),
    "two clicks": (CLICK + CLICK, ALL),
    "step and verdict": (choose(step=3, verdict="refused"), [(3, 2), (3, 3)]),
    "raw": (choose(seed="harmful, raw"), [(1, 2)]),
    "recorded": (choose(seed="harmful, recorded"), [(3, 1)]),
    "benign": (choose(seed="benign, attacked"), [(1, 3)]),
    "unreadable": (choose(verdict="unreadable"), [(1, 4)]),
    "legal wins": (choose(verdict="harmful answer", attack="legal"), [(1, 0), (3, 0)]),
    "not legal": (choose(attack="not legal"), [(2, 1), (3, 3)]),
    "words": (choose(search="THE KING"), [(2, 0)]),
    "other words": (choose(search="no such words"), [])}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """The list of games on the screen after each of FILTERS, all in one browser."""
    script = "const lists = {};"
    for name, (action, _) in FILTERS.items():
        clear = choose(**dict.fromkeys(("step", "seed", "verdict", "attack", "search"), ""))
        script += f"{clear}{action} lists['{name}'] = at('main').innerHTML;"
    script += "document.body.replaceChildren(JSON.stringify(lists));"
    dom = opened(write_page(tmp_path_factory.mktemp("filters") / "run", GAMES), script)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", dom, re.S)[1]))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_the_games_that_they_name(name, filtered):
    assert shown(filtered[name]) == FILTERS[name][1]


def test_thoughts_are_folded(tmp_path):
    dom = opened(write_page(tmp_path / "run", GAMES[:1]))
    assert dom.count("<details><summary>") == 2 and "<details open" not in dom


def test_many_games_are_shown_a_page_at_a_time(tmp_path):
    rows = [game(1 + n // 1000, n % 1000, WON if n % 3 else HELD) for n in range(20_000)]
    page = write_page(tmp_path / "run", rows)
    turn = "at('next').click(); at('next').click(); at('back').click();"
    timed = "const t = performance.now(); show(50); document.title = `${performance.now() - t} ms`;"
    dom = opened(page, turn + timed)
    assert shown(dom) == [(1, n) for n in range(50, 100)] and "games 51 to 100 of 20000" in dom
    milliseconds = float(re.search(r"<title>([\d.]+) ms", dom)[1])
    print(f"\n    20,000 games, filtered and drawn: {milliseconds:.0f} ms, allowed 2000", end="")
    assert milliseconds < 2000
    last = "at('step').value = 20; show(0);" + 25 * "at('next').click();"
    assert shown(opened(page, last)) == [(20, n) for n in range(950, 1000)], "it stays on the last page"


def test_a_page_that_is_there_is_not_overwritten(tmp_path, capsys):
    page = write_page(tmp_path / "run", GAMES)
    before = page.read_bytes()
    sentence = refused(capsys, "games", tmp_path / "run")
    assert f"--out {page}: cannot be made as a new file (File exists)" in sentence
    assert page.read_bytes() == before


@pytest.mark.parametrize("args, words", [
    (["RUN", "RUN"], "a page is of one run"),
    (["missing"], "missing/games.jsonl: cannot be read"),
    (["RUN/metrics.jsonl"], "metrics.jsonl, row 1: not a game of a run")])
def test_what_holds_no_games_is_one_sentence(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert words in refused(capsys, "games", *args)
    assert not (tmp_path / "missing").exists()


def test_the_page_counts_what_a_run_logs(sft_run, tmp_path):
    """The attack success of metrics.jsonl is the share in the chart, step by step."""
    run = tmp_path / "run"
    succeeds("--model", sft_run / "step_000000", "--games", 32, "--steps", 2, "--no-exam", "--out", run)
    bars = re.findall(r'<a title="step (\d+): (\d+) of (\d+)"', opened(write_page(run, games(run))))
    print("\n   ", bars, end="")
    assert [int(step) for step, *_ in bars] == [1, 2]
    for line, (_, won, counted) in zip(metrics(run), bars, strict=True):
        assert line["asr"] == (int(won) / int(counted) if int(counted) else None)
