"""Malformed input of every kind, through everything that reads: one message that says where, never a traceback."""

import contextlib
import io
import json

import pytest
from conftest import make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

import common

CANDIDATE = {"trace": "x", "tokens": 1, "leak": 0.0, "reworded": 0.0, "stopped": False, "scores": {"unsaid": 0.5}}
WRONG = [None, 5, True, [], {}, [[]], "", " ", "\x00", -1.5]


@pytest.fixture(scope="module")
def readers(stage):
    """name: (function of a path, a good row, the keys it needs, and for each the values that are wrong for it)"""
    prepare, evaluate = stage("01_prepare"), stage("06_evaluate")
    not_text, not_number = [value for value in WRONG if not isinstance(value, str)], [value for value in WRONG if not isinstance(value, int | float)]
    texts = lambda *keys: dict.fromkeys(keys, not_text)
    pair_wrong = dict.fromkeys(("id", "user", "conversation", "action", "context", "split"), [value for value in WRONG if value != "\x00"]) | {"setting": not_text, "cut": [value for value in WRONG if not isinstance(value, int)]}
    in_candidate = {"trace": not_text, "tokens": not_number, "leak": not_number, "reworded": not_number, "stopped": [value for value in WRONG if value is not True], "scores": [[], "x", 5, None, {"unsaid": "high"}, {"unsaid": []}]}
    wrong_candidates = [[], {}, None, "x", [5], [None], [CANDIDATE, {}], *([CANDIDATE | {key: value}] for key, values in in_candidate.items() for value in values)]
    return {
        "pairs": (common.read_pairs, make_pair(), common.PAIR_KEYS, pair_wrong),
        "scores": (lambda path: common.read_candidates(path, "03", tuple(CANDIDATE), ("baseline", "control")), {"id": "a", "candidates": [CANDIDATE], "baseline": {}, "control": {"scores": {"unsaid": 0.1}}},
                   ("id", "candidates", "baseline", "control"), {"id": not_text, "candidates": wrong_candidates, "baseline": [[], "x", 5, None], "control": [[], "x", 5, None, {}, {"scores": 5}, {"scores": {"unsaid": "high"}}]}),
        "finished": (lambda path: common.finished_rows(path, {}, False, ("id", "trace", "finished"), ["a"]), {"id": "a", "trace": "x", "finished": True}, ("id", "trace", "finished"),
                     {"id": WRONG, "trace": [5, [], {}], "finished": [None, 5, [], "x"]}),
        "answers": (evaluate.read_answers, {"answers": {"q": "tie"}}, ("answers",), {"answers": [[], "x", 5, None, {"q": "maybe"}, {"q": []}, {"q": None}]}),
        "costs": (lambda path: common.read_rows(path, evaluate.COSTS), {"stage": "03", "rows": 4, "seconds": 1.5, "tokens": 9}, evaluate.COSTS, texts("stage") | dict.fromkeys(("rows", "seconds", "tokens"), not_number)),
        "log": (lambda path: common.read_rows(path, ("objective", "step")), {"objective": "recon", "step": 1}, ("objective", "step"), {"objective": not_text, "step": [None, [], {}, "", 1.5]}),
        "turns": (lambda path: list(prepare.read_turns(str(path))), {"conversation": "c", "speaker": "ann", "text": "hi", "time": 5}, ("conversation", "speaker", "text"),
                  texts("text") | dict.fromkeys(("conversation", "speaker"), [*not_text, "", " "]) | {"time": [[], {}, 10**40]}),
        "utterances": (lambda path: prepare.load_corpus.__wrapped__(path), {"id": "u", "speaker": "ann", "conversation_id": "c", "reply_to": None, "text": "hi", "timestamp": 5},
                       ("id", "speaker", "conversation_id", "text"), texts("id", "speaker") | {"conversation_id": [*not_text, "", " "], "text": [5, [], {}], "reply_to": [5, [], {}]}),
        "markdown": (lambda path: list(prepare.read_markdown(str(path.parent))), b"**Ann:** hi", (), {}),
    }


KINDS = {
    "torn": lambda numbers, row, line, keys, wrong: line[:numbers.randrange(1, len(line))],
    "not UTF-8": lambda numbers, row, line, keys, wrong: line[:4] + bytes([numbers.choice((0x80, 0xff, 0xc3, 0xfe))]) + line[4:],
    "UTF-16": lambda numbers, row, line, keys, wrong: line.decode().encode("utf-16"),
    "no object": lambda numbers, row, line, keys, wrong: json.dumps(numbers.choice([None, True, 7, 1.5, "text", [], [row]])).encode(),
    "a key is missing": lambda numbers, row, line, keys, wrong: json.dumps({key: row[key] for key in set(row) - {numbers.choice(keys)}}).encode(),
    "a value of the wrong type": lambda numbers, row, line, keys, wrong: json.dumps(row | {(key := numbers.choice(list(wrong))): numbers.choice(wrong[key])}).encode(),
    "a web page": lambda numbers, row, line, keys, wrong: b"<!DOCTYPE html><title>404</title>" + b"x" * numbers.randrange(50),
    "too deep": lambda numbers, row, line, keys, wrong: numbers.choice((b"[", b'{"id":')) * numbers.randrange(5_000, 20_000),
    "not finite": lambda numbers, row, line, keys, wrong: line[:-1] + b', "more": ' + numbers.choice((b"NaN", b"-Infinity", b"1e999", b"[1, Infinity]")) + b"}",
    "too many digits": lambda numbers, row, line, keys, wrong: line[:-1] + b', "more": ' + b"9" * numbers.randrange(4_301, 9_000) + b"}",
    "two on a line": lambda numbers, row, line, keys, wrong: line + numbers.choice((b"", b" ", b",")) + line,
    "noise": lambda numbers, row, line, keys, wrong: bytes(numbers.choice(b"{}[]:,\"x0\\ \t\x00") for _ in range(numbers.randrange(1, 40))) + b"!",
}


@pytest.mark.parametrize("name", ["pairs", "scores", "finished", "answers", "costs", "log", "turns", "utterances", "markdown"])
def test_each_of_10000_malformed_lines_gets_one_message_with_file_and_line(readers, tmp_path, numbers, name):
    read, row, keys, wrong = readers[name]
    path = tmp_path / ("rows.md" if name == "markdown" else "rows.jsonl")
    (tmp_path / "rows.jsonl.made.json").write_text("{}")
    line = row if name == "markdown" else json.dumps(row).encode()
    path.write_bytes(line + b"\n")
    read(path)                                               # the good row is good
    kinds = ["not UTF-8", "UTF-16"] if name == "markdown" else list(KINDS)        # any text is a line of a transcript
    for count in range(10_000):
        kind = kinds[count % len(kinds)]
        bad = KINDS[kind](numbers, row, line, keys, wrong)
        path.unlink()                                        # a new file is not written to the disk at once, as one cut to nothing is
        path.write_bytes(line + b"\n" + bad + b"\n")
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as caught:
            read(path)
        message = said.getvalue()
        assert caught.value.code == 2 and message.startswith(f"error: {path}, line 2") and message.count("\n") == 1, (kind, bad[:200], message[:200])


def test_a_file_of_labels_that_is_none_gets_one_message(stage, tmp_path, capsys):
    good = {"sheet": "s", "rater": "ann", "labels": [{"item": 0, "choice": "A"}]}
    key = {("s", 0): {"first": "a"}}
    path = tmp_path / "labels.json"
    read = stage("06_evaluate").read_labels
    path.write_text(json.dumps(good))
    assert read(path, key) == ("ann", [({"first": "a"}, "a")])
    bad = [b"", b"[]", b"\xff", b"[" * 100_000, b'{"sheet": 1e999}', json.dumps(good).encode()[:-3], *(json.dumps(good | {"labels": labels}).encode() for labels in (
        5, None, [5], [{}], [{"item": 1e300, "choice": "A"}], [{"item": "x", "choice": "A"}], [{"item": 0, "choice": []}], [{"item": 7, "choice": "B"}]))]
    for data in [*bad, json.dumps(good).encode().replace(b"0", b"1e999")]:
        path.write_bytes(data)
        with pytest.raises(SystemExit) as caught:
            read(path, key)
        message = capsys.readouterr().err
        assert caught.value.code == 2 and str(path) in message and message.count("\n") == 1, data[:80]


JSONISH = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["1", "style", "intent", "values"])),
                       lambda some: st.one_of(st.lists(some, max_size=3), st.dictionaries(st.sampled_from(["1", "2", "style", "intent", "values", "x"]), some, max_size=4)), max_leaves=12)
ANSWERS = st.one_of(st.text(), JSONISH.map(json.dumps), JSONISH.map(lambda value: f"```json\n{json.dumps(value)}\n```"), st.text(alphabet="{}[]\":,0123456789 \n`style", max_size=80))


@settings(max_examples=1000, deadline=None, database=None)
@given(answer=ANSWERS, count=st.integers(1, 3))
def test_a_judges_answer_is_a_valid_one_or_none_whatever_it_says(stage, answer, count):
    ratings = common.parse_ratings(answer, count)
    assert ratings is None or (len(ratings) == count and all(row.keys() == set(common.ASPECTS) and all(0 <= value <= 9 for value in row.values()) for row in ratings))
    assert stage("06_evaluate").parse_choice(answer) in (None, "first", "second")
