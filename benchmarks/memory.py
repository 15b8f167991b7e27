"""Peak GPU memory of every stage for a model of a given shape with random weights, so that nothing is downloaded.

    python benchmarks/memory.py                     Qwen3-8B, context 2,048, trace 256, group 8; Phi-4-mini as judge
    python benchmarks/memory.py --shape qwen3-4b --context 1024
    python benchmarks/memory.py --computed          what it would say without a GPU
    python benchmarks/memory.py --check             the cache as computed and as measured, here, with the embedded model

On a GPU the stages' own functions run on random tokens and the allocator's peak is read: some 10 minutes. Without one
the peak is computed in seconds: weights, keys and values, and logits from shapes; what a layer keeps for its backward
by counting, on the CPU, the tensors that one layer of the full shape saves. Rows of a batch end early, as real texts do
(see spread). CUDA itself takes some 0.5 GiB more. Stage 3 holds the model and the judge, stage 6 one after the other; a
judge of another family is taken for a Qwen3 of its sizes. --check takes a minute. Prints one JSON object last.
"""

import argparse
import gc
import importlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from benchmarks import cost, speed

score, fit, rl = (importlib.import_module(name) for name in ("03_reconstruct_score", "04_select_sft", "05_rl_train"))

# hidden size, intermediate size, layers, heads, tied embeddings, tokens in the vocabulary (the models' config.json);
# all have 8 key-value heads of 128
SHAPES = {
    "qwen3-1.7b": (2048, 6144, 28, 16, True, 151936), "qwen3-4b": (2560, 9728, 36, 32, True, 151936),
    "qwen3-8b": (4096, 12288, 36, 32, False, 151936), "phi-4-mini": (3072, 8192, 32, 24, True, 200064)}
GIB = 2**30
ROOM = 64                                                  # spare tokens in a RoomyLayer
RANK, ANSWERS, NEGATIVES = 16, 1, 4                        # stages' defaults
VALIDATED = (8, 4)                                         # prompts at once, and traces of each
COMPARED = 72                                              # questions of a pair in stage 6: 9 arms, --round-robin


# ----------------------------------------------------------------------------------------------------------------------
# The cache of keys and values while `common.generate` runs


def spread(rows: int, limit: int) -> list[int]:
    """How many tokens each row writes: evenly from a quarter of the limit on, and every third one to the limit."""
    return [limit if row % 3 == 0 else round(limit * (0.25 + 0.75 * row / rows)) for row in range(rows)]


def cache_peak(layers: int, a_token: int, prefix: int, shared: int, groups: int, suffix: int, lengths: Sequence[int],
               limit: int) -> int:
    """Bytes that the cache holds at its peak: `groups` prompts of `prefix` tokens, the first `shared` of which all have
    in common, and behind each its rows of `suffix` tokens, row i of which writes lengths[i] more, `limit` at most.

    `a_token` is bytes a token in all layers. It follows common.generate: a full buffer grows by ROOM, and rows that
    ended leave once they are a quarter.
    """
    rows = used = room = peak = 0

    def hold(new_rows: int, new_room: int, copied: float) -> None:
        """All layers move from old to new buffers one by one; at the change `copied` layers exist twice."""
        nonlocal rows, room, peak
        old, new = rows * room, new_rows * new_room
        peak = max(peak, max(old, new) * layers + min(old, new) * copied)
        rows, room = new_rows, new_room

    def read(tokens: int) -> None:
        nonlocal used
        if used + tokens > room:
            hold(rows, used + tokens + ROOM, 1)            # keys and values of the layer
        used += tokens

    rows = 1
    if shared:
        read(shared)
        hold(groups, room, 0.5)                            # keys, then values
    rows = groups
    if prefix > shared:
        read(prefix - shared)
    hold(len(lengths), room, 0.5)
    read(suffix)
    for step in range(1, min(max(lengths) + 1, limit)):    # a row that ends is read once more, to see its end
        alive = sum(length >= step for length in lengths)
        if alive <= 0.75 * rows:
            hold(alive, room, 0.5)
        read(1)
    return round(peak * a_token / layers)


class CacheMeter(TorchDispatchMode):
    """What all RoomyLayers hold, by looking at the storages that their methods make: `peak`, in bytes."""

    def __init__(self):
        super().__init__()
        self.storages, self.foreign, self.peak = {}, set(), 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        found = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.foreign:
                self.storages[tensor.untyped_storage()._cdata] = (
                    StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self.storages = {key: some for key, some in self.storages.items() if not some[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return found

    def measure(self, work: Callable[[], object]) -> int:
        meter, Layer = self, common.RoomyLayer

        class Metered(Layer):
            def update(self, keys, values, *more, **options):
                meter.foreign = {states.untyped_storage()._cdata for states in (keys, values)}
                with meter:
                    return super().update(keys, values, *more, **options)

            def batch_select_indices(self, indices):
                meter.foreign = {indices.untyped_storage()._cdata}
                with meter:
                    super().batch_select_indices(indices)

        common.RoomyLayer = Metered
        try:
            work()
        finally:
            common.RoomyLayer = Layer
        return self.peak


def check_cache(local: common.LocalModel, prompts: Sequence[list[int]], rows: int, limit: int) -> dict[str, float]:
    """The cache's peak while `rows` completions of every prompt are sampled: measured, and computed beforehand."""
    config = local.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * local.model.dtype.itemsize
    groups = [common.split_prefix([prompt] * rows) for prompt in prompts]
    computed = cache_peak(config.num_hidden_layers, a_token, max(map(len, prompts)) - 1,
                          min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1), len(prompts), 1,
                          spread(rows * len(prompts), limit), limit)
    found: list[common.Completion] = []
    measured = CacheMeter().measure(lambda: found.extend(
        common.generate(local.model, local.tokenizer, groups, limit, range(rows * len(prompts)), 1.0, 0.1)))
    return {"measured_bytes": measured, "computed_bytes": computed, "computed_over_measured": computed / measured,
            "rows": len(found), "ended_early": sum(one.finished for one in found)}


# ----------------------------------------------------------------------------------------------------------------------
# The other parts, from shapes


def config_of(shape: str, layers: int | None = None) -> Qwen3Config:
    hidden, middle, depth, heads, tied, vocabulary = SHAPES[shape]
    return Qwen3Config(hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers or depth, head_dim=128,
                       num_attention_heads=heads, num_key_value_heads=8, vocab_size=vocabulary,
                       tie_word_embeddings=tied, max_position_embeddings=40960, attn_implementation="sdpa")


def bare_model(kind: type[PreTrainedModel], config: PretrainedConfig) -> Any:
    """A model in bfloat16 whose weights are whatever lay in memory."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def kept_by_a_layer(shape: str, tokens: int = 64) -> float:
    """Bytes a token that one decoder layer with a LoRA adapter keeps for its backward, counted."""
    model = bare_model(Qwen3ForCausalLM, config_of(shape, 1))
    model.lm_head, model.model.embed_tokens = torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4)    # only the layer counts
    adapted = common.add_adapter(model, RANK, 0)
    layer, weights = adapted.base_model.model.model.layers[0], {weight.data_ptr() for weight in adapted.parameters()}
    hidden = torch.zeros(1, tokens, SHAPES[shape][0], dtype=torch.bfloat16, requires_grad=True)
    turns = adapted.base_model.model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, position_embeddings=turns, attention_mask=None)
    return sum(kept.values()) / tokens


def weight_bytes(shape: str) -> float:
    """Bytes of a model on the GPU: NF4 with scales and theirs, the tables in 16 bits, one layer's weight unpacked."""
    hidden, middle, layers, heads, tied, vocabulary = SHAPES[shape]
    linear = layers * (2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 3 * hidden * middle)
    tables = vocabulary * hidden * 2 * (1 if tied else 2)
    return linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + tables + hidden * middle * 2


def past_bytes(shape: str) -> int:
    """Bytes a token of keys and values."""
    return 2 * SHAPES[shape][2] * 8 * 128 * 2


@lru_cache
def embedded_tokenizer() -> Any:
    return common.load_tokenizer("embedded")


def words_of(name: str) -> int:
    """Tokens of a prompt's own words."""
    return cost.prompt_words(embedded_tokenizer(), name)[0]


def judged(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """{stage: (tokens that a judge's questions share, questions, tokens of each)} of the two judges' forwards."""
    tokenizer, fields = embedded_tokenizer(), {"context": "", "action": ""}
    first, second = (common.Prompt("comparison", fields | {"first": a, "second": b}) for a, b in ("ab", "ba"))
    _, (behind, _) = common.split_prefix([common.encode_prompt(tokenizer, prompt) for prompt in (first, second)])
    beginning = len(tokenizer.encode('{"1":{"style":', add_special_tokens=False))
    shared, guesses, behind = args.context + args.action, args.n * (args.action + 6), len(behind) - 2
    return {"03 judging": (words_of("judge") + shared + guesses, args.n * len(score.ASPECTS), beginning),
            "06 judging": (words_of("comparison") - behind + shared, COMPARED, behind + 2 * args.action)}


def batches(args: argparse.Namespace) -> dict[str, tuple[int, int, int, int]]:
    """{stage: (rows of a pair, tokens that each writes, pairs at once, tokens of a prompt)} by --batch-tokens."""
    prompts = {"02": (args.n, args.trace, words_of("synthesis") + args.context + args.action),
               "03": (args.n + 2, args.action, words_of("reconstruction") + args.context + args.trace),
               "06": (ANSWERS, args.trace + args.action, words_of("user_model") + args.context)}
    return {stage: (rows, new, max(1, args.batch_tokens // (rows * (prompt + new))), prompt)
            for stage, (rows, new, prompt) in prompts.items()}


def compute(args: argparse.Namespace) -> dict[str, float]:
    """{stage: peak in GiB}, from shapes."""
    hidden, middle, layers, heads, _, vocabulary = SHAPES[args.shape]
    weights, judge, past = weight_bytes(args.shape), weight_bytes(args.judge), past_bytes(args.shape)
    prompt = args.context + words_of("synthesis") + args.action

    def drawn(each: int, new: int, groups: int, prompt: int = prompt) -> float:
        """Prompts are read a layer's widest tensors at a time; then come the rows' cache and logits in five forms."""
        reading, rows = groups * prompt * (past + 3 * middle * 2), each * groups
        cache = cache_peak(layers, past, prompt - 1, 0, groups, 1, spread(rows, new), new)
        return max(reading, cache + rows * vocabulary * (2 + 4 + 4 + 4 + 8))

    def packed(shared: int, stems: int, stem: int, leaves: int, leaf: int, past: bool = True,
               shape: str = args.shape) -> float:
        """A tree of tokens in a row: the mask with what it is made of, the widest tensors, logits. With `past` the
        shared part was read before; then its keys and values are held twice."""
        behind, wide = stems * (stem + leaves * leaf), 3 * SHAPES[shape][1] * 2
        row, total = behind + (0 if past else shared), shared + behind
        cache = (2 * shared + behind) * past_bytes(shape) if past else 0
        return cache + max(shared * wide, row * wide + row * total * 2 + total * total * 3,
                           stems * leaves * leaf * SHAPES[shape][5] * (2 + 4 + 4))

    adapter = layers * RANK * (2 * (hidden + heads * 128) + 2 * (hidden + 8 * 128) + 3 * (hidden + middle)) * 4
    layer = kept_by_a_layer(args.shape)
    # With checkpointing: what enters each layer, one layer's own, and logits in `size` bytes a token of the vocabulary.
    backward = lambda tokens, predicted, size: tokens * (layers * hidden * 2 + layer) + predicted * vocabulary * size
    written, group, sampled = args.trace + args.action, args.group * args.trace, batches(args)
    verdicts = {stage: packed(shared, questions, length, 1, 1, False, args.judge)
                for stage, (shared, questions, length) in judged(args).items()}
    parts = {
        "02 sampling": drawn(*sampled["02"]), "03 reconstructing": judge + drawn(*sampled["03"]),
        "03 likelihood": judge + packed(args.context, args.n + 2, args.trace, 1 + NEGATIVES, args.action),
        "03 judging": judge + verdicts["03 judging"],
        "04 fitting": 4 * adapter + backward(args.context + written, written, 2 + 4 + 4 + 2),
        "05 validation": 4 * adapter + drawn(VALIDATED[1], args.trace, VALIDATED[0]),
        "05 rollout": 4 * adapter + drawn(args.group, args.trace, args.prompts),
        "05 rewards": 4 * adapter + packed(args.context, args.group + 1, args.trace, NEGATIVES, args.action),
        # logits in bfloat16, in float32, picked, over the temperature, masked by min-p; entropy; two gradients
        "05 update": 4 * adapter + backward(prompt + group, group, 2 + 4 + 4 + 4 + 4 + 4 + 4 + 4),
        "06 acting": adapter + drawn(*sampled["06"]),
        "06 true action": adapter + packed(args.context, ANSWERS, args.trace, 1, args.action, False)}
    sizes = {"weights": 0.0, **parts, "06 judging": judge - weights + verdicts["06 judging"]}
    return {stage: (weights + size) / GIB for stage, size in sizes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Measured on a GPU


def random_model(shape: str) -> Any:
    """A model on the GPU as load_model gives it: random weights, the linear layers but the last in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = bare_model(Qwen3ForCausalLM, config_of(shape))
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                layer = Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                                   compress_statistics=True, quant_type="nf4")
                weight = torch.empty(child.weight.shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
                layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
                setattr(module, name, layer.cuda())
    for name, weight in model.cuda().named_parameters():
        if weight.is_floating_point():
            torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    model.is_loaded_in_4bit = True
    return model.eval().requires_grad_(False)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """{stage: the allocator's peak in GiB}."""
    model, tokenizer = random_model(args.shape), embedded_tokenizer()
    ids = lambda count: [random.randrange(10, min(40000, SHAPES[args.shape][5])) for _ in range(count)]
    peaks: dict[str, float] = {"weights": torch.cuda.memory_allocated() / GIB}

    def peak_of(stage: str, work: Callable[[], object]) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks[stage] = torch.cuda.max_memory_allocated() / GIB

    prompt = args.context + words_of("synthesis") + args.action

    def draw(rows: int, new: int, groups: int, prompt: int = prompt) -> None:
        """So many tokens end a text that a row writes two thirds of the limit on average."""
        model.generation_config.eos_token_id = list(range(0, SHAPES[args.shape][5], max(2, new * 2 // 3)))
        common.generate(model, tokenizer, [(ids(prompt - 1), [ids(1)] * rows) for _ in range(groups)], new,
                        range(rows * groups), 1.0, 0.1)

    @torch.inference_mode()
    def packed(reader: Any, shared: int, stems: int, stem: int, leaves: int, leaf: int, past: bool = True) -> None:
        prefix = ids(shared)
        tree = prefix, [ids(stem) for _ in range(stems)], [[ids(leaf) for _ in range(leaves)]] * stems
        common.shared_prefix_logprobs(reader, [tree], past=common.read_prefix(reader, prefix[:-1]) if past else ())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def fitting() -> None:
        example = ids(args.context), ids(args.trace + args.action)
        fit.completion_loss(model, [example], 1, checkpointing=True).backward()
        step()

    def judging(stage: str) -> None:
        shared, questions, length = judged(args)[stage]
        packed(judge, shared, questions, length, 1, 1, past=False)

    settings = argparse.Namespace(temperature=1.0, min_p=0.1, num_iterations=1, clip=0.2, checkpointing=True)
    group = lambda: rl.Group(ids(prompt), [ids(args.trace) for _ in range(args.group)], [0.5, -0.5] * (args.group // 2))
    sampled = batches(args)
    peak_of("02 sampling", lambda: draw(*sampled["02"]))
    judge = random_model(args.judge)
    peak_of("03 reconstructing", lambda: draw(*sampled["03"]))
    peak_of("03 likelihood", lambda: packed(model, args.context, args.n + 2, args.trace, 1 + NEGATIVES, args.action))
    peak_of("03 judging", lambda: judging("03 judging"))
    judge = None
    model = common.add_adapter(model, RANK, 0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    peak_of("04 fitting", fitting)
    peak_of("05 validation", lambda: draw(VALIDATED[1], args.trace, VALIDATED[0]))
    peak_of("05 rollout", lambda: draw(args.group, args.trace, args.prompts))
    peak_of("05 rewards", lambda: packed(model, args.context, args.group + 1, args.trace, NEGATIVES, args.action))
    peak_of("05 update", lambda: rl.update(model, optimizer, [group()], settings))
    optimizer = None
    peak_of("06 acting", lambda: draw(*sampled["06"]))
    peak_of("06 true action", lambda: packed(model, args.context, ANSWERS, args.trace, 1, args.action, past=False))
    model = None
    gc.collect()
    judge = random_model(args.judge)
    peak_of("06 judging", lambda: judging("06 judging"))
    return peaks


def check() -> dict[str, float]:
    """check_cache of stage 2's work on eight of the default pairs."""
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("01_prepare").main(["--run", folder, "--limit", "44"])
        pairs = common.read_rows(Path(folder) / "pairs.jsonl", common.Pair)[:8]
    local = common.load_model("embedded", False, "auto")
    prompts = [common.encode_prompt(local.tokenizer, common.synthesis_prompt(pair)) for pair in pairs]
    return check_cache(local, prompts, 4, 48)


def main(argv: list[str] | None = None) -> None:
    parser = speed.make_parser(
        __doc__, context=(2048, "tokens in a context"), trace=(256, "tokens in a trace"), n=(4, "candidates a pair"),
        action=(64, "tokens in an action"), group=(8, "completions a prompt in GRPO"),
        prompts=(4, "prompts at once in GRPO, where twice as many do not fit"),
        batch_tokens=(49152, "as in the stages"))
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="whose shape")
    parser.add_argument("--judge", choices=SHAPES, default="phi-4-mini", help="the judge's shape")
    parser.add_argument("--computed", action="store_true", help="compute even if there is a GPU")
    parser.add_argument("--check", action="store_true", help="compare the cache as computed and as measured, and end")
    args = parser.parse_args(argv)
    if args.check:
        return print(json.dumps(check()))
    measured = torch.cuda.is_available() and not args.computed
    peaks = (measure if measured else compute)(args)
    for stage, size in peaks.items():
        print(f"{stage:20} {size:6.2f} GiB")
    sizes = {key: value for key, value in vars(args).items() if key not in ("computed", "check")}
    print(json.dumps({"device": speed.machine() if measured else "none: computed", "torch": torch.__version__, **sizes,
                      "peak_gib": {stage: round(size, 2) for stage, size in peaks.items()}}))


if __name__ == "__main__":
    main()
