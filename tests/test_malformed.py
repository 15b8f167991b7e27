"""Malformed input of every kind, through every reader of stage 1: one message that says where, never a traceback."""

import json
import random

import pytest
from test_prepare import fails, prepare                    # noqa: F401: a fixture

import common

WRONG = [None, 5, True, [], {}, [[]], "", " ", -1.5]
NOT_TEXT = [value for value in WRONG if not isinstance(value, str)]
OPTIONAL = [value for value in NOT_TEXT if value is not None]
PAIR = {"id": "a", "user": "ann", "conversation": "c", "split": "val", "context": [{"speaker": "bo", "text": "hi"}],
        "action": "hello"}
# name: (a good row, the values that are wrong for each key that it needs, and for others)
READERS = {
    "pairs": (PAIR, dict.fromkeys(("id", "user", "conversation", "action", "split"), WRONG) | {
        "context": [None, 5, [], {}, "", [5], [None], [{}]]}, {"setting": OPTIONAL, "cut": [None, "1", 1.5, []]}),
    "turns": ({"conversation": "c", "speaker": "ann", "text": "hi"},
              {"conversation": WRONG, "speaker": WRONG, "text": NOT_TEXT},
              {"time": [[], {}, True, 10**40, 10**400, float("nan"), float("inf")]}),
    "utterances": ({"id": "u", "speaker": "ann", "conversation_id": "c", "text": "hi"},
                   {"id": NOT_TEXT, "speaker": NOT_TEXT, "conversation_id": WRONG, "text": OPTIONAL},
                   {"reply_to": OPTIONAL}),
}

def malformed(numbers, row, needed, more):
    """A line that is no row, of a random kind."""
    line, (key, values) = json.dumps(row).encode(), numbers.choice(list((needed | more).items()))
    return numbers.choice((
        line[:numbers.randrange(1, len(line))],
        line[:4] + bytes([numbers.choice((0x80, 0xff, 0xc3, 0xfe))]) + line[4:],
        line.decode().encode("utf-16"),
        json.dumps(numbers.choice([None, True, 7, 1.5, "text", [], [row]])).encode(),
        json.dumps({key: row[key] for key in set(row) - {numbers.choice(list(needed))}}).encode(),
        *[json.dumps(row | {key: numbers.choice(values)}).encode()] * 4,
        b"<!DOCTYPE html><title>404</title>",
        numbers.choice((b"[", b'{"id":')) * numbers.randrange(5_000, 20_000),
        line[:-1] + b', "more": ' + b"9" * numbers.randrange(4_301, 9_000) + b"}",
        line + numbers.choice((b"", b" ", b",")) + line,
        b"", bytes(numbers.choice(b"{}[]:,\"x0\\ \t\x00") for _ in range(numbers.randrange(1, 40))) + b"!"))

@pytest.mark.parametrize("name", READERS)
def test_every_malformed_line_gets_one_message_with_file_and_line(prepare, tmp_path, capsys, name):
    row, needed, more = READERS[name]
    read = {"pairs": lambda path: common.read_rows(path, common.Pair),
            "turns": lambda path: list(prepare.read_turns(str(path))),
            "utterances": lambda path: list(prepare.read_convokit(str(path)))}[name]
    path, numbers, good = tmp_path / "rows.jsonl", random.Random(0), json.dumps(row).encode() + b"\n"
    path.write_bytes(good)
    assert len(read(path)) == 1
    for _ in range(2000):
        path.unlink()                                      # a new file is not written to the disk at once
        path.write_bytes(good + malformed(numbers, row, needed, more) + b"\n")
        assert fails(capsys, lambda: read(path)).startswith(f"{path}, line 2")

@pytest.mark.parametrize("bad", [b"**Bo:** gr\xfc\xdfe", "**Ann:** hi".encode("utf-16"), b"\x80", b"\xc3"])
def test_a_transcript_that_is_no_text_gets_one_message_with_file_and_line(prepare, tmp_path, capsys, bad):
    (tmp_path / "rows.md").write_bytes(b"**Ann:** hi\n\n" + bad + b"\n")
    message = fails(capsys, lambda: list(prepare.read_markdown(str(tmp_path))))
    assert message.startswith(f"{tmp_path / 'rows.md'}, line 3: not UTF-8")

GOOD = b'{"id": "x", "messages": [{"role": "user", "content": "hi"}]}'

@pytest.mark.parametrize("bad, where", [
    *((bad, "train.jsonl, line 2") for bad in (
        GOOD[:20], GOOD[:4] + b"\xff" + GOOD[4:], GOOD.decode().encode("utf-16"), b"5", b"[1]", b"[" * 9_000, b"{}!")),
    *((bad, ", row 1: messages must hold turns") for bad in (
        b'{"id": "y"}', b'{"messages": 5}', b'{"messages": [5]}', b'{"messages": [null]}', b'{"messages": "text"}',
        b'{"messages": [{"role": "a", "content": [1]}]}', b'{"messages": [{"role": ["a"], "content": "x"}]}'))])
def test_a_malformed_row_of_a_local_data_set_gets_one_message(prepare, tmp_path, monkeypatch, capsys, bad, where):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(GOOD + b"\n" + bad + b"\n")
    message = fails(capsys, lambda: list(prepare.read_hub(str(tmp_path / "set"))))
    assert where in message and str(tmp_path / "set") in message
