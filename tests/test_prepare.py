"""Conversations to pairs: contexts, splits, limits, and errors of the command line."""

import json
import random
from collections import Counter

import pytest

import common


@pytest.fixture(scope="module")
def prepare(stage):
    return stage("01_prepare")


def write_turns(path, conversations=20, turns=12, time=True):
    """Random chats of ann with bo or cy; each turn's text is unique."""
    rows = []
    for c in range(conversations):
        for t in range(turns):
            speaker = "ann" if t % 2 else ("bo" if c % 3 else "cy")
            row = {"conversation": f"c{c}", "speaker": speaker, "text": f"words of turn {t} in chat number {c}"}
            rows.append(row | ({"time": f"2024-01-{c + 1:02}T00:00:00"} if time else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def tidy(prepare, turns):
    return prepare.tidy(turns, (), Counter())


def run(prepare, tmp_path, tiny_folder, *extra):
    prepare.main(["--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--source", f"turns:{tmp_path / 'turns.jsonl'}", *extra])
    return common.read_rows(tmp_path / "run" / "pairs.jsonl")


def test_a_context_is_exactly_the_turns_before_the_action(prepare, tmp_path, tiny_folder):
    rows = write_turns(tmp_path / "turns.jsonl")
    chats = {}
    for row in rows:
        chats.setdefault(row["conversation"], []).append((row["speaker"], row["text"]))
    pairs = run(prepare, tmp_path, tiny_folder, "--max-context-tokens", "400", "--max-action-tokens", "400", "--max-context-turns", "3")
    for pair in pairs:
        place = int(pair["id"].split("/")[-1])
        chat = chats[pair["conversation"]]
        assert (pair["user"], pair["action"]) == chat[place]
        assert [(turn["speaker"], turn["text"]) for turn in pair["context"]] == chat[max(0, place - 3):place]
        assert pair["cut"] == max(0, place - 3)


def test_whole_conversations_go_to_one_split_and_the_latest_to_test(prepare, tmp_path, tiny_folder):
    write_turns(tmp_path / "turns.jsonl")
    pairs = run(prepare, tmp_path, tiny_folder, "--user", "ann", "--max-action-tokens", "400", "--limit", "1000", "--test-share", "0.4")
    splits = {}
    for pair in pairs:
        splits.setdefault(pair["conversation"], set()).add(pair["split"])
    assert all(len(split) == 1 for split in splits.values())
    number = lambda split: sorted(int(name[1:]) for name, found in splits.items() if split in found)
    assert (number("train"), number("val"), number("test")) == (list(range(10)), [10, 11], list(range(12, 20)))


def test_without_dates_the_split_is_random_but_repeatable(prepare):
    chats = [(f"c{c}", None, tidy(prepare, [("bo", "hi"), ("ann", "hello")])) for c in range(40)]
    one, same, other = (prepare.split_conversations(chats, ["ann"], 0.1, 0.4, seed) for seed in (1, 1, 2))
    assert one == same and one != other and Counter(one.values()) == Counter(train=20, val=4, test=16)


def test_a_conversation_of_two_modelled_people_stays_in_one_split(prepare):
    numbers = random.Random(3)
    chats = [(f"c{c}", f"{numbers.random()}", tidy(prepare, [("bo", "hi"), ("ann", "hello"), ("bo", "yes")])) for c in range(30)]
    assert set(prepare.split_conversations(chats, ["ann", "bo"], 0.2, 0.2, 0)) == {f"c{c}" for c in range(30)}


def test_limits_and_duplicates_are_counted(prepare, tiny):
    _, tokenizer = tiny
    turns = [("bo", "how was the day"), ("ann", "it was a fine day really"), ("bo", "how was the day"), ("ann", "It was a fine day really"), ("bo", "x" * 900),
             ("ann", "this one has no context left"), ("bo", "ok"), ("ann", "too short"), ("bo", "and"), ("ann", "far " * 200)]
    limits = {"turns": 1, "context_tokens": 60, "words": 4, "action_tokens": 50, "source": "test", "setting": {}}
    pairs, dropped = prepare.make_pairs([("c", None, tidy(prepare, turns))], ["ann"], {"c": "train"}, limits, tokenizer)
    assert [pair["id"] for pair in pairs] == ["test/c/1"]
    assert dropped == {"duplicate": 1, "last turn before the action too long": 1, "action too short": 1, "action too long": 1}


def test_a_context_is_cut_at_whole_turns_from_the_oldest(prepare, tiny):
    _, tokenizer = tiny
    turns = [("bo", "a" * 30), ("ann", "b" * 30), ("bo", "c" * 30), ("ann", "these are my four words")]
    limits = {"turns": 6, "context_tokens": 90, "words": 1, "action_tokens": 90, "source": "test", "setting": {}}
    pairs, _ = prepare.make_pairs([("c", None, tidy(prepare, turns))], ["ann"], {"c": "train"}, limits, tokenizer)
    last = pairs[-1]
    assert [turn["text"] for turn in last["context"]] == ["b" * 30, "c" * 30] and last["cut"] == 1
    assert len(common.encode_data(tokenizer, common.show_context(last))) <= 90


def test_turns_of_one_speaker_in_a_row_are_joined_and_empty_ones_left_out(prepare, tmp_path):
    path = tmp_path / "turns.jsonl"
    rows = [("bo", "one"), ("bo", " two\n"), ("ann", "  "), ("bo", "three"), ("ann", "four")]
    path.write_text("".join(json.dumps({"conversation": "c", "speaker": s, "text": t}) + "\n" for s, t in rows))
    assert list(prepare.Source(f"turns:{path}", (), None)) == [("c", None, [prepare.Turn("bo", "one two three", None), prepare.Turn("ann", "four", 0)])]


def test_a_hub_data_set_is_read_from_a_local_folder(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"id": "x", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(prepare.Source(f"hub:{folder}", (), None)) == [("x", None, [prepare.Turn("user", "hi", None), prepare.Turn("assistant", "hello", 0)])]


def write_set(folder, rows):
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_hub_rows_of_one_id_stay_in_one_split_and_their_pairs_have_ids_of_their_own(prepare, tmp_path, tiny_folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"id": f"x{number % 4}" if number else " ", "messages": [{"role": "bo", "content": f"question {number}"}, {"role": "ann", "content": f"answer {number} it is"}]} for number in range(13)]
    for extra in ([], ["--pseudonymise"]):
        prepare.main(["--run", str(tmp_path / f"run{len(extra)}"), "--model", str(tiny_folder), "--source", f"hub:{write_set(tmp_path / f'set{len(extra)}', rows)}", "--user", "ann", *extra,
                      "--min-action-words", "1", "--max-action-tokens", "90", "--max-context-tokens", "300", "--limit", "1000"])
        pairs = common.read_pairs(tmp_path / f"run{len(extra)}" / "pairs.jsonl")
        assert len(pairs) == 13 and len({pair["conversation"] for pair in pairs}) == 5 == len({(pair["conversation"], pair["split"]) for pair in pairs})
        assert "8 conversations have the id of another one" in capsys.readouterr().out


def test_a_hub_turn_without_a_role_stays_in_the_context(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set", [{"messages": [{"from": 1, "value": "hi"}, {"from": None, "value": "psst"}, {"from": 1, "value": "hello"}]}])
    (_, _, turns), = prepare.Source(f"hub:{folder}", (), None)
    assert [(turn.speaker, turn.text, turn.answers) for turn in turns] == [("1", "hi", None), ("[missing]", "psst", 0), ("1", "hello", 1)]


GOOD = json.dumps({"id": "x", "messages": [{"role": "user", "content": "hi"}]}).encode()


@pytest.mark.parametrize("bad, words", [
    *((bad, "train.jsonl, line 2") for bad in (GOOD[:20], GOOD[:4] + b"\xff" + GOOD[4:], GOOD.decode().encode("utf-16"), b"5", b"[1]", b"<!DOCTYPE html>", b"[" * 9_000, b"{}!")),
    *((json.dumps(row).encode(), ", row 1: ") for row in ({"id": "y"}, {"messages": 5}, {"messages": [5]}, {"messages": [None]}, {"messages": None}, {"messages": [{"role": "a", "content": [1]}]}, {"messages": [{"role": ["a"], "content": "x"}]})),
])
def test_a_malformed_line_of_a_local_data_set_gets_one_message(prepare, tmp_path, monkeypatch, capsys, bad, words):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(GOOD + b"\n" + bad + b"\n")
    with pytest.raises(SystemExit) as caught:
        list(prepare.read_hub(str(folder)))
    message = capsys.readouterr().err.rpartition("error: ")[2]       # behind the library's bars
    assert caught.value.code == 2 and str(folder) in message and words in message and message.count("\n") == 1


def test_list_users_counts_replies(prepare, tmp_path, capsys):
    write_turns(tmp_path / "turns.jsonl", conversations=3, turns=6)
    prepare.main(["--run", str(tmp_path / "run"), "--source", f"turns:{tmp_path / 'turns.jsonl'}", "--list-users"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["9", "ann"], ["4", "bo"], ["2", "cy"]]                # a first turn is no reply
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, arguments, words", [
    ("", [], ["no conversations"]),
    (None, [], ["does not exist"]),
    ('{"conversation": "c", "speaker": "a", "text": "hi"}\n', ["--user", "nobody"], ["nobody", "--list-users"]),
    ('{"conversation": "c", "speaker": "a"}\n', [], ["line 1", "'text'"]),
    ('{"conversation": "c", "speaker": "a", "text": "x"}\n{"conversation": "", "speaker": "a", "text": "x"}\n', [], ["turns.jsonl, line 2", "'conversation' must not be empty"]),
    ('{"conversation": "c", "speaker": "a", "text": 5}\n', [], ["line 1", "'text'", "int"]),
    ('{"conversation": "c", "speaker": "a", "text": "x"}\n{"conversation": "c", "spea', [], ["line 2", "not a whole JSON object"]),
    ('{"conversation": "c", "speaker": "a", "text": "x", "time": []}\n', [], ["line 1", "'time'"]),
    ('{"conversation": "c", "speaker": "a", "text": "x"}\n{"conversation": "c", "speaker": "b", "text": "y"}\n', [], ["--user b replies in 1 conversation ", "three are needed"]),
    ("".join(f'{{"conversation": "c{c}", "speaker": "{s}", "text": "x"}}\n' for c in range(3) for s in "ab"), [], ["no pair is left"]),
])
def test_bad_sources_get_one_clear_message(prepare, tmp_path, tiny_folder, capsys, content, arguments, words):
    if content is not None:
        (tmp_path / "turns.jsonl").write_text(content)
    with pytest.raises(SystemExit) as caught:
        run(prepare, tmp_path, tiny_folder, *arguments)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("error: ") == 1 and all(word in message for word in words), message


def test_an_unknown_source_names_the_known_ones(prepare, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--run", str(tmp_path), "--source", "reddit:x"])
    assert "chitchat, convokit, markdown, turns, hub" in capsys.readouterr().err
