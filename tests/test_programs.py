"""The real scripts, started as programs, on the embedded default: a real model and real conversations, few of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent


def run_stage(run, script, *arguments):
    """Start a stage as a user would, with every hub out of reach."""
    return subprocess.run([sys.executable, str(ROOT / script), "--run", str(run), *arguments], capture_output=True, text=True,
                          timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"})


SCORING = ("--max-action-tokens", "12", "--scorers", "likelihood,embedding,judge")
STAGES = [("01_prepare.py", "--limit", "8"), ("02_sample_candidates.py", "--n", "2", "--max-trace-tokens", "16"), ("03_reconstruct_score.py", *SCORING),
          ("04_select_sft.py", "--epochs", "1"), ("05_rl_train.py", "--steps", "1", "--prompts", "2", "--group", "2", "--max-new-tokens", "16", "--epochs", "1", "--retries", "1"),
          ("06_evaluate.py", "--max-trace-tokens", "16", "--max-action-tokens", "12")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo")
    for script, *arguments in STAGES:
        done = run_stage(run, script, "--val-share" if script == "01_prepare.py" else "--seed", "0.2" if script == "01_prepare.py" else "0", *arguments)
        assert done.returncode == 0, done.stderr
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith(script.removesuffix(".py")) and " in, " in last and " s" in last
    return run


def test_the_loop_on_the_embedded_default_evaluates_every_arm_on_held_out_pairs(demo):
    pairs = common.read_rows(demo / "pairs.jsonl")
    splits = {}
    for pair in pairs:
        splits.setdefault(pair["conversation"], set()).add(pair["split"])
    assert all(len(found) == 1 for found in splits.values()) and len({pair["user"] for pair in pairs}) == 2
    results = json.loads((demo / "results.json").read_text())
    test = {pair["id"] for pair in pairs if pair["split"] == "test"}
    assert {"none", "backward", "recon", "recon-grpo"} <= results["arms"].keys()
    assert all(set(row["ids"]) == test for row in results["arms"].values())
    assert results["made_with"]["versions"]["torch"] and (demo / "report.html").stat().st_size > 10_000


def test_the_scores_of_the_embedded_default_come_with_guard_calls_and_controls(demo):
    rows = common.read_rows(demo / "scores.jsonl")
    summary = json.loads((demo / "scores.summary.json").read_text())
    every = [candidate for row in rows for candidate in row["candidates"]]
    assert all({"likelihood", "unsaid", "embedding", "judge"} == candidate["scores"].keys() and 0 <= candidate["scores"]["judge"] <= 9 for candidate in every)
    calls = summary["calls"]
    assert calls["traces"] + calls["reconstructions"] + calls["judgements"] == len(rows) * (2 * 2 + 1)         # 2N + 1 with N = 2
    assert summary["guard"]["stopped"] == sum(candidate["stopped"] for candidate in every) and summary["judge_order"]["between_orders"] >= 0
    assert summary["controls"].keys() == {"likelihood", "unsaid", "embedding", "judge"}
    pairs = {pair["id"]: pair for pair in common.read_rows(demo / "pairs.jsonl")}
    assert all(pairs[row["control"]["id"]]["conversation"] != pairs[row["id"]]["conversation"] for row in rows)


def test_a_real_model_prefers_a_trace_that_says_what_the_reply_is_about():
    """Not noise: the embedded model finds the reply likelier behind its own trace than behind another's."""
    model, tokenizer = common.load_model("embedded", None)
    pair = {"user": "a", "context": [{"speaker": "b", "text": "do you want to come to the lake with us on sunday?"}], "action": "sorry, I have to work all weekend"}
    own, other = "Sam is stressed about a job that leaves no free time.", "Sam is proud of a new puppy and wants to show it around."
    scores, _ = common.likelihood_scores(model, tokenizer, pair, [own, other])
    assert scores[0]["likelihood"] > scores[1]["likelihood"] and common.leak_share(own, pair["action"], "") == 0


@pytest.mark.parametrize("script, arguments, words", [
    ("01_prepare.py", ["--user", "nobody-of-that-name"], ["nobody-of-that-name", "--list-users"]),
    ("02_sample_candidates.py", [], ["pairs.jsonl does not exist", "01_prepare.py"]),
    ("03_reconstruct_score.py", [], ["does not exist", "01_prepare.py"]),
    ("06_evaluate.py", [], ["does not exist", "01_prepare.py"]),
])
def test_a_wrong_start_gets_one_message_and_exit_code_2(tmp_path, script, arguments, words):
    done = run_stage(tmp_path / "run", script, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_model_that_cannot_be_had_gets_one_message_and_overwrite_costs_nothing(demo):
    before = (demo / "candidates.jsonl").read_bytes()
    done = run_stage(demo, "02_sample_candidates.py", "--model", "nobody/nothing", "--overwrite")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--model nobody/nothing" in done.stderr
    assert (demo / "candidates.jsonl").read_bytes() == before


def test_a_bad_line_in_an_input_stops_the_stage_and_keeps_its_output(demo, tmp_path):
    """Also: a changed input is noticed, so rows made from different inputs never mix."""
    import shutil
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    before = (run / "scores.jsonl").read_bytes()
    whole = (run / "candidates.jsonl").read_bytes()
    (run / "candidates.jsonl").write_bytes(whole + b'{"id": "x"}\n')
    done = run_stage(run, "03_reconstruct_score.py", *SCORING)
    assert done.returncode == 2 and "'candidates' is missing" in done.stderr and f"line {len(whole.splitlines()) + 1}" in done.stderr
    (run / "candidates.jsonl").write_bytes(whole + b"\n".join(whole.splitlines()[:1]) + b"\n")
    done = run_stage(run, "03_reconstruct_score.py", *SCORING)
    assert done.returncode == 2 and "inputs" in done.stderr and "--overwrite" in done.stderr
    assert (run / "scores.jsonl").read_bytes() == before
