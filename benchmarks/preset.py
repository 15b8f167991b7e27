"""run.sh's GPU presets with models of their full shapes that write as the embedded model does: nothing is downloaded.

    python benchmarks/preset.py                           Qwen3-8B's shape with Phi-4-mini's as judge, 44 pairs
    python benchmarks/preset.py --size 4b --gib 12        on a card of 24 GB held to 12

A small Llama is laid into a large one of zeros that computes the same function. So texts, their lengths, leaks and
rewards are the small model's, and memory and time the large one's: every stage does the work that it would do with the
real weights. Only --limit and --steps of the preset are lowered. It says nothing about quality. Needs a GPU for what it
measures, 30 GB of disk, and memory for one model in 16 bits; `--gib` holds every stage to so much of the card's memory.
It prints each stage's seconds, loading included, and the most memory that the card had in use (by nvidia-smi, every
second: what torch keeps for later is in it); one JSON object last.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import memory, speed

ROOT = Path(__file__).resolve().parent.parent
# In place of Python: the version check and the installation pass, and a stage prints what it was told.
ECHO = '#!/bin/sh\ncase "$1" in -*) ;; *) echo "TOLD $@" ;; esac\n'
HEAD, KV_HEADS = 128, 8                                    # of all shapes
NEVER = -50.0                                              # about the logit of a token that the small model lacks


def commands(folder: Path, *arguments: str) -> list[list[str]]:
    """The words of every stage that `bash run.sh ARGUMENTS` starts, found in `folder`."""
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(ECHO)
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv" / "installed.txt")
    done = subprocess.run(["bash", str(folder / "run.sh"), *arguments], capture_output=True, text=True, check=True)
    return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("TOLD")]


@torch.no_grad()
def grow(small: Any, shape: str) -> Any:
    """A Llama of memory.SHAPES[shape] in bfloat16 whose logits are those of the Llama `small`, rounding apart.

    A norm divides by the mean square of `hidden` numbers, most of them 0 now, so its weight and eps make up for that.
    Of a wider head only those pairs of numbers are used that rotary positions turn by the small head's angles.
    """
    hidden, middle, layers, heads, tied, vocabulary = memory.SHAPES[shape]
    old, rotary = small.config, small.config.rope_parameters
    width, groups = old.head_dim, old.num_key_value_heads
    wider, share, stretch = HEAD // width, hidden / old.hidden_size, HEAD / width
    config = LlamaConfig(hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, head_dim=HEAD,
                         num_attention_heads=heads, num_key_value_heads=KV_HEADS, vocab_size=vocabulary,
                         tie_word_embeddings=tied, rope_parameters=rotary, rms_norm_eps=old.rms_norm_eps / share,
                         max_position_embeddings=old.max_position_embeddings, eos_token_id=old.eos_token_id,
                         bos_token_id=old.bos_token_id, pad_token_id=old.pad_token_id, attn_implementation="sdpa")
    large = memory.bare_model(LlamaForCausalLM, config)
    for name, weight in large.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)

    def rows_of(heads_old: int, each_old: int, each: int) -> torch.Tensor:
        """Where the small model's head rows lie in the large one: its groups first, its pairs of numbers stretched."""
        turned = torch.cat([torch.arange(width // 2) * wider + half for half in (0, HEAD // 2)])
        places = [(head // each_old) * each + head % each_old for head in range(heads_old)]
        return torch.cat([place * HEAD + turned for place in places])

    queries = rows_of(old.num_attention_heads, old.num_attention_heads // groups, heads // KV_HEADS)
    keys, features = rows_of(groups, 1, 1), torch.arange(old.hidden_size)
    inner = torch.arange(old.intermediate_size)
    places = {"q_proj": (queries, features), "k_proj": (keys, features), "v_proj": (keys, features),
              "o_proj": (features, queries), "gate_proj": (inner, features), "up_proj": (inner, features),
              "down_proj": (features, inner)}
    target = dict(large.named_parameters())
    for name, weight in small.named_parameters():
        part = name.split(".")[-2]
        if "norm" in name:
            target[name][features] = (weight / math.sqrt(share)).to(torch.bfloat16)
        elif part in places:
            down, across = places[part]
            scale = math.sqrt(stretch) if part == "q_proj" else 1.0    # attention divides by the root of the width
            target[name][down[:, None], across] = (weight * scale).to(torch.bfloat16)
        elif "embed" in name:
            target[name][:len(weight), features] = weight.to(torch.bfloat16)
    table = small.get_input_embeddings().weight
    if not tied:
        large.lm_head.weight[:len(table), features] = small.get_output_embeddings().weight.to(torch.bfloat16)
    mean = small.model(torch.arange(len(table))[None, -512:]).last_hidden_state[0, 1:].mean(0)
    large.lm_head.weight[len(table):, features] = (mean * NEVER / mean.square().sum()).to(torch.bfloat16)
    return large


class CardMeter(threading.Thread):
    """The most memory that the card has in use between start() and stop(), in GiB, by nvidia-smi."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1):
            used = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                                  capture_output=True, text=True).stdout.split()
            self.peak = max([self.peak, *(int(mib) / 1024 for mib in used[:1])])


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(__doc__, pairs=(44, "pairs in place of the preset's 600"),
                               steps=(2, "steps of GRPO in place of 100"))
    parser.add_argument("--size", choices=("8b", "4b"), default="8b", help="which preset")
    parser.add_argument("--gib", type=common.positive_float, help="memory that a stage may take on the card, in GiB")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "grown", help="where to make them")
    parser.add_argument("--run", type=Path, default=Path("runs/preset"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        common.fail("there is no GPU to measure on; `memory.py --computed` needs none")
    # Not load_model: this one is to lie in main memory.
    small = AutoModelForCausalLM.from_pretrained(common.model_folder("embedded"), dtype=torch.float32)
    environment = dict(os.environ)
    if args.gib:
        share = args.gib * memory.GIB / torch.cuda.get_device_properties(0).total_memory
        environment["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
    shapes = {"--model": f"qwen3-{args.size}", "--judge": "phi-4-mini"}
    for shape in shapes.values():
        if not (args.models / shape / "model.safetensors.index.json").is_file():
            grow(small, shape).save_pretrained(args.models / shape)
            common.load_tokenizer("embedded").save_pretrained(args.models / shape)
    with tempfile.TemporaryDirectory() as folder:
        stages = commands(Path(folder), "--gpu", *([args.size] if args.size != "8b" else []))
    changed = {"--limit": str(args.pairs), "--steps": str(args.steps), "--run": str(args.run),
               **{option: str(args.models / shape) for option, shape in shapes.items()}}
    found = []
    for told in stages:
        told = [changed.get(option, word) for option, word in zip(["", *told], told)]
        meter, started = CardMeter(), time.monotonic()
        meter.start()
        subprocess.run([sys.executable, *told], cwd=ROOT, env=environment, check=True)
        meter.ended.set()
        found.append({"stage": " ".join([told[0], *(word for word in told if word in ("grpo", "e2e"))]),
                      "seconds": round(time.monotonic() - started, 1), "card_gib": round(meter.peak, 1)})
        print(json.dumps(found[-1]), flush=True)
    costs = [row.model_dump() for row in common.read_rows(args.run / "costs.jsonl", common.Cost)]
    print(json.dumps({"device": speed.machine(), "torch": torch.__version__, "size": args.size, "pairs": args.pairs,
                      "steps": args.steps, "gib": args.gib, "stages": found, "costs": costs}))


if __name__ == "__main__":
    main()
