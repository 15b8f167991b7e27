"""Stage 1: turn conversations into (context, action) pairs of real people.

An action is one turn of the modelled person, its context the turns before it in the same conversation.

    in     a source of conversations (--source)
    out    RUN/pairs.jsonl      id, user, conversation, split, context [{speaker, text}], action

How to run it:

    python 01_prepare.py                                     the embedded chat corpus, its two busiest people
    python 01_prepare.py --list-users                        who is in the source, with counts
    python 01_prepare.py --source turns:my.jsonl --user ann  your own data: rows {conversation, speaker, text, time?}
    python 01_prepare.py --source hub:NAME                   a `datasets` data set with a column of messages

Departures from the paper: its eight people and four domains are not public knowledge; the embedded corpus is the
BYU chit-chat set (Myers, Etchart & Fulda 2020), MIT licence. The limits and the splits are ours: whole conversations
go to one split, and a person's later conversations to test, as a model that is deployed meets them.
"""

import hashlib
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from common import (Row, begin_run, check_record, cut_context, dump_row, encode_data, fraction, load_tokenizer, made_with, package_folder,
                    positive_int, progress, read_pairs, read_rows, stage_arguments, stop, write_output)

Conversation = tuple[str, str | None, list[tuple[str, str]]]  # (id, time that sorts or None, [(speaker, text), …])

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
        name, at = row["conversation"], row.get("time")
        # A number is padded so that it sorts like a date string does.
        at = f"{at:020.6f}" if isinstance(at, int | float) else at
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
        stop(f"cannot load --source hub:{name}: {problem}")
    column = next((key for key in ("messages", "conversations", "turns") if key in rows.column_names), None)
    if column is None:
        stop(f"--source hub:{name} has columns {', '.join(rows.column_names)}; one of messages, conversations, turns is needed")
    for number, row in enumerate(rows):
        if not isinstance(row[column], list) or not all(isinstance(turn, dict) for turn in row[column]):
            stop(f"--source hub:{name}, row {number}: {column!r} must be a list of turns like {{role, content}}")
        turns = [tuple(next((str(turn[key]) for key in keys if turn.get(key) is not None), "")
                       for keys in (("speaker", "role", "from"), ("text", "content", "value"))) for turn in row[column]]
        yield str(row.get("id", number)), None, turns


SOURCES = {"chitchat": read_chitchat, "turns": read_turns, "hub": read_hub}


def read_source(source: str) -> list[Conversation]:
    """All conversations of `--source`, texts stripped, empty turns left out, turns of one speaker in a row joined."""
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        stop(f"--source {source}: unknown kind {kind!r}; choose from {', '.join(SOURCES)}")
    if kind != "chitchat" and not rest:
        stop(f"--source {source}: say which, as in {kind}:PATH_OR_NAME")
    conversations = []
    for name, at, turns in progress(SOURCES[kind](rest), "reading conversations"):
        merged: list[tuple[str, str]] = []
        for speaker, text in ((speaker, " ".join(text.split())) for speaker, text in turns):
            if text and merged and merged[-1][0] == speaker:
                merged[-1] = (speaker, f"{merged[-1][1]} {text}")
            elif text:
                merged.append((speaker, text))
        if merged:
            conversations.append((name, at, merged))
    if not conversations:
        stop(f"--source {source} holds no conversations; check that the file is not empty")
    return conversations


# ------------------------------------------------------------------------------------------------
# From conversations to pairs


def count_replies(conversations: list[Conversation]) -> Counter:
    """How often each speaker replies (a conversation's first turn answers nothing)."""
    return Counter(speaker for _, _, turns in conversations for speaker, _ in turns[1:])


def split_conversations(conversations: list[Conversation], users: list[str], val: float, test: float, seed: int) -> dict[str, str]:
    """Give each conversation of `users` to train, val or test, a person at a time.

    A person's conversations are ordered by time, or by a seeded shuffle if any has none; the last share `test` is the
    test split, the share `val` before it validation. A conversation shared by two of them stays with the first.
    """
    splits: dict[str, str] = {}
    for user in users:
        mine = [(at, name) for name, at, turns in conversations if name not in splits and any(speaker == user for speaker, _ in turns[1:])]
        random.Random(seed).shuffle(mine)
        if all(at is not None for at, _ in mine):
            mine.sort()
        first_test = round(len(mine) * (1 - test))
        first_val = round(len(mine) * (1 - test - val))
        splits |= {name: "train" if i < first_val else "val" if i < first_test else "test" for i, (_, name) in enumerate(mine)}
    return splits


def make_pairs(conversations: list[Conversation], users: list[str], splits: dict[str, str], limits: Row, tokenizer) -> tuple[list[Row], Counter]:
    """Every reply of `users` with its context, and a count of what was left out by reason.

    A context is cut at whole turns from the oldest, to `turns` turns and `context_tokens` tokens; `cut` in the row says
    how many turns are missing. An action is never cut: one that is too long is left out.
    """
    pairs, dropped, seen = [], Counter(), set()
    chosen = [conversation for conversation in conversations if conversation[0] in splits]
    for name, _, turns in progress(chosen, "making pairs"):
        for place, (speaker, text) in enumerate(turns):
            if speaker not in users or place == 0:
                continue
            key = (speaker, turns[place - 1][1].casefold(), text.casefold())
            if len(text.split()) < limits["words"]:
                dropped["action too short"] += 1
            elif len(encode_data(tokenizer, text)) > limits["action_tokens"]:
                dropped["action too long"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                context = [{"speaker": who, "text": said} for who, said in turns[max(0, place - limits["turns"]):place]]
                row = {"id": f"{limits['source']}/{name}/{place}", "user": speaker, "conversation": name,
                       "split": splits[name], "context": context, "action": text, "cut": place - len(context)}
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


def main(argv: list[str] | None = None) -> None:
    parser = stage_arguments(__doc__, default_limit=44)
    group = parser.add_argument_group("where the conversations come from, and whose actions are modelled")
    group.add_argument("--source", default="chitchat", help="chitchat, turns:FILE or hub:NAME (default: %(default)s)")
    group.add_argument("--user", action="append", metavar="ID", help="model this person (may be repeated; default: the two with most replies)")
    group.add_argument("--list-users", action="store_true", help="print who is in the source and how often each replies, and stop")
    group = parser.add_argument_group("what makes a pair")
    group.add_argument("--max-context-turns", type=positive_int, default=6, help="turns before the action (default: %(default)s)")
    group.add_argument("--max-context-tokens", type=positive_int, default=96, help="tokens of the model in a context (default: %(default)s)")
    group.add_argument("--min-action-words", type=positive_int, default=8, help="words in an action, at least; fewer give nothing to reconstruct (default: %(default)s)")
    group.add_argument("--max-action-tokens", type=positive_int, default=32, help="tokens in an action, at most (default: %(default)s)")
    group = parser.add_argument_group("splits, as shares of each person's conversations (and of the pairs under --limit)")
    group.add_argument("--val-share", type=fraction, default=0.1, help="share of validation (default: %(default)s)")
    group.add_argument("--test-share", type=fraction, default=0.55, help="share of test (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.val_share > 0 and args.test_share > 0 and args.val_share + args.test_share < 1):
        stop("--val-share and --test-share must be positive and leave something for train")

    started = time.monotonic() if args.list_users else begin_run(args.run)
    source_file = Path(args.source.partition(":")[2])
    if args.source.startswith("turns:") and not source_file.is_file():
        stop(f"{source_file} does not exist; --source turns:FILE needs a JSONL file")
    output = args.run / "pairs.jsonl"
    record = made_with(args, [source_file] if args.source.startswith("turns:") else [])
    if not args.list_users and check_record(output, record, args.overwrite):
        print(f"01_prepare: {output} is already made ({len(read_pairs(output))} pairs)")
        return
    conversations = read_source(args.source)
    replies = count_replies(conversations)
    if args.list_users:
        print(f"{'replies':>8}  user")
        print("\n".join(f"{count:>8}  {user}" for user, count in replies.most_common()))
        return
    users = list(dict.fromkeys(args.user or [user for user, _ in replies.most_common(2)]))
    if unknown := [user for user in users if user not in replies]:
        stop(f"--user {unknown[0]}: nobody of that name replies in {args.source}; see who does with --list-users")

    if any(at is None for name, at, turns in conversations):
        print("some conversations have no time: the splits of their people are random, not by date")
    splits = split_conversations(conversations, users, args.val_share, args.test_share, args.seed)
    limits = {"turns": args.max_context_turns, "context_tokens": args.max_context_tokens, "words": args.min_action_words,
              "action_tokens": args.max_action_tokens, "source": args.source.partition(":")[0]}
    pairs, dropped = make_pairs(conversations, users, splits, limits, load_tokenizer(args.model))
    shares = {"train": 1 - args.val_share - args.test_share, "val": args.val_share, "test": args.test_share}
    chosen = choose_pairs(pairs, users, args.limit, shares, args.seed)
    counts = Counter(pair["split"] for pair in chosen)
    if empty := [split for split in shares if not counts[split]]:
        stop(f"no pair is left for {', '.join(empty)} (of {len(pairs)}; dropped: {dict(dropped)}); give more conversations, a higher --limit or looser limits")
    if len(pairs) > len(chosen):
        dropped["beyond --limit"] = len(pairs) - len(chosen)

    write_output(output, "".join(map(dump_row, chosen)), record)
    print("people:", ", ".join(f"{user} ({replies[user]} replies)" for user in users))
    print("dropped:", ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "nothing")
    print(f"01_prepare: {sum(replies[user] for user in users)} replies in, {len(chosen)} pairs out "
          f"({', '.join(f'{split} {counts[split]}' for split in shares)}), {sum(dropped.values())} skipped, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
