"""Stage 6 in a whole run of the tiny model: what it writes, what it keeps, and the report."""

import json
import re
import shutil

import pytest
from conftest import make_pair
from test_prepare import write_turns

import common


@pytest.fixture(scope="module")
def evaluate(stage):
    return stage("06_evaluate")


@pytest.mark.parametrize("traces", [["Sam thinks"], ["Sam thinks", "Sam feels a bit", ""], [None]])
def test_the_true_action_is_as_likely_as_on_average_behind_the_models_own_traces(evaluate, tiny, traces):
    """Against the model run on one whole sequence at a time: the log of the mean of the probabilities, not the mean of the logs."""
    import torch
    model, tokenizer = tiny
    pair = make_pair()
    prompt, action = common.user_prompt(tokenizer, pair, traces[0] is not None), common.encode_data(tokenizer, pair["action"])
    likely = []
    for trace in traces:
        start = prompt + ([] if trace is None else common.close_trace(tokenizer, trace))
        with torch.no_grad():
            logprobs = model(torch.tensor([start + action])).logits[0].double().log_softmax(-1)
        likely.append(sum(logprobs[len(start) + at - 1, token] for at, token in enumerate(action)).exp())
    expected = (sum(likely) / len(likely)).log().item() / len(action)
    assert evaluate.true_action_logprob(model, tokenizer, pair, traces) == pytest.approx(expected, abs=1e-4)


def test_every_arm_answers_every_pair_even_if_its_trace_never_ends(evaluate, tiny):
    model, tokenizer = tiny
    pairs = [make_pair(f"c/{i}") for i in range(3)]
    rows = evaluate.act(model, tokenizer, pairs, True, 2, 5, 6, 0.7, 0)
    assert [row["id"] for row in rows] == ["c/0", "c/1", "c/2"] and all("</think>" not in row["trace"] for row in rows)
    assert all(len(row["traces"]) == 2 and row["trace"] == row["traces"][0] for row in rows)
    assert rows == evaluate.act(model, tokenizer, pairs, True, 2, 5, 6, 0.7, 0)
    assert evaluate.act(model, tokenizer, pairs, False, 2, 5, 6, 0.7, 0)[0]["traces"] == [None]


SHORT = ["--max-trace-tokens", "6", "--max-action-tokens", "6"]
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
    judgements = common.read_rows(tiny_run / "judgements.jsonl", ("what", "id", "a", "b", "order", "winner"))
    assert sum(row["what"] == "actions" for row in judgements) == len(test) * len(arms)                        # 7 against backward, and recon against shuffled
    for arm in arms - {"e2e-grpo"}:
        assert {row["id"] for row in common.read_rows(tiny_run / "reconstructions" / f"{arm}.jsonl", ("id", "trace", "reconstruction", "stopped"))} == test


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


@pytest.mark.parametrize("width", [420, 1100])
def test_the_report_works_in_a_browser_without_a_console_message(tiny_run, browser, width, tmp_path):
    browser.open(tiny_run / "report.html", width)
    assert browser.value("document.body.textContent.includes('recon-grpo over backward')") and browser.value("document.querySelectorAll('circle').length") >= 14
    assert browser.value("document.querySelector('#examples .turns').textContent.includes('</script><script>')") and browser.value("document.images.length") == 0
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")             # tables and plots scroll inside their cards
    total = json.loads((tiny_run / "results.json").read_text())["data"]["pairs"]
    counts = []
    for outcome in ("win", "tie", "loss", ""):
        browser.value(f"(by('of-arm').value = 'none', by('of-outcome').value = '{outcome}', by('of-outcome').onchange())")
        text = browser.value("by('place').textContent")
        counts.append(0 if text == "none like this" else int(text.split()[-1]))
    arm = json.loads((tiny_run / "results.json").read_text())["arms"]["none"]
    assert counts == [arm["wins"], arm["ties"], arm["losses"], total]
    stopped = sum(any(candidate["stopped"] for candidate in row["candidates"]) for row in common.read_rows(tiny_run / "scores.jsonl") if row["id"] in arm["ids"])
    for which, expected in (("stopped", stopped), ("passed", total - stopped), ("", total)):
        browser.value(f"(by('of-leak').value = '{which}', by('of-leak').onchange())")
        assert browser.value("by('place').textContent") == (f"1 of {expected}" if expected else "none like this")
    stages = {row["stage"] for row in common.read_rows(tiny_run / "costs.jsonl")}
    assert "06_evaluate" in stages and all(browser.value(f"by('cost').textContent.includes('{name}')") for name in (*stages, "reconstructions"))
    assert [browser.value(f"document.querySelectorAll('#{part} svg').length") for part in ("scores", "curve", "actions-plot", "reconstructions-plot")] == [3, 5, 1, 1]         # e2e has no traces that could leak
    colours = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(browser.value("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join()"))
        browser.screenshot(tmp_path / f"report-{width}-{scheme}.png")                     # to look at, with pytest --basetemp
    assert len(set(colours)) == 2
    browser.press("ArrowRight")
    assert browser.value("by('place').textContent") == f"2 of {total}" and not browser.console


def test_results_name_all_that_they_depend_on(tiny_run, tiny_folder):
    results = json.loads((tiny_run / "results.json").read_text())
    assert results["models"] == dict.fromkeys(("user_models", "scores", "traces"), str(tiny_folder)) and results["scorer"] == "unsaid" and results["judge"]["name"] == "encoder"
    assert set(results["data"]["people"]) == {"ann"} and results["data"]["made_with"]["source"].startswith("turns:")
    made = results["made_with"]
    assert {"pairs.jsonl", "scores.jsonl", "models/recon/adapter_model.safetensors"} <= made["inputs"].keys() and made["arguments"]["seed"] == 0
    assert {"user_model", "comparison", "reconstruction"} <= made["prompts"].keys() and made["versions"]["torch"]
    assert any("shuffled" in sentence for sentence in results["reading"])
    assert {(row["what"], row["a"], row["b"]) for row in results["comparisons"]} >= {("actions", "recon", "shuffled"), ("reconstructions", "recon", "backward")}


def test_two_runs_with_one_seed_give_the_same_results(stage, tiny_run, tiny_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for name in ("predictions", "reconstructions"):
        shutil.rmtree(run / name)
    stage("06_evaluate").main(["--run", str(run), "--model", str(tiny_folder), *SHORT, "--overwrite"])
    assert (run / "results.json").read_bytes() == (tiny_run / "results.json").read_bytes()


def test_reconstructions_are_of_the_arms_own_traces_and_shuffled_is_of_another_conversation(tiny_run):
    scored = {row["id"]: row for row in common.read_rows(tiny_run / "scores.jsonl")}
    conversation = {row["id"]: row["conversation"] for row in common.read_rows(tiny_run / "pairs.jsonl")}
    rows = {arm: {row["id"]: row for row in common.read_rows(tiny_run / "reconstructions" / f"{arm}.jsonl")} for arm in ("none", "backward", "recon", "worst", "shuffled")}
    for name in rows["none"]:
        first = scored[name]["candidates"][0]
        assert (rows["backward"][name]["trace"], rows["backward"][name]["reconstruction"]) == (first["trace"], first["reconstruction"])
        assert rows["none"][name]["trace"] is None and rows["none"][name]["reconstruction"] == scored[name]["baseline"]["reconstruction"]
        others = {row["trace"] for other, row in rows["recon"].items() if conversation[other] != conversation[name]}
        assert rows["shuffled"][name]["trace"] in others
        found = {c["trace"]: c["scores"]["unsaid"] for c in scored[name]["candidates"] if not c["stopped"]}
        if len(found) > 1:
            assert found[rows["recon"][name]["trace"]] == max(found.values()) and found[rows["worst"][name]["trace"]] == min(found.values())


def test_a_language_model_judges_in_both_orders_and_is_asked_only_once(stage, tiny_run, tiny_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    module = stage("06_evaluate")
    arguments = ["--run", str(run), "--model", str(tiny_folder), *SHORT, "--judge", str(tiny_folder)]
    module.main(arguments)
    rows = common.read_rows(run / "judgements.jsonl")
    assert {row["order"] for row in rows} == {"ab", "ba"} and json.loads((run / "results.json").read_text())["judge"]["same_family"]
    assert "calls made now" in capsys.readouterr().out
    (run / "results.json").unlink()
    module.main(arguments)
    assert "calls made now" not in capsys.readouterr().out and common.read_rows(run / "judgements.jsonl") == rows


def test_a_sheet_is_written_and_the_labels_come_back(stage, tiny_run, tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    arguments = ["--run", str(run), "--model", str(tiny_folder), *SHORT]
    stage("06_evaluate").main([*arguments, "--human-sheet", "6"])
    key = common.read_rows(run / "human.key.jsonl")
    labels = tmp_path / "ann.json"
    labels.write_text(json.dumps({"sheet": key[0]["sheet"], "rater": "ann", "labels": [{"item": row["item"], "choice": "AB"[row["item"] % 2]} for row in key]}))
    stage("06_evaluate").main([*arguments, "--human-labels", str(labels)])
    people = json.loads((run / "results.json").read_text())["people"]
    assert people["labels"] == len(key) == people["with_judge"]["n"] and not people["outdated"] and "people and judge: agreement" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        stage("06_evaluate").main([*arguments, "--human-labels", str(tmp_path / "nobody.json")])
    assert "does not exist" in capsys.readouterr().err


def test_traces_scored_by_one_model_train_the_user_model_on_another(stage, tiny_run, tiny_folder, tmp_path):
    """The reconstructions stay those of the model that scored."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    run.mkdir()
    for name in ("pairs.jsonl", "candidates.jsonl", "scores.jsonl"):
        for path in (tiny_run / name, tiny_run / f"{name}.made.json"):
            shutil.copy(path, run)
    stage("04_select_sft").main(["--run", str(run), "--model", str(other), "--epochs", "1", "--rank", "4"])
    stage("06_evaluate").main(["--run", str(run), "--model", str(other), *SHORT])
    results = json.loads((run / "results.json").read_text())
    assert results["models"] == {"user_models": str(other), "scores": str(tiny_folder), "traces": str(tiny_folder)}
    assert common.record_of(run / "reconstructions" / "recon.jsonl")["arguments"]["model"] == str(tiny_folder)


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


def test_a_damaged_file_is_named_before_any_model_acts_and_a_torn_line_of_costs_is_cut(stage, tiny_run, tiny_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "results.json").unlink()
    evaluate = stage("06_evaluate")
    arguments = ["--run", str(run), "--model", str(tiny_folder), *SHORT]
    scored, summary = (run / "scores.jsonl").read_bytes(), (run / "scores.summary.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "load_model", lambda *args: pytest.fail("a model was loaded"))
        (run / "scores.summary.json").write_text("{")
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert "scores.summary.json cannot be read" in capsys.readouterr().err
        (run / "scores.summary.json").write_bytes(summary)
        rows = [json.loads(line) for line in scored.splitlines()]
        rows[1]["control"] = {}
        (run / "scores.jsonl").write_text("".join(map(common.dump_row, rows)))
        patched.setattr(evaluate, "check_made_from", lambda *args: None)
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert "scores.jsonl, line 2: 'control' must hold 'scores'" in capsys.readouterr().err
    (run / "scores.jsonl").write_bytes(scored)
    with (run / "costs.jsonl").open("a") as file:
        file.write('{"stage": "02_sam')
    evaluate.main(arguments)
    assert (run / "results.json").is_file() and all(row["stage"] for row in common.read_rows(run / "costs.jsonl"))


def test_a_damaged_summary_of_scores_is_made_anew_from_the_rows(stage, tiny_run, tiny_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    whole, rows = (run / "scores.summary.json").read_bytes(), (run / "scores.jsonl").read_bytes()
    (run / "scores.summary.json").write_bytes(whole[:40])
    stage("03_reconstruct_score").main(["--run", str(run), "--model", str(tiny_folder), "--max-action-tokens", "6", "--batch", "5"])
    assert (run / "scores.summary.json").read_bytes() == whole and (run / "scores.jsonl").read_bytes() == rows
