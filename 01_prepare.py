"""Stage 1: turn conversations into (context, action) pairs of real people.

An action is one turn of the modelled person. Its context is the turns before it, or in a thread the chain of ancestors.

    in     a source of conversations (--source), or a preset of source, people and setting (--domain)
    out    RUN/pairs.jsonl              see common.Pair
           RUN/pairs.summary.json       people, and what was cleaned, dropped and found wrong, with counts

How to run it (each source into a --run of its own):

    python 01_prepare.py                                      the embedded chats, their two busiest people
    python 01_prepare.py --list-users                         who is in the source, with counts
    python 01_prepare.py --domain supreme                     a preset; its corpus is downloaded once
    python 01_prepare.py --source convokit:FOLDER             a ConvoKit corpus: a folder, a zip or a name
    python 01_prepare.py --source markdown:FOLDER             transcripts whose turns open with **Name:**
    python 01_prepare.py --source turns:FILE --user ann       your own data, see TurnLine
    python 01_prepare.py --source hub:NAME                    a `datasets` data set with a column of messages

Departures from the paper: its people and domains are not public; the domains here are of the same kind. The limits and
the splits are ours: whole conversations go to one split, a person's later ones to test, as a deployed model meets them.
"""

import difflib
import hashlib
import html
import io
import json
import os
import random
import re
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pooch
from pydantic import AliasChoices, Field, ValidationError
from tqdm import tqdm

import common
from common import PERSON, Pair, Row, Text, fail

@dataclass(slots=True)
class Turn:
    speaker: str
    text: str
    parent: int | None = None                              # place of the turn that it answers, which stands before it

class Conversation(NamedTuple):                            # what a reader yields
    id: str
    time: str | None                                       # sorts; if any is None, splits are random
    turns: list[Turn]
    problems: Sequence[tuple[str, str]] = ()               # (what is wrong, where), reported and not fatal

def in_order(said: Iterable[tuple[str, str]]) -> list[Turn]:
    """Turns from (speaker, text), each of which answers the one before."""
    return [Turn(speaker, text, place - 1 if place else None) for place, (speaker, text) in enumerate(said)]

# ----------------------------------------------------------------------------------------------------------------------
# Readers: each is a generator of conversations. A new domain is one more reader, a line in SOURCES and one in DOMAINS.

class TurnLine(Row):
    """A line of --source turns:FILE. The turns of a conversation stand in order."""
    conversation: Text
    speaker: Text
    text: str
    time: Annotated[float, Field(gt=-1e15, lt=1e15)] | str | None = None      # the first turn's counts

class Utterance(Row):
    """A line of a ConvoKit corpus' utterances.jsonl. Older corpora name some keys otherwise."""
    id: str
    speaker: str = Field(validation_alias=AliasChoices("speaker", "user"))
    conversation: Text = Field(validation_alias=AliasChoices("conversation_id", "root"))
    reply_to: str | None = Field(None, validation_alias=AliasChoices("reply_to", "reply-to"))
    text: str | None
    timestamp: Any = None

def read_chitchat(_: str) -> Iterator[Conversation]:
    """Chats of two people with at least ten turns; a turn is a list of messages sent in a row."""
    path = common.package_folder("chitchat_dataset") / "dataset.json"
    for name, chat in json.loads(path.read_text(encoding="utf-8")).items():
        said = [(turn[0]["sender"], " ".join(message["text"] for message in turn)) for turn in chat["messages"] if turn]
        if len(said) >= 10 and len({speaker for speaker, _ in said}) == 2:
            yield Conversation(name, chat["start"], in_order(said))

def read_turns(path: str) -> Iterator[Conversation]:
    conversations: dict[str, list[TurnLine]] = defaultdict(list)
    for row in common.read_rows(Path(path), TurnLine):
        conversations[row.conversation].append(row)
    for name, rows in conversations.items():
        time = f"{rows[0].time + 1e15:024.6f}" if isinstance(rows[0].time, float) else rows[0].time  # sorts as dates do
        yield Conversation(name, time, in_order((row.speaker, row.text) for row in rows))

def read_hub(name: str) -> Iterator[Conversation]:
    """A data set on the hub or in a local folder, whose rows hold a list of turns."""
    import datasets                                        # here: a second that other sources need not pay

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as problem:                           # of many kinds: no network, no such name, no such split
        for path in sorted(Path(name).rglob("*.jsonl")):   # the library does not say which line it could not read
            common.read_rows(path, Row)
        fail(f"cannot load --source hub:{name}: {common.first_line(problem.__cause__ or problem)}")
    column = next((key for key in ("conversations", "turns") if key in rows.column_names), "messages")
    find = lambda turn, *keys: next((turn[key] for key in keys if turn.get(key) is not None), "")
    for number, row in enumerate(rows):
        try:
            said = [(find(turn, "speaker", "role", "from"), find(turn, "text", "content", "value"))
                    for turn in row[column]]
        except (LookupError, TypeError, AttributeError):   # no such column, no list, a turn that is no object
            said = [(None, None)]
        if not all(isinstance(speaker, str | int) and isinstance(text, str) for speaker, text in said):
            fail(f"--source hub:{name}, row {number}: {column} must hold turns like {{role, content}}, both texts")
        key = str(row.get("id") or "").strip() or str(number)
        yield Conversation(key, None, in_order((str(speaker), text) for speaker, text in said))

def read_markdown(folder: str) -> Iterator[Conversation]:
    """Each .md file of a folder, in the order of their names; a turn opens with **Name:** at the start of a line."""
    by_number = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
    for place, path in enumerate(sorted(Path(folder).rglob("*.md"), key=by_number)):
        try:
            text = path.read_text(encoding="utf-8-sig")    # a byte-order mark would hide the first turn's opening
        except UnicodeDecodeError as problem:
            line = problem.object[:problem.start].count(b"\n") + 1
            fail(f"{path}, line {line}: not UTF-8 text ({problem.reason}); convert the file")
        _, *parts = re.split(r"(?m)^\*\*([^*\n]{0,80}?):\*\*[ \t]*", text)     # 'Break' marks advertisements
        said = [(name.strip(), text) for name, text in zip(parts[::2], parts[1::2]) if name.strip() != "Break"]
        yield Conversation(path.relative_to(folder).with_suffix("").as_posix(), f"{place:08}", in_order(said))

def corpus_file(place: str) -> Path:
    """utterances.jsonl of a corpus folder, or a zip; that of a corpus on ConvoKit's server is downloaded once."""
    path = Path(place, "utterances.jsonl") if Path(place).is_dir() else Path(place)
    if path.exists():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(path)):
        fail(f"{path} does not exist; name a folder with utterances.jsonl, a zip, or a corpus like supreme-2019")
    base = os.environ.get("CONVOKIT_BASE_URL", "https://zissou.infosci.cornell.edu/convokit/datasets").rstrip("/")
    address = f"{base}/{re.sub('^supreme-[0-9]{4}$', 'supreme-corpus', place)}/{place}.zip"    # years share a folder
    pooch.get_logger().setLevel("WARNING")
    try:                                                   # the file gets its name when it is whole
        return Path(pooch.retrieve(address, None, f"{place}.zip", common.CACHE / "convokit", progressbar=True))
    except (OSError, ValueError) as problem:
        fail(f"cannot download {address} ({common.first_line(problem)}); start again, or pass --source convokit:FILE")

def corpus_lines(path: Path) -> Iterator[bytes]:
    """The lines of a corpus' utterances.jsonl; out of a zip they are streamed, and nothing is unpacked."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from file
        return
    try:
        with zipfile.ZipFile(path) as archive:
            name, = (name for name in archive.namelist() if re.fullmatch("(?!__MACOSX)(.*/)?utterances.jsonl", name))
            yield from io.BufferedReader(archive.open(name), 1 << 20)
    except Exception as problem:                           # a broken zip raises a dozen kinds of them
        fail(f"{path} is no whole zip with one utterances.jsonl in it ({common.first_line(problem)}); fetch it again")

def read_convokit(place: str) -> Iterator[Conversation]:
    """The threads of a corpus. Their time is that of the first utterance, if it can be seconds since 1970."""
    threads: dict[str, dict[str, tuple]] = defaultdict(dict)                  # (speaker, text, reply_to, line) by id
    times: dict[str, float] = {}
    problems: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for number, line in enumerate(tqdm(corpus_lines(Path(place)), "reading utterances", disable=None), start=1):
        try:
            row = Utterance.model_validate(common.parse_line(place, number, line))
        except ValidationError as problem:
            first = problem.errors()[0]
            fail(f"{place}, line {number}: {' '.join(first['loc']) or 'the row'}: {first['msg']}; an utterance of "
                 "ConvoKit's format has id, speaker, conversation_id, reply_to and text")
        name, thread = row.conversation, threads[row.conversation]
        if row.id in thread:
            problems[name].append(("ids that stand there twice; the first is kept", f"line {number}"))
            continue
        thread[row.id] = (sys.intern(row.speaker), row.text or "", row.reply_to, number)
        time = float(row.timestamp) if re.fullmatch(r"\d{1,15}(\.\d*)?", str(row.timestamp)) else 0.0
        times[name] = min(time, times.get(name, time))
    for name in list(threads):
        turns = arrange_thread(threads.pop(name), problems[name])
        yield Conversation(name, f"{times[name]:020.6f}" if times[name] > 1e8 else None, turns, problems.pop(name))

def arrange_thread(rows: dict[str, tuple], problems: list[tuple[str, str]]) -> list[Turn]:
    """The turns of a thread, each behind the one it answers, else in the order of the file."""
    places, turns = {}, []
    for key in rows:
        chain: dict[str, None] = {}
        while key in rows and key not in places and key not in chain:         # the last: answers may run in a circle
            chain[key] = None
            key = rows[key][2]
        for above in reversed(chain):
            places[above] = len(places)
    for place, (speaker, text, reply_to, line) in enumerate(rows[key] for key in places):
        parent = places.get(reply_to, place)
        if reply_to is not None and parent >= place:       # missing, in another thread, or in a circle
            problems.append(("answers to nothing in their thread; they begin a chain", f"line {line}"))
        turns.append(Turn(speaker, text, parent if parent < place else None))
    return turns

SOURCES: dict[str, Callable[[str], Iterator[Conversation]]] = {"chitchat": read_chitchat, "convokit": read_convokit,
    "markdown": read_markdown, "turns": read_turns, "hub": read_hub}

# ----------------------------------------------------------------------------------------------------------------------
# Domains: where the conversations come from, who is modelled, and what the prompts say of the setting

@dataclass
class Domain:
    source: str
    people: Sequence[str] = ()                             # none: the two with most replies
    setting: str | None = None                             # place and role, which prompts then begin with
    clean: Sequence[str] = ()                              # rules of CLEANING

DOMAINS = {
    "chat": Domain("chitchat", ("31267496-e50f-4f91-a197-c5b1bfde803b", "549cc1d1-270e-4a53-b561-133a8d0086b4")),
    "supreme": Domain("convokit:supreme-2019", ("j__neil_gorsuch", "j__john_g_roberts_jr"), clean=("stage directions",),
        setting=f"A hearing at the Supreme Court of the United States. {PERSON} is one of the justices."),
    "debate": Domain("convokit:winning-args-corpus", (),   # for iq2-corpus, which is spoken, pass --setting as well
        f"An online debate in which people try to change each other's view. {PERSON} is one of the debaters.",
        ("deleted", "quoted lines", "links", "emphasis", "entities")),
    "podcast": Domain("markdown:transcripts/practicalai", ("Daniel Whitenack", "Chris Benson"),
        f"A podcast about machine learning. {PERSON} is one of its hosts.", ("links", "stage directions", "emphasis")),
}
NO_DOMAIN = {"markdown": DOMAINS["podcast"].clean, "convokit": ("deleted", "stage directions")}       # rules by format

# ----------------------------------------------------------------------------------------------------------------------
# Cleaning: a rule takes a text and returns it without what it removes. "deleted" is a rule of tidy.

# Escaped brackets are a transcriber's, whatever they hold: \[laughter\]. Others hold people's words too, so there it
# must be a sound, a break or a time: [08:10], (Laughter.), but not [t]he, [the Court], [1] or (Recess Appointments).
SOUND = (r"(?:\w{1,20} )?(?:laughs|laughing|laughter|chuckles|applause|cheers|inaudible|unintelligible|indiscernible|"
         r"cross-?talk)(?:(?: and|,) \w{1,20})?|pause|recess|no response")
TIME = r"(?:\d\d:\d\d(?::\d\d)?|\d:\d\d:\d\d)(?:\.\d+)?"   # not a verse, 5:17, or a ratio, 3:10
DIRECTION = re.compile(
    rf"\\\[[^\[\]\n]{{0,60}}\\\]|(?<!\w)\[(?i:{SOUND}|music|silence|(?={TIME}))\.?(?: ?{TIME})?\](?![\w(])"
    rf"|(?<!\w)\((?=[A-Z])(?i:{SOUND})\.?(?: {TIME})?\)")
LINK = re.compile(r"\[([^\[\]\n]{0,300})\]\((?:[^()\n]|\([^()\n]{0,300}\)){0,2000}\)")
EMPHASIS = re.compile(r"(?<![\w*_`])(\*{1,3}|_{1,3}|`|~~)(?=\S)([^*_`~\n]+?)(?<=\S)\1(?![\w*_`])")

CLEANING: dict[str, Callable[[str], str]] = {
    "stage directions": lambda text: DIRECTION.sub(" ", text) if "[" in text or "(" in text else text,     # it is slow
    "quoted lines": lambda text: re.sub(r"(?m)^[^\S\n]*(?:>|&gt;).*$", " ", text),
    "links": lambda text: re.sub(r"https?://\S+", " ", LINK.sub(r"\1", text)),
    "emphasis": lambda text: EMPHASIS.sub(r"\2", text),
    "entities": html.unescape,
}
DELETED = ("[deleted]", "[removed]")
MISSING = "[missing]"                                      # who speaks without a name
# Names that many or no people share: closed accounts, bots, voices that a transcript could not tell. Never modelled.
NOBODY = (*DELETED, MISSING, "DeltaBot", "AutoModerator", "<INAUDIBLE>")

def tidy(turns: Sequence[Turn], rules: Sequence[str], counts: Counter) -> list[Turn]:
    """Turns with clean text on one line; empty ones are left out, and turns of one speaker in a row become one.

    What answered an empty turn answers what that one answered. A reply is joined to a turn of the same speaker only if
    nothing else answers that turn. What answers a deleted turn begins a chain: what it answers is not known.
    """
    kept: list[Turn] = []
    moved: list[int | None] = []                           # where in `kept` each turn is, or what it answered if empty
    single: list[bool] = []                                # does an answer to this turn stand alone under `moved`?
    replies = Counter(turn.parent for turn in turns)
    for turn in turns:
        speaker, text = turn.speaker, turn.text
        if not speaker.strip():
            counts["a speaker without a name"] += 1
            speaker = MISSING
        parent = None if turn.parent is None else moved[turn.parent]
        alone = turn.parent is None or (replies[turn.parent] == 1 and single[turn.parent])
        if "deleted" in rules and text.strip() in DELETED:
            counts["deleted"] += 1
            text, parent, alone = "", None, True
        for rule in rules:
            if rule in CLEANING and (cleaned := CLEANING[rule](text)) != text:
                counts[rule] += 1
                text = cleaned
        text = " ".join(text.split())
        single.append(bool(text) or alone)
        moved.append(parent)
        if alone and parent is not None and kept[parent].speaker == speaker and speaker not in NOBODY:
            kept[parent].text += f" {text}" if text else ""
        elif text:
            moved[-1] = len(kept)
            kept.append(Turn(speaker, text, parent))
    return kept

class Source:
    """The tidied conversations of --source. It is walked twice, to count replies and to keep what is needed."""

    def __init__(self, name: str, rules: Sequence[str] = (), sha256: str | None = None):
        self.kind, _, self.place = name.partition(":")
        if self.kind not in SOURCES or (self.kind != "chitchat" and not self.place):
            fail(f"--source {name}: choose from {', '.join(SOURCES)}, and say which, as in turns:FILE")
        if self.kind == "convokit":
            self.place = str(corpus_file(self.place))
        self.rules = rules
        if sha256 and sha256.lower() not in (found := self.hashes().values()):
            fail(f"{self.place} has the sha256 {', '.join(found)}, not {sha256}: another version or damaged; remove it")

    def __iter__(self) -> Iterator[Conversation]:
        self.cleaned, self.problems = Counter(), {}
        for name, time, turns, problems in SOURCES[self.kind](self.place):
            for kind, where in problems:
                self.problems.setdefault(kind, {"count": 0, "first": f"{self.place}, {where}"})["count"] += 1
            if kept := tidy(turns, self.rules, self.cleaned):
                yield Conversation(name, time, kept)

    def hashes(self) -> dict[str, str]:
        """Of every file that is read, so that a changed source is noticed; none of a package or a name on the hub."""
        path = Path(self.place)
        files = path.rglob("*.md" if self.kind == "markdown" else "*") if self.place and path.is_dir() else [path]
        return {str(file): common.file_hash(file) for file in files if file.is_file()}

# ----------------------------------------------------------------------------------------------------------------------
# From conversations to pairs

def count_replies(source: Source) -> Counter:
    """How often each speaker who is somebody answers somebody else."""
    replies: Counter = Counter()
    for _, _, turns, _ in source:
        replies.update(turn.speaker for turn in turns if turn.speaker not in NOBODY and turn.parent is not None
                       and turns[turn.parent].speaker != turn.speaker)
    if not replies:
        fail(f"--source {source.kind}:{source.place} holds no conversations in which somebody replies; check it")
    return replies

def choose_people(asked: Iterable[str], replies: Counter) -> list[str]:
    """Those asked for, or the two who reply most. Fails at a name that nobody has, with the nearest ones."""
    users = list(dict.fromkeys(asked)) or [user for user, _ in replies.most_common(2)]
    for user in users:
        if user not in replies:
            near = ", ".join(difflib.get_close_matches(user, replies, 3, 0.4)) or "nobody"
            fail(f"--user {user}: nobody of that name replies here; near it is {near}; see who does with --list-users")
    return users

def repliers(conversation: Conversation) -> set[str]:
    return {turn.speaker for turn in conversation.turns if turn.parent is not None}

def split_conversations(conversations: Sequence[Conversation], users: Sequence[str], args) -> dict[str, str]:
    """Give each conversation, by id, to train, val or test, a person at a time: the person's last ones to test.

    They are ordered by time, or by a seeded shuffle if any has none. One that an earlier person gave a place stays
    there and counts in the order: else later conversations could be learnt from while earlier ones are the test.
    """
    splits: dict[str, str] = {}
    for user in users:
        times = {one.id: one.time for one in conversations if user in repliers(one)}
        if (count := len(times)) < 3:
            fail(f"--user {user} replies in {count} conversations; three are needed, one for each split")
        mine = [(time, name) for name, time in times.items()]
        random.Random(args.seed).shuffle(mine)
        if None in times.values():
            print(f"{user}: conversations without a time are split at random, not by date")
        else:
            mine.sort()
        first_test = min(max(round(count * (1 - args.test_share)), 2), count - 1)
        first_val = min(max(round(count * (1 - args.test_share - args.val_share)), 1), first_test - 1)
        for place, (_, name) in enumerate(mine):
            splits.setdefault(name, "train" if place < first_val else "val" if place < first_test else "test")
    return splits

def find_replies(conversations: Sequence[Conversation], users: Sequence[str], source: str, min_words: int
                 ) -> tuple[list[tuple[str, Conversation, int]], Counter]:
    """(id, conversation, place) of what may become an action, as far as shows without a tokenizer; other counts."""
    replies, dropped, seen, parts = [], Counter(), set(), Counter()
    for one in conversations:
        parts[one.id] += 1
        again = f"{parts[one.id]}." if parts[one.id] > 1 else ""              # conversations may share an id
        for place, turn in enumerate(one.turns):
            if turn.speaker not in users or turn.parent is None:
                continue
            before = one.turns[turn.parent]
            key = (turn.speaker, before.text.casefold(), turn.text.casefold())
            if before.speaker == turn.speaker:
                dropped["answers the same person"] += 1
            elif len(turn.text.split()) < min_words:
                dropped["action too short"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                replies.append((f"{source}/{one.id}/{again}{place}", one, place))
    return replies, dropped

def pair_quotas(limit: int, shares: dict[str, float], users: Sequence[str]) -> dict[tuple[str, str], int]:
    """How many pairs to take of each (split, user): by `shares`, evenly over `users`, one at least."""
    kinds = [(split, user) for split in shares for user in users]
    quotas = {kind: max(1, round(limit * shares[kind[0]] / len(users))) for kind in kinds}
    while sum(quotas.values()) > max(limit, len(quotas)):  # rounding up went too far: take it from the largest
        quotas[max(quotas, key=quotas.get)] -= 1
    return quotas

def choose_pairs(replies: Sequence[tuple[str, Conversation, int]], splits: dict[str, str],
                 quotas: dict[tuple[str, str], int], tokenizer: Any, args, dropped: Counter) -> list[Pair]:
    """Pairs of `replies` in a random order that the seed fixes, until every quota is full.

    So many conversations take part, and a later stage's --limit takes a fair sample. Tokenising is slow: it ends where
    a quota is full, so `dropped` counts as too long only what was looked at. A context is cut at whole turns.
    """
    chosen, room = [], dict(quotas)
    length = lambda text: len(common.encode_data(tokenizer, text))
    order = lambda reply: hashlib.sha256(f"{args.seed}/{reply[0]}".encode()).digest()
    for name, one, place in tqdm(sorted(replies, key=order), "choosing pairs", disable=None):
        turn, split = one.turns[place], splits[one.id]
        if not room[split, turn.speaker]:
            dropped["not looked at, as --limit was met"] += 1
            continue
        chain, above = [], turn.parent
        while above is not None:                           # the ancestors, never their other replies
            chain.append(one.turns[above])
            above = one.turns[above].parent
        context = [common.Turn(speaker=each.speaker, text=each.text) for each in chain[:args.max_context_turns][::-1]]
        pair = Pair(id=name, user=turn.speaker, conversation=one.id, split=split, context=context, action=turn.text,
                    setting=args.setting)
        long = length(pair.action) > args.max_action_tokens
        while not long and pair.context and length(common.format_scene(pair)) > args.max_context_tokens:
            pair.context.pop(0)
        if long or not pair.context:
            dropped["action too long" if long else "last turn before the action too long"] += 1
            continue
        pair.cut = len(chain) - len(pair.context)
        room[split, turn.speaker] -= 1
        chosen.append(pair)
    return chosen

def pseudonymise(pairs: Sequence[Pair], users: Sequence[str], speakers: Iterable[str]) -> list[Pair]:
    """The pairs with roles for names: person-1, … for who is modelled, speaker-1, … for others, conversation-1, ….

    In texts, whole names go, and each word of a name (two letters or more, no digits in the name) where it begins with
    a capital, unless the texts have it in small letters as well: 'Will you' stays. It hides speakers' names alone.
    """
    roles = {user: f"person-{number}" for number, user in enumerate(users, start=1)}
    for speaker in dict.fromkeys(speakers):
        roles.setdefault(speaker, f"speaker-{len(roles) - len(users) + 1}")
    texts = (text for pair in pairs for text in (pair.action, *(turn.text for turn in pair.context)))
    small = {word for text in texts for word in re.findall(r"\b[a-z]{2,}\b", text)}
    # The modelled people last, so that a name they share is theirs; 'missing' is no name.
    named = [(name, role) for name, role in reversed(roles.items()) if name not in NOBODY]
    whole = {form.casefold(): role for name, role in named for form in (name, name.replace("_", " "))}
    words = {word.casefold(): role for name, role in named if not re.search(r"\d", name)
             for word in re.findall(r"[^\W\d_]{2,}", name) if word.casefold() not in small}
    words |= {form: role for form, role in whole.items() if len(form) > 2}
    longest_first = "|".join(sorted(map(re.escape, words), key=len, reverse=True)) or "(?!)"
    pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)", re.IGNORECASE)
    def role_of(found: re.Match) -> str:
        text, key = found.group(), found.group().casefold()
        return words[key] if text[0].isupper() or (key in whole and key not in small) else text
    hide = lambda text: pattern.sub(role_of, text)
    names = {name: f"conversation-{n}" for n, name in enumerate(dict.fromkeys(pair.conversation for pair in pairs), 1)}
    return [Pair(
        id=pair.id.replace(f"/{pair.conversation}/", f"/{names[pair.conversation]}/"), user=roles[pair.user],
        conversation=names[pair.conversation], split=pair.split, action=hide(pair.action), cut=pair.cut,
        context=[common.Turn(speaker=roles[turn.speaker], text=hide(turn.text)) for turn in pair.context],
        setting=pair.setting and PERSON.join(map(hide, pair.setting.split(PERSON)))) for pair in pairs]

# ----------------------------------------------------------------------------------------------------------------------
# The stage

def parse_args(argv: list[str] | None):
    parser = common.stage_arguments(__doc__, default_limit=44)
    add = parser.add_argument_group("where the conversations come from, and whose actions are modelled").add_argument
    add("--domain", choices=tuple(DOMAINS), help="a preset, of which --source, --user and --setting override parts")
    add("--source", help="chitchat, convokit:FOLDER_ZIP_OR_NAME, markdown:FOLDER, turns:FILE or hub:NAME")
    add("--user", action="append", metavar="ID", help="model this person; may be repeated (unset: the two busiest)")
    add("--setting", metavar="TEXT", help=f"a sentence on the place, one on {PERSON}'s role (unset: none)")
    add("--sha256", metavar="HEX", help="refuse a source file whose checksum is another")
    add("--pseudonymise", action="store_true", help="replace the names of people by roles in all rows")
    add("--list-users", action="store_true", help="print who is in the source and how often each replies, and end")
    add = parser.add_argument_group("what makes a pair").add_argument
    number = {"type": common.positive_int, "metavar": "N"}
    add("--max-context-turns", default=6, help="turns before the action, at most", **number)
    add("--max-context-tokens", default=80, help="tokens in a context, at most", **number)
    add("--min-action-words", default=common.LEXICON["min_action_words"], help="words in an action, at least", **number)
    add("--max-action-tokens", default=32, help="tokens in an action, at most", **number)
    add = parser.add_argument_group("splits, as shares of a person's conversations, and of --limit").add_argument
    add("--val-share", type=common.fraction, default=0.05, help="for validation")
    add("--test-share", type=common.fraction, default=0.72, help="for test")
    args = parser.parse_args(argv)
    if args.show_prompt:
        fail("stage 1 asks no model; --show-prompt is for the stages behind it")
    if not (args.val_share > 0 and args.test_share > 0 and args.val_share + args.test_share < 1):
        fail("--val-share and --test-share must be positive and leave something for train")
    domain = DOMAINS[args.domain] if args.domain else Domain(args.source or "chitchat")
    args.source, args.setting = args.source or domain.source, args.setting or domain.setting
    args.user = args.user or list(domain.people)
    args.clean = domain.clean if args.domain else NO_DOMAIN.get(args.source.partition(":")[0], ())
    return args

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list_users:
        replies = count_replies(Source(args.source, args.clean, args.sha256))
        return print("\n".join(f"{count:>8}  {user}" for user, count in [("user", "replies"), *replies.most_common()]))
    started = common.open_run(args)
    source, output = Source(args.source, args.clean, args.sha256), args.run / "pairs.jsonl"
    following, asked = "python 02_sample_candidates.py", args.user
    args.user = list(map(common.hash_of, asked)) if args.pseudonymise else asked          # configs hold no names either
    config = common.run_config(args, ignore=["four_bit", "dtype"]) | {"inputs": source.hashes()}
    if common.is_made(output, config, args.overwrite):
        print(f"{output} is already made")
        return common.print_next(args, following)
    replies = count_replies(source)
    users = choose_people(asked, replies)
    conversations = [one for one in source if repliers(one) & set(users)]
    splits = split_conversations(conversations, users, args)
    shares = {"train": 1 - args.val_share - args.test_share, "val": args.val_share, "test": args.test_share}
    found, dropped = find_replies(conversations, users, source.kind, args.min_action_words)
    quotas = pair_quotas(args.limit or 10**9, shares, users)
    pairs = choose_pairs(found, splits, quotas, common.load_tokenizer(args.model), args, dropped)
    if empty := set(shares) - {pair.split for pair in pairs}:
        fail(f"no pair is left for {', '.join(empty)} ({dict(dropped)}); give more conversations or looser limits")
    if args.pseudonymise:
        pairs = pseudonymise(pairs, users, (turn.speaker for one in conversations for turn in one.turns))
    counts = sorted(Counter(f"{pair.user} {pair.split}" for pair in pairs).items())
    summary = {"pairs": dict(counts), "problems": source.problems, "cleaned": source.cleaned, "dropped": dropped}
    common.write_file(args.run / "pairs.summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    common.write_file(output, "".join(map(common.dump_row, pairs)), config)
    for what, rows in summary.items():
        print(f"{what}:", "; ".join(f"{name} {count}" for name, count in rows.items()) or "none")
    common.end_stage(args, "01_prepare", sum(replies[user] for user in users), len(pairs), 0, started, 0, following)

if __name__ == "__main__":
    common.run_stage(main)
