"""Where the time of every stage goes: the whole loop on a fresh run folder, with the functions of each stage timed.

    python benchmarks/profiling.py                              the demo: ten minutes on two cores
    python benchmarks/profiling.py --limit 24 --steps 1         some minutes, to see it work

Each stage runs unchanged in a process of its own, in which the functions below are wrapped. Seconds are exclusive: time
in a function that is called by another one counts for the inner one alone.

    imports         of modules, wherever they happen
    loading         of models, encoders and adapters
    prefill         common.generate until the first token is known; decoding is the rest of it
    scoring         log-probs of given tokens, without gradients: likelihood_scores, shared_prefix_logits, read_prefix
    forward         the same with gradients; backward is torch.autograd.backward
    encoder         common.embed
    rest            everything else: optimizer steps, files, statistics, the start of Python

Operations are counted as 2 x parameters x tokens that go through the model (the output layer: tokens whose logits are
computed), once more for a backward, which goes to the adapter alone. Attention, adapters and the encoder are left out,
padding counts. They are held against this machine's own rate in a large product of matrices (torch.mm). The file is not
called profile.py because Python has a module of that name. Prints one JSON object last.
"""

import builtins
import functools
import importlib
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECTIONS = ("imports", "loading", "prefill", "decoding", "scoring", "forward", "backward", "encoder", "rest")


class Clock:
    """Exclusive seconds and operations by section; the innermost one that is open runs."""

    def __init__(self):
        self.seconds, self.operations = defaultdict(float), defaultdict(float)
        self.open, self.last, self.synchronise = ["rest"], STARTED, lambda: None

    def charge(self) -> None:
        self.synchronise()
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def section(self, name: str):
        self.charge()
        self.open.append(name)
        try:
            yield
        finally:
            self.charge()
            self.open.pop()

    def timed(self, call: Callable, name: Callable[[], str]) -> Callable:
        @functools.wraps(call)
        def wrapped(*args, **options):
            with self.section(name()):
                return call(*args, **options)
        return wrapped

    def wrap(self, owner: Any, *names: str, section: str | Callable[[], str]) -> None:
        for name in names:
            setattr(owner, name, self.timed(getattr(owner, name), section if callable(section) else lambda: section))


def watch(clock: Clock, common: Any, torch: Any) -> None:
    """Wrap what is timed. A stage finds the wrapped functions in common when it runs."""
    if torch.cuda.is_available():
        clock.synchronise = torch.cuda.synchronize
    reading = lambda: "forward" if torch.is_grad_enabled() else "scoring"
    clock.wrap(common, "load_encoder", "load_tokenizer", "add_adapter", section="loading")
    clock.wrap(common, "likelihood_scores", section="scoring")
    clock.wrap(common, "shared_prefix_logits", "read_prefix", section=reading)
    clock.wrap(common, "embed", section="encoder")
    prefills = [0]                                         # forwards that are left until the first token
    with_gradients = [0.0]                                 # operations of the forwards that a backward goes through

    def load_model(*args, load=common.load_model, **options):
        with clock.section("loading"):
            local = load(*args, **options)
        count_operations(local.model)
        return local

    def count_operations(model: Any) -> None:
        output = model.get_output_embeddings().weight.numel()
        table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        body, forward = model.num_parameters() - output - table, model.forward

        @functools.wraps(forward)
        def counted(input_ids=None, **options):
            found = forward(input_ids, **options)
            done = 2.0 * body * input_ids.numel() + 2.0 * output * math.prod(found.logits.shape[:-1])
            clock.operations[clock.open[-1]] += done
            with_gradients[0] += done * torch.is_grad_enabled()
            if clock.open[-1] == "prefill":
                prefills[0] -= 1
                if not prefills[0]:                        # the rest of common.generate is decoding
                    clock.charge()
                    clock.open[-1] = "decoding"
            return found
        model.forward = counted

    def generate(model, tokenizer, groups, *args, call=common.generate, **options):
        prefixes = [prefix for prefix, _ in groups]
        shared = len(os.path.commonprefix(prefixes))
        prefills[0] = bool(shared) + (max(map(len, prefixes)) > shared) + 1
        with clock.section("prefill"):
            return call(model, tokenizer, groups, *args, **options)

    def backward(*args, call=torch.autograd.backward, **options):
        with clock.section("backward"):
            clock.operations["backward"] += with_gradients[0]
            with_gradients[0] = 0.0
            return call(*args, **options)

    common.load_model, common.generate, torch.autograd.backward = load_model, generate, backward


def run_stage(result: Path, script: str, arguments: list[str]) -> None:
    """In the child: run a stage as a program and write down where its time went."""
    clock = Clock()
    clock.wrap(builtins, "__import__", section="imports")
    clock.wrap(importlib, "import_module", section="imports")
    import torch

    import common

    watch(clock, common, torch)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        clock.charge()
        result.write_text(json.dumps({"seconds": clock.seconds, "operations": clock.operations}))


def profile_stage(script: str, *arguments: str) -> dict[str, Any]:
    """{seconds, operations} by section of a stage that runs as a program."""
    with tempfile.TemporaryDirectory() as folder:
        result, started = Path(folder) / "result.json", time.perf_counter()
        subprocess.run([sys.executable, __file__, "--child", str(result), script, *arguments], check=True)
        total, found = time.perf_counter() - started, json.loads(result.read_text())
    found["seconds"]["rest"] += total - sum(found["seconds"].values())                  # how Python starts and ends
    return found


def main(argv: list[str] | None = None) -> None:
    import torch

    import common
    from benchmarks import evaluation, speed

    parser = speed.make_parser(__doc__, limit=(44, "pairs in all"), steps=(6, "of GRPO, for each objective"))
    parser.add_argument("--model", default="embedded", metavar="NAME", help="as in the stages")
    parser.add_argument("--dtype", default="auto", help="as in the stages")
    args = parser.parse_args(argv)
    rates = {name: speed.matrix_rate(getattr(torch, name)) for name in ("bfloat16", "float32")}
    dtype, stages = common.resolve_dtype(args.dtype), {}
    with tempfile.TemporaryDirectory() as run:
        for script, *settings in evaluation.stages(args.limit, steps=args.steps, sampling=("--held-out", "12"),
                                                   e2e=("--val-every", "6")):
            options = ["--run", run, "--model", args.model, "--dtype", dtype]
            labels = [word for word in settings if word in ("grpo", "e2e")]
            stages[" ".join([script.partition("_")[0], *labels])] = profile_stage(script, *settings, *options)
    total = lambda key, section: sum(stage[key].get(section, 0.0) for stage in stages.values())
    stages["all"] = {key: {section: total(key, section) for section in SECTIONS} for key in ("seconds", "operations")}
    print(f"{'seconds':10}" + "".join(f"{section:>10}" for section in (*SECTIONS, "total")))
    for name, stage in stages.items():
        cells = [stage["seconds"].get(section, 0.0) for section in SECTIONS]
        print(f"{name:10}" + "".join(f"{cell:10.1f}" for cell in (*cells, sum(cells))))
    print(f"share of the machine's rate in {dtype}, {rates[dtype] / 1e9:,.0f} GFLOP/s")
    for name, stage in stages.items():
        stage["share_of_matrix_rate"] = {section: done / stage["seconds"][section] / rates[dtype]
                                         for section, done in stage["operations"].items() if done}
        stage["share_of_matrix_rate"]["total"] = (
            sum(stage["operations"].values()) / sum(stage["seconds"].values()) / rates[dtype])
        cells = [stage["share_of_matrix_rate"].get(section) for section in (*SECTIONS, "total")]
        print(f"{name:10}" + "".join(f"{'' if cell is None else format(cell, '.0%'):>10}" for cell in cells))
    print(json.dumps(evaluation.rounded({"machine": speed.machine(), "torch": torch.__version__, "model": args.model,
                                         "dtype": dtype, "matrix_rate": rates, "stages": stages})))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_stage(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
