"""Conversations to pairs: contexts, splits, limits, names, and errors of the command line."""

import json
from argparse import Namespace
from collections import Counter

import pytest
from conftest import release

import common
from common import Pair

ROOMY = ("--max-context-tokens", "900", "--max-action-tokens", "400", "--min-action-words", "1")

@pytest.fixture(scope="module")
def prepare(stage):
    return stage("01_prepare")

def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def write_turns(path, conversations=20, turns=12, time=True):
    """Chats of ann with bo or cy; each turn's text is unique."""
    return write_lines(path, [
        {"conversation": f"c{c}", "speaker": "ann" if t % 2 else "bo" if c % 3 else "cy",
         "text": f"words of turn {t} in chat number {c}"} | ({"time": f"2024-01-{c + 1:02}T00:00:00"} if time else {})
        for c in range(conversations) for t in range(turns)])

def make_pairs(prepare, tiny_folder, folder, *extra, source=None, run="run"):
    """The pairs that the stage makes of a source, or of turns.jsonl in the folder."""
    release()                                              # the lock of an earlier call in this process
    source = source or f"turns:{folder / 'turns.jsonl'}"
    prepare.main(["--run", str(folder / run), "--model", str(tiny_folder), "--source", source, *extra])
    return common.read_rows(folder / run / "pairs.jsonl", Pair)

def chat(prepare, name, time, *speakers):
    said = ((speaker, f"{speaker} speaks at {place}") for place, speaker in enumerate(speakers))
    return prepare.Conversation(name, time, prepare.in_order(said))

def split(prepare, chats, users, val=0.1, test=0.4, seed=0):
    return prepare.split_conversations(chats, users, Namespace(val_share=val, test_share=test, seed=seed))

def fails(capsys, call):
    """The one message with which a call ends the program."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = capsys.readouterr().err.rpartition("error: ")[2]               # behind the bars
    assert caught.value.code == 2 and message.count("\n") == 1, message
    return message

def test_a_context_is_exactly_the_turns_before_the_action(prepare, tmp_path, tiny_folder):
    chats = {}
    for row in map(json.loads, write_turns(tmp_path / "turns.jsonl").read_text().splitlines()):
        chats.setdefault(row["conversation"], []).append((row["speaker"], row["text"]))
    pairs = make_pairs(prepare, tiny_folder, tmp_path, *ROOMY, "--max-context-turns", "3")
    assert len(pairs) == 44
    for pair in pairs:
        turns, place = chats[pair.conversation], int(pair.id.split("/")[-1])
        assert (pair.user, pair.action) == turns[place] and pair.cut == max(0, place - 3)
        assert [(turn.speaker, turn.text) for turn in pair.context] == turns[max(0, place - 3):place]

def test_whole_conversations_go_to_one_split_and_the_latest_to_test(prepare, tmp_path, tiny_folder):
    write_turns(tmp_path / "turns.jsonl")
    options = ("--limit", "1000", "--user", "ann", "--val-share", "0.1", "--test-share", "0.4")
    pairs = make_pairs(prepare, tiny_folder, tmp_path, *ROOMY, *options)
    expected = enumerate(["train"] * 10 + ["val"] * 2 + ["test"] * 8)
    assert {(pair.conversation, pair.split) for pair in pairs} == {(f"c{place}", name) for place, name in expected}

def test_without_dates_the_split_is_random_but_repeatable(prepare, capsys):
    chats = [chat(prepare, f"c{c}", None, "bo", "ann") for c in range(40)]
    one, same, other = (split(prepare, chats, ["ann"], seed=seed) for seed in (1, 1, 2))
    assert one == same and one != other and Counter(one.values()) == Counter(train=20, val=4, test=16)
    assert "ann: conversations without a time" in capsys.readouterr().out

def test_a_shared_conversation_has_one_split_and_nobodys_future_is_learnt_from(prepare):
    chats = [chat(prepare, f"c{day:02}", f"{day:03}", "cy", *["ann"] * (day <= 10), "bo") for day in range(1, 21)]
    splits = split(prepare, chats, ["ann", "bo"], 0.1, 0.5)
    days = {name: [day for day, found in splits.items() if found == name] for name in ("train", "val", "test")}
    assert sum(map(len, days.values())) == 20 and max(days["train"]) < min(days["test"])
    assert {splits[f"c{day:02}"] for day in range(1, 11)} == set(days)        # ann's keep their places

def test_who_has_three_conversations_has_one_in_each_split_and_who_has_two_is_refused(prepare, capsys):
    chats = [chat(prepare, f"c{c}", f"{c:03}", "bo", "ann") for c in range(12)]
    for count in range(3, 13):
        splits = list(split(prepare, chats[:count], ["ann"], 0.1, 0.55).values())
        assert set(splits) == {"train", "val", "test"} and splits == sorted(splits, key=["train", "val", "test"].index)
    repeated = [*chats[:3], chat(prepare, "c0", "9", "bo", "ann")]              # an id counts once, by its last time
    assert split(prepare, repeated, ["ann"], 0.1, 0.1) == {"c1": "train", "c2": "val", "c0": "test"}
    assert "replies in 2 conversations; three" in fails(capsys, lambda: split(prepare, chats[:2], ["ann"]))

def test_pairs_chosen_lazily_are_those_of_choosing_among_all(prepare, tmp_path, tiny_folder):
    write_turns(tmp_path / "turns.jsonl", conversations=30)
    options = ("--max-action-tokens", "30", "--max-context-tokens", "120", "--seed", "7", "--val-share",
               "0.1", "--test-share", "0.55")
    everything = make_pairs(prepare, tiny_folder, tmp_path, *options, "--limit", "100000", run="all")
    room, expected = prepare.pair_quotas(20, {"train": 0.35, "val": 0.1, "test": 0.55}, ["ann", "bo"]), []
    for pair in everything:
        if room[pair.split, pair.user]:
            room[pair.split, pair.user] -= 1
            expected.append(pair)
    assert len(expected) == 20 and make_pairs(prepare, tiny_folder, tmp_path, *options, "--limit", "20") == expected
    every, some = (json.loads((tmp_path / run / "pairs.summary.json").read_text())["dropped"] for run in ("all", "run"))
    assert some["not looked at, as --limit was met"] > 100 and every["action too long"] > some["action too long"] > 0
    assert len({pair.conversation for pair in expected}) > 12               # of 30, in a random order
    assert len(everything) + sum(every.values()) == 20 + sum(some.values())

def test_quotas_keep_to_the_limit_and_give_everyone_a_pair(prepare):
    shares = {"train": 0.35, "val": 0.1, "test": 0.55}
    assert list(prepare.pair_quotas(44, shares, ["ann", "bo"]).values()) == [8, 8, 2, 2, 12, 12]
    for limit in range(1, 200):
        users = list("abcdefgh"[:1 + limit % 8])
        quotas = prepare.pair_quotas(limit, shares, users)
        assert min(quotas.values()) >= 1 and sum(quotas.values()) <= max(limit, 3 * len(users))

def test_what_is_left_out_is_counted_by_reason_and_a_context_is_cut_at_whole_turns(prepare, tiny_folder):
    tokenizer = common.load_tokenizer(str(tiny_folder))
    said = [("bo", "how was the day"), ("ann", "it was a fine day really"), ("bo", "how was the day"),
            ("ann", "It was a fine day really"), ("bo", "x" * 900), ("ann", "this one has no context left"),
            ("bo", "ok"), ("ann", "too short"), ("bo", "a" * 30), ("ann", "far " * 200), ("bo", "b" * 30),
            ("ann", "c d e f g h")]
    one = prepare.Conversation("c", None, prepare.in_order(said))
    replies, dropped = prepare.find_replies([one], ["ann"], "test", 4)
    args = Namespace(seed=0, max_action_tokens=50, max_context_turns=2, max_context_tokens=60, setting=None)
    pairs = prepare.choose_pairs(replies, {"c": "train"}, {("train", "ann"): 9}, tokenizer, args, dropped)
    assert {pair.id: (len(pair.context), pair.cut) for pair in pairs} == {"test/c/1": (1, 0), "test/c/11": (1, 10)}
    assert all(len(common.encode_data(tokenizer, common.format_scene(pair))) <= 60 for pair in pairs)
    assert dropped == {"duplicate": 1, "last turn before the action too long": 1, "action too short": 1,
                       "action too long": 1}

def test_turns_in_a_row_are_joined_empty_ones_left_out_and_a_deleted_one_ends_the_chain(prepare):
    counts = Counter()
    tidied = lambda turns, *rules: [(one.speaker, one.text, one.parent) for one in prepare.tidy(turns, rules, counts)]
    thread = lambda *turns: [prepare.Turn(*turn) for turn in turns]
    said = [("bo", "one"), ("bo", " two\n"), ("ann", "  "), ("bo", "three"), ("ann", "four"), (" ", "?"), ("", "!")]
    assert tidied(prepare.in_order(said)) == [
        ("bo", "one two three", None), ("ann", "four", 0), ("[missing]", "?", 1), ("[missing]", "!", 2)]
    deleted = thread(("bo", "root"), ("ann", "[laughter]", 0), ("cy", "below", 1), ("ann", "[deleted]", 0),
                     ("bo", "answers it", 3), ("cy", "on", 4))
    assert tidied(deleted, "deleted", "stage directions") == [
        ("bo", "root", None), ("cy", "below", 0), ("bo", "answers it", None), ("cy", "on", 2)]
    assert counts == {"a speaker without a name": 2, "deleted": 1, "stage directions": 1}
    branch = thread(("bo", "root"), ("ann", "one", 0), ("bo", " ", 0), ("bo", "more", 2))
    assert len(tidied(branch)) == 3                        # not joined to root, which ann answers as well

def test_people_are_counted_by_replies_to_others_and_nobody_is_nobody(prepare, tmp_path, capsys):
    source = write_turns(tmp_path / "turns.jsonl", conversations=3, turns=6)
    bots = [{"conversation": "c0", "speaker": name, "text": "x"} for name in ("[deleted]", "[deleted]", "DeltaBot")]
    source.write_text(source.read_text() + "".join(json.dumps(row) + "\n" for row in bots))
    prepare.main(["--run", str(tmp_path / "run"), "--source", f"turns:{source}", "--list-users"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["9", "ann"], ["4", "bo"], ["2", "cy"]]                # a first turn is no reply
    assert not (tmp_path / "run").exists()

def test_the_nearest_names_are_suggested(prepare, capsys):
    replies = Counter({"j__neil_gorsuch": 5, "bo": 3, "Daniel Whitenack": 2})
    for asked, name in (("gorsuch", "j__neil_gorsuch"), ("j_neil_gorsuhc", "j__neil_gorsuch"), ("Daniel", "Daniel W")):
        assert f"near it is {name}" in fails(capsys, lambda: prepare.choose_people([asked], replies))
    assert prepare.choose_people([], replies) == ["j__neil_gorsuch", "bo"]

def test_pairs_are_made_once_and_a_changed_source_or_setting_is_noticed(prepare, tmp_path, tiny_folder, capsys):
    source = write_turns(tmp_path / "turns.jsonl")
    make = lambda setting: make_pairs(prepare, tiny_folder, tmp_path, "--setting", setting)
    pairs = make("A court.")
    assert {pair.setting for pair in pairs} == {"A court."} and make("A court.") == pairs
    assert "already made" in (said := capsys.readouterr().out) and said.count("next: python 02_sample") == 2
    assert "arguments.setting was 'A court.'" in fails(capsys, lambda: make("A pub."))
    write_turns(source, conversations=19)
    assert f"inputs.{source} was" in fails(capsys, lambda: make("A court."))

def test_pseudonyms_hide_every_speakers_name_wherever_it_stands(prepare):
    action = "Sure, Lee is in, and Ho too. Will you? Missing! u/the_dude (the dude) and user_99x say so, the lee side."
    turn = common.Turn(speaker="j__bo_mcshort", text="Ann, will you and Mr. McShort (MCSHORT) join?")
    pair = Pair(id="markdown/talk-with-ann/3", user="Ann Lee", conversation="talk-with-ann", split="test", cut=2,
                setting="Ann Lee is asked.", context=[turn], action=action)
    names = ["Ann Lee", "j__bo_mcshort", "Will Ho", "the_dude", "user_99x", prepare.MISSING, "Ann Bo"]
    hidden, = prepare.pseudonymise([pair], ["Ann Lee"], names)
    assert (hidden.id, hidden.user, hidden.conversation, hidden.setting, hidden.split, hidden.cut) == (
        "markdown/conversation-1/3", "person-1", "conversation-1", "person-1 is asked.", "test", 2)
    assert hidden.context == [
        common.Turn(speaker="speaker-1", text="person-1, will you and Mr. speaker-1 (speaker-1) join?")]
    # Lee stays here, because the same text has it in small letters; Will, The and Missing are words.
    assert hidden.action == action.replace("Ho", "speaker-2").replace("the_dude", "speaker-3").replace(
        "the dude", "speaker-3").replace("user_99x", "speaker-4")

def test_with_pseudonyms_no_name_is_written_anywhere(prepare, tmp_path, tiny_folder):
    source = write_turns(tmp_path / "turns.jsonl")
    source.write_text(source.read_text().replace('"ann"', '"Annika"').replace("turn 1 ", "turn 1 of Annika "))
    make_pairs(prepare, tiny_folder, tmp_path, *ROOMY, "--user", "Annika", "--pseudonymise")
    written = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.json*")}
    assert len(written) == 4 and not any("annika" in text.lower() for text in written.values())
    assert "turn 1 of person-1" in written["pairs.jsonl"]

TURN = '{"conversation": "c", "speaker": "a", "text": "x"}\n'
THREE = "".join(TURN.replace('c"', f'{c}"').replace('"a', f'"{name}') for c in "def" for name in "ab")

@pytest.mark.parametrize("content, arguments, words", [
    ("", [], "no conversations in which somebody replies"),
    (None, [], "does not exist"),
    (THREE, ["--user", "nobody"], "--user nobody: nobody of that name"),
    (TURN + '{"conversation": "c", "speaker": "a"}\n', [], "turns.jsonl, line 2: text: "),
    (TURN + TURN.replace('"a"', '"b"'), [], "--user b replies in 1 conversations; three"),
    (THREE, [], "no pair is left"),
    (THREE, ["--val-share", "0.6", "--test-share", "0.5"], "--val-share and --test-share"),
    (THREE, ["--sha256", "0" * 64], "has the sha256"),
    (THREE, ["--source", "reddit:x"], "choose from chitchat, convokit, markdown, turns, hub"),
    (THREE, ["--source", "hub:"], "say which"),
])
def test_bad_sources_and_arguments_get_one_message(prepare, tmp_path, tiny_folder, capsys, content, arguments, words):
    if content is not None:
        (tmp_path / "turns.jsonl").write_text(content)
    assert words in fails(capsys, lambda: make_pairs(prepare, tiny_folder, tmp_path, *arguments))
