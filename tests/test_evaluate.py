"""Judging, intervals, and the report, also in a real browser if there is one."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import make_pair
from test_prepare import write_turns

import common


@pytest.fixture(scope="module")
def evaluate(stage):
    return stage("06_evaluate")


def test_the_closer_action_wins_and_a_near_equal_one_ties(evaluate):
    assert evaluate.judge(0.5, 0.4, 0.02) == "a" and evaluate.judge(0.4, 0.5, 0.02) == "b"
    assert evaluate.judge(0.5, 0.49, 0.02) == "tie" and evaluate.judge(0.49, 0.5, 0.02) == "tie"


def test_a_win_rate_counts_a_tie_as_half(evaluate):
    pairs = [make_pair(f"c{i}/1") for i in range(4)]
    judgements = [{"id": pair["id"], "winner": winner} for pair, winner in zip(pairs, ("a", "tie", "b", "a"))]
    row = evaluate.compare(judgements, pairs, 0)
    assert (row["wins"], row["ties"], row["losses"], row["win_rate"]) == (2, 1, 1, 0.625)
    assert row["ci95"][0] <= 0.625 <= row["ci95"][1]


def test_the_interval_treats_a_conversation_as_one_observation(evaluate, numbers):
    """40 points in 4 conversations that agree within themselves: far wider than 40 points that are all apart."""
    points = [float(i // 10 % 2) for i in range(40)]
    clustered = evaluate.bootstrap_interval(points, [str(i // 10) for i in range(40)], 0)
    apart = evaluate.bootstrap_interval(points, [str(i) for i in range(40)], 0)
    assert clustered[1] - clustered[0] > 2 * (apart[1] - apart[0])
    assert apart[0] < 0.5 < apart[1]
    assert evaluate.bootstrap_interval([1.0, 1.0], ["a", "b"], 0) == [1.0, 1.0]


def test_the_interval_has_the_width_of_the_normal_approximation_for_independent_points(evaluate, numbers):
    points = [float(numbers.random() < 0.5) for _ in range(400)]
    low, high = evaluate.bootstrap_interval(points, [str(i) for i in range(400)], 1)
    mean = sum(points) / 400
    expected = 2 * 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert abs((high - low) / expected - 1) < 0.15


def test_log_prob_of_the_true_action_is_read_behind_the_models_own_trace(evaluate, tiny):
    import torch
    model, tokenizer = tiny
    pair = make_pair()
    prompt, thought = common.user_prompt(tokenizer, pair, True), common.close_trace(tokenizer, "Sam thinks")
    action = common.encode_data(tokenizer, pair["action"])
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + thought + action])).logits[0].log_softmax(-1)
    start = len(prompt + thought)
    expected = sum(logprobs[start + at - 1, token].item() for at, token in enumerate(action)) / len(action)
    assert evaluate.true_action_logprob(model, tokenizer, pair, "Sam thinks") == pytest.approx(expected, abs=1e-4)


def test_every_arm_answers_every_pair_even_if_its_trace_never_ends(evaluate, tiny):
    model, tokenizer = tiny
    pairs = [make_pair(f"c/{i}") for i in range(3)]
    rows = evaluate.act(model, tokenizer, pairs, True, 5, 6, 0.7, 0)
    assert [row["id"] for row in rows] == ["c/0", "c/1", "c/2"] and all("</think>" not in row["trace"] for row in rows)
    assert rows == evaluate.act(model, tokenizer, pairs, True, 5, 6, 0.7, 0)
    assert evaluate.act(model, tokenizer, pairs, False, 5, 6, 0.7, 0)[0]["trace"] is None


HOSTILE = "</script><script>console.error('escaped')</script><img src=x onerror=console.error('escaped')> \u2028 <!--"


@pytest.fixture(scope="module")
def tiny_run(stage, tiny_folder, tmp_path_factory):
    """All six stages, in this process, on the tiny model, with hostile text in the data."""
    run = tmp_path_factory.mktemp("tiny_run")
    source = run / "turns.jsonl"
    rows = write_turns(source, conversations=16, turns=6)
    for row in rows:
        row["text"] = f"{row['text']} {HOSTILE}" if row["speaker"] != "ann" else f"{row['text']} <b>bold</b>"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common_arguments = ["--run", str(run), "--model", str(tiny_folder)]
    stage("01_prepare").main([*common_arguments, "--source", f"turns:{source}", "--user", "ann", "--max-action-tokens", "200", "--max-context-tokens", "900", "--limit", "24"])
    stage("02_sample_candidates").main([*common_arguments, "--n", "2", "--max-trace-tokens", "6", "--batch", "5"])
    stage("03_reconstruct_score").main([*common_arguments, "--max-action-tokens", "6", "--batch", "5"])
    stage("04_select_sft").main([*common_arguments, "--epochs", "1", "--rank", "4", "--arms", "none,backward,recon,shuffled,longest,worst"])
    stage("05_rl_train").main([*common_arguments, "--epochs", "1", "--rank", "4", "--steps", "1", "--max-new-tokens", "6"])
    stage("05_rl_train").main([*common_arguments, "--epochs", "1", "--rank", "4", "--steps", "1", "--max-new-tokens", "6", "--objective", "e2e"])
    stage("06_evaluate").main([*common_arguments, "--max-trace-tokens", "6", "--max-action-tokens", "6"])
    return run


def test_the_whole_loop_leaves_every_file_of_the_contract(tiny_run):
    pairs = {row["id"]: row for row in common.read_rows(tiny_run / "pairs.jsonl", ("id", "user", "conversation", "split", "context", "action"))}
    test = {name for name, pair in pairs.items() if pair["split"] == "test"}
    train = {name for name, pair in pairs.items() if pair["split"] == "train"}
    arms = {"none", "backward", "recon", "recon-grpo", "e2e-grpo", "shuffled", "longest", "worst"}
    for row in common.read_rows(tiny_run / "scores.jsonl", ("id", "candidates", "baseline")):
        assert len(row["candidates"]) == 2
        for candidate in row["candidates"]:
            assert {"trace", "finished", "tokens", "reconstruction", "leak", "scores"} <= candidate.keys()
            assert {"likelihood", "embedding", "unsaid"} == candidate["scores"].keys() and candidate["scores"].keys() <= row["baseline"].keys()
    for arm in arms - {"e2e-grpo"}:
        assert {row["id"] for row in common.read_rows(tiny_run / "traces" / f"{arm}.jsonl", ("id", "trace", "k", "score", "leak"))} == train
    for arm in arms:
        assert {row["id"] for row in common.read_rows(tiny_run / "predictions" / f"{arm}.jsonl", ("id", "trace", "action"))} == test
    results = json.loads((tiny_run / "results.json").read_text())["arms"]
    assert results.keys() == arms
    for arm, row in results.items():
        assert set(row["ids"]) == test and row["n"] == len(test)
        assert row["versus"] == (None if arm == "backward" else "backward")
        assert arm == "backward" or row["wins"] + row["ties"] + row["losses"] == row["n"]
    judgements = common.read_rows(tiny_run / "judgements.jsonl", ("id", "a", "b", "order", "winner"))
    assert len(judgements) == len(test) * (len(arms) - 1)


def test_only_the_train_split_is_learnt_from(tiny_run):
    split = {row["id"]: row["split"] for row in common.read_rows(tiny_run / "pairs.jsonl")}
    for path in (tiny_run / "traces").glob("*.jsonl"):
        assert {split[row["id"]] for row in common.read_rows(path)} == {"train"}


def test_the_report_holds_no_markup_from_the_data_and_loads_nothing(tiny_run):
    page = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and "<img" not in page and "<b>bold" not in page and "\u2028" not in page
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org)", page.replace("\\u003cimg src=x", ""))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert HOSTILE.split(" \u2028")[0] in data["examples"][0]["context"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_the_report_works_in_a_browser_without_a_console_message(tiny_run, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
               f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", (tiny_run / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert "recon-grpo" in shown.stdout and "<circle" in shown.stdout and "what Sam really wrote" in shown.stdout
    assert "&lt;/script&gt;&lt;script&gt;" in shown.stdout


def test_a_finished_run_is_found_done(stage, tiny_run, tiny_folder, capsys):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    common_arguments = ["--run", str(tiny_run), "--model", str(tiny_folder)]
    stage("02_sample_candidates").main([*common_arguments, "--n", "2", "--max-trace-tokens", "6", "--batch", "5"])
    stage("06_evaluate").main([*common_arguments, "--max-trace-tokens", "6", "--max-action-tokens", "6"])
    assert capsys.readouterr().out.count("already made") == 2
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_another_comparison_judges_anew_without_acting_anew(stage, tiny_run, tiny_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}
    module = stage("06_evaluate")
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("a model was loaded"))
    module.main(["--run", str(run), "--model", str(tiny_folder), "--max-trace-tokens", "6", "--max-action-tokens", "6", "--versus", "none"])
    results = json.loads((run / "results.json").read_text())["arms"]
    assert results["none"]["versus"] is None and results["backward"]["versus"] == "none"
    assert {path.name: path.read_bytes() for path in (run / "predictions").iterdir()} == before


def test_a_model_fitted_on_other_pairs_is_not_evaluated(stage, tiny_run, tiny_folder, tmp_path, capsys):
    """Its training conversations may be in the new test split."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    pairs = common.read_rows(run / "pairs.jsonl")
    common.write_text(run / "pairs.jsonl", "".join(map(common.dump_row, pairs[1:])))
    with pytest.raises(SystemExit) as caught:
        stage("06_evaluate").main(["--run", str(run), "--model", str(tiny_folder)])
    assert caught.value.code == 2 and "another pairs.jsonl" in capsys.readouterr().err


def test_an_interrupted_stage_goes_on_and_ends_with_the_same_bytes(stage, tiny_run, tiny_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    common_arguments = ["--run", str(run), "--model", str(tiny_folder)]
    for name, module, more in (("candidates.jsonl", "02_sample_candidates", ["--n", "2", "--max-trace-tokens", "6", "--batch", "5"]),
                               ("scores.jsonl", "03_reconstruct_score", ["--max-action-tokens", "6", "--batch", "5"]),
                               ("predictions/recon.jsonl", "06_evaluate", ["--max-trace-tokens", "6", "--max-action-tokens", "6"])):
        whole = (run / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        (run / name).write_bytes(b"".join(lines[:len(lines) // 2 + 1])[:-9])
        if module == "06_evaluate":
            (run / "results.json").unlink()
        stage(module).main([*common_arguments, *more])
        assert (run / name).read_bytes() == whole
