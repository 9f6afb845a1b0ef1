"""
Credit: returns, the table CREDITS, what `credit` logs, and what a rare win is worth under each of them.

    payoff + shaping - KL --returns--> a return per token --CREDITS--> an advantage per token
"""
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import measured
from data import pack
from judge import Verdict
from selfplay import (ATTACKER, CREDITS, DEFENDER, REWARDS, Experience, Turn, credit, groups_of,
                      leave_one_out, parse_reply, payoff, returns, signs, whiten)
from train import policy_loss

FLAWED = parse_reply("")


def experience(role, payoff, prompt=(1,), logprobs=(-1.0,), shaping=1.0, harmful=True):
    """A turn of some tokens with this payoff."""
    turn = Turn(role, list(prompt), [7] * len(logprobs), list(logprobs), FLAWED)
    return Experience(turn, payoff, shaping, harmful)


def random_step(n=60, seed=0):
    """Turns of both roles and both labels, three or so to a prompt, with their returns."""
    rng = np.random.default_rng(seed)
    experiences, references = [], []
    for _ in range(n):
        length = int(rng.integers(1, 9))
        role = (ATTACKER, DEFENDER)[rng.integers(2)]
        payoff, shaping = float(rng.choice([-4, -2, 0, 2])), float(rng.choice([-1, 1]))
        prompt, harmful = [int(rng.integers(20))], bool(rng.integers(2))
        experiences.append(experience(role, payoff, prompt, rng.normal(size=length), shaping, harmful))
        references.append(rng.normal(size=length))
    return experiences, references


def returns_of(experiences, references, beta):
    return [returns(e.payoff + e.shaping, np.array(e.turn.logprobs), reference_T, beta)
            for e, reference_T in zip(experiences, references, strict=True)]


def largest_error(values, others):
    return max(np.abs(value_T - other_T).max() for value_T, other_T in zip(values, others, strict=True))


# ---------------------------------------------------------------- returns

def test_returns_equal_a_loop_over_the_definition():
    rng = np.random.default_rng(0)
    for reward in (3.0, -25.0):
        logprob_T = rng.normal(size=9)
        reference_T = rng.normal(size=9)
        expected = []
        for t in range(9):
            kl = sum(logprob_T[u] - reference_T[u] for u in range(t, 9))
            expected.append(max(-10.0, min(10.0, reward)) - 0.01 * kl)
        error_T = np.abs(returns(reward, logprob_T, reference_T, 0.01) - expected)
        measured("returns against a loop", error_T.max(), 1e-12)


def test_returns_can_be_packed_as_they_are():
    return_T = returns(1.0, np.array([-1.0, -2.0]), np.array([-1.0, -1.0]), 0.1)
    _, _, return_BT = pack([[5]], [[6, 7]], [[return_T]])
    measured("packed returns", (return_BT - torch.tensor([[0.0, 1.1, 1.1]])).abs().max(), 1e-6)


# ---------------------------------------------------------------- the official credit, and the default

def by_kind(values, experiences, kind):
    """All tokens of each kind of turn."""
    tokens = {}
    for value_T, e in zip(values, experiences, strict=True):
        tokens.setdefault(kind(e), []).extend(value_T)
    return {k: np.array(value_N) for k, value_N in tokens.items()}


def test_the_official_credit_gives_every_role_mean_0_and_deviation_1_over_its_tokens():
    experiences, references = random_step()
    advantage = CREDITS["reinforce++"](returns_of(experiences, references, 0.1), experiences)
    for role, tokens_N in by_kind(advantage, experiences, lambda e: e.turn.role).items():
        measured(f"{role}: mean", abs(tokens_N.mean()), 1e-12)
        measured(f"{role}: deviation - 1", abs(tokens_N.std() - 1), 1e-12)


def test_a_kind_is_divided_by_its_deviation_or_by_the_floor_if_that_is_larger():
    experiences, references = random_step()
    values = returns_of(experiences, references, 0.1)
    tokens = by_kind(values, experiences, lambda e: e.turn.role)
    deviations = {role: np.std(tokens_N) for role, tokens_N in tokens.items()}
    for floor in (0.0, min(deviations.values()) * 1.001, 100.0):
        expected = []
        for value_T, e in zip(values, experiences, strict=True):
            role = e.turn.role
            expected.append((value_T - np.mean(tokens[role])) / max(deviations[role], floor))
        white = whiten(values, experiences, floor, lambda e: e.turn.role)
        measured(f"floor {floor:.3f}", largest_error(white, expected), 1e-12)


def test_the_default_has_mean_0_for_each_role_and_label_and_divides_by_at_least_2():
    experiences, references = random_step()
    values = returns_of(experiences, references, 0.1)
    advantage = CREDITS["centred"](values, experiences)
    before, after = (by_kind(v, experiences, lambda e: (e.turn.role, e.harmful)) for v in (values, advantage))
    assert len(after) == 4
    for kind, tokens_N in after.items():
        measured(f"{kind}: mean", abs(tokens_N.mean()), 1e-12)
        scale = max(2.0, before[kind].std())
        measured(f"{kind}: deviation", abs(tokens_N.std() - before[kind].std() / scale), 1e-12)


def test_a_kind_that_is_absent_changes_nothing_for_the_others():
    experiences, references = random_step()
    values = returns_of(experiences, references, 0.1)
    for name in ("centred", "reinforce++"):
        both = CREDITS[name](values, experiences)
        defender = [n for n, e in enumerate(experiences) if e.turn.role == DEFENDER]
        alone = CREDITS[name]([values[n] for n in defender], [experiences[n] for n in defender])
        measured(f"{name}: defender alone", largest_error(alone, [both[n] for n in defender]), 0.0)
    assert all(advantages_of([], []) == [] for advantages_of in CREDITS.values())


def test_a_rare_win_stands_out_if_it_is_compared_with_its_own_label():
    """
    One attack of 32 on harmful seeds wins (2), the others lose (-2); a defender that refuses everything gives
    attacks on benign seeds 0. Compared with all of them, a losing attack on a harmful seed is bad news, and
    an attack on a benign seed good news, whatever it was. Compared with its label, only the win is news.
    """
    payoffs = [2.0] + [-2.0] * 31 + [0.0] * 32
    experiences = [experience(ATTACKER, payoff, harmful=n < 32) for n, payoff in enumerate(payoffs)]
    values = [np.array([payoff + 1]) for payoff in payoffs]
    advantage_N = {name: np.concatenate(CREDITS[name](values, experiences)) for name in CREDITS}
    # the mean payoff on harmful seeds is -1.875
    expected_N = [(2 + 1.875) / 2] + [(-2 + 1.875) / 2] * 31 + [0.0] * 32
    measured("centred: win, losses, benign", np.abs(advantage_N["centred"] - expected_N).max(), 1e-12)
    noise = {name: np.abs(a_N[1:]).sum() / a_N[0] for name, a_N in advantage_N.items() if name != "group"}
    print(f"\n    the 63 others weigh {noise['centred']:.1f} times the win if centred by label, "
          f"{noise['reinforce++']:.1f} times if by role", end="")
    assert noise["centred"] < 1.01 and noise["reinforce++"] > 20


# ---------------------------------------------------------------- groups

def test_the_group_credit_equals_a_loop_over_all_pairs():
    experiences, references = random_step()
    values = returns_of(experiences, references, 0.1)
    expected = []
    for n, e in enumerate(experiences):
        others = [m for m, other in enumerate(experiences) if m != n
                  and (other.turn.role, other.turn.prompt_ids) == (e.turn.role, e.turn.prompt_ids)]
        alike = [experiences[m].payoff + experiences[m].shaping == e.payoff + e.shaping for m in others]
        baseline = np.mean([values[m][0] for m in others]) if others else 0.0
        expected.append(0 * values[n] if all(alike) else values[n] - baseline)
    advantage = leave_one_out(values, experiences)
    measured("leave-one-out against a loop", largest_error(advantage, expected), 1e-12)
    sizes = Counter(map(len, groups_of(experiences)))
    silent = sum(not advantage_T.any() for advantage_T in advantage)
    print(f"\n    groups by size: {dict(sorted(sizes.items()))}; {silent} of 60 turns teach nothing", end="")
    assert len(sizes) > 3 and 0 < silent < 30


def test_turns_are_grouped_by_role_and_prompt():
    turns = [(ATTACKER, [1]), (DEFENDER, [1]), (ATTACKER, [1, 2]), (ATTACKER, [1]), (DEFENDER, [1])]
    assert groups_of([experience(role, 0.0, prompt) for role, prompt in turns]) == [[0, 3], [1, 4], [2]]


def test_a_group_of_equal_payoffs_teaches_nothing_and_is_counted():
    """Their KL terms differ, but are no reason to change. Equal payoffs of different format are no tie."""
    groups = {1: [(2.0, 1.0), (2.0, 1.0), (2.0, 1.0)], 2: [(2.0, 1.0), (-2.0, 1.0)],
              3: [(2.0, 1.0), (2.0, -1.0)], 4: [(-2.0, 1.0), (-2.0, 1.0)], 5: [(0.0, 1.0)]}
    rng = np.random.default_rng(0)
    experiences = [experience(DEFENDER, payoff, [prompt], rng.normal(size=3), shaping)
                   for prompt, pairs in groups.items() for payoff, shaping in pairs]
    references = [rng.normal(size=3) for _ in experiences]
    advantage, metrics = credit(experiences, references, 0.1, CREDITS["group"])
    teaches = {e.turn.prompt_ids[0] for e, a_T in zip(experiences, advantage, strict=True) if a_T.any()}
    assert teaches == {2, 3}
    assert metrics["equal_groups"] == 2 / 4, "a turn alone is no group"


# ---------------------------------------------------------------- the log

def test_the_logged_deviations_and_the_kl_equal_plain_numpy():
    experiences, references = random_step()
    gains = returns_of(experiences, references, 0.1)
    for name, advantages_of in CREDITS.items():
        advantage, metrics = credit(experiences, references, 0.1, advantages_of)
        measured(f"{name}: advantages", largest_error(advantage, advantages_of(gains, experiences)), 0.0)
        ratios = [np.array(e.turn.logprobs) - r_T for e, r_T in zip(experiences, references, strict=True)]
        measured("kl", abs(metrics["kl"] - np.concatenate(ratios).mean()), 1e-12)
        for role in (ATTACKER, DEFENDER):
            reward_N, kl_N = [], []
            for e, ratio_T in zip(experiences, ratios, strict=True):
                if e.turn.role == role:
                    reward_N += [e.payoff + e.shaping] * len(ratio_T)
                    kl_N += [-0.1 * ratio_T[t:].sum() for t in range(len(ratio_T))]
            for key, value_N in ((f"payoff_deviation_{role}", reward_N), (f"kl_deviation_{role}", kl_N)):
                measured(key, abs(metrics[key] - np.std(value_N)), 1e-12)


def test_what_a_step_does_not_have_is_logged_as_none():
    advantage, metrics = credit([], [], 2.0, CREDITS["centred"])
    assert advantage == [] and set(metrics.values()) == {None}
    _, metrics = credit([experience(ATTACKER, 2.0)], [np.array([-1.0])], 2.0, CREDITS["centred"])
    assert metrics == {"kl": 0.0, "equal_groups": None, "payoff_deviation_attacker": 0.0,
                       "kl_deviation_attacker": 0.0, "payoff_deviation_defender": None,
                       "kl_deviation_defender": None}


# ---------------------------------------------------------------- where the official credit fails

@pytest.mark.parametrize("drift", [1e-1, 1e-2, 1e-4])   # nats a token, between the policy and its start
def test_once_all_payoffs_are_equal_the_official_advantage_is_the_kl_term_blown_up(drift):
    """64 attacks of 20 tokens, all of which lose. What is left of their returns is 0.01 per nat of drift."""
    rng = np.random.default_rng(0)
    experiences = [experience(ATTACKER, -2.0, logprobs=rng.normal(-1, 0.5, size=20)) for _ in range(64)]
    references = [np.array(e.turn.logprobs) - rng.normal(0, drift, size=20) for e in experiences]
    kl_terms = [gain_T - (-2.0 + 1.0) for gain_T in returns_of(experiences, references, 0.01)]
    kl_N = np.concatenate(kl_terms)
    factors = {}
    for name, floor in (("reinforce++", 1e-4), ("centred", 2.0)):
        advantage, metrics = credit(experiences, references, 0.01, CREDITS[name])
        assert metrics["payoff_deviation_attacker"] == 0.0
        measured("logged deviation of the KL term", abs(metrics["kl_deviation_attacker"] - kl_N.std()), 1e-12)
        factors[name] = 1 / max(kl_N.std(), floor)
        expected = [factors[name] * (kl_T - kl_N.mean()) for kl_T in kl_terms]
        measured(f"{name}: the KL term times {factors[name]:.3g}", largest_error(advantage, expected), 1e-9)
    assert factors["centred"] == 0.5 and factors["reinforce++"] > 20


# What the official credit hears, and what it does not. An attacker chooses one of 25 tactics, the rare one in
# 4 % of its games. The frozen defender answers benign requests and refuses harmful ones, but for that tactic.
# "sure": the rare tactic always wins. "daring": it wins 40 % of its games and is garbled, a forfeit, in 60 %,
# which is better than always losing: 0.4 x 2 - 0.6 x 4 = -1.6 against -2. One game in a hundred is a forfeit
# whatever the tactic. Payoffs are those of the zero-sum table. Of 128 games a step, 64 have an attacker.
N_TACTICS, RARE, START = 25, 0, 0.04
WORLDS = {"sure": (1.0, 0.0), "daring": (0.4, 0.6)}   # how often the rare tactic wins, and is a forfeit
HARMFUL_N = np.arange(64) % 2 == 0
STRAY = 0.01
TABLE = REWARDS["zero_sum"]
WON, LOST, ANSWERED = (payoff(TABLE.attacker, signs(verdict, verdict.prompt_harmful)) for verdict in (
    Verdict(True, False, True), Verdict(True, True, False), Verdict(False, False, False)))


def start_logits():
    """Of each tactic: a row for harmful seeds, a row for benign ones."""
    logits_2N = torch.zeros(2, N_TACTICS)
    logits_2N[:, RARE] = np.log(START * (N_TACTICS - 1) / (1 - START))
    return logits_2N


def attacks(logits_2N, rng, world):
    """A step's attacks: (tactics, rows, turns to learn from)."""
    row_N = np.where(HARMFUL_N, 0, 1)
    logprob_2N = logits_2N.detach().double().log_softmax(-1).numpy()
    cumulative_2N = np.exp(logprob_2N).cumsum(-1)
    tactic_N = (rng.random((64, 1)) > cumulative_2N[row_N]).sum(-1).clip(max=N_TACTICS - 1)
    wins, garbled = WORLDS[world]
    chance_N, rare_N = rng.random(64), tactic_N == RARE
    payoff_N = np.where(HARMFUL_N, np.where(rare_N & (chance_N < wins), WON, LOST), ANSWERED)
    forfeit_N = rare_N & (chance_N >= 1 - garbled) | (rng.random(64) < STRAY)
    payoff_N[forfeit_N] = TABLE.forfeit
    turns = [experience(ATTACKER, float(payoff_N[n]), [row_N[n], n // 8], [logprob_2N[row_N[n], tactic_N[n]]],
                        harmful=bool(HARMFUL_N[n])) for n in range(64)]   # four attacks on each seed
    return tactic_N, row_N, turns


def logit_gradient(logits_2N, rng, world, advantages_of):
    """Leave the gradient of a step's loss in the logits; a nat of KL to the start costs 0.01."""
    tactic_N, row_N, turns = attacks(logits_2N, rng, world)
    start_2N = start_logits().double().log_softmax(-1).numpy()
    references = [start_2N[row, tactic, None] for row, tactic in zip(row_N, tactic_N, strict=True)]
    advantage, _ = credit(turns, references, 0.01, advantages_of)
    logprob_BT = logits_2N.log_softmax(-1)[row_N, tactic_N][:, None]
    advantage_BT = torch.tensor(np.array(advantage), dtype=torch.float32)
    loss = policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, torch.ones(64, 1).bool(), 64, 0.2)
    loss.backward()


def rate_after_training(world, advantages_of, seed):
    """How often attacks on harmful seeds use the rare tactic after 150 steps of AdamW."""
    logits_2N = start_logits().requires_grad_()
    optimizer = torch.optim.AdamW([logits_2N], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for _ in range(150):
        logit_gradient(logits_2N, rng, world, advantages_of)
        torch.nn.utils.clip_grad_norm_([logits_2N], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return logits_2N.softmax(-1)[0, RARE].item()


def test_a_stray_forfeit_is_as_loud_as_a_win_to_the_official_credit_and_half_as_loud_to_the_default():
    """A step of 64 attacks in which one wins, +4 above the others, and one in which one forfeits, 2 below."""
    loudness = {}
    for name in ("reinforce++", "centred"):
        for word, paid in (("win", WON), ("forfeit", TABLE.forfeit)):
            turns = [experience(ATTACKER, payoff, harmful=bool(harmful))
                     for payoff, harmful in zip([paid] + [LOST] * 63, HARMFUL_N, strict=True)]
            values = [np.array([e.payoff + e.shaping]) for e in turns]
            loudness[name, word] = CREDITS[name](values, turns)[0][0]
    # official: of 64 values, 63 of them equal, the odd one is sqrt(63) deviations away, whatever it is worth
    expected = {("reinforce++", "win"): 63 ** 0.5, ("reinforce++", "forfeit"): -63 ** 0.5,
                ("centred", "win"): 4 * 31 / 32 / 2, ("centred", "forfeit"): -2 * 31 / 32 / 2}
    for key, value in expected.items():
        measured(f"{' '.join(key)}: advantage {loudness[key]:+.2f}", abs(loudness[key] - value), 1e-12)


@pytest.mark.parametrize("name", CREDITS)
def test_a_rare_tactic_that_always_wins_is_learnt_with_each_credit(name):
    rates = [rate_after_training("sure", CREDITS[name], seed) for seed in range(3)]
    print(f"\n    {name}, seeds 0 to 2: {', '.join(f'{rate:.3f}' for rate in rates)}, from {START}", end="")
    assert min(rates) > 0.9


def test_a_rare_tactic_that_wins_or_forfeits_is_mostly_unlearnt_with_the_official_credit_but_not_by_default():
    """Chance decides a good part of 150 steps, so there are 24 attackers of each."""
    median = {}
    for name in CREDITS:
        rates = np.array([rate_after_training("daring", CREDITS[name], seed) for seed in range(24)])
        median[name] = np.median(rates)
        fell, rose = np.sum(rates < START / 2), np.sum(rates > 2 * START)
        print(f"\n    {name}: median {median[name]:.3f}, from {START}; {fell} of 24 fell below half, "
              f"{rose} rose above double; seeds 0 to 2: {rates[:3].round(3).tolist()}", end="")
    assert median["reinforce++"] < START / 2 and median["centred"] > 10 * START
