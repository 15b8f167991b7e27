"""How long stage 1 takes, and how much memory, on a made-up ConvoKit corpus of the size of the whole Supreme Court corpus.

    python benchmarks/prepare.py                 1,800,000 utterances in 8,300 conversations, 0.74 GB on disk
    python benchmarks/prepare.py --zip           the same read out of a zip

Writes the corpus (not timed) under --folder, runs 01_prepare.py on it as a program, and prints one JSON object last with
seconds and the program's peak memory. Utterances have metadata, as real ones do; every fifth conversation is a tree.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_corpus(path: Path, utterances: int, conversations: int) -> None:
    numbers = random.Random(0)
    words = [f"{a}{b}" for a in ("con", "pre", "tri", "sta", "mel", "dor", "ban", "lin", "gra", "fos") for b in ("tent", "cise", "bute", "nd", "ow", "mant", "ner", "den", "ve", "ter")]
    people = [f"j__justice_{number}" for number in range(9)] + [f"advocate_{number}" for number in range(4000)]
    size = utterances // conversations
    with path.open("w", encoding="utf-8") as file:
        for number in range(utterances):
            conversation, turn = divmod(number, size)
            here = [people[number % 9], people[9 + conversation % 4000]]
            before = numbers.randrange(turn) if turn and conversation % 5 == 0 else turn - 1
            file.write(json.dumps({
                "id": f"{conversation}__{turn:04}", "conversation_id": f"{conversation}__0000", "speaker": here[turn % 2], "reply_to": f"{conversation}__{before:04}" if turn else None,
                "timestamp": turn * 7.5, "text": " ".join(numbers.choices(words, k=numbers.randint(4, 40))),
                "meta": {"case_id": f"{1955 + conversation % 65}_{conversation}", "start_times": [turn * 7.5, turn * 7.5 + 3], "speaker_type": "J" if turn % 2 else "A", "side": None}, "vectors": []}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_800_000, help="in all (default: %(default)s)")
    parser.add_argument("--zip", action="store_true", help="pack the corpus, and read it out of the zip")
    parser.add_argument("--folder", type=Path, help="where the corpus and the run are written (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        write_corpus(corpus / "utterances.jsonl", args.utterances, max(3, args.utterances // 217))
        size = (corpus / "utterances.jsonl").stat().st_size
        if args.zip:
            with zipfile.ZipFile(corpus.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(corpus / "utterances.jsonl", "corpus/utterances.jsonl")
            corpus = corpus.with_suffix(".zip")
        started = time.monotonic()
        subprocess.run([sys.executable, str(ROOT / "01_prepare.py"), "--run", str(Path(name) / "run"), "--source", f"convokit:{corpus}"], check=True)
        seconds = time.monotonic() - started
    print(json.dumps({"machine": platform.processor() or platform.machine(), "utterances": args.utterances, "bytes": size, "zip": args.zip, "seconds": round(seconds, 1),
                      "peak_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)}))


if __name__ == "__main__":
    main()
