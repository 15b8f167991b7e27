"""Stage 1: turn conversations into (context, action) pairs of real people.

An action is one turn of the modelled person, its context the turns that it answers: in a thread the chain of ancestors,
in any other conversation the turns before it.

    in     a source of conversations (--source), or a preset of source, people and setting (--domain)
    out    RUN/pairs.jsonl              id, user, conversation, split, context [{speaker, text}], action, cut, setting
           RUN/pairs.summary.json       people, what was cleaned, dropped and found wrong, with counts

How to run it (each source into a --run of its own):

    python 01_prepare.py                                     the embedded chat corpus, its two busiest people
    python 01_prepare.py --list-users                        who is in the source, with counts
    python 01_prepare.py --run runs/supreme --domain supreme                             a preset; the corpus is downloaded once
    python 01_prepare.py --run runs/supreme --domain supreme --source convokit:FOLDER    the same, from a corpus folder or zip you have
    python 01_prepare.py --run runs/talks --source markdown:FOLDER --user "Ann Lee"      transcripts whose turns open with **Name:**
    python 01_prepare.py --run runs/mine --source turns:my.jsonl --user ann              your own data: rows {conversation, speaker, text, time?}
    python 01_prepare.py --run runs/hub --source hub:NAME                                a `datasets` data set with a column of messages

Departures from the paper: its eight people and four domains are not public knowledge; the domains here are of the same
kind. The limits and the splits are ours: whole conversations go to one split, and a person's later conversations to
test, as a model that is deployed meets them.
"""

import argparse
import difflib
import fcntl
import hashlib
import html
import http.client
import json
import lzma
import os
import random
import re
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from common import (CACHE, PERSON, Row, begin_run, break_tags, check_record, cut_context, dump_row, file_hash, first_line, fraction, load_tokenizer, made_with,
                    package_folder, parse_line, positive_int, progress, read_pairs, read_rows, run_stage, stage_arguments, stop, write_output, write_text)

# What a reader yields: (id, time that sorts or None, turns). A turn is (speaker, text), or in a thread (speaker, text,
# the place of the turn that it answers, which stands before it, or None).
Conversation = tuple[str, str | None, list[tuple]]


# ------------------------------------------------------------------------------------------------
# Sources: each is a generator of conversations. A new domain is one more function and one more line in SOURCES.


def read_chitchat(_: str) -> Iterator[Conversation]:
    """Chats of two people with at least ten turns; a turn is a list of messages sent in a row."""
    path = package_folder("chitchat_dataset") / "dataset.json"
    for name, chat in json.loads(path.read_text(encoding="utf-8")).items():
        turns = [(turn[0]["sender"], " ".join(message["text"] for message in turn)) for turn in chat["messages"] if turn]
        if len(turns) >= 10 and len({speaker for speaker, _ in turns}) == 2:
            yield name, chat["start"], turns


def read_turns(path: str) -> Iterator[Conversation]:
    """A JSONL file with one turn a line, in order: conversation, speaker, text and, if known, time."""
    conversations: dict[str, list[tuple[str, str]]] = defaultdict(list)
    times: dict[str, str | None] = {}
    for number, row in enumerate(read_rows(Path(path), ("conversation", "speaker", "text")), start=1):
        for key in ("conversation", "speaker", "text"):
            if not isinstance(row[key], str):
                stop(f"{path}, line {number}: {key!r} must be a string, found {type(row[key]).__name__}")
        if blank := next((key for key in ("conversation", "speaker") if not row[key].strip()), None):
            stop(f"{path}, line {number}: {blank!r} must not be empty")
        name, at = row["conversation"], row.get("time")
        # A number is padded so that it sorts like a date string does.
        at = f"{at:020.6f}" if isinstance(at, int | float) and abs(at) < 1e15 else at
        if not isinstance(at, str | None):
            stop(f"{path}, line {number}: 'time' must be a number or an ISO date string, found {type(at).__name__}")
        times.setdefault(name, at)
        conversations[name].append((row["speaker"], row["text"]))
    yield from ((name, times[name], turns) for name, turns in conversations.items())


def read_hub(name: str) -> Iterator[Conversation]:
    """A data set on the hub (or in a local folder) whose rows hold a list of turns under messages, conversations or turns."""
    import datasets  # here, because the import takes a second that other sources need not pay

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as problem:  # the library raises many kinds: no network, no such name, no such split
        for path in sorted(Path(name).rglob("*.jsonl")):     # it does not say which line it could not read
            read_rows(path)
        while problem.__cause__:
            problem = problem.__cause__
        stop(f"cannot load --source hub:{name}: {first_line(problem)}")
    column = next((key for key in ("messages", "conversations", "turns") if key in rows.column_names), None)
    if column is None:
        stop(f"--source hub:{name} has columns {', '.join(rows.column_names)}; one of messages, conversations, turns is needed")
    for number, row in enumerate(rows):
        if not isinstance(row[column], list) or not all(isinstance(turn, dict) for turn in row[column]):
            stop(f"--source hub:{name}, row {number}: {column!r} must be a list of turns like {{role, content}}")
        turns = [[next((turn[key] for key in keys if turn.get(key) is not None), "") for keys in (("speaker", "role", "from"), ("text", "content", "value"))] for turn in row[column]]
        if not all(isinstance(speaker, str | int) and isinstance(text, str) for speaker, text in turns):
            stop(f"--source hub:{name}, row {number}: in {column!r} a turn's role must be a text or a number, and its content a text")
        key = row.get("id")
        yield str(number) if key is None or not str(key).strip() else str(key), None, [(str(speaker), text) for speaker, text in turns]


SPOKEN_BY = re.compile(r"^\*\*([^*\n]{0,80}?):\*\*[ \t]*", re.MULTILINE)


def read_markdown(folder: str) -> Iterator[Conversation]:
    """Every .md file under a folder is a conversation, in the order of their names; a turn opens with **Name:** at the start of a line.

    'Break' is no speaker: so The Changelog's transcripts mark advertisements.
    """
    paths = sorted(Path(folder).rglob("*.md"), key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))])
    if not paths:
        stop(f"--source markdown:{folder} holds no .md file; name a folder of transcripts")
    for place, path in enumerate(paths):
        try:
            text = path.read_text(encoding="utf-8-sig")      # a byte-order mark would hide the first turn's opening
        except UnicodeDecodeError as problem:
            line = problem.object[:problem.start].count(b"\n") + 1
            stop(f"{path}, line {line}: not UTF-8 text ({problem.reason}); convert the file")
        _, *parts = SPOKEN_BY.split(text)
        turns = [(speaker.strip(), said) for speaker, said in zip(parts[::2], parts[1::2]) if speaker.strip() != "Break"]
        if turns:
            yield path.relative_to(folder).with_suffix("").as_posix(), f"{place:08}", turns


# ------------------------------------------------------------------------------------------------
# ConvoKit's corpus format: utterances.jsonl in a folder or a zip, threads by reply_to

CONVOKIT = "https://zissou.infosci.cornell.edu/convokit/datasets"
LARGEST_RATIO = 200                                        # JSON text is compressed 5 to 20 times


def corpus_address(name: str) -> str:
    """Where ConvoKit's server keeps a corpus: the years of the Supreme Court lie in one folder, every other corpus in its own."""
    base = os.environ.get("CONVOKIT_BASE_URL", CONVOKIT).rstrip("/")
    return f"{base}/{'supreme-corpus' if re.fullmatch('supreme-[0-9]{4}', name) else name}/{name}.zip"


def download(address: str, target: Path) -> None:
    """Fetch a zip to `target`, going on where an earlier attempt stopped; only a whole file gets its name.

    What is there already is kept if the server says that it still has the same file (strong ETag or date, by If-Range), else
    fetched anew. A second process that wants the same file stops; the lock's file stays, as lock_run's does.
    """
    part, mark, locked = (target.with_name(target.name + ending) for ending in (".part", ".part.etag", ".lock"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stop(f"another process is downloading {address}; wait for it and start again")
        if not target.is_file():                             # another process may have been faster
            fetch(address, part, mark)
            part.replace(target)
            mark.unlink()


def fetch(address: str, part: Path, mark: Path) -> None:
    """The transfer itself: the whole file is in `part` afterwards, or the program has stopped and said why."""
    again = f"start again to go on, or download {address} yourself and pass --source convokit:FILE"
    version = mark.read_text() if mark.is_file() else ""
    have = part.stat().st_size if version and part.is_file() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            if answer.status != 206:
                have = 0
            elif not (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
                part.unlink()
                stop(f"{address} sent another part than the one asked for; {again}")
            whole = have + int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
            version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
            mark.write_text("" if version.startswith("W/") else version)
            with part.open("ab" if have else "wb") as file, tqdm(desc=f"downloading {part.stem}", total=whole, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
                bar.update(have)
                while block := answer.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as problem:
        if problem.code == 416:                              # there is nothing behind what we have: begin anew
            part.unlink(missing_ok=True)
            stop(f"what was downloaded of {address} does not fit it any more and was removed; start again")
        stop(f"cannot download {address}: HTTP {problem.code} {problem.reason}; " + ("try again later" if problem.code >= 500 else "check the corpus name, or download it yourself and pass --source convokit:FILE"))
    except (OSError, ValueError, http.client.HTTPException) as problem:
        stop(f"downloading {address} broke off ({first_line(problem)}); {again}")
    found = part.stat().st_size
    if whole is None and not zipfile.is_zipfile(part):
        stop(f"downloading {address} broke off, or it is no zip; {again}")
    if whole is not None and found != whole:
        if found > whole:
            part.unlink()
        stop(f"{address}: {found:,} bytes arrived of {whole:,}; {again}")


def check_zip(path: Path, file: zipfile.ZipFile) -> None:
    """Refuse an archive with names that point outside it, or one that would unpack to more than its size can honestly hold."""
    for member in file.infolist():
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/"):
            stop(f"{path}: the archive holds the path {member.filename!r}, which points outside it; do not use this file")
        if member.file_size > 1 << 24 and member.file_size > LARGEST_RATIO * max(member.compress_size, 1):
            stop(f"{path}: {member.filename} would unpack from {member.compress_size:,} to {member.file_size:,} bytes, which no text does; do not use this file")


def corpus_file(place: str, sha256: str | None) -> Path:
    """The file that holds a corpus: utterances.jsonl of a folder, a zip, or the zip of a corpus of that name, which is downloaded once."""
    path = Path(place)
    if not path.exists():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", place) or place.endswith((".zip", ".jsonl")):
            stop(f"--source convokit:{place}: there is no such folder or file; name a corpus folder, a zip, or a corpus of ConvoKit's like supreme-2019")
        path = CACHE / "convokit" / f"{place}.zip"
        if not path.is_file():
            download(corpus_address(place), path)
    if path.is_dir():
        path = path / "utterances.jsonl"
        if not path.is_file():
            stop(f"{path} does not exist; a corpus folder holds utterances.jsonl, speakers.json and conversations.json")
    if sha256 and (found := file_hash(path)) != sha256.lower():
        stop(f"{path} has the sha256 {found}, not {sha256}; it is another version or was damaged: remove it to download it anew")
    return path


@contextmanager
def open_utterances(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """(what to call it, lines) of a corpus' utterances.jsonl, out of the zip if it lies in one."""
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            yield str(path), lines
        return
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        stop(f"{path} is a web page, not a zip: the server answered with one; remove the file and check the corpus name")
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(path, archive)
            if any(member.flag_bits & 1 for member in archive.infolist()):
                stop(f"{path} is encrypted; unpack it and name the folder")
            names = [name for name in archive.namelist() if name.rpartition("/")[2] == "utterances.jsonl" and not name.startswith("__MACOSX")]
            if len(names) != 1:
                stop(f"{path} holds {len(names)} files called utterances.jsonl, and a corpus has one")
            with archive.open(names[0]) as lines:
                yield f"{path}, {names[0]}", lines
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, NotImplementedError, UnicodeError) as problem:
        stop(f"{path} is not a whole zip ({first_line(problem)}); remove it and fetch it again")


@dataclass
class Corpus:
    """Utterances by row, without their metadata: texts in one buffer and numbers in arrays, some 150 bytes a row and its text."""

    texts: bytearray
    ends: array                                  # where each text ends in the buffer
    speaker: array                               # into `speakers`
    conversation: array                          # into `conversations`
    parent: array                                # row of the utterance that it answers, or -1
    time: array
    speakers: list[str]
    conversations: list[str]


def keep_problem(problems: dict[str, list], kind: str, where: str) -> None:
    """Count what is wrong with a source, with the first place of each kind."""
    problems.setdefault(kind, [where, 0])[1] += 1


@lru_cache(maxsize=1)
def load_corpus(path: Path) -> tuple[Corpus, dict[str, list]]:
    """Read a corpus once, line by line, and resolve who answers whom.

    Reported by file and line, not fatal, as real corpora have them: an id that stands there twice (the first is kept), an answer to an
    utterance that is missing or in another conversation (it begins a chain), cycles (left out), and a speaker without a name.
    """
    corpus = Corpus(bytearray(), array("q"), array("i"), array("i"), array("i"), array("d"), [], [])
    rows, speakers, conversations = {}, {}, {}
    waiting: list[tuple[int, str, int]] = []                 # (row, the id it answers, line) of answers that come before what they answer
    problems: dict[str, list] = {}
    with open_utterances(path) as (name, lines):
        for number, line in enumerate(progress(lines, "reading utterances"), start=1):
            if not line.strip():
                continue
            row = parse_line(name, number, line)
            try:
                key, who = row["id"], row["speaker"] if "speaker" in row else row["user"]
                thread = row["conversation_id"] if "conversation_id" in row else row["root"]
                answers, text, at = row["reply_to"] if "reply_to" in row else row.get("reply-to"), row["text"], row.get("timestamp")
            except (KeyError, TypeError) as problem:
                stop(f"{name}, line {number}: not an utterance of ConvoKit's format, which has id, speaker, conversation_id, reply_to, text ({type(problem).__name__}: {problem})")
            if not all(isinstance(value, str) for value in (key, who, thread)) or not isinstance(text, str | None) or not isinstance(answers, str | None):
                stop(f"{name}, line {number}: id, speaker, conversation_id and text must be texts, reply_to a text or null")
            if not thread.strip():
                stop(f"{name}, line {number}: the id of the conversation must not be empty")
            if key in rows:
                keep_problem(problems, "ids that stand there twice; the first is kept", f"{name}, line {number}: {key!r}")
                continue
            if not who.strip():
                keep_problem(problems, "utterances without a speaker's name; they stand in contexts and are never modelled", f"{name}, line {number}: {key!r}")
            found = rows.get(answers, -1)                    # before it has its own row: an utterance may claim to answer itself
            rows[key] = len(corpus.ends)
            corpus.texts += (text or "").encode("utf-8", "replace")
            corpus.ends.append(len(corpus.texts))
            corpus.speaker.append(speakers.setdefault(who, len(speakers)))
            corpus.conversation.append(conversations.setdefault(thread, len(conversations)))
            corpus.parent.append(found)
            try:
                corpus.time.append(float(at))
            except (TypeError, ValueError, OverflowError):
                corpus.time.append(0.0)
            if answers is not None and found < 0:
                waiting.append((rows[key], answers, number))
            elif found >= 0 and corpus.conversation[found] != corpus.conversation[-1]:
                keep_problem(problems, "answers to an utterance of another conversation; they begin a chain", f"{name}, line {number}: {key!r}")
                corpus.parent[-1] = -1
    for row, answers, number in waiting:
        found = rows.get(answers, -1)
        if found < 0 or corpus.conversation[found] != corpus.conversation[row]:
            keep_problem(problems, "answers to an utterance that is missing; they begin a chain", f"{name}, line {number}: {answers!r}")
        else:
            corpus.parent[row] = found
    # A chain that never ends at a beginning is a cycle. state: 0 not seen, 1 on the way, 2 good, 3 in or behind a cycle
    state = bytearray(len(corpus.parent))
    for row, _, number in waiting:                           # a cycle needs an answer that comes before what it answers
        path = []
        while row >= 0 and not state[row]:
            state[row] = 1
            path.append(row)
            row = corpus.parent[row]
        bad = row >= 0 and state[row] in (1, 3)
        if bad and state[row] == 1:
            keep_problem(problems, "cycles of answers; their utterances are left out", f"{name}, line {number}")
        for seen in path:
            state[seen] = 3 if bad else 2
    for row, above in enumerate(corpus.parent):              # what answers a cycle from below stands behind it
        if state[row] == 3 or (not state[row] and above >= 0 and state[above] == 3):
            state[row] = 3
            corpus.conversation[row] = -1
    corpus.speakers, corpus.conversations = list(speakers), list(conversations)
    return corpus, problems

def read_convokit(path: str) -> Iterator[Conversation]:
    """The conversations of a corpus, each a thread: parents before the utterances that answer them, siblings in the order of the file.

    The time is that of its first utterance if it can be a date (seconds since 1970); in a transcript it counts from the
    start of the recording and orders nothing.
    """
    corpus, _ = load_corpus(Path(path))
    order = sorted((row for row, thread in enumerate(corpus.conversation) if thread >= 0), key=corpus.conversation.__getitem__)
    at = 0
    while at < len(order):
        thread, end = corpus.conversation[order[at]], at
        while end < len(order) and corpus.conversation[order[end]] == thread:
            end += 1
        rows, at = order[at:end], end
        places: dict[int, int] = {}
        for row in rows:
            chain = []
            while row >= 0 and row not in places:            # parents that stand later in the file come first here
                chain.append(row)
                row = corpus.parent[row]
            for above in reversed(chain):
                places[above] = len(places)
        turns = [(corpus.speakers[corpus.speaker[row]], corpus.texts[corpus.ends[row - 1] if row else 0:corpus.ends[row]].decode("utf-8"), places.get(corpus.parent[row])) for row in places]
        first = min(corpus.time[row] for row in rows)
        yield corpus.conversations[thread], f"{first:020.6f}" if first > 1e8 else None, turns


SOURCES: dict[str, Callable[[str], Iterator[Conversation]]] = {
    "chitchat": read_chitchat, "convokit": read_convokit, "markdown": read_markdown, "turns": read_turns, "hub": read_hub}


# ------------------------------------------------------------------------------------------------
# Domains: where the conversations come from, who is modelled, and what the prompts say of the setting


@dataclass
class Domain:
    """A preset. `setting` names the place and the person's role, no private fact; `clean` names rules of CLEANING."""

    source: str
    people: tuple[str, ...]                      # none: the two with most replies
    setting: str | None                          # None: the prompts' own words, a chat between friends
    clean: tuple[str, ...]


DOMAINS = {
    "chat": Domain("chitchat", ("31267496-e50f-4f91-a197-c5b1bfde803b", "549cc1d1-270e-4a53-b561-133a8d0086b4"), None, ()),
    # The two who reply most in the arguments of the 2023 term that this was checked with.
    "supreme": Domain("convokit:supreme-2019", ("j__neil_gorsuch", "j__john_g_roberts_jr"), f"A hearing at the Supreme Court of the United States. {PERSON} is one of the justices.", ("stage directions",)),
    # A debate is among strangers: who replies most differs from corpus to corpus. For iq2-corpus, which is spoken, pass --setting and --user.
    "debate": Domain("convokit:winning-args-corpus", (), f"An online debate in which people try to change each other's view. {PERSON} is one of the debaters.", ("deleted", "quoted lines", "links", "emphasis", "entities")),
    "podcast": Domain("markdown:transcripts/practicalai", ("Daniel Whitenack", "Chris Benson"), f"A podcast about machine learning. {PERSON} is one of its hosts.", ("links", "stage directions", "emphasis")),
}

# Escaped brackets are a transcriber's, whatever they hold. Others hold words of people too, so there it must be a sound, a break or a time.
SOUND = r"(?:\w{1,20} )?(?:laughs|laughing|laughter|chuckles|applause|cheers|inaudible|unintelligible|indiscernible|cross-?talk)(?:(?: and|,) \w{1,20})?"
BREAK = r"pause|recess|no response"
TIME = r"(?:\d\d:\d\d(?::\d\d)?|\d:\d\d:\d\d)(?:\.\d+)?"                           # not a verse, 5:17, or a ratio, 3:10
DIRECTION = re.compile(rf"\\\[[^\[\]\n]{{0,60}}\\\]|(?<!\w)\[(?i:{SOUND}|{BREAK}|music|silence|(?={TIME}))\.?(?: ?{TIME})?\](?![\w(])|(?<!\w)\((?=[A-Z])(?i:{SOUND}|{BREAK})\.?(?: {TIME})?\)")

# What each domain needs and no more. A rule takes a text and returns it without what the rule removes; "deleted" is handled where threads are tidied.
CLEANING: dict[str, Callable[[str], str]] = {
    # \[laughter\], [08:10], \[unintelligible 00:06:03.11\], (Laughter.); not [t]he, [sic], [the Court], [1], a link or (Recess Appointments Clause)
    "stage directions": lambda text: DIRECTION.sub(" ", text) if "[" in text or "(" in text else text,      # most texts have none, and the pattern is slow
    "quoted lines": lambda text: re.sub(r"(?m)^[^\S\n]*(?:>|&gt;).*$", " ", text),
    "links": lambda text: re.sub(r"https?://\S+", " ", re.sub(r"\[([^\[\]\n]{0,300})\]\((?:[^()\n]|\([^()\n]{0,300}\)){0,2000}\)", r"\1", text)),
    "emphasis": lambda text: re.sub(r"(?<![\w*_`])(\*{1,3}|_{1,3}|`|~~)(?=\S)([^*_`~\n]+?)(?<=\S)\1(?![\w*_`])", r"\2", text),
    "entities": html.unescape,
}
DELETED = ("[deleted]", "[removed]")
# Names that many or no people share: closed accounts, bots, voices that a transcript could not tell. Never modelled, never joined.
MISSING = "[missing]"                                      # who speaks without a name
NOBODY = frozenset(("[deleted]", "[removed]", MISSING, "DeltaBot", "AutoModerator", "<INAUDIBLE>"))


@dataclass
class Turn:
    """One turn after tidying; `answers` is the place of the turn that it answers, or None where a conversation or chain begins;
    `depth` counts the turns before it in its chain."""

    speaker: str
    text: str
    answers: int | None
    depth: int = field(default=0, compare=False)


def tidy(turns: list[tuple], rules: Iterable[str], counts: Counter) -> list[Turn]:
    """Turns with clean text on one line; empty ones are left out, and turns of one speaker in a row become one.

    What answered an empty turn answers what that one answered. A reply is joined to a turn of the same speaker only if
    nothing else answers that turn. What answers a deleted turn begins a new chain: what it answers is not known. A turn whose
    speaker has no name is nobody's, and stays where it is.
    """
    kept: list[Turn] = []
    place: list[int | None] = []                             # of each turn given, in `kept`
    alone: list[bool] = []                                   # may what answers this turn be joined to the turn it ends up answering?
    parents = [turn[2] if len(turn) > 2 else number - 1 if number else None for number, turn in enumerate(turns)]
    replies = Counter(parents)
    for number, (speaker, text, *_) in enumerate(turns):
        if not speaker.strip():
            counts["a speaker without a name"] += 1
            speaker = MISSING
        above = parents[number]
        answers = None if above is None else place[above]
        if "deleted" in rules and text.strip() in DELETED:
            counts["deleted"] += 1
            place.append(None)
            alone.append(True)
            continue
        for rule in rules:
            if rule in CLEANING and (cleaned := CLEANING[rule](text)) != text:
                counts[rule] += 1
                text = cleaned
        text, only = " ".join(text.split()), above is None or (replies[above] == 1 and alone[above])
        alone.append(only if not text else True)
        if not text:
            place.append(answers)
        elif answers is not None and kept[answers].speaker == speaker and only and speaker not in NOBODY:
            kept[answers].text += f" {text}"
            place.append(answers)
        else:
            place.append(len(kept))
            kept.append(Turn(speaker, text, answers, 0 if answers is None else kept[answers].depth + 1))
    return kept


def chain_of(turns: list[Turn], place: int, most: int | None = None) -> list[Turn]:
    """The (last `most`) turns that lead to the one at `place`, oldest first, without it: its ancestors, never their other replies."""
    chain, above = [], turns[place].answers
    while above is not None and len(chain) != most:
        chain.append(turns[above])
        above = turns[above].answers
    return chain[::-1]


class Source:
    """The conversations of `--source`, tidied; walked twice, once to count and once to keep what is needed, so that a corpus
    of millions of turns need not be in memory as Python objects."""

    def __init__(self, source: str, rules: Iterable[str], sha256: str | None):
        self.kind, _, rest = source.partition(":")
        if self.kind not in SOURCES:
            stop(f"--source {source}: unknown kind {self.kind!r}; choose from {', '.join(SOURCES)}")
        if self.kind != "chitchat" and not rest:
            stop(f"--source {source}: say which, as in {self.kind}:PATH_OR_NAME")
        if sha256 and self.kind != "convokit":
            stop("--sha256 is for --source convokit:NAME_OR_FILE")
        if self.kind == "turns" and not Path(rest).is_file():
            stop(f"{rest} does not exist; --source turns:FILE needs a JSONL file")
        self.place = str(corpus_file(rest, sha256)) if self.kind == "convokit" else rest
        self.name, self.rules, self.counts = source, tuple(rules), Counter()

    def files(self) -> Row:
        """The hash of every file that is read, by name; none for a package or a hub's data set."""
        if self.kind in ("chitchat", "hub"):
            return {}
        path = Path(self.place)
        files = [path] if path.is_file() else sorted(path.rglob("*.md" if self.kind == "markdown" else "*")) if path.is_dir() else []
        return {(file.relative_to(path).as_posix() if file != path else file.name): file_hash(file) for file in files if file.is_file()}

    def problems(self) -> dict[str, list]:
        """What was wrong with a corpus: the first place and the count of each kind."""
        return load_corpus(Path(self.place))[1] if self.kind == "convokit" else {}

    def __iter__(self) -> Iterator[tuple[str, str | None, list[Turn]]]:
        self.counts.clear()
        empty = True
        for name, at, turns in progress(SOURCES[self.kind](self.place), "reading conversations"):
            if found := tidy(turns, self.rules, self.counts):
                empty = False
                yield name, at, found
        if empty:
            stop(f"--source {self.name} holds no conversations; check that it is not empty")


# ------------------------------------------------------------------------------------------------
# From conversations to pairs


def count_replies(conversations: Iterable[tuple[str, str | None, list[Turn]]]) -> Counter:
    """How often each speaker who is somebody answers a turn of somebody else."""
    replies: Counter = Counter()
    for _, _, turns in conversations:
        replies.update(turn.speaker for turn in turns if turn.answers is not None and turns[turn.answers].speaker != turn.speaker and turn.speaker not in NOBODY)
    return replies


def split_conversations(conversations: list[tuple[str, str | None, list[Turn]]], users: list[str], val: float, test: float, seed: int) -> dict[str, str]:
    """Give each conversation of `users` to train, val or test, a person at a time.

    A person's conversations are ordered by time, or by a seeded shuffle if any has none; the last share `test` is the
    test split, the share `val` before it validation. A conversation shared by two of them stays with the first.
    """
    splits: dict[str, str] = {}
    for user in users:
        mine = [(at, name) for name, at in {name: at for name, at, turns in conversations if any(turn.speaker == user and turn.answers is not None for turn in turns)}.items()]
        random.Random(seed).shuffle(mine)
        if all(at is not None for at, _ in mine):
            mine.sort()
        first_test = min(max(round(len(mine) * (1 - test)), 2), len(mine) - 1)
        first_val = min(max(round(len(mine) * (1 - test - val)), 1), first_test - 1)
        # A conversation that another person gave a place stays there, and counts in this person's order: or the rest would be shared
        # out anew, and the person's later conversations be learnt from while earlier ones are the test.
        for i, (_, name) in enumerate(mine):
            splits.setdefault(name, "train" if i < first_val else "val" if i < first_test else "test")
    return splits


def token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """How many tokens encode_data makes of each text, in one call: a call costs more than a short text does."""
    return list(map(len, tokenizer([break_tags(tokenizer, text) for text in texts], add_special_tokens=False, split_special_tokens=True).input_ids)) if texts else []


def make_pairs(conversations: list[tuple[str, str | None, list[Turn]]], users: list[str], splits: dict[str, str], limits: Row, tokenizer: Any) -> tuple[list[Row], Counter]:
    """Every reply of `users` with its context, and a count of what was left out by reason.

    A context is cut at whole turns from the oldest, to `turns` turns and `context_tokens` tokens; `cut` in the row says
    how many turns are missing. An action is never cut: one that is too long is left out. Ids differ also where a source names
    two conversations alike.
    """
    pairs, dropped, seen, parts = [], Counter(), set(), Counter()
    for name, _, turns in progress([some for some in conversations if some[0] in splits], "making pairs"):
        parts[name] += 1
        again = f"{parts[name]}." if parts[name] > 1 else ""
        mine = [place for place, turn in enumerate(turns) if turn.speaker in users and turn.answers is not None]
        sizes = token_counts(tokenizer, [turns[place].text for place in mine])
        for place, size in zip(mine, sizes):
            turn = turns[place]
            key = (turn.speaker, turns[turn.answers].text.casefold(), turn.text.casefold())
            if turns[turn.answers].speaker == turn.speaker:
                dropped["answers the same person"] += 1
            elif len(turn.text.split()) < limits["words"]:
                dropped["action too short"] += 1
            elif size > limits["action_tokens"]:
                dropped["action too long"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                context = [{"speaker": above.speaker, "text": above.text} for above in chain_of(turns, place, limits["turns"])]
                row = {"id": f"{limits['source']}/{name}/{again}{place}", "user": turn.speaker, "conversation": name,
                       "split": splits[name], "context": context, "action": turn.text, "cut": turn.depth - len(context)} | limits["setting"]
                if fitting := cut_context(tokenizer, row, limits["context_tokens"]):
                    pairs.append(fitting)
                else:
                    dropped["last turn before the action too long"] += 1
    return pairs, dropped


def choose_pairs(pairs: list[Row], users: list[str], limit: int | None, shares: dict[str, float], seed: int) -> list[Row]:
    """At most `limit` pairs (but one a person and split), by `shares` and evenly over `users`, drawn at random so that
    many conversations take part.

    The order is shuffled, so that a later stage's --limit takes a fair sample.
    """
    pairs = sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}/{pair['id']}".encode()).digest())
    if limit is None:
        return pairs
    kept: Counter = Counter()
    quota = {(split, user): max(1, round(limit * share / len(users))) for split, share in shares.items() for user in users}
    while sum(quota.values()) > max(limit, len(quota)):      # rounding up went too far: take it from the largest part
        quota[max(quota, key=quota.get)] -= 1
    chosen = []
    for pair in pairs:
        kind = pair["split"], pair["user"]
        if kept[kind] < quota[kind]:
            kept[kind] += 1
            chosen.append(pair)
    return chosen


def pseudonymise(pairs: list[Row], users: list[str], speakers: Iterable[str]) -> list[Row]:
    """The pairs with the names of all speakers replaced by roles: person-1, … for who is modelled, speaker-1, … for everybody else,
    conversation-1, … for conversations, whose names may tell who took part.

    In texts, whole names go wherever they stand, and every word of a name (of two letters or more, of a name without digits) where it
    begins with a capital, unless the same texts have it in small letters as well: 'Will you' and 'May I' stay. It hides names,
    and nothing else: what people tell of themselves stays, and so does a name of somebody who does not speak.
    """
    roles = {user: f"person-{number}" for number, user in enumerate(users, start=1)}
    for speaker in dict.fromkeys(speakers):
        roles.setdefault(speaker, f"speaker-{len(roles) - len(users) + 1}")
    texts = [text for pair in pairs for text in (pair["action"], *(turn["text"] for turn in pair["context"]))]
    small = {word for text in texts for word in re.findall(r"\b[a-z]{2,}\b", text)}
    words: dict[str, str] = {}
    named = [(name, role) for name, role in roles.items() if name not in NOBODY]          # 'missing' is no name
    for name, role in reversed(named):                       # the modelled people last, so that a shared name is theirs
        words |= {word.casefold(): role for word in re.findall(r"[^\W\d_]{2,}", name) if not re.search(r"\d", name) and word.casefold() not in small}
    for name, role in reversed(named):
        words |= {form.casefold(): role for form in (name, name.replace("_", " ")) if len(form) > 2}
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")(?!\w)", re.IGNORECASE)
    whole = {form.casefold() for name, _ in named for form in (name, name.replace("_", " "))}

    def role_of(found: re.Match) -> str:
        text = found.group()
        return words[text.casefold()] if text[0].isupper() or (text.casefold() in whole and text.casefold() not in small) else text

    hide = lambda text: pattern.sub(role_of, text)
    numbers = {name: f"conversation-{number}" for number, name in enumerate(dict.fromkeys(pair["conversation"] for pair in pairs), start=1)}
    hidden = []
    for pair in pairs:
        kind, place = pair["id"].partition("/")[0], pair["id"].rpartition("/")[2]
        hidden.append(pair | {"id": f"{kind}/{numbers[pair['conversation']]}/{place}", "user": roles[pair["user"]], "conversation": numbers[pair["conversation"]], "action": hide(pair["action"]),
                              "context": [{"speaker": roles[turn["speaker"]], "text": hide(turn["text"])} for turn in pair["context"]]}
                      | ({"setting": hide(pair["setting"])} if "setting" in pair else {}))
    return hidden


def choose_people(asked: Iterable[str], preset: Iterable[str], replies: Counter, source: str) -> list[str]:
    """The people to model: those asked for, those of the preset, or the two who reply most. Stops at a name that nobody has, with the nearest ones."""
    users = list(dict.fromkeys(asked or preset or [user for user, _ in replies.most_common(2)]))
    if unknown := next((user for user in users if user not in replies), None):
        folded = {user.casefold(): user for user in replies}
        near = [user for user in replies if unknown.casefold() in user.casefold()][:3] or [folded[name] for name in difflib.get_close_matches(unknown.casefold(), folded, 3, 0.5)]
        stop((f"--user {unknown}" if asked else f"{unknown}, of the --domain, for whom --user may name somebody else") + f": nobody of that name replies in {source}; " + (f"near it are {', '.join(near)}; " if near else "") + "see who does with --list-users")
    return users


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__, default_limit=44)
    group = parser.add_argument_group("where the conversations come from, and whose actions are modelled")
    group.add_argument("--domain", choices=tuple(DOMAINS), default=None, help="a preset of source, people, setting and cleaning; --source, --user and --setting override its parts")
    group.add_argument("--source", help="chitchat, convokit:FOLDER_ZIP_OR_NAME, markdown:FOLDER, turns:FILE or hub:NAME (default: chitchat)")
    group.add_argument("--user", action="append", metavar="ID", help="model this person (may be repeated; default: the two with most replies)")
    group.add_argument("--setting", metavar="TEXT", help=f"a sentence or two on where this is and which role {PERSON}, as prompts call the person, has in it (default: a chat between friends)")
    group.add_argument("--sha256", metavar="HEX", help="refuse a corpus file whose checksum is another")
    group.add_argument("--pseudonymise", action="store_true", help="replace the names of people by roles in all rows")
    group.add_argument("--list-users", action="store_true", help="print who is in the source and how often each replies, and stop")
    group = parser.add_argument_group("what makes a pair")
    group.add_argument("--max-context-turns", type=positive_int, default=6, help="turns before the action, at most (default: %(default)s)")
    group.add_argument("--max-context-tokens", type=positive_int, default=96, help="tokens in a context, at most, by the model's tokenizer (default: %(default)s)")
    group.add_argument("--min-action-words", type=positive_int, default=8, help="words in an action, at least; fewer give nothing to reconstruct (default: %(default)s)")
    group.add_argument("--max-action-tokens", type=positive_int, default=32, help="tokens in an action, at most (default: %(default)s)")
    group = parser.add_argument_group("splits, as shares of each person's conversations (and of the pairs under --limit)")
    group.add_argument("--val-share", type=fraction, default=0.1, help="share of validation (default: %(default)s)")
    group.add_argument("--test-share", type=fraction, default=0.55, help="share of test (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.val_share > 0 and args.test_share > 0 and args.val_share + args.test_share < 1):
        stop("--val-share and --test-share must be positive and leave something for train")

    domain = DOMAINS[args.domain] if args.domain else Domain("chitchat", (), None, ())
    if args.source is None:
        args.source = domain.source
    elif not args.domain:                                    # without a preset, what the format itself needs
        domain.clean = {"markdown": DOMAINS["podcast"].clean, "convokit": ("deleted", "stage directions")}.get(args.source.partition(":")[0], ())
    args.setting = args.setting or domain.setting
    started = time.monotonic() if args.list_users else begin_run(args.run, args.max_memory)
    source = Source(args.source, domain.clean, args.sha256)
    output = args.run / "pairs.jsonl"
    told = argparse.Namespace(**vars(args) | {"user": args.user and [hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()[:8] if args.pseudonymise else user for user in args.user]})
    record = made_with(told, files=source.files(), clean=domain.clean, people=[] if args.pseudonymise else domain.people)
    if not args.list_users and check_record(output, record, args.overwrite):
        print(f"01_prepare: {output} is already made ({len(read_pairs(output))} pairs)")
        return
    replies = count_replies(source)
    if args.list_users:
        print(f"{'replies':>8}  user")
        print("\n".join(f"{count:>8}  {user}" for user, count in replies.most_common()))
        return
    users = choose_people(args.user or [], domain.people, replies, args.source)
    conversations = [some for some in source if any(turn.speaker in users and turn.answers is not None for turn in some[2])]
    for user in users:
        if (found := len({name for name, _, turns in conversations if any(turn.speaker == user and turn.answers is not None for turn in turns)})) < 3:
            stop(f"--user {user} replies in {found} conversation{'s' * (found != 1)} of {args.source}; three are needed, one each for train, val and test")
    if repeated := len(conversations) - len({name for name, _, _ in conversations}):
        print(f"{repeated} conversations have the id of another one: those of one id stay in one split")
    if any(at is None for _, at, _ in conversations):
        print("some conversations have no time: the splits of their people are random, not by date")
    splits = split_conversations(conversations, users, args.val_share, args.test_share, args.seed)
    limits = {"turns": args.max_context_turns, "context_tokens": args.max_context_tokens, "words": args.min_action_words,
              "action_tokens": args.max_action_tokens, "source": source.kind,
              "setting": {"setting": args.setting} if args.setting else {}}
    pairs, dropped = make_pairs(conversations, users, splits, limits, load_tokenizer(args.model))
    shares = {"train": 1 - args.val_share - args.test_share, "val": args.val_share, "test": args.test_share}
    chosen = choose_pairs(pairs, users, args.limit, shares, args.seed)
    counts = Counter(pair["split"] for pair in chosen)
    if empty := [split for split in shares if not counts[split]]:
        stop(f"no pair is left for {', '.join(empty)} (of {len(pairs)}; dropped: {dict(dropped)}); give more conversations, a higher --limit or looser limits")
    if len(pairs) > len(chosen):
        dropped["beyond --limit"] = len(pairs) - len(chosen)
    named = chosen
    if args.pseudonymise:
        chosen = pseudonymise(chosen, users, [turn.speaker for _, _, turns in conversations for turn in turns])
    problems = {kind: {"first": first, "count": count} for kind, (first, count) in source.problems().items()}
    replied = dict(zip((pair["user"] for pair in chosen), (replies[pair["user"]] for pair in named)))
    parts = Counter((pair["user"], pair["split"]) for pair in chosen)
    summary = {"source": args.source, "setting": args.setting, "cleaned": dict(source.counts), "dropped": dict(dropped), "problems": problems,
               "people": {user: {"replies": count, "pairs": {split: parts[user, split] for split in shares}} for user, count in replied.items()}}
    write_text(args.run / "pairs.summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_output(output, "".join(map(dump_row, chosen)), record)
    print("people:", ", ".join(f"{user} ({found['replies']} replies)" for user, found in summary["people"].items()))
    for user, found in summary["people"].items():
        if lacking := [split for split, count in found["pairs"].items() if not count]:
            print(f"{user} has no pair in {', '.join(lacking)}: the others' pairs stand for it")
    for kind, found in problems.items():
        print(f"{found['count']} {kind} (first: {found['first']})")
    print("cleaned:", ", ".join(f"{rule} in {count} turns" for rule, count in source.counts.most_common()) or "nothing")
    print("dropped:", ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "nothing")
    print(f"01_prepare: {sum(replies[user] for user in users)} replies in, {len(chosen)} pairs out "
          f"({', '.join(f'{split} {counts[split]}' for split in shares)}), {sum(dropped.values())} skipped, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_stage(main)
