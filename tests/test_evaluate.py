"""Stage 6 behind a whole run of the tiny model: what it compares, what it does again, and what it refuses."""

import json
import shutil

import pytest
import torch
from conftest import make_pair, make_run, run_stages
from test_training import SCORE, make_scores, stage

import common

evaluate = stage("06_evaluate")
EVALUATE = "06_evaluate --max-trace-tokens 6 --max-action-tokens 6 --num-actions 2"
ARMS = ["none", "backward", "guarded", "recon", "recon-grpo", "e2e-grpo", "shuffled"]


@pytest.fixture(scope="module")
def finished(tiny_folder, encoder, tmp_path_factory):
    """A run folder with every stage done."""
    run = make_run(tmp_path_factory.mktemp("finished") / "run", train=4, val=2, test=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_encoder", lambda name: encoder)
        patch.setitem(common.PROMPTS, "synthesis", common.PROMPTS["synthesis"][::9])           # without its examples
        run_stages(
            stage, run, tiny_folder, "02_sample_candidates --num-samples 2 --max-trace-tokens 6",
            "03_reconstruct_score --max-action-tokens 6", "05_rl_train --steps 1 --rank 4",
            "04_select_sft --epochs 1 --rank 4 --arms none,backward,guarded,recon,shuffled",
            "02_sample_candidates --tag grpo", "03_reconstruct_score --tag grpo", "04_select_sft --tag grpo",
            "05_rl_train --objective e2e --steps 1 --rank 4 --max-new-tokens 6", EVALUATE)
    return run


@pytest.fixture()
def run(finished, encoder, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(common, "load_encoder", lambda name: encoder)
    return shutil.copytree(finished, tmp_path / "run")


def results_of(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("traces", [["Sam thinks"], [f"Sam thinks {k % 18}" for k in range(20)], [None]])
def test_the_true_action_is_as_likely_as_on_average_behind_the_models_own_traces(tiny, traces):
    """Against plain forwards: the log of the mean of the probabilities, not the mean of the logs."""
    pair, likely = make_pair(), []
    prompt = common.encode_prompt(tiny.tokenizer, common.user_prompt(pair, traces[0] is not None))
    action = common.encode_data(tiny.tokenizer, pair.action)
    for trace in traces:
        start = prompt + common.close_trace(tiny.tokenizer, trace)
        with torch.no_grad():
            logprobs = tiny.model(torch.tensor([start + action])).logits[0].double().log_softmax(-1)
        likely.append(sum(logprobs[len(start) + at - 1, token] for at, token in enumerate(action)).exp())
    found = evaluate.true_action_logprobs(tiny, pair, traces)
    answers = [evaluate.Answer(trace=trace, finished=True, action="", tokens=0, action_logprob=logprob)
               for trace, logprob in zip(traces, found)]
    row = evaluate.Prediction(id="c/1", action_tokens=len(action), answers=answers)
    expected = (sum(likely) / len(likely)).log().item() / len(action)
    assert evaluate.marginal_logprob(row, len(traces)) == pytest.approx(expected, abs=1e-4)
    mean = sum(one.log().item() for one in likely) / len(likely) / len(action)
    assert evaluate.marginal_logprob(row, 1) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("text, finished, trace, action", [
    ("Sam is sad.\n</think>\nSam: oh no\nmore", True, "Sam is sad.", "oh no"),
    ("Sam is sad. Sam wants to", False, "Sam is sad.", ""), ("Sam is", True, "Sam is", "")])
def test_an_answer_is_a_trace_and_what_follows_it_and_an_open_trace_is_cut_to_whole_sentences(
        text, finished, trace, action):
    found = evaluate.read_answer(common.Completion(text, finished, 9, []), True)
    assert (found.trace, found.finished, found.action) == (trace, "</think>" in text, action)


def test_reconstructions_are_those_of_the_candidates_that_an_arm_chooses():
    """Of no trace for none, of the control for shuffled; a pair without the score is left out where it chooses."""
    row = make_scores("c/1", [0.1, 0.9, 0.4], [0.4, 0, 0])
    for text, some in zip(("r0", "r1", "r2", "other"), [*row.candidates, row.control]):
        some.reconstruction = text
    row.baseline_reconstruction = "nothing"
    missing = make_scores("c/2", [None]).model_copy(update={"baseline_reconstruction": ""})
    rules = ("none", "backward", "guarded", "recon", "shuffled")
    found = {rule: evaluate.reconstructed([row, missing], rule, SCORE) for rule in rules}
    assert {rule: rows["c/1"][0][1] for rule, rows in found.items()} == {
        "none": "nothing", "backward": "r0", "guarded": "r1", "recon": "r1", "shuffled": "other"}
    assert found["none"]["c/1"][0][0] is None and found["recon"]["c/1"][0][0] == "Sam is c/1 1."
    assert [rule for rule, rows in found.items() if "c/2" in rows] == ["none", "backward", "shuffled"]
    row.baseline_reconstruction = None
    assert evaluate.reconstructed([row, missing], "none", SCORE) == {}


def test_every_arm_acts_on_every_test_pair_and_only_the_train_split_is_learnt_from(finished):
    split = {pair.id: pair.split for pair in common.read_rows(finished / "pairs.jsonl", common.Pair)}
    test = [name for name, kind in split.items() if kind == "test"]
    for path in (finished / "traces").glob("*.jsonl"):
        assert {split[row.id] for row in common.read_rows(path, common.Choice)} == {"train"}
    results = results_of(finished)
    assert list(results["arms"]) == ARMS
    assert set(results["reconstructions"]) == {*ARMS, "longest", "worst"} - {"e2e-grpo"}
    for arm, row in results["arms"].items():
        rows = common.read_rows(finished / "predictions" / f"{arm}.jsonl", evaluate.Prediction)
        assert {each.id for each in rows} == set(test) and all(
            (answer.trace is None) == (arm == "none") for each in rows for answer in each.answers)
        assert row["versus"] == (None if arm == "backward" else "backward")
        curve = list(row["action_logprob_by_k"].values())
        assert len(curve) == 2 and curve[1] == pytest.approx(row["action_logprob"]) and curve[0] <= curve[1] + 1e-9
        assert arm == "backward" or row["wins"] + row["ties"] + row["losses"] == 2 * row["n"] == 2 * len(test)
    assert {"scores.grpo.jsonl", "models/e2e-grpo/adapter_model.safetensors"} < results["config"]["inputs"].keys()
    compared = {(row["what"], row["a"], row["b"]) for row in results["comparisons"]}
    assert {("actions", "recon-grpo", "guarded"), ("reconstructions", "recon", "shuffled")} < compared


def test_acting_again_gives_the_same_bytes_and_a_complete_run_the_same_table(
        finished, run, tiny_folder, monkeypatch, capsys):
    for name in ("results.json", "predictions/none.jsonl"):
        (run / name).unlink()
    half = (run / "predictions" / "recon.jsonl").read_bytes()
    (run / "predictions" / "recon.jsonl").write_bytes(half[:len(half) // 2])
    run_stages(stage, run, tiny_folder, EVALUATE)
    table = capsys.readouterr().out.partition("06_evaluate: ")[0]
    for name in ("results.json", "judgements.jsonl", "predictions/recon.jsonl", "predictions/none.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("a model was loaded"))
    run_stages(stage, run, tiny_folder, EVALUATE)
    again = capsys.readouterr().out
    assert again.startswith(table) and "are complete" in again and "win rate" in table


def test_another_comparison_judges_anew_the_same_texts_without_acting_anew(run, tiny_folder, monkeypatch):
    """And recon-grpo's reconstructions are those of the tag's first trace that passes."""
    before, told, judge = (run / "predictions" / "recon.jsonl").read_bytes(), {}, evaluate.judge_pairs

    def listening(by, what, pairs, texts, comparisons):
        told[what] = texts
        return judge(by, what, pairs, texts, comparisons)

    monkeypatch.setattr(evaluate, "judge_pairs", listening)
    monkeypatch.setattr(common, "load_model", lambda *_: pytest.fail("a model was loaded"))
    run_stages(stage, run, tiny_folder, f"{EVALUATE} --versus none")
    arms = results_of(run)["arms"]
    assert (arms["none"]["versus"], arms["backward"]["versus"]) == (None, "none")
    assert (run / "predictions" / "recon.jsonl").read_bytes() == before
    for row in common.read_rows(run / "scores.grpo.jsonl", common.Scores):
        passing = [(some.trace, some.reconstruction) for some in row.candidates if not some.is_leak]
        if passing and row.id in told["actions"]["none"]:
            assert told["reconstructions"]["recon-grpo"][row.id] == passing[:1]


def test_language_models_judge_in_both_orders_and_one_that_says_a_alone_flips(run, tiny_folder, loopback):
    loopback.reply = lambda body: "A"
    served = f"big at http://127.0.0.1:{loopback.port}/v1"
    for judge, name in ((str(tiny_folder), str(tiny_folder)), ("openai:big", served)):
        run_stages(stage, run, tiny_folder, f"{EVALUATE} --judge {judge}")
        verdicts = [json.loads(line) for line in (run / "judgements.jsonl").read_text().splitlines()]
        assert {row["order"] for row in verdicts} == {"ab", "ba"} and results_of(run)["judge"] == name
    rows = results_of(run)["comparisons"]
    assert {row["win_rate"] for row in rows} == {0.5} and {row["flip_rate"] for row in rows} in ({1.0}, {1.0, None})


@pytest.mark.parametrize("what, message", [
    ("settings", "lr was 0.001, is now 0.5"), ("traces/recon.jsonl", "training pairs"),
    ("pairs.jsonl", "another pairs.jsonl"), ("versus", "models/worst does not exist")])
def test_arms_that_cannot_be_compared_stop_it_with_a_message(run, tiny_folder, capsys, what, message):
    if what == "settings":
        run_stages(stage, run, tiny_folder, "04_select_sft --arms worst --epochs 1 --rank 4 --lr 0.5")
    elif what != "versus":
        (run / what).write_text("".join((run / what).read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit) as caught:
        run_stages(stage, run, tiny_folder, f"{EVALUATE} --versus {'worst' if what == 'versus' else 'backward'}")
    assert caught.value.code == 2 and message in capsys.readouterr().err
