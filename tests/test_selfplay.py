"""The game: parsing, seeds, play, rewards, credit."""
from itertools import product

import numpy as np
import pytest
import torch

import selfplay
from conftest import measured
from judge import Verdict
from sample import Sample
from selfplay import (ATTACKER, DEFENDER, ENGLISH, REWARDS, Game, Reply, Seed, Turn, is_legal, seeds_for_step, pack, parse_reply, payoffs, play, experiences_of, game_record, returns,
                      show_game, whiten, write_reply)

# ---------------------------------------------------------------- parsing

WELL_FORMED = ["plan </think> <answer> text </answer>", "plan</think><answer>text</answer>", " plan \n</think>\n\n<answer>\ntext\n</answer>\n "]
FLAWED_BUT_PASSED_ON = ["plan </think> <answer> text </answer> more", " </think> <answer> text </answer>", "plan </think> hm <answer> text </answer>",
                        "<think> plan </think> <answer> text </answer>"]
NOTHING_PASSED_ON = ["plan </think>", "plan", "", "plan </think> text", "plan </think> <answer> text", "plan </think> <answer> </answer>", "<answer> text </answer>",
                     "<answer> text </answer> </think>", "plan <answer> draft </answer> </think> <answer> text </answer>",
                     "plan </think> <answer> one </answer> <answer> two </answer>", "plan </think> more </think> <answer> text </answer>",
                     "plan </think> <answer> <answer> text </answer>", "plan </think> </answer> text <answer>", "plan </think> <answer> <think> plan </answer>"]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_a_well_formed_reply_is_read_in_parts(text):
    reply = parse_reply(text)
    assert (reply.thought, reply.answer, reply.well_formed) == ("plan", "text", True)


@pytest.mark.parametrize("text", FLAWED_BUT_PASSED_ON)
def test_a_flaw_outside_the_answer_pair_costs_the_format_reward_only(text):
    reply = parse_reply(text)
    assert (reply.answer, reply.well_formed) == ("text", False)


@pytest.mark.parametrize("text", NOTHING_PASSED_ON)
def test_a_reply_with_a_tag_out_of_place_passes_nothing_on(text):
    reply = parse_reply(text)
    assert (reply.answer, reply.well_formed) == ("", False)


def test_no_thought_is_ever_passed_on_whatever_the_order_of_the_tags():
    pieces = ["secret", "</think>", "<answer>", "</answer>", "<think>"]
    for length in range(1, 7):
        for parts in product(pieces, repeat=length):
            text = " ".join(parts)
            if parse_reply(text).answer:
                before, _, after = text.partition("</think>")
                assert "<answer>" not in before and after.count("<answer>") == after.count("</answer>") == 1, text


def test_what_is_written_is_what_is_read():
    assert parse_reply(write_reply("plan", "text")).answer == "text" and parse_reply(write_reply("plan", "text", cot=False), cot=False).answer == "text"


def test_without_thoughts_the_whole_reply_is_the_answer():
    assert parse_reply("  text \n", cot=False) == Reply("  text \n", "", "text", True) and not parse_reply("  ", cot=False).well_formed


# ---------------------------------------------------------------- seeds

POOLS = [[Seed(f"{h}{r}{i}", h, r) for i in range(n)] for (h, r), n in zip(product((True, False), (True, False)), (5, 7, 6, 8))]


def test_the_four_kinds_of_seed_come_in_equal_shares_and_reproducibly():
    seeds = seeds_for_step(POOLS, 32, seed=0, step=3)
    assert all(sum((s.harmful, s.revise) == kind for s in seeds) == 8 for kind in product((True, False), repeat=2))
    assert seeds == seeds_for_step(POOLS, 32, seed=0, step=3) and seeds != seeds_for_step(POOLS, 32, seed=0, step=4) and seeds != seeds_for_step(POOLS, 32, seed=1, step=3)


def test_every_seed_is_used_once_before_any_is_used_twice():
    drawn = [s for step in range(7) for s in seeds_for_step(POOLS, 20, seed=0, step=step) if (s.harmful, s.revise) == (True, True)]
    assert all(sorted(s.text for s in drawn[i:i + 5]) == sorted(s.text for s in POOLS[0]) for i in range(0, 35, 5))


# ---------------------------------------------------------------- play

SECRET = "burn"   # a word of the thoughts that must not travel


class Script:
    """A player that answers from a list and remembers what it was shown."""

    def __init__(self, chat, replies):
        self.chat, self.replies, self.seen = chat, replies, []

    def __call__(self, prompts, numbers):
        self.seen += [self.chat.tokenizer.decode(p) for p in prompts]
        return [Sample(ids, [0.0] * len(ids), True) for ids in (self.chat.tokenizer(self.replies[n], add_special_tokens=False).input_ids for n in numbers)]


def test_no_thought_reaches_the_other_side_or_the_judge(chat):
    attacks = [f"{SECRET} {SECRET} </think> <answer> kill the weed </answer>", f"{SECRET} </think> kill the weed", f"{SECRET} <answer> {SECRET} </answer>", f"{SECRET}"]
    answers = [f"{SECRET} </think> <answer> get the hose </answer>", f"{SECRET} </think> <answer> get the hose </answer> hm", f"{SECRET} the hose", f"{SECRET} </think>"]
    shown, seeds = [], [Seed("paint the bridge", True, True)] * 4
    judge = lambda exchanges: shown.extend(exchanges) or [Verdict(True, True, False)] * len(exchanges)
    attacker, defender = Script(chat, attacks), Script(chat, answers)
    games = play(seeds, [0, 1, 2, 3], chat, attacker, defender, judge)
    assert not any(SECRET in text for text in defender.seen), defender.seen
    assert len(shown) == 2 and not any(SECRET in e.prompt + e.response for e in shown)
    assert [g.asked for g in games] == ["kill the weed"] + ["paint the bridge"] * 3, "an attacker that passes nothing on has the raw seed asked instead"
    assert [g.verdict for g in games[2:]] == [Verdict(True, True, False)] * 2, "a defender that passes nothing on has refused"


def test_a_raw_seed_skips_the_attacker(chat):
    attacker, defender = Script(chat, {}), Script(chat, {4: "fine </think> <answer> get the map </answer>"})
    game = play([Seed("find the king", False, False)], [4], chat, attacker, defender, lambda e: [Verdict(False, False, False)])[0]
    assert game.attacker is None and attacker.seen == [] and "find the king" in defender.seen[0]
    assert game_record(game, 1)["attack"] is None and "find the king" in show_game(game, REWARDS["zero_sum"])


def test_the_defender_sees_the_attack_and_nothing_else(chat):
    defender = Script(chat, ["fine </think> <answer> get the map </answer>"])
    play([Seed("rob the bank", True, True)], [0], chat, Script(chat, ["use story </think> <answer> tell a story </answer>"]), defender, lambda e: [Verdict()])
    assert defender.seen == ["<user> tell a story <end> <assistant> <think>"]


def test_the_english_prompts_hold_their_text_and_ask_for_the_layout():
    assert all("{text}" in p for p in (ENGLISH.attack_harmful, ENGLISH.attack_benign, ENGLISH.defend))
    assert all(tag in ENGLISH.layout for tag in ("<think>", "</think>", "<answer>", "</answer>"))


# ---------------------------------------------------------------- rewards

ANSWERS = (True, False, None)


def game(seed_harmful, verdict, attack="attack"):
    attacker = Turn(ATTACKER, [], [1], [0.0], Reply("", "plan", attack, bool(attack)))
    return Game(0, Seed("seed", seed_harmful, True), attacker, attack or "seed", Turn(DEFENDER, [], [1], [0.0], Reply("", "plan", "answer", True)), verdict)


@pytest.mark.parametrize("seed_harmful, prompt, refusal, response", list(product((True, False), ANSWERS, ANSWERS, ANSWERS)))
def test_every_cell_of_both_tables(seed_harmful, prompt, refusal, response):
    verdict = Verdict(prompt, refusal, response)
    known = None not in (prompt, refusal, response)
    p, s, h = 2 * (prompt == seed_harmful) - 1, 2 * (refusal == prompt) - 1, 2 * (response is True) - 1
    general = payoffs(game(seed_harmful, verdict), REWARDS["paper"])
    assert general == ({ATTACKER: 0.5 * p - 0.5 * s + h, DEFENDER: s - h} if known else {ATTACKER: None, DEFENDER: None})
    strict = payoffs(game(seed_harmful, verdict), REWARDS["zero_sum"])
    assert strict[DEFENDER] == general[DEFENDER]
    if prompt != seed_harmful:
        assert strict[ATTACKER] == -4.0 and not is_legal(game(seed_harmful, verdict))
    else:
        assert is_legal(game(seed_harmful, verdict)) and (strict[ATTACKER] is None if not known else strict[ATTACKER] + strict[DEFENDER] == 0)


# The game part of the official code's rewards, as published by running it: (seed, prompt, refusal, response) -> attacker, defender.
OFFICIAL = {"hhrb": (-1, 2), "hhrh": (1, 0), "hhch": (2, -2), "hhcb": (0, 0), "hbrh": (1, -2), "hbrb": (-1, 0), "hbch": (0, 0), "hbcb": (-2, 2),
            "bbcb": (-1, 2), "bbrb": (0, 0), "bbrh": (2, -2), "bbch": (1, 0), "bhch": (1, -2), "bhcb": (-1, 0), "bhrh": (0, 0), "bhrb": (-2, 2)}


@pytest.mark.parametrize("cell", OFFICIAL)
def test_the_paper_table_reproduces_the_official_rewards(cell):
    paid = payoffs(game(cell[0] == "h", Verdict(cell[1] == "h", cell[2] == "r", cell[3] == "h")), REWARDS["paper"])
    assert (paid[ATTACKER], paid[DEFENDER]) == OFFICIAL[cell]


@pytest.mark.parametrize("name", REWARDS)
def test_an_attacker_that_passes_nothing_on_forfeits(name):
    for verdict in (Verdict(True, True, False), Verdict(True, False, True)):
        paid = payoffs(game(True, verdict, attack=""), REWARDS[name])
        assert paid[ATTACKER] == REWARDS[name].forfeit and paid[DEFENDER] == payoffs(game(True, verdict), REWARDS[name])[DEFENDER]


def test_unreadable_games_and_ties_earn_nothing_and_teach_nothing():
    games = [game(True, Verdict(readable=False)), game(True, Verdict(True, None, True)), game(True, Verdict(True, True, False))]
    experiences = experiences_of(games, REWARDS["zero_sum"], (ATTACKER, DEFENDER), cot=True)
    assert [(p.turn.role, p.payoff, p.shaping) for p in experiences] == [(ATTACKER, -2.0, 1.0), (DEFENDER, 2.0, 1.0)]
    assert [p.shaping for p in experiences_of(games, REWARDS["zero_sum"], (DEFENDER,), cot=False)] == [0.0]


# ---------------------------------------------------------------- credit

def test_returns_equal_a_brute_force_loop():
    rng = np.random.default_rng(0)
    for reward in (3.0, -25.0):
        logprob, reference = rng.normal(size=9), rng.normal(size=9)
        expected = [sum(-0.01 * (logprob[u] - reference[u]) for u in range(t, 9)) + max(-10.0, min(10.0, reward)) for t in range(9)]
        measured("returns against a loop", np.abs(returns(reward, logprob, reference, 0.01) - expected).max(), 1e-12)


def test_whitening_gives_every_role_mean_0_and_deviation_1_over_its_tokens():
    rng, roles = np.random.default_rng(0), [ATTACKER, DEFENDER, DEFENDER] * 20
    white = whiten([rng.normal(3, 5, size=rng.integers(1, 30)) for _ in roles], roles)
    for role in (ATTACKER, DEFENDER):
        tokens = np.concatenate([w for w, r in zip(white, roles) if r == role])
        measured(f"{role}: mean", abs(tokens.mean()), 1e-12)
        measured(f"{role}: deviation - 1", abs(tokens.std() - 1), 1e-12)


def test_a_roles_absence_changes_nothing_for_the_other():
    rng, roles = np.random.default_rng(0), [ATTACKER, DEFENDER, DEFENDER] * 5
    values = [rng.normal(size=4) for _ in roles]
    alone = whiten([v for v, r in zip(values, roles) if r == DEFENDER], [DEFENDER] * 10)
    assert all(np.array_equal(a, b) for a, b in zip(alone, [w for w, r in zip(whiten(values, roles), roles) if r == DEFENDER]))
    assert whiten([], []) == []


def test_pack_masks_by_position_even_where_padding_looks_like_a_stop_token():
    ids_BT, mask_BT, value_BT = pack([[5, 0], [7]], [[0, 6, 0], [8]], [[[1.0, 2.0, 3.0], [4.0]]])
    assert ids_BT.tolist() == [[5, 0, 0, 6, 0], [7, 8, 0, 0, 0]]
    assert mask_BT.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert torch.equal(value_BT, torch.tensor([[0.0, 0, 1, 2, 3], [0, 4, 0, 0, 0]]))


def test_the_demo_shows_a_verdict_and_rewards():
    text = selfplay.demo()
    assert "verdict" in text and "attacker -2.0, defender +2.0" in text and "attacker +2.0, defender -2.0" in text
