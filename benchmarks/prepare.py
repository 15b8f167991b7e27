"""How long stage 1 takes, and how much memory, on a made-up ConvoKit corpus as large as that of the Supreme Court.

    python benchmarks/prepare.py                 1,800,000 utterances in 8,300 conversations, 0.74 GB on disk
    python benchmarks/prepare.py --zip           the same read out of a zip

Writes the corpus (not timed) under --folder, runs 01_prepare.py on it as a program, and prints one JSON object last
with seconds and the program's peak memory. Utterances have metadata, as real ones do; every fifth conversation is a
tree.
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
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGINNINGS, ENDS = "con pre tri sta mel dor ban lin gra fos".split(), "tent cise bute nd ow mant ner den ve ter".split()


def write_corpus(path: Path, utterances: int) -> None:
    numbers, words = random.Random(0), ["".join(parts) for parts in product(BEGINNINGS, ENDS)]
    size = utterances // max(3, utterances // 217)         # of a conversation
    with path.open("w", encoding="utf-8") as file:
        for number in range(utterances):
            conversation, turn = divmod(number, size)
            before = numbers.randrange(turn) if turn and conversation % 5 == 0 else turn - 1
            file.write(json.dumps({
                "id": f"{conversation}__{turn:04}", "conversation_id": f"{conversation}__0000",
                "speaker": f"advocate_{conversation % 4000}" if turn % 2 else f"j__justice_{number % 9}",
                "reply_to": f"{conversation}__{before:04}" if turn else None, "timestamp": turn * 7.5,
                "text": " ".join(numbers.choices(words, k=numbers.randint(4, 40))),
                "meta": {"case_id": f"{1955 + conversation % 65}_{conversation}", "side": None,
                         "start_times": [turn * 7.5, turn * 7.5 + 3], "speaker_type": "J" if turn % 2 else "A"},
                "vectors": []}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_800_000, help="in all (default: %(default)s)")
    parser.add_argument("--zip", action="store_true", help="pack the corpus, and read it out of the zip")
    parser.add_argument("--folder", type=Path, help="where corpus and run are written (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        corpus = Path(name) / "utterances.jsonl"
        write_corpus(corpus, args.utterances)
        size = corpus.stat().st_size
        if args.zip:
            with zipfile.ZipFile(Path(name) / "corpus.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(corpus, "corpus/utterances.jsonl")
            corpus = Path(name) / "corpus.zip"
        command = [sys.executable, ROOT / "01_prepare.py", "--run", f"{name}/run", "--source", f"convokit:{corpus}"]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(json.dumps({"machine": platform.processor() or platform.machine(), "utterances": args.utterances,
                      "bytes": size, "zip": args.zip, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    main()
