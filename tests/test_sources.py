"""Other people's formats: threads, transcripts, data sets, zips and downloads; and what cleaning removes."""

import http.server
import json
import os
import random
import re
import runpy
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from test_prepare import ROOMY, fails, make_pairs, prepare, write_lines      # noqa: F401: prepare is a fixture

import common

SAMPLES = Path(os.environ.get("RECON_SAMPLES", ROOT.parent / "shared" / "data"))
RULE = "stage directions"

def utterance(name, speaker, reply_to, text=None, thread="t"):
    return {"id": name, "speaker": speaker, "conversation_id": thread, "reply_to": reply_to, "timestamp": 0.5,
            "text": text or f"words of {name}", "meta": {"huge": "x" * 50}}

def corpus(folder, rows):
    write_lines(folder / "utterances.jsonl", rows)
    return folder

def read(prepare, source, *rules):
    return [(name, time, [(turn.speaker, turn.text, turn.parent) for turn in turns])
            for name, time, turns, _ in prepare.Source(source, rules)]

ROWS = [utterance(f"{c}.{n}", "ab"[n % 2], f"{c}.{n - 1}" if n else None, thread=f"c{c}")
        for c in range(5) for n in range(6)]

def test_a_context_is_the_chain_of_ancestors_and_never_a_sibling(prepare, tmp_path, tiny_folder):
    """On random trees whose lines are shuffled, so that answers often come before what they answer."""
    numbers = random.Random(0)
    rows = [utterance(f"{thread}.{n}", f"p{n}", f"{thread}.{numbers.randrange(n)}" if n else None, thread=f"t{thread}")
            for thread in range(8) for n in range(12)]     # nobody speaks twice in a thread: nothing is joined
    by_text = {row["text"]: row for row in rows}
    numbers.shuffle(rows)
    users = [word for n in range(1, 12) for word in ("--user", f"p{n}")]
    pairs = make_pairs(prepare, tiny_folder, tmp_path, *ROOMY, *users, "--limit", "1000", "--max-context-turns", "99",
                       source=f"convokit:{corpus(tmp_path / 'c', rows)}")
    assert len(pairs) == 8 * 11
    for pair in pairs:
        row, expected = by_text[pair.action], []
        while row["reply_to"]:
            row = by_text[f"words of {row['reply_to']}"]
            expected.insert(0, row["text"])
        assert [turn.text for turn in pair.context] == expected

def test_circles_missing_parents_and_repeated_ids_are_reported_and_never_hang(prepare, tmp_path):
    rows = [utterance("root", "bo", None), utterance("left", "ann", "root"), utterance("orphan", "cy", "long gone"),
            utterance("child", "ann", "orphan"), utterance("x", "ann", "y"), utterance("y", "bo", "x"),
            utterance("behind", "cy", "y"), utterance("self", "bo", "self"), utterance("left", "bo", "root", "another"),
            utterance("stranger", "ann", "root", thread="other")]
    source = prepare.Source(f"convokit:{corpus(tmp_path / 'c', rows)}")
    (_, _, turns, _), (_, _, stranger, _) = source
    answers = {turn.text: None if turn.parent is None else turns[turn.parent].text for turn in turns}
    expected = dict(root=None, left="root", orphan=None, child="orphan", y=None, x="y", behind="y", self=None)
    assert answers == {f"words of {name}": above and f"words of {above}" for name, above in expected.items()}
    assert [turn.parent for turn in stranger] == [None]
    path = tmp_path / "c" / "utterances.jsonl"
    assert {kind.split(" that")[0].split(";")[0]: found for kind, found in source.problems.items()} == {
        "answers to nothing in their thread": {"count": 4, "first": f"{path}, line 3"},
        "ids": {"count": 1, "first": f"{path}, line 9"}}

def test_older_keys_of_a_corpus_are_read_and_its_dates_if_they_can_be_dates(prepare, tmp_path):
    said = ((1, "bo", "1300000000", "hi"), (2, "ann", None, None), (3, "bo", 1.4e9, "a"))
    rows = [{"id": str(n), "user": name, "root": "1", "reply-to": str(n - 1) if n > 1 else None, "timestamp": time,
             "text": text} for n, name, time, text in said]
    turns = [("bo", "hi a", None)]
    assert read(prepare, f"convokit:{corpus(tmp_path / 'c', rows)}") == [("1", None, turns)]
    rows[1]["timestamp"] = 1300000004
    assert read(prepare, f"convokit:{corpus(tmp_path / 'c', rows)}") == [("1", "0001300000000.000000", turns)]

def test_the_embedded_chats_are_long_and_of_two_people(prepare):
    chats = list(prepare.read_chitchat(""))
    assert len(chats) > 2000 and all(len(one.turns) >= 10 and len(prepare.repliers(one)) == 2 for one in chats)

def test_a_transcript_opens_turns_with_names_and_breaks_are_left_out(prepare, tmp_path):
    (tmp_path / "a-10.md").write_text("Title, not a turn\n\n**Ann Lee:** Hi **all**.\n\nStill me.\n\n**Bo:** yes"
                                      "\n**Break:** an advert \\[12:00\\]\n\n**Bo:** and on\n\n** :** who\n")
    (tmp_path / "a-9.md").write_text("\ufeff**Bo:** first\n\n**Ann Lee:** second\n", encoding="utf-8")
    nine, ten = read(prepare, f"markdown:{tmp_path}", RULE, "emphasis")
    assert (nine[0], ten[0]) == ("a-9", "a-10") and nine[1] < ten[1]
    assert nine[2] == [("Bo", "first", None), ("Ann Lee", "second", 0)]
    assert ten[2] == [("Ann Lee", "Hi all. Still me.", None), ("Bo", "yes and on", 0), ("[missing]", "who", 1)]

def test_hub_rows_of_one_id_share_a_split_and_a_turn_without_a_role_stays(prepare, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = lambda n: [{"role": role, "content": f"{role} says {n}"} for role in ("bo", None, "ann")]
    write_lines(tmp_path / "set" / "train.jsonl", [
        {"id": f"x{n % 4}" if n else " ", "messages": turns(n)} for n in range(13)])
    pairs = make_pairs(prepare, tiny_folder, tmp_path, *ROOMY, "--user", "ann", "--limit", "1000", "--pseudonymise",
                       source=f"hub:{tmp_path / 'set'}")
    assert len({pair.id for pair in pairs}) == 13 and pairs[0].context[1].text.startswith("None says")
    assert len({pair.conversation for pair in pairs}) == 5 == len({(pair.conversation, pair.split) for pair in pairs})

@pytest.mark.parametrize("rule, text, clean", [
    (RULE, r"Yes \[laughter\] me [08:10] up.\[unintelligible 00:06:03.11\] (Laughter.)", "Yes   me   up.   "),
    (RULE, "[audience laughs] (Laughter and applause.) (General laughter.) [inaudible 00:01:02] (Inaudible 01:02) "
           "(Pause.) (Recess) [Music]", " " * 15),
    *((RULE, text, text) for text in (
        "[t]he State says [sic] that list[int] and x[0] (as in Lee) hold", "[laughter](https://a.b)", "[" * 40_000,
        "(Recess Appointments Clause) (Laughter is honest) (pause) (Pause the game) (Music and Art) (Music) f(Pause)",
        "[the Court] [12] [2019] [the music industry] [META] [1:1] [5:17] [3:10]")),
    ("quoted lines", "\n" * 50_000 + "a > b", "\n" * 50_000 + "a > b"),
    ("quoted lines", "> you said\nI disagree\n &gt; this too\n3 > 2", " \nI disagree\n \n3 > 2"),
    ("links", "[" * 40_000, "[" * 40_000),
    ("links", "see [the paper](https://a.b/c_(d)) and https://x.y/z?q=1 there", "see the paper and   there"),
    ("emphasis", "**very** _good_, not snake_case_name or 2 * 3 * 4, `code` ~~gone~~",
     "very good, not snake_case_name or 2 * 3 * 4, code gone"),
    ("entities", "Tom &amp; Ann", "Tom & Ann")])
def test_a_cleaning_rule_takes_what_it_names_and_no_more(prepare, rule, text, clean):
    assert prepare.CLEANING[rule](text) == clean

@pytest.mark.parametrize("kind, name, user", [("convokit", "supreme-2023-sample", "j__neil_gorsuch"),
                                              ("markdown", "practicalai-sample", "Daniel Whitenack")])
def test_pairs_of_a_real_sample_are_what_was_said_in_order_without_labels(
        prepare, tmp_path, tiny_folder, capsys, kind, name, user):
    folder = SAMPLES / name
    label = r"(?<![\w*])\*\*|:\*\*|\[|\((?:Laughter|Inaudible|Pause)|(?:^|[.?!]\s+)(?:JUSTICE|MR\.|GENERAL)[A-Z .]*:"
    if not folder.is_dir():
        pytest.skip(f"no {name} here (RECON_SAMPLES)")
    prepare.main(["--source", f"{kind}:{folder}", "--list-users"])
    replies = int(re.search(rf"(\d+)  {user}", capsys.readouterr().out)[1])
    pairs = make_pairs(prepare, tiny_folder, tmp_path, "--user", user, "--max-context-tokens", "9000", "--limit", "999",
                       "--max-action-tokens", "9000", source=f"{kind}:{folder}")
    assert f"{replies} rows in, {len(pairs)} out" in capsys.readouterr().out and len(pairs) > 100
    raw = {path.stem: re.sub(r"\*\*Break:\*\*.*", "", path.read_text(encoding="utf-8")) for path in folder.glob("*.md")}
    for row in map(json.loads, (folder / "utterances.jsonl").open() if kind == "convokit" else ()):
        raw[row["conversation_id"]] = f"{raw.get(row['conversation_id'], '')} {row['text']}"
    letters = lambda text: re.sub(r"\(Laughter\.\)|\\\[.*?\\\]|\*\*[^*\n]+:\*\*|[\W_]", "", text)
    raw = {key: letters(text) for key, text in raw.items()}
    for pair in pairs:
        said = [*(turn.text for turn in pair.context), pair.action]
        assert "".join(map(letters, said)) in raw[pair.conversation]
        assert not any(re.search(label, text) for text in said)
        assert pair.context[-1].speaker != pair.user == user

# Zips and downloads

def zipped(path, rows=ROWS, name="corpus/utterances.jsonl", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, "".join(json.dumps(row) + "\n" for row in rows))
        archive.writestr("corpus/speakers.json", "{}")
    return path

def test_a_zip_is_read_without_unpacking_it(prepare, tmp_path):
    whole = read(prepare, f"convokit:{corpus(tmp_path / 'c', ROWS)}")
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        assert read(prepare, f"convokit:{zipped(tmp_path / 'c.zip', method=method)}") == whole
    assert [(name, time) for name, time, _ in whole] == [(f"c{c}", None) for c in range(5)]        # 0.5 is no date
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.zip"]

def test_a_broken_zip_or_a_missing_corpus_gets_one_message(prepare, tmp_path, capsys):
    whole = zipped(tmp_path / "whole.zip", ROWS * 50).read_bytes()
    locked = whole.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01", 1)
    broken = {"cut": whole[:len(whole) // 2], "damaged": whole[:60] + bytes(30) + whole[90:], "locked": locked,
              "page": b"<!DOCTYPE html>404", "other": zipped(tmp_path / "x.zip", name="else.jsonl").read_bytes()}
    assert locked != whole
    for name, content in broken.items():
        (tmp_path / f"{name}.zip").write_bytes(content)
        message = fails(capsys, lambda: read(prepare, f"convokit:{tmp_path / name}.zip"))
        assert f"{name}.zip is no whole zip with one utterances.jsonl in it (" in message
    for place in (tmp_path, tmp_path / "nothing.zip"):
        assert "does not exist; name a folder with utt" in fails(capsys, lambda: prepare.Source(f"convokit:{place}"))

@pytest.fixture()
def server(tmp_path, monkeypatch):
    """Corpora on loopback. `cut` breaks the first connection after so many bytes."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        cut, asked, log_message = None, [], lambda *_: None

        def copyfile(self, source, output):
            self.asked.append(self.path)
            output.write(source.read()[:Handler.cut])
            Handler.cut = None

    for name in ("supreme-corpus/supreme-2019.zip", "iq2-corpus/iq2-corpus.zip"):
        (tmp_path / "sets" / name).parent.mkdir(parents=True)
        zipped(tmp_path / "sets" / name)
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("CONVOKIT_BASE_URL", f"http://127.0.0.1:{serving.server_port}/sets")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    yield Handler
    serving.shutdown()
    serving.server_close()

def test_a_corpus_is_downloaded_once_and_half_of_it_is_not_taken_for_the_whole(prepare, server, tmp_path, capsys):
    server.cut = 500
    assert "cannot download http://" in fails(capsys, lambda: prepare.Source("convokit:supreme-2019"))
    assert not list((tmp_path / "cache" / "convokit").iterdir())
    for _ in range(2):
        assert len(read(prepare, "convokit:supreme-2019")) == 5
    assert server.asked == ["/sets/supreme-corpus/supreme-2019.zip"] * 2
    assert [path.name for path in (tmp_path / "cache" / "convokit").iterdir()] == ["supreme-2019.zip"]

def test_a_wrong_checksum_or_name_is_refused(prepare, server, tmp_path, capsys):
    message = fails(capsys, lambda: prepare.Source("convokit:iq2-corpus", sha256="0" * 64))
    right = common.file_hash(tmp_path / "cache" / "convokit" / "iq2-corpus.zip")
    assert right in message and prepare.Source("convokit:iq2-corpus", sha256=right.upper())
    assert "404" in fails(capsys, lambda: prepare.Source("convokit:no-such-corpus"))

def test_the_readmes_own_domain_is_at_most_20_lines_and_works(prepare, tmp_path, tiny_folder, monkeypatch):
    code, = re.findall(r"```python\n([^`]*def read_.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(code.splitlines()) <= 20
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "logs").mkdir()
    for day in range(1, 9):
        lines = (f"2026-03-0{day} 12:0{n} <{('bo', 'ann')[n % 2]}> {n} of day {day} https://a.b\n" for n in range(8))
        (tmp_path / "logs" / f"2026-03-0{day}.log").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SOURCES", dict(prepare.SOURCES))
    monkeypatch.setattr(prepare, "DOMAINS", dict(prepare.DOMAINS))
    monkeypatch.setattr(sys, "argv", ["own.py", "--run", "run", "--domain", "irc", "--model", str(tiny_folder), *ROOMY])
    runpy.run_path("own.py", run_name="__main__")
    pairs = common.read_rows(tmp_path / "run" / "pairs.jsonl", common.Pair)
    assert {pair.user for pair in pairs} == {"ann", "bo"}
    assert all("http" not in pair.action and "developers" in pair.setting for pair in pairs)
    days = {split: {pair.conversation for pair in pairs if pair.split == split} for split in ("train", "test")}
    assert max(days["train"]) < min(days["test"])
