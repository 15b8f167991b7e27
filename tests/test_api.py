"""Stages 2, 3 and 6 with a model on a server: one on loopback that fails in every way, and `transformers serve`."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib

import pytest
from conftest import Loopback, api_args, make_pair, release, run_stages

import common

KEY = "secret-key-1234"
SAMPLE, SCORE = "02_sample_candidates", "03_reconstruct_score"
SETTINGS = {SAMPLE: "--num-samples 2 --batch-tokens 300", SCORE: "--scorers embedding,judge --batch-tokens 600",
            "06_evaluate": "--judge openai:big --max-trace-tokens 6 --max-action-tokens 6"}


def told(body: dict) -> str:
    return body["messages"][-1]["content"]


def speak(body: dict) -> str:
    """An answer that depends on the prompt alone, in the form that it asks for."""
    number, aspects = zlib.crc32(f"{told(body)} {body.get('seed')}".encode()), ("style", "intent", "values")
    if "Rate every guess" in told(body):
        guesses = range(1, told(body).count("\nGuess ") + 1)
        return json.dumps({str(guess): dict.fromkeys(aspects, (number + guess) % 10) for guess in guesses})
    choice = "Answer with one letter" in told(body)
    return "AB"[number % 2] if choice else f"Sam is thinking about number {number}. Sam wants to tell Alex."


def failing(schedule: dict, otherwise=speak):
    """A reply that gives schedule[k] (called, if it can be) as the k-th answer, and else what there is to say."""
    count = itertools.count()

    def reply(body):
        given = schedule.get(next(count))
        return otherwise(body) if given is None else given(body) if callable(given) else given

    return reply


def make_api_run(run, train: int = 3, test: int = 3):
    """Pairs of which no two ask the same question."""
    pairs = [make_pair(f"c{place}/1", f"I would never do number {place} on a sunday", split, setting=f"Chat {place}.")
             for place, split in enumerate(["train"] * train + ["test"] * test)]
    common.write_file(run / "pairs.jsonl", "".join(map(common.dump_row, pairs)), {"arguments": {}, "inputs": {}})
    return run


def run_stage(stage, name, run, *more, model="openai:big") -> int:
    """The exit code of a stage."""
    always = "--run", str(run), "--model", str(model), "--concurrency", "3"
    try:
        stage(name).main([*always, *SETTINGS[name].split(), *more])
    except SystemExit as ended:
        return ended.code
    finally:
        release()
    return 0


def rows_of(run, name="candidates") -> dict:
    schema = {"candidates": common.Candidates, "scores": common.Scores}[name]
    return {row.id: row for row in common.read_rows(run / f"{name}.jsonl", schema)}       # no id may come twice


@pytest.fixture(scope="module")
def undisturbed(stage, tmp_path_factory):
    """What stages 2 and 3 write when nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        server, run = Loopback(), make_api_run(tmp_path_factory.mktemp("undisturbed"))
        server.reply = speak
        patch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
        assert run_stage(stage, SAMPLE, run) == run_stage(stage, SCORE, run) == 0
        server.stop()
    return run


def test_rows_from_a_server_are_as_those_of_a_local_model_and_requests_are_counted(stage, loopback, tmp_path, capsys):
    run = make_api_run(tmp_path)
    loopback.reply = failing({1: ("Sam is glad. Sam wants", "length")})
    assert run_stage(stage, SAMPLE, run, "--temperature", "0.6") == run_stage(stage, SCORE, run) == 0
    rows = rows_of(run)
    cut = [found for row in rows.values() for found in row.candidates if not found.finished]
    assert len(rows) == 6 and cut == [common.Candidate(trace="Sam is glad.", finished=False, tokens=5)]
    bodies = [body for _, _, body in loopback.asked]
    assert (bodies[1]["temperature"], bodies[1]["max_tokens"]) == (0.6, 48) and "never do number" in told(bodies[1])
    assert [message["role"] for message in bodies[1]["messages"]] == [role for role, _ in common.PROMPTS["synthesis"]]
    assert len({body["seed"] for body in bodies[1:13]}) == 12                 # n traces of one prompt are n draws
    assert not any("never do" in told(body) for body in bodies if "Write only" in told(body))
    costs = common.read_rows(run / "costs.jsonl", common.Cost)
    assert [(row.requests, row.api_tokens, row.tokens) for row in costs] == [(13, 195, 0), (31, 465, 0)]
    assert "13 requests to a server" in capsys.readouterr().out
    for row in rows_of(run, "scores").values():
        assert row.calls == {"reconstructions": 2, "reconstructions for controls": 2, "judgements": 1}
        assert all({"embedding", "judge"} == some.scores.keys() and some.reconstruction for some in row.candidates)


hang = lambda _: time.sleep(3) or "too late"
FAULTS = {
    "busy": {2: 429, 5: (429, {"Retry-After": "0"}, "slow down")}, "failing": {3: 500, 6: (502, {}, "x" * 200_000)},
    "nonsense": {2: (200, {}, "not JSON"), 5: {"choices": None}, 8: {"error": "none"}, 11: (200, {}, "[]")},
    "empty": {2: {"choices": []}, 5: "", 8: "<think>well", 11: {"choices": [{"message": {"content": None}}]}},
    "no counts": {2: {"choices": [{"message": {"content": "Sam is glad."}}]}}, "hanging": {2: hang, 6: hang}}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_leaves_out_is_counted_and_asked_for_at_the_next_start(
        fault, stage, loopback, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "API_TIMEOUT", 1 if fault == "hanging" else 60)
    loopback.reply = failing(FAULTS[fault])
    assert run_stage(stage, SAMPLE, make_api_run(tmp_path)) == 2 and len(loopback.asked) == 13
    kept, wanted, error = rows_of(tmp_path), rows_of(undisturbed), capsys.readouterr().err
    assert f"{6 - len(kept)} pairs without an answer" in error and "start again" in error and error.count("error:") == 1
    assert 0 < len(kept) < 6 and all(wanted[key] == row for key, row in kept.items())
    answered = len(common.read_rows(tmp_path / "api_cache.jsonl", common.CachedAnswer)) - 1
    for torn in ("candidates.jsonl", "api_cache.jsonl"):
        with (tmp_path / torn).open("a") as file:
            file.write('{"key": "a crash tore')
    loopback.reply, loopback.asked[:] = speak, []
    assert run_stage(stage, SAMPLE, tmp_path) == 0
    assert len(loopback.asked) == 1 + 12 - answered and rows_of(tmp_path) == wanted     # 1: is the server there?


def test_stage_3_asks_again_only_for_what_had_no_answer(stage, loopback, undisturbed, tmp_path, capsys):
    for path in undisturbed.glob("[cp]*jsonl*"):           # candidates and pairs
        shutil.copy(path, tmp_path)
    missing = lambda body: ("Chat 3" in told(body) and "Write only" in told(body) and "goes on" not in told(body)
                            or "Chat 4" in told(body) and "Rate every" in told(body))
    loopback.reply = lambda body: "" if missing(body) else speak(body)
    assert run_stage(stage, SCORE, tmp_path) == 2
    said = capsys.readouterr()
    assert "6 rows in, 4 out" in said.out and "2 pairs without an answer" in said.err and "an empty answer" in said.err
    assert not (tmp_path / "scores.summary.json").exists()
    loopback.reply, loopback.asked[:] = speak, []
    assert run_stage(stage, SCORE, tmp_path) == 0 and rows_of(tmp_path, "scores") == rows_of(undisturbed, "scores")
    assert len(loopback.asked) == 1 + 3                    # two that were missing, and a judgement that waited for one


@pytest.mark.parametrize("answer, requests, rows", [(503, common.GIVE_UP, {"c0/1"}),
                                                    ((400, {}, "window of 8 tokens"), 10, {"c0/1", "c5/1"})])
def test_a_server_that_is_gone_is_given_up_and_one_that_refuses_some_prompts_is_not(
        answer, requests, rows, stage, loopback, tmp_path, capsys):
    """Of equally long prompts the first pair's come first, those of the last pair last."""
    loopback.reply = lambda body: answer if any(f"Chat {place}" in told(body) for place in range(1, 5)) else speak(body)
    assert run_stage(stage, SAMPLE, make_api_run(tmp_path), "--concurrency", "1") == 2
    error = capsys.readouterr().err
    assert len(loopback.asked) == 3 + requests and rows_of(tmp_path).keys() == rows
    assert error.count("error:") == 1 and ("503" in error or "window of 8 tokens" in error)


@pytest.mark.parametrize("content, text", [
    ("<think>\nhm\n</think>\n\nSam wants none.", "Sam wants none."), ("hm</think> Sam is glad.", "Sam is glad."),
    ("<think>hm", None), ([{"type": "text"}], None), ("Sam is \ud800 glad.", "Sam is ? glad.")])
def test_what_a_model_thinks_is_not_its_answer(loopback, tmp_path, monkeypatch, content, text):
    monkeypatch.setenv("OPENAI_API_KEY", "")               # nothing, not even 'none', is then cut out of answers
    api = common.ApiModel("openai:big", api_args(tmp_path))
    loopback.answers = [{"choices": [{"message": {"content": content}, "finish_reason": "stop"}],
                         "usage": {"completion_tokens": 5, "total_tokens": 15}}]
    answer = api.ask([], 5)
    assert (answer and answer.text) == text and len(common.read_rows(api.path, common.CachedAnswer)) == 1 + bool(text)


CONTROL = ["<|im_end|>", "<｜User｜>", "<｜end▁of▁sentence｜>", "</s>", "<start_of_turn>", "<unused12>", "<think>",
           "</think>", "<tool_call>", "[INST]", "[/INST]", "[gMASK]", "[|user|]", "<<SYS>>", "<0x0A>"]


def test_no_control_token_of_a_chat_template_reaches_a_server_from_data(loopback, tmp_path, numbers):
    """Locally they are split while encoding; a server encodes by itself."""
    api = common.ApiModel("openai:big", api_args(tmp_path))
    for _ in range(50):
        data = "".join(numbers.choices([*CONTROL, "<", "[", "{first}", " ", "hi", ">"], k=6))
        prompt = common.Prompt("comparison", dict.fromkeys(("context", "action", "first", "second"), data))
        (_, system), (_, user) = (message.values() for message in api.messages(prompt))
        assert system == common.PROMPTS["comparison"][0][1] and not [token for token in CONTROL if token in user]
        assert user.replace(" ", "").count(data.replace(" ", "")) >= 4


def test_parameters_that_a_model_refuses_are_left_out(loopback, tmp_path):
    common.ApiModel("openai:big", api_args(tmp_path, api_omit="temperature,seed,max_tokens")).ask([], 40, 0.7, 3)
    assert loopback.asked[-1][2].keys() == {"model", "messages", "max_completion_tokens"}
    assert loopback.asked[-1][2]["max_completion_tokens"] > 40


def test_the_key_stands_in_no_file_and_no_message(stage, loopback, tmp_path, capsys):
    """Whatever the server does with it: repeats it in an answer, or in an error's body and header."""
    echo = lambda body: speak(body) if "Rate every" in told(body) else f"Sam thinks of {KEY}. Sam wants it."
    loopback.reply = failing({3: (500, {"X-Key": KEY}, f"invalid key {KEY}"), 6: {"choices": KEY}, 9: {KEY: 1}}, echo)
    codes = [run_stage(stage, SAMPLE, make_api_run(tmp_path))]
    loopback.reply = echo
    codes += [run_stage(stage, name, tmp_path) for name in (SAMPLE, SCORE)]
    loopback.reply = lambda body: (401, {}, f"Incorrect key: {KEY} {'x' * 222}{KEY}")     # cut to 300 characters
    codes += [run_stage(stage, SAMPLE, tmp_path, "--overwrite", model="openai:other")]
    said = capsys.readouterr()
    assert codes == [2, 0, 0, 2] and "Incorrect key: [key]" in said.err and KEY[:6] not in said.out + said.err
    assert all("Sam thinks of [key]." in row.candidates[0].trace for row in rows_of(tmp_path).values())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert all(key == f"Bearer {KEY}" and KEY not in json.dumps(body) for _, key, body in loopback.asked)


def test_a_redirect_does_not_carry_the_key_to_another_host(loopback, tmp_path):
    other, api = Loopback(), common.ApiModel("openai:big", api_args(tmp_path))
    loopback.reply = lambda body: (307, {"Location": f"http://127.0.0.1:{other.port}/v1/chat/completions"}, "there")
    api.ask([], 5)
    other.stop()
    assert len(loopback.asked) == 2 and all(key is None for _, key, _ in other.asked)


@pytest.mark.parametrize("address", [f"https://api.example/{KEY}/v1", "https://ann:word@api.example/v1",
                                     "https://api.example/v1?api-key=word", "api.example/v1",
                                     "http://localhost:word/v1"])
def test_an_address_that_is_none_or_holds_a_secret_is_refused_and_not_repeated(
        loopback, tmp_path, monkeypatch, capsys, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(SystemExit):
        common.ApiModel("openai:big", api_args(tmp_path))
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY" in error and KEY not in error and "word" not in error


def test_likelihood_needs_a_local_model_and_says_so_before_any_work(stage, loopback, tmp_path, capsys):
    assert run_stage(stage, SCORE, tmp_path, "--scorers", "likelihood") == 2
    assert "--scorers likelihood needs a local model" in capsys.readouterr().err and not loopback.asked


def test_comparisons_without_an_answer_end_stage_6_and_only_they_are_asked_for_again(
        stage, loopback, undisturbed, tiny_folder, tmp_path, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    run_stages(stage, run, tiny_folder, "04_select_sft --score judge --epochs 1 --arms none,backward")
    loopback.reply = lambda body: "" if "Chat 4" in told(body) else speak(body)
    assert run_stage(stage, "06_evaluate", run, model=tiny_folder) == 2
    error, asked = capsys.readouterr().err, {told(body) for _, _, body in loopback.asked}
    assert "comparisons without an answer" in error and "an empty answer" in error and error.count("error:") == 1
    assert not (run / "results.json").exists() and not (run / "judgements.jsonl").exists()
    loopback.reply, loopback.asked[:] = speak, []
    assert run_stage(stage, "06_evaluate", run, model=tiny_folder) == 0
    again = [told(body) for _, _, body in loopback.asked[1:]]
    assert asked & set(again) == {text for text in asked if "Chat 4" in text} and len(set(again)) == len(again)
    judged = [json.loads(line) for line in (run / "judgements.jsonl").read_text().splitlines()]
    assert {row["pair"] for row in judged} == {"c3/1", "c4/1", "c5/1"} and all(row["winner"] for row in judged)
    assert json.loads((run / "results.json").read_text())["judge"].startswith("big at http://")


def test_stages_2_and_3_with_transformers_serve(stage, tiny_folder, tmp_path, monkeypatch):
    served, run = shutil.copytree(tiny_folder, tmp_path / "served"), make_api_run(tmp_path / "run", train=2, test=0)
    path = served / "generation_config.json"               # without do_sample this server is greedy at any temperature
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    command = "-m transformers.cli.transformers serve --device cpu --host 127.0.0.1 --port".split()
    server = subprocess.Popen([sys.executable, *command, port, str(served)], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        until, ready = time.monotonic() + 120, False
        while not ready:
            assert server.poll() is None and time.monotonic() < until
            try:
                ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            except OSError:
                time.sleep(0.2)
        assert [run_stage(stage, name, run, model=f"openai:{served}") for name in (SAMPLE, SCORE)] == [0, 0]
    finally:
        server.kill()
        server.wait()
    traces = [found for row in rows_of(run).values() for found in row.candidates]
    assert len({found.trace for found in traces}) == 4 and all(0 < found.tokens <= 48 for found in traces)
    assert len(scores := rows_of(run, "scores")) == 2
    assert all(some.scores["embedding"] > -1 for row in scores.values() for some in row.candidates)
    assert all(row.requests > 4 and row.api_tokens > 100 for row in common.read_rows(run / "costs.jsonl", common.Cost))
