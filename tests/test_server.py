"""Stages 2, 3 and 6 with models on a server: one on loopback that fails in every way we know, and `transformers serve` with the embedded model."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
from conftest import ROOT, Loopback, make_pair
from hypothesis import strategies as st

import common

KEY = "secret-key-1234"


def speak(body: dict) -> str:
    """An answer that depends on the prompt alone, in the form that it asks for."""
    told = body["messages"][-1]["content"]
    number = zlib.crc32(told.encode())
    if "Rate every guess" in told:
        return json.dumps({str(guess): dict.fromkeys(common.ASPECTS, (number + guess) % 10) for guess in range(1, told.count("\nGuess ") + 1)})
    return "AB"[number % 2] if "Answer with one letter" in told else f"Sam is thinking about number {number}. Sam wants to tell Alex."


def failing(schedule: dict, otherwise=speak):
    """A reply that gives schedule[k] as the k-th answer (calling it if it can be called), and else what there is to say."""
    lock, count = threading.Lock(), iter(range(10_000))

    def reply(body):
        with lock:
            given = schedule.get(next(count))
        return (given(body) if callable(given) else given) if given is not None else otherwise(body)

    return reply


def some_pairs(count: int = 6) -> list[dict]:
    pairs = [make_pair(f"c{number}/1", f"I would never do number {number} on a sunday", "train" if number < count // 2 else "test") for number in range(count)]
    for number, pair in enumerate(pairs):
        pair["context"][0]["text"] += f" for the {number}th time"
    return pairs


def write_pairs(run, count: int = 6) -> None:
    run.mkdir(exist_ok=True)
    (run / "pairs.jsonl").write_text("".join(map(common.dump_row, some_pairs(count))))


def sample(stage, run, *more):
    stage("02_sample_candidates").main(["--run", str(run), "--model", "openai:big", "--n", "2", "--batch", "2", "--concurrency", "3", *more])


def score(stage, run, *more):
    stage("03_reconstruct_score").main(["--run", str(run), "--model", "openai:big", "--scorers", "embedding,judge", "--batch", "2", "--concurrency", "3", *more])


def rows_of(path) -> dict[str, dict]:
    """Rows by id, each id once."""
    rows = common.read_rows(path)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def undisturbed(stage, tmp_path_factory):
    """What stages 2 and 3 write when nothing fails."""
    with pytest.MonkeyPatch.context() as patch:
        server, run = Loopback(), tmp_path_factory.mktemp("undisturbed")
        server.reply = speak
        patch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
        write_pairs(run)
        sample(stage, run)
        score(stage, run)
        server.stop()
    return run


def test_rows_from_a_server_are_as_those_of_a_local_model_and_its_tokens_are_counted(stage, loopback, tmp_path, capsys):
    write_pairs(tmp_path)
    loopback.answers += ["Hello.", ("Sam is glad. Sam wants", "length")]
    loopback.reply = speak
    sample(stage, tmp_path, "--concurrency", "1")
    rows = rows_of(tmp_path / "candidates.jsonl")
    cut = [candidate for row in rows.values() for candidate in row["candidates"] if not candidate["finished"]]
    assert len(rows) == 6 and cut == [{"trace": "Sam is glad.", "finished": False, "tokens": 5}]
    _, _, body = loopback.asked[1]
    assert body["temperature"] == 1.0 and body["max_tokens"] == 40 and "I would never do number" in body["messages"][-1]["content"]
    assert [message["role"] for message in body["messages"]] == [role for role, _ in common.PROMPTS["synthesis"]]
    assert len({body["seed"] for _, _, body in loopback.asked[1:]}) == 12                 # n traces of one prompt are n draws
    score(stage, tmp_path)
    told = capsys.readouterr().out
    costs = common.read_rows(tmp_path / "costs.jsonl")
    assert [(row["requests"], row["prompt_tokens"], row["completion_tokens"]) for row in costs] == [(13, 130, 65), (43, 430, 215)]
    assert "13 requests to the server, 130 tokens read and 65 written there" in told
    scores = rows_of(tmp_path / "scores.jsonl")
    for row in scores.values():                               # N traces, N reconstructions, one judgement, and two for the embedding's controls
        assert row["calls"] == {"reconstructions": 2, "reconstructions for controls": 2, "judgements": 1}
        assert all({"embedding", "judge"} == candidate["scores"].keys() and candidate["reconstruction"] for candidate in row["candidates"])
    assert not any("I would never" in body["messages"][-1]["content"] for _, _, body in loopback.asked if "Write only the next message" in body["messages"][-1]["content"])


def test_as_many_requests_as_asked_for_are_under_way_at_once(loopback):
    together = threading.Barrier(4)
    loopback.reply = lambda body: (together.wait(30), speak(body))[1]                     # nobody is answered before four have asked
    server = common.Server("openai:big", 4)
    answers = server.ask_all({"messages": [{"role": "user", "content": str(number)}], "max_tokens": 5} for number in range(8))
    assert [answer.text for answer in answers] == [speak({"messages": [{"content": str(number)}]}) for number in range(8)] and server.requests == 8


FAULTS = {
    "busy": lambda server: {number: (429, {"Retry-After": "0"}, "slow down") for number in (2, 5, 6, 11)},
    "failing": lambda server: {3: 500, 4: 502, 9: 503, 10: (500, {}, "x" * 200_000)},
    "nonsense": lambda server: {2: (200, {}, "not JSON"), 4: {"choices": None}, 7: {"error": "none"}, 8: {}},
    "empty": lambda server: {2: {"choices": []}, 5: "", 6: ("", "length"), 9: "<think>well", 12: {"choices": [{"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "stop"}]}},
    "hanging": lambda server: {number: lambda body: server.hang.wait(60) and "too late" for number in (2, 6)},
    "restarted": lambda server: {4: lambda body: server.restart()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_recovers_costs_no_row_and_doubles_none(fault, stage, loopback, undisturbed, tmp_path, monkeypatch):
    """The rows of both stages are those of an undisturbed server."""
    loopback.hang = threading.Event()

    def restart():
        def later():
            loopback.stop()
            loopback.hang.wait(0.5)
            loopback.start()
        threading.Thread(target=later).start()
        return 503

    loopback.restart = restart
    monkeypatch.setattr(common, "TIMEOUT", 0.5 if fault == "hanging" else 30)
    monkeypatch.setattr(common, "EMPTY_TRIES", 6)             # which question meets an empty answer is chance: one may meet all five
    if fault == "restarted":
        monkeypatch.setattr(common, "WAITS", (0.2,) * 100)
    write_pairs(tmp_path)
    for run_stage, name in ((sample, "candidates.jsonl"), (score, "scores.jsonl")):
        loopback.answers, loopback.reply = ["Hello."], failing(FAULTS[fault](loopback))
        before = len(loopback.asked)
        run_stage(stage, tmp_path)
        assert rows_of(tmp_path / name) == rows_of(undisturbed / name)
        assert len(loopback.asked) - before > (12 if name == "candidates.jsonl" else 30) + 1                # something was asked for again
    loopback.hang.set()


def test_a_pair_whose_answers_stay_empty_has_no_row_and_is_asked_for_at_the_next_start(stage, loopback, undisturbed, tmp_path, capsys):
    write_pairs(tmp_path)
    for run_stage, name, count in ((sample, "candidates.jsonl", 12), (score, "scores.jsonl", 30)):
        loopback.reply = lambda body: {"choices": []} if "for the 3th time" in body["messages"][-1]["content"] else speak(body)
        with pytest.raises(SystemExit) as caught:
            run_stage(stage, tmp_path)
        said = capsys.readouterr()
        assert caught.value.code == 2 and "1 pairs without an answer" in said.err and "an empty answer" in said.err and "start the stage again" in said.err
        assert "6 rows in, 5 out" in said.out
        assert rows_of(tmp_path / name).keys() == rows_of(undisturbed / name).keys() - {"c3/1"} and not (tmp_path / "scores.summary.json").exists()
        loopback.reply, loopback.asked[:] = speak, []
        run_stage(stage, tmp_path)
        assert rows_of(tmp_path / name) == rows_of(undisturbed / name)
        asked = [body["messages"][-1]["content"] for _, _, body in loopback.asked[1:]]
        assert sum("for the 3th time" in told for told in asked) >= count / 6
        if run_stage is sample:
            assert len(asked) == 2                            # the others are not paid for twice
    assert json.loads((tmp_path / "scores.summary.json").read_text())["pairs"] == 6


def test_a_server_that_stays_away_ends_the_stage_which_goes_on_when_it_is_back(stage, loopback, undisturbed, tmp_path, capsys):
    write_pairs(tmp_path)
    for run_stage, name, last in ((sample, "candidates.jsonl", 7), (score, "scores.jsonl", 13)):
        # Its last answer comes when the other requests have given up, and must not be told as the reason.
        loopback.answers, loopback.reply = ["Hello."], failing({last: lambda body: (loopback.stop(), time.sleep(0.5), 503)[2]})
        with pytest.raises(SystemExit) as caught:
            run_stage(stage, tmp_path)
        error = capsys.readouterr().err
        kept = rows_of(tmp_path / name)
        assert caught.value.code == 2 and 0 < len(kept) < 6 and f"{6 - len(kept)} pairs without an answer" in error and "Connection refused" in error
        loopback.start()
        loopback.reply = speak
        run_stage(stage, tmp_path)
        assert rows_of(tmp_path / name) == rows_of(undisturbed / name)


def test_a_server_that_is_gone_is_not_asked_once_more_for_every_row(loopback):
    loopback.reply = lambda body: 503
    server = common.Server("openai:big", 1)
    assert server.ask_all({"messages": [], "max_tokens": 5} for _ in range(50)) == [None] * 50
    assert len(loopback.asked) == common.GIVE_UP * (len(common.WAITS) + 1)


def test_a_request_that_is_refused_alone_does_not_end_the_others(loopback):
    """A prompt too long for the server's window, for instance."""
    loopback.reply = lambda body: (400, {}, "maximum context length is 8 tokens") if len(body["messages"][0]["content"]) > 20 else "yes"
    server = common.Server("openai:big", 2)
    texts = ["short", "a long prompt, longer than the window"] * 6
    answers = server.ask_all({"messages": [{"role": "user", "content": text}], "max_tokens": 5} for text in texts)
    assert [answer and answer.text for answer in answers] == ["yes", None] * 6 and len(loopback.asked) == 12 and "maximum context length" in server.problem


def test_any_number_of_refused_requests_before_the_first_answer_ends_nothing(loopback):
    """The longest prompts come first: a stage that gave up on them would meet them first again at every start."""
    loopback.reply = lambda body: (400, {}, "maximum context length is 8 tokens") if body["messages"][0]["content"] == "long" else "yes"
    server = common.Server("openai:big", 1)
    answers = server.ask_all({"messages": [{"role": "user", "content": text}], "max_tokens": 5} for text in ["long"] * 40 + ["short"])
    assert answers[-1].text == "yes" and answers[:-1] == [None] * 40


def test_a_server_that_says_nothing_is_not_paid_for_every_row(loopback):
    loopback.reply = lambda body: {"choices": []}
    server = common.Server("openai:big", 1)
    assert server.ask_all({"messages": [], "max_tokens": 5} for _ in range(50)) == [None] * 50
    assert len(loopback.asked) == common.USELESS * common.EMPTY_TRIES


def test_a_stage_that_asks_a_server_goes_on_with_another_batch(stage, loopback, undisturbed, tmp_path, capsys):
    """--batch only says how many pairs are under way; what is there is not paid for twice."""
    write_pairs(tmp_path)
    for run_stage, name in ((sample, "candidates.jsonl"), (score, "scores.jsonl")):
        loopback.reply = lambda body: (400, {}, "too long") if "for the 3th time" in body["messages"][-1]["content"] else speak(body)
        with pytest.raises(SystemExit):
            run_stage(stage, tmp_path)
        loopback.reply = speak
        run_stage(stage, tmp_path, "--batch", "5", "--concurrency", "3")
        assert rows_of(tmp_path / name) == rows_of(undisturbed / name) and ", 5 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("header, seconds", [("7", 7), ("0.5", 0.5), ("100000", 600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", 0), ("", 0)])
def test_a_server_that_says_how_long_to_wait_is_waited_for(loopback, header, seconds):
    loopback.answers += [(429, {"Retry-After": header}, "busy"), "yes"]
    server, waited = common.Server("openai:big", 1), []
    server.gone = SimpleNamespace(is_set=lambda: False, wait=waited.append)
    assert server.ask([], 5).text == "yes" and waited == [seconds]


def test_a_model_that_wants_other_parameters_is_asked_in_its_own_way_and_once(loopback, capsys):
    """As the newer models do: max_completion_tokens, the default temperature, no seed, and reasoning at the expense of the limit."""
    def picky(body):
        for name, words in (("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."), ("temperature", "Unsupported value: 'temperature'."), ("seed", "no seed")):
            if name in body:
                return 400, {}, json.dumps({"error": {"message": words}})
        return "yes"

    loopback.reply = picky
    server = common.open_server("openai:big", 1)
    assert len(loopback.asked) == 4
    assert server.ask([], 40, 0.7, 3).text == "yes" and len(loopback.asked) == 5
    assert loopback.asked[-1][2].keys() == {"model", "messages", "max_completion_tokens"} and loopback.asked[-1][2]["max_completion_tokens"] > 40
    assert capsys.readouterr().err.count("does not take") == 3
    loopback.reply = lambda body: (400, {}, "the prompt 'what temperature is it' is too long") if "temperature" in body else "yes"
    server = common.Server("openai:other", 1)
    server.opening = False
    with pytest.raises(common.NoAnswer):
        server.ask([], 40, 0.7)


@pytest.mark.parametrize("content, text", [("<think>\nhm\n</think>\n\nSam is glad.", "Sam is glad."), ("hm</think> Sam is glad.", "Sam is glad."), (" Sam is glad. ", "Sam is glad."),
                                           ("<think>hm", ""), (None, ""), ([{"type": "text"}], "")])
def test_what_a_model_thinks_is_not_its_answer(content, text):
    assert common.text_of(content) == text


def test_data_cannot_forge_the_control_tokens_of_a_chat_template():
    """Locally they are split while encoding; a server encodes by itself."""
    (_, system), (_, user) = [message.values() for message in common.messages_of("comparison", context="Alex: hi {first}", action="<|im_end|>", first="[INST] <3", second="</think> a<b")]
    assert "Alex: hi {first}" in user and "< |im_end|>" in user and "[ INST] <3" in user and "< /think> a<b" in user
    assert system == common.PROMPTS["comparison"][0][1]


CONTROL = ("<|im_end|>", "<|eot_id|>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "</s>", "<start_of_turn>", "<unused12>", "<reserved-1>", "<think>", "</think>",
           "<tool_call>", "[INST]", "[/INST]", "[gMASK]", "[|user|]", "<<SYS>>", "<|start|>", "<0x0A>")


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*CONTROL, "<", "[", "{action}"])), max_size=8).map("".join))
def test_no_control_token_of_a_known_family_reaches_a_server_from_data(text):
    (_, system), (_, user) = [message.values() for message in common.messages_of("comparison", context=text, action=text, first=text, second=text)]
    clean = "".join(common.PROMPTS["comparison"][1][1])
    assert not [token for token in CONTROL if token in user and token not in clean]
    assert user.replace(" ", "").count(text.replace(" ", "")) >= 4 or not text.strip()


def test_a_key_stands_in_no_file_and_no_message(stage, loopback, tmp_path, capsys):
    """Whatever the server does with it: repeats it in an answer, in an error's body, reason and header, or in what is no HTTP at all."""
    write_pairs(tmp_path)
    loopback.reply = failing({3: (500, {"X-Key": KEY}, f"invalid key {KEY}"), 4: (400, {}, "x" * 290 + KEY), 5: {"choices": f"{KEY}"}, 7: {KEY: 1}},
                             lambda body: f"Sam thinks of {KEY}. Sam wants it." if "Rate every guess" not in body["messages"][-1]["content"] else speak(body))
    with pytest.raises(SystemExit):
        sample(stage, tmp_path)
    loopback.reply = failing({3: (500, {}, KEY)}, loopback.reply)
    sample(stage, tmp_path)
    score(stage, tmp_path)
    loopback.reply = lambda body: (401, {}, f"Incorrect API key provided: {KEY}")
    for name in ("02_sample_candidates", "03_reconstruct_score"):
        with pytest.raises(SystemExit):
            (sample if "02" in name else score)(stage, tmp_path, "--overwrite")
    said = capsys.readouterr()
    assert "Incorrect API key provided: [key]" in said.err and KEY not in said.out + said.err
    assert "Sam thinks of [key]." in (tmp_path / "candidates.jsonl").read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert all(key == f"Bearer {KEY}" for _, key, _ in loopback.asked) and not any(KEY in json.dumps(body) for _, _, body in loopback.asked if "[key]" not in json.dumps(body))


def test_a_redirect_does_not_carry_the_key_to_another_host(loopback):
    other = Loopback()
    loopback.reply = lambda body: (302, {"Location": f"http://127.0.0.1:{other.port}/v1/chat/completions"}, "there")
    with pytest.raises(common.NoAnswer, match="302"):
        common.Server("openai:big", 1).ask([], 5)
    other.stop()
    assert not other.asked


@pytest.mark.parametrize("address", [f"https://api.example/{KEY}/v1", "https://ann:word@api.example/v1", "https://api.example/v1?api-key=word"])
def test_an_address_that_holds_a_secret_is_refused_and_not_repeated(loopback, monkeypatch, capsys, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(SystemExit):
        common.Server("openai:big", 1)
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY" in error and KEY not in error and "word" not in error


def test_a_wrong_model_or_judge_costs_no_old_rows(stage, loopback, undisturbed, tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    loopback.reply = lambda body: (404, {}, f"model {body['model']} does not exist")
    for run_stage, more in ((sample, ()), (score, ()), (score, ("--model", str(tiny_folder), "--judge", "openai:wrong"))):
        with pytest.raises(SystemExit) as caught:
            run_stage(stage, run, "--overwrite", *more)
        assert caught.value.code == 2 and "does not exist" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_likelihood_needs_a_local_model_and_says_so_before_any_work(stage, loopback, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    with pytest.raises(SystemExit):
        stage("03_reconstruct_score").main(["--run", str(run), "--model", "openai:big", "--overwrite"])
    assert "--scorers likelihood needs a local model; pass --scorers embedding,judge, or a local --model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.load_model("openai:big", None)
    assert "openai:big is on a server" in capsys.readouterr().err and not loopback.asked


def test_the_first_question_has_the_temperature_of_those_to_come(stage, loopback, tmp_path):
    """transformers serve --continuous-batching keeps the first request's for all."""
    write_pairs(tmp_path)
    sample(stage, tmp_path, "--temperature", "0.6")
    assert {body["temperature"] for _, _, body in loopback.asked} == {0.6} and len(loopback.asked) == 13


def test_a_server_that_never_samples_is_noticed(stage, loopback, tmp_path, capsys):
    write_pairs(tmp_path)
    loopback.reply = speak
    sample(stage, tmp_path)
    assert "all the same" in capsys.readouterr().out


@pytest.fixture(scope="module")
def fitted(stage, undisturbed, tiny_folder, tmp_path_factory):
    """User models of the tiny model, and scores of the server, for stage 6."""
    run = tmp_path_factory.mktemp("fitted")
    shutil.copytree(undisturbed, run, dirs_exist_ok=True)
    (run / "pairs.jsonl.made.json").write_text(json.dumps({"arguments": {}}))
    stage("04_select_sft").main(["--run", str(run), "--model", str(tiny_folder), "--score", "judge", "--epochs", "1"])
    return run


def test_comparisons_without_an_answer_end_stage_6_and_only_they_are_asked_for_again(stage, loopback, fitted, tiny_folder, tmp_path, capsys):
    """Also: the arms that stage 3 has not reconstructed are written by the server that did the others."""
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    evaluate = lambda: stage("06_evaluate").main(["--run", str(run), "--model", str(tiny_folder), "--max-trace-tokens", "6", "--max-action-tokens", "6",
                                                  "--judge", "openai:big", "--concurrency", "2"])
    loopback.reply = lambda body: {"choices": []} if "for the 4th time" in body["messages"][-1]["content"] and "Answer with one letter" in body["messages"][-1]["content"] else speak(body)
    with pytest.raises(SystemExit) as caught:
        evaluate()
    said = capsys.readouterr()
    answers = lambda: [question for row in common.read_rows(run / "answers.jsonl") for question in row["answers"]]
    asked = len(answers())
    assert caught.value.code == 2 and "comparisons without an answer" in said.err and "requests to the server" in said.out
    assert asked and not (run / "results.json").exists() and not (run / "judgements.jsonl").exists()
    assert rows_of(run / "reconstructions" / "shuffled.jsonl").keys() == {"c3/1", "c4/1", "c5/1"}
    loopback.reply, loopback.asked[:] = speak, []
    evaluate()
    again = [body["messages"][-1]["content"] for _, _, body in loopback.asked[1:]]
    assert again and all("for the 4th time" in told for told in again)
    questions = answers()
    assert len(set(questions)) == len(questions) == asked + len(again)
    assert json.loads((run / "results.json").read_text())["scorer"] == "judge: openai:big"
    judged = common.read_rows(run / "judgements.jsonl")
    assert len({tuple(row[key] for key in ("what", "id", "a", "b", "order")) for row in judged}) == len(judged) and all(row["winner"] for row in judged)
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


# ------------------------------------------------------------------------------------------------
# `transformers serve` with the embedded model


class Serving:
    """`transformers serve` as a program on loopback. The model is the embedded one, told to sample: without `do_sample` in its
    generation_config.json this server answers greedily at any temperature."""

    def __init__(self, folder: Path):
        embedded = Path(common.model_folder("embedded"))
        for path in embedded.iterdir():
            if path.name != "generation_config.json":
                (folder / path.name).symlink_to(path)
        generation = json.loads((embedded / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"transformers serve did not start: {self.log.read_text()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def forward(self, body: dict):
        """The server's answer to a request, for a Loopback to give."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if not importlib.util.find_spec(name)]:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install -r requirements.txt")
    server = Serving(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def test_stages_2_3_and_6_with_transformers_serve_which_is_restarted_busy_hanging_and_silent(stage, serving, loopback, tiny_folder, tmp_path, monkeypatch):
    """Stage 2 and 6 as programs, stage 3 in this process for the sake of a short time-out. Few and short: this server answers one request at a time."""
    run, model = tmp_path / "run", f"openai:{serving.folder}"
    pairs = [pair | {"split": split} for pair, split in zip(some_pairs(3), ("train", "test", "train"))]
    run.mkdir()
    (run / "pairs.jsonl").write_text("".join(map(common.dump_row, pairs)))
    (run / "pairs.jsonl.made.json").write_text(json.dumps({"arguments": {}}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_BASE_URL": f"http://127.0.0.1:{serving.port}/v1", "OPENAI_API_KEY": KEY}
    program = lambda script, *more: subprocess.Popen([sys.executable, str(ROOT / script), "--run", str(run), *more], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    sampling = program("02_sample_candidates.py", "--model", model, "--n", "1", "--max-trace-tokens", "24", "--batch", "1", "--concurrency", "2")
    while not (run / "candidates.jsonl").exists() or not (run / "candidates.jsonl").read_bytes():
        assert sampling.poll() is None, sampling.stderr.read()
        time.sleep(0.02)
    serving.stop()
    serving.start()
    out, err = sampling.communicate()
    print(out, err)
    assert sampling.returncode == 0 and "asking again" in err and "requests to the server" in out
    rows = rows_of(run / "candidates.jsonl")
    assert rows.keys() == {pair["id"] for pair in pairs} and all(len(row["candidates"]) == 1 for row in rows.values())
    assert all(candidate["trace"] and 0 < candidate["tokens"] <= 24 for row in rows.values() for candidate in row["candidates"])

    silent = threading.Event()

    def timeout_of_the_next(seconds, then):
        """Only the request that hangs may time out: how long a real answer takes depends on the machine."""
        def reply(body):
            monkeypatch.setattr(common, "TIMEOUT", seconds)
            return then(body)
        return reply

    loopback.reply = failing({2: (429, {"Retry-After": "0"}, "busy"), 4: {"choices": []}, 5: timeout_of_the_next(1, serving.forward),
                              6: timeout_of_the_next(300, lambda body: silent.wait(300) and 500)}, serving.forward)
    stage("03_reconstruct_score").main(["--run", str(run), "--model", model, "--scorers", "embedding,judge", "--max-action-tokens", "12", "--concurrency", "1", "--limit", "2"])
    silent.set()
    scored = rows_of(run / "scores.jsonl")
    assert scored.keys() == {"c0/1", "c1/1"} and all(row["calls"]["judgements"] in (1, 2, 3) for row in scored.values())
    assert all(candidate["reconstruction"] and candidate["scores"]["embedding"] > -1 for row in scored.values() for candidate in row["candidates"])

    stage("04_select_sft").main(["--run", str(run), "--model", str(tiny_folder), "--score", "embedding", "--epochs", "1", "--arms", "none,backward"])
    run = shutil.copytree(run, tmp_path / "copy")           # this process holds the lock of the other one
    environment["OPENAI_BASE_URL"] = f"http://127.0.0.1:{loopback.port}/v1"
    loopback.reply = failing({1: (429, {"Retry-After": "1"}, "busy"), 2: {"choices": []}, 3: 503}, serving.forward)
    evaluating = program("06_evaluate.py", "--model", str(tiny_folder), "--max-trace-tokens", "6", "--max-action-tokens", "6", "--judge", model, "--concurrency", "2")
    out, err = evaluating.communicate()
    print(out, err)
    assert evaluating.returncode == 0 and "requests to the server" in out, err
    judged = common.read_rows(run / "judgements.jsonl")
    assert len({tuple(row[key] for key in ("what", "id", "a", "b", "order")) for row in judged}) == len(judged)
    assert {row["id"] for row in judged} == {"c1/1"} and (run / "results.json").exists()
    costs = {row["stage"]: row for row in common.read_rows(run / "costs.jsonl")}
    assert all(costs[name]["prompt_tokens"] > 100 and costs[name]["completion_tokens"] > 0 for name in ("02_sample_candidates", "03_reconstruct_score", "06_evaluate"))
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] and KEY not in out + err
