"""Other people's formats: threads, transcripts, zips and downloads, whole and broken, and what cleaning takes away."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

import common

SAMPLES = Path(os.environ.get("RECON_SAMPLES", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def prepare(stage):
    return stage("01_prepare")


@pytest.fixture(autouse=True)
def forget_corpora(prepare):
    prepare.load_corpus.cache_clear()


def utterance(name, speaker, answers, text=None, conversation="t", **more):
    return {"id": name, "speaker": speaker, "conversation_id": conversation, "reply_to": answers, "timestamp": 0.5, "text": text or f"words of {name}", "meta": {"huge": "x" * 50}} | more


def write_corpus(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(prepare, place, rules=()):
    return list(prepare.Source(f"convokit:{place}", rules, None))


def refused(prepare, capsys, place, sha256=None):
    """The one message with which a source is refused."""
    with pytest.raises(SystemExit) as caught:
        list(prepare.Source(f"convokit:{place}", (), sha256))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("error: ") == 1 and "Traceback" not in message
    return message


# ------------------------------------------------------------------------------------------------
# Threads


def test_a_context_is_the_chain_of_ancestors_and_never_a_sibling(prepare, tmp_path, numbers):
    """Against the obvious way, on random trees whose lines are shuffled, so that answers often come before what they answer."""
    rows = []
    for thread in range(8):
        for at in range(12):
            rows.append(utterance(f"{thread}.{at}", numbers.choice("abcdefgh"), f"{thread}.{numbers.randrange(at)}" if at else None, conversation=f"t{thread}"))
    by_id = {row["id"]: row for row in rows}
    numbers.shuffle(rows)
    found = {}
    for name, _, turns in read(prepare, write_corpus(tmp_path / "c", rows)):
        for place, turn in enumerate(turns):
            found[turn.text.split("words of ")[-1]] = " ".join(above.text for above in (*prepare.chain_of(turns, place), turn))
    for name, text in found.items():
        expected, above = [], name
        while above is not None:
            expected.insert(0, by_id[above]["text"])
            above = by_id[above]["reply_to"]
        assert text == " ".join(expected)
    answered = Counter(row["reply_to"] for row in rows)
    joined = sum(row["reply_to"] is not None and by_id[row["reply_to"]]["speaker"] == row["speaker"] and answered[row["reply_to"]] == 1 for row in rows)
    assert len(found) == len(rows) - joined                                     # all but those joined to the turn before, by the same speaker


def test_siblings_cycles_missing_parents_and_ids_that_stand_twice(prepare, tmp_path, capsys, tiny_folder):
    rows = [utterance("root", "bo", None), utterance("left", "ann", "root"), utterance("right", "cy", "root"), utterance("below", "ann", "right"),
            utterance("orphan", "cy", "deleted long ago"), utterance("its child", "ann", "orphan"),
            utterance("x", "ann", "y"), utterance("y", "bo", "x"), utterance("behind the cycle", "cy", "y"), utterance("self", "bo", "self"),
            utterance("left", "bo", "root", "a second one of that id"), utterance("stranger", "ann", "root", conversation="other")]
    corpus = write_corpus(tmp_path / "c", rows)
    (_, _, turns), (_, _, other) = read(prepare, corpus)
    texts = {turn.text: [above.text for above in prepare.chain_of(turns, place)] for place, turn in enumerate(turns)}
    assert texts == {"words of root": [], "words of left": ["words of root"], "words of right": ["words of root"], "words of below": ["words of root", "words of right"],
                     "words of orphan": [], "words of its child": ["words of orphan"]}
    assert [turn.answers for turn in other] == [None]
    problems = prepare.load_corpus(corpus / "utterances.jsonl")[1]
    assert {kind.split(";")[0]: (re.search(r"line (\d+)", first)[1], count) for kind, (first, count) in problems.items()} == {
        "answers to an utterance that is missing": ("5", 1), "cycles of answers": ("7", 2), "ids that stand there twice": ("11", 1), "answers to an utterance of another conversation": ("12", 1)}
    assert all("utterances.jsonl, line" in first for first, _ in problems.values())
    for thread in range(3):
        rows += [utterance(f"{thread} a", "bo", None, conversation=f"c{thread}"), utterance(f"{thread} b", "ann", f"{thread} a", conversation=f"c{thread}")]
    write_corpus(tmp_path / "c", rows)
    prepare.load_corpus.cache_clear()
    prepare.main(["--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--source", f"convokit:{corpus}", "--user", "ann", "--min-action-words", "1", "--max-action-tokens", "90", "--max-context-tokens", "300"])
    assert "utterances.jsonl, line 11" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "pairs.summary.json").read_text())["problems"].keys() == problems.keys()


def test_a_speaker_without_a_name_stays_in_contexts_and_is_never_modelled(prepare, tmp_path, tiny_folder, capsys):
    rows = [row for c in range(3) for row in (utterance(f"{c} a", "bo", None, conversation=f"c{c}"), utterance(f"{c} b", "", f"{c} a", conversation=f"c{c}"),
                                              utterance(f"{c} c", " ", f"{c} b", conversation=f"c{c}"), utterance(f"{c} d", "ann", f"{c} c", conversation=f"c{c}"))]
    prepare.main(["--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--source", f"convokit:{write_corpus(tmp_path / 'c', rows)}",
                  "--min-action-words", "1", "--max-action-tokens", "90", "--max-context-tokens", "300"])
    pairs = common.read_pairs(tmp_path / "run" / "pairs.jsonl")
    assert len(pairs) == 3 and {pair["user"] for pair in pairs} == {"ann"}
    assert all([turn["speaker"] for turn in pair["context"]] == ["bo", "[missing]", "[missing]"] for pair in pairs)
    assert "6 utterances without a speaker's name" in (said := capsys.readouterr().out) and "utterances.jsonl, line 2: '0 b'" in said


def test_a_transcripts_turn_without_a_name_is_nobodys(prepare, tmp_path):
    (tmp_path / "a.md").write_text("\ufeff**Ann:** first\n\n** :** who\n\n**:** knows\n\n**Ann:** third\n", encoding="utf-8")
    (_, _, turns), = prepare.Source(f"markdown:{tmp_path}", (), None)
    assert [(turn.speaker, turn.text, turn.answers) for turn in turns] == [("Ann", "first", None), ("[missing]", "who", 0), ("[missing]", "knows", 1), ("Ann", "third", 2)]


def test_older_keys_and_metadata_and_dates(prepare, tmp_path):
    rows = [{"id": "1", "user": "bo", "root": "1", "reply-to": None, "timestamp": "1300000000", "text": "hi"}, {"id": "2", "user": "ann", "root": "1", "reply-to": "1", "timestamp": None, "text": None},
            {"id": "3", "user": "ann", "root": "1", "reply-to": "2", "timestamp": 1300000009, "text": "hello"}]
    assert read(prepare, write_corpus(tmp_path / "c", rows)) == [("1", None, [prepare.Turn("bo", "hi", None), prepare.Turn("ann", "hello", 0)])]
    rows[1]["timestamp"] = 1300000004
    prepare.load_corpus.cache_clear()
    assert read(prepare, write_corpus(tmp_path / "c", rows))[0][1] == "1300000000.000000".zfill(20)


def test_what_answers_an_empty_turn_answers_what_that_one_answered_and_a_deleted_one_ends_the_chain(prepare):
    counts = Counter()
    thread = [("bo", "root", None), ("ann", "[laughter]", 0), ("cy", "below", 1), ("ann", "[deleted]", 0), ("bo", "answers the deleted", 3), ("cy", "on", 4)]
    turns = prepare.tidy(thread, ("deleted", "stage directions"), counts)
    assert [(turn.text, turn.answers) for turn in turns] == [("root", None), ("below", 0), ("answers the deleted", None), ("on", 2)]
    assert counts == {"deleted": 1, "stage directions": 1}
    branch = [("bo", "root", None), ("ann", "one", 0), ("bo", "(nothing)", 0), ("bo", "more", 2)]
    branch[2] = ("bo", " ", 0)
    assert [turn.text for turn in prepare.tidy(branch, (), counts)] == ["root", "one", "more"]             # not joined to root, which ann answers as well


@pytest.mark.parametrize("rule, text, clean", [
    ("stage directions", r"Yes \[laughter\] sign [08:10] me up.\[unintelligible 00:06:03.11\] (Laughter.)", "Yes   sign   me up.   "),
    ("stage directions", '[t]he State says [sic] that list[int] and x[0] (as in Lee) hold', '[t]he State says [sic] that list[int] and x[0] (as in Lee) hold'),
    ("stage directions", "[audience laughs] (Laughter and applause.) (General laughter.) [inaudible 00:01:02] (Inaudible 01:02) (Pause.) (Recess) [Music]", " " * 15),
    *(("stage directions", text, text) for text in ("(Recess Appointments Clause) (Laughter is honest) (pause) (Pause the game) (Music and Art) (Music) f(Pause) (b) (A)", "[the Court] [12] [2019] [the music industry] [META] [1:1] [5:17] [3:10]", "[laughter](https://a.b)", "[" * 40_000)),
    ("quoted lines", "\n" * 50_000 + "a > b", "\n" * 50_000 + "a > b"), ("links", "[" * 40_000, "[" * 40_000),
    ("quoted lines", "> you said\nI disagree\n &gt; this too\n3 > 2", " \nI disagree\n \n3 > 2"),
    ("links", "see [the paper](https://a.b/c_(d)) and https://x.y/z?q=1 there", "see the paper and   there"),
    ("emphasis", "this is **very** _good_, not snake_case_name or 2 * 3 * 4, `code` ~~gone~~", "this is very good, not snake_case_name or 2 * 3 * 4, code gone"),
    ("entities", "Tom &amp; Ann", "Tom & Ann")])
def test_a_cleaning_rule_takes_what_it_names_and_no_more(prepare, rule, text, clean):
    assert prepare.CLEANING[rule](text) == clean


# ------------------------------------------------------------------------------------------------
# Transcripts, domains, names


def test_a_transcript_opens_turns_with_names_and_breaks_are_left_out(prepare, tmp_path):
    (tmp_path / "show-10.md").write_text("Title, not a turn\n\n**Ann Lee:** Hi **all**.\n\nStill me.\n\n**Bo:** yes\n**Break:** \\[12:00\\]\n\n**Bo:** and on\n")
    (tmp_path / "show-9.md").write_text("**Bo:** first\n\n**Ann Lee:** second\n")
    found = list(prepare.Source(f"markdown:{tmp_path}", ("stage directions", "emphasis"), None))
    assert [name for name, _, _ in found] == ["show-9", "show-10"] and found[0][1] < found[1][1]
    assert [(turn.speaker, turn.text) for turn in found[1][2]] == [("Ann Lee", "Hi all. Still me."), ("Bo", "yes and on")]


def test_a_setting_is_what_every_prompt_opens_with(prepare, tmp_path, tiny, tiny_folder):
    _, tokenizer = tiny
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps({"conversation": f"c{c}", "speaker": s, "text": f"{s} has {c} words to say"}) + "\n" for c in range(6) for s in ("bo", "ann")))
    prepare.main(["--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--source", f"turns:{tmp_path / 'turns.jsonl'}", "--user", "ann", "--setting", "A court. Sam is a judge.",
                  "--min-action-words", "2", "--max-action-tokens", "90", "--max-context-tokens", "300"])
    pair = common.read_pairs(tmp_path / "run" / "pairs.jsonl")[0]
    assert pair["setting"] == "A court. Sam is a judge."
    plain = {key: value for key, value in pair.items() if key != "setting"}
    for prompt in (lambda pair: common.synthesis_prompt(tokenizer, pair), lambda pair: common.user_prompt(tokenizer, pair, True),
                   *(lambda pair, name=name: common.action_group(tokenizer, pair, ["x"], name)[0][0] for name in ("transcript", "reconstruction"))):
        assert "A court. Sam is a judge." in tokenizer.decode(prompt(pair)) and "A court" not in tokenizer.decode(prompt(plain))
    transcript = tokenizer.decode(common.action_group(tokenizer, plain, ["x"])[0][0])
    assert transcript.startswith("A chat between friends.\n\nAlex: ") and "friends" not in tokenizer.decode(common.action_group(tokenizer, pair, ["x"])[0][0])


def test_pseudonyms_hide_every_speakers_name_wherever_it_stands(prepare):
    pairs = [{"id": "markdown/talk-with-ann/3", "user": "Ann Lee", "conversation": "talk-with-ann", "setting": "Ann Lee is asked.", "context": [{"speaker": "j__bo_mcshort", "text": "Ann, will you and Mr. McShort (MCSHORT) join?"}],
              "action": "Sure, Lee is in, and Ho too. Will you? The one called u/the_dude and user_99x say so, the lee side."}]
    hidden, = prepare.pseudonymise(pairs, ["Ann Lee"], ["Ann Lee", "j__bo_mcshort", "Will Ho", "the_dude", "user_99x"])
    assert hidden["user"] == "person-1" and hidden["context"] == [{"speaker": "speaker-1", "text": "person-1, will you and Mr. speaker-1 (speaker-1) join?"}]
    assert (hidden["id"], hidden["conversation"], hidden["setting"]) == ("markdown/conversation-1/3", "conversation-1", "person-1 is asked.")
    # Lee stays here, because the same text has it in small letters; Will and The are words.
    assert hidden["action"] == "Sure, Lee is in, and speaker-2 too. Will you? The one called u/speaker-3 and speaker-4 say so, the lee side."


def test_what_stands_for_a_name_that_is_not_known_is_no_name_to_hide(prepare):
    pairs = [{"id": "turns/c/1", "user": "ann", "conversation": "c", "context": [{"speaker": prepare.MISSING, "text": "Deleted again?"}], "action": "Missing a deadline is bad."}]
    hidden, = prepare.pseudonymise(pairs, ["ann"], [prepare.MISSING, "[deleted]", "ann"])
    assert hidden["action"] == "Missing a deadline is bad." and hidden["context"] == [{"speaker": "speaker-1", "text": "Deleted again?"}]


def test_conversations_of_one_id_count_once_in_the_splits(prepare):
    turns = prepare.tidy([("bo", "hi"), ("ann", "hello")], (), Counter())
    splits = prepare.split_conversations([("a", "1", turns), ("b", "2", turns), ("c", "3", turns), ("a", "4", turns)], ["ann"], 0.1, 0.1, 0)
    assert splits == {"b": "train", "c": "val", "a": "test"}


def test_nobody_is_modelled_or_joined(prepare, tmp_path):
    rows = [utterance("1", "bo", None), utterance("2", "[deleted]", "1"), utterance("3", "[deleted]", "2"), utterance("4", "DeltaBot", "3"), utterance("5", "ann", "4")]
    source = prepare.Source(f"convokit:{write_corpus(tmp_path / 'c', rows)}", (), None)
    assert prepare.count_replies(source) == {"ann": 1} and len(list(source)[0][2]) == 5


@pytest.mark.parametrize("count", range(3, 12))
def test_every_person_with_three_conversations_has_one_in_each_split(prepare, count):
    chats = [(f"c{c}", f"{c:03}", prepare.tidy([("bo", "hi"), ("ann", "hello")], (), Counter())) for c in range(count)]
    splits = prepare.split_conversations(chats, ["ann"], 0.1, 0.55, 0)
    assert set(splits.values()) == {"train", "val", "test"} and list(splits.values()) == sorted(splits.values(), key=("train", "val", "test").index)


def test_nobodys_later_conversations_are_learnt_from_while_earlier_ones_are_the_test(prepare):
    chats = [(f"c{day:02}", f"{day:03}", prepare.tidy([("cy", "hi"), *([("ann", "hello")] if day <= 10 else []), ("bo", "yes")], (), Counter())) for day in range(1, 21)]
    splits = prepare.split_conversations(chats, ["ann", "bo"], 0.1, 0.5, 0)
    assert max(name for name, split in splits.items() if split == "train") < min(name for name, split in splits.items() if split == "test")


def test_a_corpus_that_has_changed_is_not_taken_for_the_old_one(prepare, tmp_path, tiny_folder, capsys):
    def prepared(source):
        prepare.load_corpus.cache_clear()
        prepare.main(["--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--source", source, "--user", "b", "--min-action-words", "1", "--max-action-tokens", "90", "--max-context-tokens", "300"])

    corpus = write_corpus(tmp_path / "c", ROWS)
    prepared(f"convokit:{corpus}")
    prepared(f"convokit:{corpus}")
    assert "already made" in capsys.readouterr().out
    write_corpus(tmp_path / "c", ROWS[6:])
    with pytest.raises(SystemExit):
        prepared(f"convokit:{corpus}")
    assert "files.utterances.jsonl" in capsys.readouterr().err


def test_the_nearest_names_are_suggested(prepare, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "c", [utterance("1", "bo", None), utterance("2", "j__neil_gorsuch", "1")])
    for asked in ("gorsuch", "j_neil_gorsuhc"):
        with pytest.raises(SystemExit):
            prepare.main(["--run", str(tmp_path / "run"), "--source", f"convokit:{corpus}", "--user", asked])
        assert "near it are j__neil_gorsuch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Real samples, where there are any


@pytest.mark.skipif(not (SAMPLES / "supreme-2023-sample").is_dir(), reason="no sample of the Supreme Court corpus here (RECON_SAMPLES)")
def test_real_arguments_give_contexts_that_are_exactly_the_preceding_turns(prepare, tmp_path, tiny_folder):
    folder = SAMPLES / "supreme-2023-sample"
    prepare.main(["--run", str(tmp_path), "--model", str(tiny_folder), "--source", f"convokit:{folder}", "--user", "j__neil_gorsuch",
                  "--max-context-tokens", "9000", "--max-action-tokens", "9000", "--limit", "1000"])
    raw = {}
    for line in (folder / "utterances.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        raw.setdefault(row["conversation_id"], []).append((row["speaker"], " ".join(row["text"].replace("(Laughter.)", " ").split())))
    pairs = common.read_pairs(tmp_path / "pairs.jsonl")
    check_plain(pairs)
    check_pairs(pairs, raw)


@pytest.mark.skipif(not (SAMPLES / "practicalai-sample").is_dir(), reason="no sample of podcast transcripts here (RECON_SAMPLES)")
def test_real_transcripts_give_contexts_that_are_exactly_the_preceding_turns(prepare, tmp_path, tiny_folder):
    folder = SAMPLES / "practicalai-sample"
    prepare.main(["--run", str(tmp_path), "--model", str(tiny_folder), "--source", f"markdown:{folder}", "--user", "Daniel Whitenack",
                  "--max-context-tokens", "9000", "--max-action-tokens", "9000", "--limit", "1000"])
    raw = {}
    for path in folder.glob("*.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("**"):
                name, _, line = line.removeprefix("**").partition(":**")
                raw.setdefault(path.stem, []).append((name, ""))
            raw[path.stem][-1] = (raw[path.stem][-1][0], f"{raw[path.stem][-1][1]} {line}")
    plain = lambda text: " ".join(re.sub(r"(?<![\w*_])(?:\*++|_++)(?=\w)|(?<=\w)(?:\*++|_++)(?!\w)", "", re.sub(r"\\\[.*?\\\]", " ", text).replace("`", "")).split())
    raw = {name: [(speaker, plain(text)) for speaker, text in turns if speaker != "Break"] for name, turns in raw.items()}
    pairs = common.read_pairs(tmp_path / "pairs.jsonl")
    check_plain(pairs)
    check_pairs(pairs, raw)


@pytest.mark.parametrize("source, user", [("convokit:../shared/data/supreme-2023-sample", "j__neil_gorsuch"), ("markdown:../shared/data/practicalai-sample", "Daniel Whitenack")])
def test_the_defaults_make_plain_pairs_of_a_sample_and_list_its_people(prepare, tmp_path, monkeypatch, capsys, source, user):
    if not (SAMPLES / source.rpartition("/")[2]).is_dir():
        pytest.skip("no such sample here (RECON_SAMPLES)")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(SAMPLES.resolve())
    (tmp_path / "main").mkdir()
    monkeypatch.chdir(tmp_path / "main")
    prepare.main(["--source", source, "--list-users"])
    listed = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert len(listed) > 3 and list(listed.values()) == sorted(listed.values(), reverse=True) and not list(Path().iterdir())
    prepare.main(["--source", source, "--user", user])
    pairs = common.read_pairs(Path("runs/demo/pairs.jsonl"))
    assert f"01_prepare: {listed[user]} replies in, {len(pairs)} pairs out" in capsys.readouterr().out and {pair["user"] for pair in pairs} == {user}
    check_plain(pairs)


def check_plain(pairs):
    """No text holds a stage direction, emphasis, or the label of somebody who speaks."""
    names = {turn["speaker"] for pair in pairs for turn in pair["context"]} | {pair["user"] for pair in pairs}
    label = re.compile(r"(?<![\w*])\*\*|:\*\*|\[|\((?:Laughter|Applause|Inaudible|Pause|Recess)|(?:^|[.?!\]*]\s+)(?:JUSTICE|MR\.|MS\.|GENERAL|" + "|".join(map(re.escape, names)) + r")[A-Z .]*:")
    for text in (text for pair in pairs for text in (pair["action"], *(turn["text"] for turn in pair["context"]))):
        assert not label.search(text), text


def check_pairs(pairs, raw):
    """Each pair's context is the end of what comes right before its action, and no conversation is in two splits."""
    assert len(pairs) > 100 and len({(pair["conversation"], pair["split"]) for pair in pairs}) == len({pair["conversation"] for pair in pairs})
    for pair in pairs:
        turns = []
        for speaker, text in raw[pair["conversation"]]:
            if text and turns and turns[-1][0] == speaker:
                turns[-1] = (speaker, f"{turns[-1][1]} {text}")
            elif text:
                turns.append((speaker, text))
        places = [at for at, turn in enumerate(turns) if turn == (pair["user"], pair["action"])]
        context = [(turn["speaker"], turn["text"]) for turn in pair["context"]]
        assert any(context == turns[max(0, at - len(context)):at] for at in places)


# ------------------------------------------------------------------------------------------------
# Broken files, and downloads


def zipped(path, rows=None, name="corpus/utterances.jsonl", text=None, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, text if text is not None else "".join(json.dumps(row) + "\n" for row in rows))
        archive.writestr("corpus/speakers.json", "{}")
    return path


ROWS = [utterance(f"{c}.{at}", "ab"[at % 2], f"{c}.{at - 1}" if at else None, conversation=f"c{c}") for c in range(5) for at in range(6)]


def test_a_zip_is_read_without_unpacking_it(prepare, tmp_path):
    folder = read(prepare, write_corpus(tmp_path / "c", ROWS))
    prepare.load_corpus.cache_clear()
    assert read(prepare, zipped(tmp_path / "c.zip", ROWS)) == folder and len(folder) == 5


def test_broken_and_hostile_files_get_one_clear_message(prepare, tmp_path, capsys):
    whole = zipped(tmp_path / "whole.zip", ROWS * 50).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:len(whole) // 2])
    assert "not a whole zip" in refused(prepare, capsys, tmp_path / "cut.zip")
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    assert "not a whole zip" in refused(prepare, capsys, tmp_path / "damaged.zip")
    for number, name in enumerate(("../utterances.jsonl", "/etc/utterances.jsonl", "a/../../utterances.jsonl", "C:/utterances.jsonl", "..\\utterances.jsonl")):
        assert "points outside it" in refused(prepare, capsys, zipped(tmp_path / f"path{number}.zip", ROWS, name))
    assert "no text does" in refused(prepare, capsys, zipped(tmp_path / "bomb.zip", name="utterances.jsonl", text="0" * (20 << 20)))
    (tmp_path / "page.zip").write_text("<!DOCTYPE html><html>404</html>")
    assert "is a web page" in refused(prepare, capsys, tmp_path / "page.zip")
    assert "0 files called utterances.jsonl" in refused(prepare, capsys, zipped(tmp_path / "other.zip", ROWS, "else.jsonl"))
    assert "no such folder or file" in refused(prepare, capsys, tmp_path / "nothing.zip")
    (tmp_path / "empty").mkdir()
    assert "utterances.jsonl does not exist" in refused(prepare, capsys, tmp_path / "empty")
    for line, words in ((b'{"id": "\xe4"}', "line 1: not UTF-8"), (b'{"id": "1"}', "line 1: not an utterance"), (b"[1]", "not an utterance"), (b'{"id":', "not a whole JSON"),
                        (b'{"id": 1, "speaker": "a", "conversation_id": "c", "reply_to": null, "text": "x"}', "must be texts")):
        folder = write_corpus(tmp_path / "bad", [])
        (folder / "utterances.jsonl").write_bytes(line + b"\n")
        assert words in refused(prepare, capsys, folder)
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.md").write_bytes("**Ann:** hi\n\n**Bo:** gr\xfc\xdfe\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        list(prepare.Source(f"markdown:{tmp_path / 'latin'}", (), None))
    assert "a.md, line 3: not UTF-8" in capsys.readouterr().err


def test_a_zip_packed_in_another_way_is_read_and_one_with_a_password_refused(prepare, tmp_path, capsys):
    whole = zipped(tmp_path / "lzma.zip", ROWS, method=zipfile.ZIP_LZMA)
    assert len(read(prepare, whole)) == 5
    damaged = bytearray(whole.read_bytes())
    damaged[80:120] = bytes(40)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    assert "not a whole zip" in refused(prepare, capsys, tmp_path / "damaged.zip")
    locked = bytearray(zipped(tmp_path / "locked.zip", ROWS).read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):                 # where a file's flags stand, here and in the list of files
        locked[locked.index(mark) + place] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    assert "locked.zip is encrypted; unpack it" in refused(prepare, capsys, tmp_path / "locked.zip")


class Server(http.server.BaseHTTPRequestHandler):
    """One file with ranges and an ETag. `drop` breaks the connection after so many bytes, once; `page` is a status to fail with."""

    content, etag, drop, page, length, asked = b"", "v1", None, 0, True, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.headers.get("If-Range") == self.etag else 0
        Server.asked.append((self.path, start))
        if self.page:
            self.send_error(self.page)
            return
        self.send_response(206 if start else 200)
        if self.etag:
            self.send_header("ETag", self.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.length:
            self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) if self.drop is None else self.drop
        Server.drop = None
        self.wfile.write(self.content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture()
def server(prepare, tmp_path, monkeypatch):
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("CONVOKIT_BASE_URL", f"http://127.0.0.1:{running.server_port}/sets")
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    Server.content, Server.etag, Server.drop, Server.page, Server.length, Server.asked = zipped(tmp_path / "served.zip", ROWS * 200).read_bytes(), "v1", None, 0, True, []
    yield Server
    running.shutdown()


def test_a_broken_download_goes_on_where_it_stopped_and_is_kept(prepare, server, capsys):
    server.drop = len(server.content) // 3
    assert "start again to go on" in refused(prepare, capsys, "supreme-2019")
    assert len(read(prepare, "supreme-2019")) == 5
    assert [path for path, _ in server.asked] == ["/sets/supreme-corpus/supreme-2019.zip"] * 2 and 0 < server.asked[1][1] <= len(server.content) // 3
    prepare.load_corpus.cache_clear()
    assert len(read(prepare, "supreme-2019")) == 5 and len(server.asked) == 2
    kept = prepare.CACHE / "convokit" / "supreme-2019.zip"
    assert kept.read_bytes() == server.content and sorted(kept.parent.iterdir()) == [kept, kept.with_name("supreme-2019.zip.lock")]


def test_a_download_is_begun_anew_if_the_file_has_changed_meanwhile(prepare, server, tmp_path, capsys):
    server.drop = len(server.content) // 2
    refused(prepare, capsys, "iq2-corpus")
    server.content, server.etag = zipped(tmp_path / "newer.zip", ROWS[:12]).read_bytes(), "v2"
    assert len(read(prepare, "iq2-corpus")) == 2 and server.asked[-1] == ("/sets/iq2-corpus/iq2-corpus.zip", 0)


def test_what_does_not_fit_the_servers_file_any_more_is_removed(prepare, server, capsys):
    server.drop = len(server.content) // 2
    refused(prepare, capsys, "iq2-corpus")
    server.page = 416
    assert "was removed; start again" in refused(prepare, capsys, "iq2-corpus") and server.asked[-1][1] > 0
    server.page = 0
    assert len(read(prepare, "iq2-corpus")) == 5 and server.asked[-1][1] == 0


@pytest.mark.parametrize("etag, length", [(None, True), ("W/weak", True), ("v1", False)])
def test_without_a_version_or_a_length_no_half_file_is_taken_for_whole(prepare, server, capsys, etag, length):
    server.etag, server.length, server.drop = etag, length, len(server.content) // 2
    assert "start again" in refused(prepare, capsys, "iq2-corpus") and not (prepare.CACHE / "convokit" / "iq2-corpus.zip").exists()
    assert len(read(prepare, "iq2-corpus")) == 5 and server.asked[-1][1] == (0 if length else len(server.content) // 2)


def test_two_downloads_of_one_corpus_do_not_mix(prepare, server, capsys):
    (prepare.CACHE / "convokit").mkdir(parents=True)
    path = prepare.CACHE / "convokit" / "iq2-corpus.zip"
    with path.with_name("iq2-corpus.zip.lock").open("w") as lock:
        prepare.fcntl.flock(lock, prepare.fcntl.LOCK_EX)
        assert "another process is downloading" in refused(prepare, capsys, "iq2-corpus") and not server.asked
        prepare.fcntl.flock(lock, prepare.fcntl.LOCK_UN)
        assert len(read(prepare, "iq2-corpus")) == 5
        assert os.path.sameopenfile(lock.fileno(), (still := path.with_name("iq2-corpus.zip.lock").open()).fileno())     # or a third would lock another file than a second
        still.close()
    prepare.download("http://nobody.invalid/", path)         # fetched by another process between a look at it and the lock


def test_a_wrong_checksum_or_size_or_name_is_refused(prepare, server, capsys):
    message = refused(prepare, capsys, "winning-args-corpus", "0" * 64)
    assert "sha256" in message and common.file_hash(prepare.CACHE / "convokit" / "winning-args-corpus.zip") in message
    assert len(list(prepare.Source("convokit:winning-args-corpus", (), common.file_hash(prepare.CACHE / "convokit" / "winning-args-corpus.zip")))) == 5
    server.page = 404
    assert "HTTP 404" in refused(prepare, capsys, "no-such-corpus")
    assert not (prepare.CACHE / "convokit" / "no-such-corpus.zip").exists()


def test_the_readmes_own_domain_is_at_most_20_lines_and_works(tmp_path, tiny_folder):
    code = re.search(r"### Your own domain.*?```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert len(code.splitlines()) <= 20
    (tmp_path / "prepare_irc.py").write_text(code)
    (tmp_path / "logs").mkdir()
    for day in range(1, 9):
        lines = [f"2026-03-{day:02} 12:{minute:02} <{'ann' if minute % 2 else 'bo'}> day {day} message {minute}, see https://a.b/c" for minute in range(8)]
        (tmp_path / "logs" / f"2026-03-{day:02}.log").write_text("\n".join(lines))
    command = [sys.executable, "prepare_irc.py", "--run", "run", "--domain", "irc", "--model", str(tiny_folder), "--min-action-words", "3", "--max-action-tokens", "90", "--max-context-tokens", "400"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pairs = common.read_pairs(tmp_path / "run" / "pairs.jsonl")
    assert {pair["user"] for pair in pairs} == {"ann", "bo"} and all("http" not in pair["action"] and "developers" in pair["setting"] for pair in pairs)
    assert max(pair["conversation"] for pair in pairs if pair["split"] == "train") < min(pair["conversation"] for pair in pairs if pair["split"] == "test")
