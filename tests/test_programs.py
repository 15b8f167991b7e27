"""The real scripts, started as programs, on the embedded default: a real model and real conversations, few of them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_pair

import common
from common import Pair, Scores

COMMANDS = [
    "01_prepare.py --limit 9 --val-share 0.2 --test-share 0.4",
    "02_sample_candidates.py --num-samples 2 --max-trace-tokens 16",
    "03_reconstruct_score.py --max-action-tokens 12 --negatives 1 --scorers likelihood,embedding,judge",
    "04_select_sft.py --epochs 1 --arms none,backward,guarded,recon",
    "05_rl_train.py --steps 1 --num-generations 2",
    "02_sample_candidates.py --tag grpo",
    "03_reconstruct_score.py --tag grpo",
    "04_select_sft.py --tag grpo",
    "05_rl_train.py --objective e2e --steps 1 --num-generations 2 --max-new-tokens 16",
    "06_evaluate.py --max-trace-tokens 16 --max-action-tokens 12 --judge embedded",
]


def run_program(run, command):
    """Start a stage as a user would, with every hub out of reach."""
    script, *arguments = command.split()
    return subprocess.run([sys.executable, str(ROOT / script), "--run", str(run), *arguments], capture_output=True,
                          text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished run. Each stage ended with its closing line and the next command, the one that follows here."""
    run = tmp_path_factory.mktemp("demo")
    for command, following in zip(COMMANDS, [*COMMANDS[1:], "report.html"]):
        done = run_program(run, command)
        assert done.returncode == 0, done.stderr
        closing, last = done.stdout.strip().splitlines()[-2:]
        assert closing.startswith(command.split()[0].removesuffix(".py")) and " in, " in closing and " s, " in closing
        assert last.startswith("next: ") and following.split()[0] in last
        assert ("--tag grpo" in last) == ("--tag grpo" in following) and ("e2e" in last) == ("e2e" in following)
    return run


def test_the_loop_on_the_embedded_default_evaluates_every_arm_on_held_out_pairs(demo):
    pairs = common.read_rows(demo / "pairs.jsonl", Pair)
    results = json.loads((demo / "results.json").read_text())
    assert {"none", "backward", "guarded", "recon", "recon-grpo", "e2e-grpo"} == results["arms"].keys()
    assert all(row["n"] == sum(pair.split == "test" for pair in pairs) for row in results["arms"].values())
    assert {"none", "backward", "recon", "recon-grpo", "shuffled"} <= results["reconstructions"].keys()
    assert (demo / "report.html").stat().st_size > 10_000


def test_the_judge_takes_2n_plus_1_model_calls_a_pair_and_rates_every_candidate(demo):
    rows = common.read_rows(demo / "scores.jsonl", Scores)
    every = [candidate for row in rows for candidate in row.candidates]
    assert all(0 <= candidate.scores["judge"] <= 9 for candidate in every)
    calls = json.loads((demo / "scores.summary.json").read_text())["calls"]
    assert calls["traces"] + calls["reconstructions"] + calls["judgements"] == len(rows) * (2 * 2 + 1)


def test_a_second_start_finds_the_stage_complete(demo):
    done = run_program(demo, COMMANDS[3])
    assert done.returncode == 0 and done.stdout.count("is complete") == 4


def test_a_real_model_prefers_a_trace_that_says_what_the_reply_is_about():
    """Not noise: the embedded model finds the reply likelier behind its own trace than behind another's."""
    local = common.load_model("embedded", False, "auto")
    turn = common.Turn(speaker="bo", text="do you want to come to the lake with us on sunday?")
    pair = make_pair(action="sorry, I have to work all weekend", context=[turn])
    own, other = ("Sam is stressed about a job that leaves no free time.",
                  "Sam is proud of a new puppy and wants to show it around.")
    items = [(pair, [own, other], ["the puppy likes everybody so much"])]
    ((scores, _),) = common.likelihood_scores(local, items)
    assert scores[0]["likelihood"] > scores[1]["likelihood"] and scores[0]["contrast"] > scores[1]["contrast"]


@pytest.mark.parametrize("command, words", [
    ("01_prepare.py --user nobody-of-that-name", ["nobody-of-that-name", "--list-users"]),
    ("03_reconstruct_score.py", ["pairs.jsonl does not exist", "01_prepare.py"]),
])
def test_a_wrong_start_gets_one_message_and_exit_code_2(tmp_path, command, words):
    done = run_program(tmp_path / "run", command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_model_that_cannot_be_had_gets_one_message_and_overwrite_costs_nothing(demo):
    before = (demo / "candidates.jsonl").read_bytes()
    done = run_program(demo, "02_sample_candidates.py --model nobody/nothing --overwrite")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--model nobody/nothing" in done.stderr
    assert (demo / "candidates.jsonl").read_bytes() == before


def test_a_bad_line_and_a_changed_input_stop_the_stage_and_keep_its_output(demo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    before, whole = (run / "scores.jsonl").read_bytes(), (run / "candidates.jsonl").read_bytes()
    (run / "candidates.jsonl").write_bytes(whole + b'{"id": "x"}\n')
    done = run_program(run, COMMANDS[2])
    assert done.returncode == 2 and f"line {len(whole.splitlines()) + 1}: candidates" in done.stderr
    rows = whole.splitlines(keepends=True)
    (run / "candidates.jsonl").write_bytes(b"".join(rows[::-1]))
    done = run_program(run, COMMANDS[2])
    assert done.returncode == 2 and "inputs" in done.stderr and "--overwrite" in done.stderr
    assert (run / "scores.jsonl").read_bytes() == before
