"""What stage 6 concludes from verdicts: judges biased on purpose, intervals with a known truth, SciPy's answers."""

import importlib
import random
from argparse import Namespace
from itertools import product

import pytest
import torch
from conftest import api_args, make_pair
from scipy import stats

import common

evaluate = importlib.import_module("06_evaluate")


def some_pairs(count: int) -> list[common.Pair]:
    return [make_pair(f"c{i // 2}/{i}", split="test", user="ann" if i % 3 else "bo") for i in range(count)]


def distinct_texts(pairs):
    return {arm: {pair.id: [(None, f"{arm} {i}")] for i, pair in enumerate(pairs)} for arm in ("recon", "backward")}


def judged(pairs, texts, answer):
    """recon against backward by a judge with a mind of its own: answer(first, second) is first, second, tie or None."""
    ask = lambda pair, questions: [answer(*question) for question in questions]
    judge = evaluate.Judge("made up", ("ab", "ba"), ask)
    rows = evaluate.judge_pairs(judge, "actions", pairs, texts, [("recon", "backward")])
    return evaluate.compare(rows, pairs, texts, 0)


def test_a_judge_that_always_answers_a_gives_exactly_half_and_flips_always():
    pairs = some_pairs(11)
    row = judged(pairs, distinct_texts(pairs), lambda first, second: "first")
    assert (row.win_rate, row.flip_rate, row.ties, row.p) == (0.5, 1.0, 11, 1.0)
    arms, args = {"e2e-grpo": {"distinct": 0.25}}, Namespace(judge="tiny", model="tiny")
    warned = " ".join(evaluate.find_warnings([row], arms, args, "contrast"))
    assert all(words in warned for words in ("contradicts itself", "favour their own", "e2e-grpo repeats itself: 25%"))


def test_a_judge_that_prefers_the_longer_text_is_exposed_by_the_length_matched_rate(numbers):
    """recon is twice as long in two of five pairs, and in the others a word longer, a word shorter and as long."""
    pairs, texts = some_pairs(40), {"recon": {}, "backward": {}}
    for place, pair in enumerate(pairs):
        words = numbers.randint(4, 9)
        length = [2 * words + 4, 2 * words + 4, words + 1, words - 1, words][place % 5]
        texts["recon"][pair.id], texts["backward"][pair.id] = [(None, "recon " * length)], [(None, "other " * words)]
    longer = lambda one, two: ["tie", "first", "second"][(len(one) > len(two)) - (len(one) < len(two))]
    row = judged(pairs, texts, longer)
    assert (row.win_rate, row.longer_wins.n, row.longer_wins.win_rate, row.flip_rate) == (0.7, 32, 1.0, 0.0)
    assert (row.matched.n, row.matched.win_rate) == (24, 0.5)
    warned = " ".join(evaluate.find_warnings([row], {}, Namespace(judge="encoder"), "contrast"))
    assert "the longer text wins 100.0%" in warned and "recon wins 50.0%" in warned


def test_orders_that_disagree_are_a_tie_and_a_missing_answer_counts_nowhere():
    for winners, expected in ((["a", "a"], ("a", False)), (["a", "b"], ("tie", True)), (["tie", "b"], ("tie", False)),
                              (["b"], ("b", None)), (["a", None], (None, None))):
        assert evaluate.aggregate_orders(winners) == expected
    pairs = some_pairs(4)
    answers = [("first", "second"), ("first", "first"), (None, "second"), ("tie", "tie")]       # in both orders
    answer = lambda first, second: answers[int(first[-1])][second.startswith("recon")]
    row = judged(pairs, distinct_texts(pairs), answer)
    assert (row.n, row.wins, row.ties, row.losses, row.unparsed) == (3, 1, 2, 0, 0.25)
    assert row.flip_rate == pytest.approx(1 / 3) and row.by_person["bo"].n + row.by_person["ann"].n == 3
    row = judged(pairs, distinct_texts(pairs), lambda first, second: None)
    assert (row.n, row.unparsed, row.win_rate, row.p) == (0, 1.0, None, None)


def test_the_answers_of_a_pair_are_averaged_before_the_interval():
    """One of the two answers wins in every pair, so no conversation differs from another."""
    pairs = some_pairs(16)
    both = lambda arm: [(None, f"{arm} good"), (None, f"{arm} bad")]
    texts = {arm: {pair.id: both(arm) for pair in pairs} for arm in ("recon", "backward")}
    row = judged(pairs, texts, lambda first, second: "first" if (first < second) == ("good" in first) else "second")
    assert (row.n, row.wins, row.losses, row.win_rate) == (32, 16, 16, 0.5) and row.ci95 == [0.5, 0.5]


def test_equal_texts_tie_unasked_and_hide_neither_flips_nor_lengths():
    pairs, asked = some_pairs(12), []
    texts = distinct_texts(pairs)
    texts["backward"] |= {pair.id: texts["recon"][pair.id] for pair in pairs[:9]}
    row = judged(pairs, texts, lambda *question: asked.append(question) or "first")
    assert len(asked) == 6 and (row.identical, row.flip_rate, row.matched.n, row.ties) == (9, 1.0, 3, 12)


def test_a_similarity_judge_prefers_the_closer_text_and_never_an_empty_one_and_ties_near_equal_ones(encoder):
    pair = make_pair(action="I am worried because my dog is sick")
    questions = [("my dog is ill and I am worried", "the train leaves at nine"), ("", "the train leaves at nine"),
                 ("nine is when the train leaves", "")]
    for name in ("encoder", "chrf"):
        judge = evaluate.similarity_judge(name, encoder, 0.02)
        assert judge.ask(pair, questions) == ["first", "second", "first"] and judge.orders == ("both",)
        assert evaluate.similarity_judge(name, encoder, 1.0).ask(pair, questions[:1]) == ["tie"]


def test_a_local_judge_answers_with_the_likelier_letter_whatever_else_it_is_asked(tiny, numbers):
    """Against the model run on each whole prompt alone."""
    texts = ["".join(numbers.choice("abcdefgh ") for _ in range(numbers.randint(1, 30))) for _ in range(6)]
    pair, questions, expected = make_pair(), [(first, second) for first in texts[:3] for second in texts[3:]], []
    a, b = (tiny.tokenizer.encode(letter)[0] for letter in "AB")
    for question in questions:
        prompt = common.encode_prompt(tiny.tokenizer, evaluate.comparison_prompt(pair, question))
        with torch.no_grad():
            logits = tiny.model(torch.tensor([prompt])).logits[0, -1]
        expected.append("first" if logits[a] > logits[b] else "second")
    judge = evaluate.local_judge("tiny", tiny)
    assert judge.ask(pair, questions) == expected and judge.ask(pair, questions[:1]) == expected[:1]
    assert judge.orders == ("ab", "ba")


def test_a_judge_on_a_server_is_asked_for_a_letter_and_anything_else_is_missing(loopback, tmp_path):
    api = common.ApiModel("openai:big", api_args(tmp_path, concurrency=1))
    loopback.answers += ["**B**", "well, B I think", " a.\n", "Message B", "AB"]
    judge, pair = evaluate.api_judge(api), make_pair(action="yes {second}\nor no")
    questions = [(f"one {i}", "two") for i in range(5)]
    assert judge.ask(pair, questions) == ["second", None, "first", "second", None] and judge.orders == ("ab", "ba")
    told = loopback.asked[1][2]["messages"][1]["content"]
    assert "Message A:\n<<<\nSam: one 0\n>>>" in told and "Sam: yes {second} or no\n>>>" in told


def test_the_interval_covers_the_truth_in_95_percent_of_runs_and_a_naive_one_does_not():
    """Pairs of a conversation share its luck: a win rate that is drawn for each from a beta distribution."""
    numbers, covered, naive, runs, true_rate = random.Random(1), 0, 0, 600, 0.65
    for run in range(runs):
        points, clusters = [], []
        for conversation in range(24):
            luck = numbers.betavariate(1.5 * true_rate, 1.5 * (1 - true_rate))
            for _ in range(numbers.randint(1, 6)):
                points.append(0.5 if numbers.random() < 0.1 else float(numbers.random() < luck))
                clusters.append(str(conversation))
        truth, mean = 0.05 + 0.9 * true_rate, sum(points) / len(points)
        low, high = common.bootstrap_interval(points, clusters, run)
        error = 1.96 * (sum((point - mean) ** 2 for point in points) / len(points) ** 2) ** 0.5
        covered, naive = covered + (low <= truth <= high), naive + (abs(mean - truth) <= error)
    assert 0.93 <= covered / runs <= 0.97 and naive / runs < 0.88, (covered / runs, naive / runs)


def test_the_interval_takes_a_conversation_for_one_observation(numbers):
    """As wide as the t interval over the sums of 15 conversations, whatever the number of equal points in each."""
    points = [numbers.gauss(0, 1) for _ in range(15)]
    low, high = common.bootstrap_interval(sorted(points * 4), [str(i // 4) for i in range(60)])
    expected = stats.t.interval(0.95, 14, loc=sum(points) / 15, scale=stats.sem(points))
    assert (high - low) / (expected[1] - expected[0]) == pytest.approx(1, abs=0.1)
    assert common.bootstrap_interval([1.0] * 6, list("abcdef")) == [1.0, 1.0]
    assert common.bootstrap_interval([1.0, 0.0] * 6, list("abcdeabcdeab")) is None              # five are too few


def test_the_sign_flip_p_is_the_share_of_all_flips_that_are_as_extreme(numbers):
    points, clusters = [numbers.choice((0.0, 0.5, 1.0)) for _ in range(25)], [str(i // 3) for i in range(25)]
    sums = [sum(point - 0.5 for point, cluster in zip(points, clusters) if cluster == name) for name in set(clusters)]
    flips = product((1, -1), repeat=len(sums))
    flipped = [abs(sum(sign * value for sign, value in zip(signs, sums))) for signs in flips]
    extreme = sum(value >= abs(sum(sums)) - 1e-9 for value in flipped)
    assert evaluate.sign_flip_p(points, clusters, 0) == pytest.approx(extreme / len(flipped))
    assert evaluate.sign_flip_p([0.5, 0.5], ["a", "b"], 0) == evaluate.sign_flip_p([1.0, 1.0], ["a", "a"], 0) == 1.0
    points = [float(numbers.random() < 0.6) for _ in range(60)]                    # too many to enumerate: a sign test
    expected = stats.binomtest(int(sum(points)), 60).pvalue
    assert evaluate.sign_flip_p(points, list(map(str, range(60))), 0) == pytest.approx(expected, abs=0.03)


def test_holm_allows_for_the_number_of_comparisons():
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.9, 0.8]) == [1.0, 1.0] and evaluate.holm([]) == []


def test_each_arm_is_compared_once_and_recon_with_its_controls():
    arms = ["none", "backward", "guarded", "recon", "recon-grpo", "shuffled"]
    controls = {("recon", "guarded"), ("recon", "shuffled"), ("recon-grpo", "guarded")}
    chosen, everyone = (evaluate.choose_comparisons(arms, "backward", every) for every in (False, True))
    assert len(chosen) == 8 and set(chosen) == controls | {(arm, "backward") for arm in arms if arm != "backward"}
    assert len(everyone) == 15 and len({frozenset(some) for some in everyone}) == 15
