"""What stage 6 concludes from verdicts: judges that are biased on purpose, intervals with a known truth, and SciPy's and scikit-learn's answers."""

import random
from itertools import product

import pytest
import torch
from conftest import make_pair
from scipy import stats
from sklearn.metrics import cohen_kappa_score

import common


@pytest.fixture(scope="module")
def evaluate(stage):
    return stage("06_evaluate")


def some_pairs(count: int, a_conversation: int = 2) -> list[dict]:
    return [make_pair(f"c{i // a_conversation}/{i}", split="test") | {"user": "ann" if i % 3 else "bo"} for i in range(count)]


def judged(evaluate, judge, pairs, texts, tmp_path) -> dict:
    """The statistics of recon against backward by a judge."""
    rows = evaluate.judge_pairs(judge, "actions", pairs, texts, [("recon", "backward")], tmp_path / "answers.jsonl")
    return evaluate.compare(rows, pairs, texts, 0)


def made_up_judge(evaluate, answer):
    """A judge with a mind of its own: answer(first, second) is first, second, tie or None."""
    return evaluate.Judge("made up", ("ab", "ba"), lambda context, action, questions: [answer(*question) for question in questions])


# ------------------------------------------------------------------------------------------------
# Judges


def test_a_judge_that_always_answers_a_gives_exactly_half_and_flips_always(evaluate, tmp_path):
    pairs = some_pairs(11)
    texts = {arm: {pair["id"]: f"{arm} {i}" for i, pair in enumerate(pairs)} for arm in ("recon", "backward")}
    row = judged(evaluate, made_up_judge(evaluate, lambda first, second: "first"), pairs, texts, tmp_path)
    assert row["win_rate"] == 0.5 and row["flip_rate"] == 1.0 and row["ties"] == 11 and row["p"] == 1.0 and row["needed"] is None
    said = evaluate.read_results([row | {"p_holm": 1.0}], {}, {"name": "made up", "same_family": True}, "unsaid")
    assert any("contradicts itself in 100%" in sentence for sentence in said) and any("own family" in sentence for sentence in said)


def test_a_judge_that_prefers_the_longer_text_is_exposed_by_the_length_matched_rate(evaluate, tmp_path, numbers):
    pairs = some_pairs(400)
    words = lambda low, high: " ".join(["word"] * numbers.randint(low, high)) + f" {numbers.random()}"
    texts = {"recon": {pair["id"]: words(6, 20) for pair in pairs}, "backward": {pair["id"]: words(4, 14) for pair in pairs}}
    longer = lambda first, second: "first" if len(first.split()) > len(second.split()) else "second" if len(first.split()) < len(second.split()) else "tie"
    row = judged(evaluate, made_up_judge(evaluate, longer), pairs, texts, tmp_path)
    assert row["win_rate"] > 0.7 and row["ci95"][0] > 0.6 and row["longer_wins"]["win_rate"] == 1.0 and row["flip_rate"] == 0.0
    assert row["matched"]["win_rate"] < row["win_rate"] - 0.1 and row["matched"]["n"] > 20
    said = evaluate.read_results([row | {"p_holm": row["p"]}], {}, {"name": "made up", "same_family": False}, "unsaid")
    assert any("the longer text wins 100.0%" in sentence and "similar length" in sentence for sentence in said)


def test_one_order_against_the_other_is_a_tie_and_a_missing_answer_counts_nowhere(evaluate, tmp_path):
    assert evaluate.settle(["a", "a"]) == ("a", False) and evaluate.settle(["a", "b"]) == ("tie", True) and evaluate.settle(["tie", "b"]) == ("tie", False)
    assert evaluate.settle(["b"]) == ("b", None) and evaluate.settle(["a", None]) == (None, None)
    pairs = some_pairs(4)
    texts = {arm: {pair["id"]: f"{arm} {i}" for i, pair in enumerate(pairs)} for arm in ("recon", "backward")}
    answers = {"recon 0": ("first", "second"), "recon 1": ("first", "first"), "recon 2": (None, "second"), "recon 3": ("tie", "tie")}
    answer = lambda first, second: answers[first][0] if first.startswith("recon") else answers[second][1]
    row = judged(evaluate, made_up_judge(evaluate, answer), pairs, texts, tmp_path)
    assert (row["n"], row["wins"], row["ties"], row["losses"], row["unparsed"], row["flip_rate"]) == (3, 1, 2, 0, 0.25, pytest.approx(1 / 3))
    (tmp_path / "answers.jsonl").unlink()
    row = judged(evaluate, made_up_judge(evaluate, lambda first, second: None), pairs, texts, tmp_path)
    assert row["n"] == 0 and row["unparsed"] == 1.0 and row["win_rate"] is None


def test_equal_texts_tie_unasked_and_no_question_is_asked_twice(evaluate, tmp_path):
    pairs = some_pairs(3)
    texts = {"recon": {pair["id"]: f"text {i}" for i, pair in enumerate(pairs)}, "backward": {pair["id"]: "text 0" for pair in pairs}}
    asked = []
    judge = made_up_judge(evaluate, lambda first, second: asked.append((first, second)) or "first")
    first = evaluate.judge_pairs(judge, "actions", pairs, texts, [("recon", "backward")], tmp_path / "answers.jsonl")
    assert len(asked) == 4 and [row["winner"] for row in first[:2]] == ["tie", "tie"]
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"question": "torn')
    assert evaluate.judge_pairs(judge, "actions", pairs, texts, [("recon", "backward")], tmp_path / "answers.jsonl") == first and len(asked) == 4
    other = {**texts, "recon": {**texts["recon"], pairs[1]["id"]: "another text"}}
    evaluate.judge_pairs(judge, "actions", pairs, other, [("recon", "backward")], tmp_path / "answers.jsonl")
    assert len(asked) == 6 and all("another text" in question for question in asked[4:])


def test_the_encoder_prefers_the_closer_text_ties_near_equal_ones_and_never_an_empty_one(evaluate, encoder):
    assert evaluate.closer(0.5, 0.4, 0.02) == "first" and evaluate.closer(0.4, 0.5, 0.02) == "second" and evaluate.closer(0.5, 0.49, 0.02) == "tie"
    judge = evaluate.encoder_judge(encoder, 0.02)
    questions = [("my dog is ill and I am worried", "the train leaves at nine"), ("", "the train leaves at nine"), ("nine is when the train leaves", "")]
    assert judge.ask("Alex: hi", "I am worried because my dog is sick", questions) == ["first", "second", "first"] and judge.orders == ("both",)


def test_a_local_judge_answers_with_the_likelier_letter_whatever_else_it_is_asked(evaluate, tiny, numbers):
    """Against the model run on each whole prompt alone."""
    model, tokenizer = tiny
    judge = evaluate.local_judge("tiny", model, tokenizer)
    texts = ["".join(numbers.choice("abcdefgh ") for _ in range(numbers.randint(1, 30))) for _ in range(6)]
    questions = [(first, second) for first in texts[:3] for second in texts[3:]]
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    expected = []
    for first, second in questions:
        prompt = sum(common.encode_prompt(tokenizer, "comparison", context="Alex: hi", action="yes", first=common.one_line(first), second=common.one_line(second)), [])
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        expected.append("first" if logits[a] > logits[b] else "second")
    assert judge.ask("Alex: hi", "yes", questions) == expected and judge.calls == 9
    assert judge.ask("Alex: hi", "yes", questions[:1]) == expected[:1]


@pytest.mark.parametrize("answer, choice", [("A", "first"), (" b.\n", "second"), ("**A**", "first"), ("Message B", "second"), ("A or B", None), ("", None), ("I cannot say", None), ("AB", None)])
def test_a_remote_answer_is_a_letter_or_nothing(evaluate, answer, choice):
    assert evaluate.parse_choice(answer) == choice


def test_a_remote_judge_asks_again_for_a_letter_and_then_gives_up(evaluate, loopback):
    loopback.answers += ["well, B I think", "B", "?", "?", "?"]
    judge = evaluate.remote_judge(common.Server("openai:big", 1))
    assert judge.ask("Alex: hi {first}", "yes {second}", [("one", "two"), ("two", "one")]) == ["second", None] and judge.calls == 5
    told = loopback.asked[0][2]
    assert told["model"] == "big" and "Message A:\n<<<\nSam: one\n>>>" in told["messages"][1]["content"] and "yes {second}" in told["messages"][1]["content"]


@pytest.mark.parametrize("name, family", [("Qwen/Qwen3-8B", "qwen"), ("openai:gpt-5-mini", "gpt"), ("embedded", "smollm"), ("HuggingFaceTB/SmolLM2-1.7B", "smollm"),
                                          ("meta-llama/Meta-Llama-3.1-8B", "llama"), ("/models/7b-chat", None)])
def test_a_models_family_is_known_by_its_name(evaluate, name, family):
    assert evaluate.family(name) == family


def test_identical_texts_hide_neither_flips_nor_a_preference_for_length(evaluate, tmp_path):
    pairs = some_pairs(12)
    texts = {"recon": {pair["id"]: f"text {i}" for i, pair in enumerate(pairs)}, "backward": {pair["id"]: f"text {i}" if i < 9 else f"other {i}" for i, pair in enumerate(pairs)}}
    row = judged(evaluate, made_up_judge(evaluate, lambda first, second: "first"), pairs, texts, tmp_path)
    assert row["identical"] == 9 and row["flip_rate"] == 1.0 and row["matched"]["n"] == 3 and row["ties"] == 12


def test_one_conversation_gives_a_win_rate_and_no_more(evaluate, tmp_path):
    pairs = some_pairs(3, a_conversation=9)
    texts = {arm: {pair["id"]: f"{arm} {i}" for i, pair in enumerate(pairs)} for arm in ("recon", "backward")}
    row = judged(evaluate, made_up_judge(evaluate, lambda first, second: "first" if "recon" in first else "second"), pairs, texts, tmp_path)
    assert row["win_rate"] == 1.0 and row["ci95"] is None and row["p"] == 1.0 and row["needed"] is None and row["ci95_people"] is None
    assert evaluate.read_results([row | {"p_holm": 1.0}], {"e2e-grpo": {"distinct_actions": 0.25}}, {"name": "encoder", "same_family": False}, "embedding")[-2].startswith("e2e-grpo repeats itself: 25%")


# ------------------------------------------------------------------------------------------------
# Intervals and tests


@pytest.mark.parametrize("true_rate, conversations", [(0.5, 24), (0.65, 24), (0.547, 60)])
def test_the_interval_covers_the_truth_in_95_percent_of_runs_and_a_naive_one_does_not(true_rate, conversations):
    """Pairs of a conversation share its luck: a win rate drawn for each from a beta distribution around the true one."""
    numbers, covered, naive, runs = random.Random(1), 0, 0, 2000
    for run in range(runs):
        points, clusters = [], []
        for conversation in range(conversations):
            luck = numbers.betavariate(1.5 * true_rate, 1.5 * (1 - true_rate))
            for _ in range(numbers.randint(1, 6)):
                points.append(0.5 if numbers.random() < 0.1 else float(numbers.random() < luck))
                clusters.append(str(conversation))
        truth = 0.05 + 0.9 * true_rate
        low, high = common.bootstrap_interval(points, clusters, run, draws=1000)
        mean = sum(points) / len(points)
        error = 1.96 * (sum((point - mean) ** 2 for point in points) / len(points) ** 2) ** 0.5
        covered, naive = covered + (low <= truth <= high), naive + (abs(mean - truth) <= error)
    assert 0.93 <= covered / runs <= 0.97, covered / runs
    assert naive / runs < 0.9, naive / runs


def test_the_interval_treats_a_conversation_as_one_observation():
    """80 points in 8 conversations that agree within themselves: far wider than 80 points that are all apart."""
    points = [float(i // 10 % 2) for i in range(80)]
    clustered = common.bootstrap_interval(points, [str(i // 10) for i in range(80)], 0)
    apart = common.bootstrap_interval(points, [str(i) for i in range(80)], 0)
    assert clustered[1] - clustered[0] > 2 * (apart[1] - apart[0]) and apart[0] < 0.5 < apart[1]
    assert common.bootstrap_interval([1.0] * 6, list("abcdef"), 0) == [1.0, 1.0]
    assert common.bootstrap_interval([1.0, 0.0] * 6, list("abcdeabcdeab"), 0) is None                # five conversations are too few


def test_the_interval_has_the_width_of_the_t_interval_for_independent_points(evaluate, numbers):
    points = [numbers.gauss(0, 1) for _ in range(15)]
    low, high = common.bootstrap_interval(points, list(map(str, range(15))), 1, draws=20000)
    expected = stats.t.interval(0.95, 14, loc=sum(points) / 15, scale=stats.sem(points))
    assert (high - low) / (expected[1] - expected[0]) == pytest.approx(1, abs=0.1)
    assert evaluate.standard_error(points, list(map(str, range(15)))) == pytest.approx(stats.sem(points))


def test_people_who_differ_widen_the_interval(evaluate, numbers):
    people = [i % 8 for i in range(320)]
    points = [float(numbers.random() < (0.9 if person % 2 else 0.1)) for person in people]
    conversations = [f"{i // 32} {person}" for i, person in enumerate(people)]
    by_conversation, by_people = common.bootstrap_interval(points, conversations, 0), evaluate.people_interval(points, conversations, people, 0)
    assert by_people[1] - by_people[0] > 2 * (by_conversation[1] - by_conversation[0])
    assert evaluate.people_interval(points, conversations, [person % 5 for person in people], 0) is None


def test_the_sign_flip_p_is_the_share_of_all_flips_that_are_as_extreme(evaluate, numbers):
    points, clusters = [numbers.choice((0.0, 0.5, 1.0)) for _ in range(25)], [str(i // 3) for i in range(25)]
    sums = [sum(point - 0.5 for point, cluster in zip(points, clusters) if cluster == name) for name in sorted(set(clusters))]
    flipped = [abs(sum(sign * value for sign, value in zip(signs, sums))) for signs in product((1, -1), repeat=len(sums))]
    assert evaluate.sign_flip_p(points, clusters, 0) == pytest.approx(sum(value >= abs(sum(sums)) - 1e-9 for value in flipped) / len(flipped))


def test_the_sign_flip_p_equals_scipys_for_many_independent_pairs(evaluate, numbers):
    """Against the exact sign test, which is the same hypothesis where no point is a tie."""
    points = [float(numbers.random() < 0.6) for _ in range(60)]
    expected = stats.binomtest(int(sum(points)), 60).pvalue
    assert evaluate.sign_flip_p(points, list(map(str, range(60))), 0) == pytest.approx(expected, abs=0.03)
    assert evaluate.sign_flip_p([0.5, 0.5], ["a", "b"], 0) == 1.0


def test_kappa_equals_scikit_learns(evaluate, numbers):
    for _ in range(20):
        first, second = ([numbers.choice(("a", "a", "b", "tie")) for _ in range(30)] for _ in range(2))
        assert evaluate.kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert evaluate.kappa(["a", "a"], ["a", "a"]) is None
    labels = [(0, *numbers.choice((("a", "a"), ("b", "b")))) for _ in range(10)] + [(0, "a", "a"), (0, "b", "b")]
    same = evaluate.agreement(labels, [str(i % 6) for i in range(12)], 0)
    assert same["kappa"] == 1.0 and same["agreement"] == 1.0 and same["kappa_ci95"] == [1.0, 1.0]


def test_the_kappa_of_several_people_is_the_mean_over_each_two(evaluate, numbers):
    raters = [[numbers.choice(("a", "b", "tie")) for _ in range(30)] for _ in range(3)]
    labels = [((i, j), a, b) for i in range(3) for j in range(i) for a, b in zip(raters[i], raters[j])]
    expected = sum(cohen_kappa_score(raters[i], raters[j]) for i in range(3) for j in range(i)) / 3
    assert evaluate.agreement(labels, ["c"] * 90, 0)["kappa"] == pytest.approx(expected)


def test_holm_allows_for_the_number_of_comparisons(evaluate):
    assert evaluate.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evaluate.holm([0.9, 0.8]) == [1.0, 1.0] and evaluate.holm([]) == []


def test_needed_is_the_number_that_has_80_percent_power(evaluate, tmp_path):
    """Independent pairs, win rate 0.6: the textbook's 194 or so."""
    pairs = [make_pair(f"c{i}/{i}", split="test") for i in range(1000)]
    texts = {arm: {pair["id"]: f"{arm} {i}" for i, pair in enumerate(pairs)} for arm in ("recon", "backward")}
    won = lambda text: "recon" in text and int(text.split()[1]) % 10 < 6 or "backward" in text and int(text.split()[1]) % 10 >= 6
    row = judged(evaluate, made_up_judge(evaluate, lambda first, second: "first" if won(first) else "second"), pairs, texts, tmp_path)
    assert row["win_rate"] == 0.6 and row["needed"] == pytest.approx((1.96 + 0.8416) ** 2 * 0.24 / 0.01, rel=0.01)


def test_the_arms_are_compared_once_each_and_recon_with_its_control(evaluate):
    arms = ["none", "backward", "recon", "shuffled"]
    assert evaluate.choose_comparisons(arms, "backward", False) == [("none", "backward"), ("recon", "backward"), ("shuffled", "backward"), ("recon", "shuffled")]
    everyone = evaluate.choose_comparisons(arms, "backward", True)
    assert len(everyone) == 6 and len({frozenset(some) for some in everyone}) == 6


@pytest.mark.parametrize("a, b, rate, p, words", [("recon", "shuffled", 0.7, 0.01, "recon does better than its control"), ("shuffled", "recon", 0.3, 0.01, "recon does better than its control"),
                                                  ("recon", "shuffled", 0.7, 0.06, "cannot be told apart"), ("recon", "shuffled", 0.3, 0.01, "shuffled does better than recon")])
def test_the_reading_says_in_words_what_the_control_shows(evaluate, a, b, rate, p, words):
    row = {"what": "actions", "a": a, "b": b, "win_rate": rate, "ci95": None, "p": p, "p_holm": p, "flip_rate": None, "longer_wins": {"n": 0, "ci95": None}, "matched": {"n": 0}}
    assert words in " ".join(evaluate.read_results([row], {}, {"name": "encoder", "same_family": False}, None))
