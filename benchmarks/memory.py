"""Peak GPU memory of every stage for a model of a given shape with random weights, so that nothing is downloaded.

    python benchmarks/memory.py                                   Qwen3-8B: context 2,048, N 4, trace 256, group 8; a judge like Phi-4-mini's
    python benchmarks/memory.py --shape qwen3-4b --context 1024
    python benchmarks/memory.py --computed                        what it would say without a GPU

On a GPU the stages' own functions run on random tokens and the allocator's peak is read. Without one the peak is computed:
weights, keys and values, and logits from their shapes; what a layer keeps for its backward by counting, on the CPU, the
tensors that one layer of the full shape saves. CUDA itself takes some 0.5 GiB more. Stage 3 holds the model and the judge, stage 6
one after the other; a judge of another family is taken for a Qwen3 of its sizes. Prints one JSON object last.
"""

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
from benchmarks import cost

sft, rl = (importlib.import_module(name) for name in ("04_select_sft", "05_rl_train"))

# hidden size, intermediate size, layers, heads, tied embeddings, tokens in the vocabulary; all have 8 key-value heads of 128 (the models' config.json)
SHAPES = {"qwen3-1.7b": (2048, 6144, 28, 16, True, 151936), "qwen3-4b": (2560, 9728, 36, 32, True, 151936), "qwen3-8b": (4096, 12288, 36, 32, False, 151936),
          "phi-4-mini": (3072, 8192, 32, 24, True, 200064)}
GIB = 2**30
WORDS = cost.WORDS["synthesis"]                            # tokens of the synthesis prompt without context and action: instructions and worked examples
VALIDATION = 16                                            # prompts at once, one completion each
RANK = 16
TRACES = 2                                                 # a held-out pair in stage 6
ANSWER = 7                                                 # tokens of the judge's answer up to a digit: {"1":{"style":
QUESTIONS = 42                                             # of a pair in one forward of stage 6's judge: 7 arms' reconstructions, each against each in both orders (--round-robin)
BETWEEN = 76                                               # tokens of the comparison's prompt behind what its questions share, but for the two messages


def config_of(shape: str, layers: int | None = None) -> Qwen3Config:
    hidden, middle, depth, heads, tied, vocabulary = SHAPES[shape]
    return Qwen3Config(hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
                       vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=40960, attn_implementation="sdpa")


def random_model(shape: str) -> Any:
    """A model on the GPU as load_model gives it: random weights, the linear layers but the last in NF4 with double quantisation."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = Qwen3ForCausalLM(config_of(shape))
    torch.set_default_dtype(torch.float32)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                layer = Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
                weight = torch.empty(child.weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
                layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
                setattr(module, name, layer.cuda())
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    model.is_loaded_in_4bit = True
    return model.cuda().eval().requires_grad_(False)


def judged(args: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """{stage: (tokens that a judge's questions share, questions, tokens of each)} of the two judges' forwards."""
    shared = args.context + args.action
    return {"03 judging": (cost.WORDS["judge"] + shared + args.n * (args.action + cost.GUESS), args.n * len(common.ASPECTS), ANSWER),
            "06 judging": (cost.WORDS["comparison"] - BETWEEN + shared, QUESTIONS, BETWEEN + 2 * args.action)}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """{stage: the allocator's peak in GiB}."""
    model, tokenizer = random_model(args.shape), common.load_tokenizer("embedded")
    ids = lambda count: torch.randint(10, 40000, (count,)).tolist()
    peaks: dict[str, float] = {"weights": torch.cuda.memory_allocated() / GIB}

    def peak_of(stage: str, work: Callable[[], object]) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks[stage] = torch.cuda.max_memory_allocated() / GIB

    prompt = args.context + WORDS + args.action
    draw = lambda rows, new, pairs=args.pairs: common.generate(model, tokenizer, [(ids(prompt - 1), [ids(1)] * rows) for _ in range(pairs)], new, list(range(rows * pairs)), 1.0, common.MIN_P)

    @torch.inference_mode()
    def score(rows: int) -> None:
        common.packed_logprobs(model, [(ids(args.context), [ids(args.trace + args.action) for _ in range(rows)])], [[args.trace] * rows])

    @torch.inference_mode()
    def judging(stage: str) -> None:
        shared, questions, length = judged(args)[stage]
        common.packed_logits(judge, ids(shared), [ids(length + 1) for _ in range(questions)], [length] * questions)

    peak_of("02 sampling", lambda: draw(args.n, args.trace))
    judge = random_model(args.judge)
    peak_of("03 reconstructing", lambda: draw(args.n + 2, args.action))
    peak_of("03 likelihood", lambda: score(args.n + 2))
    peak_of("03 judging", lambda: judging("03 judging"))
    judge = None
    model = common.add_adapter(model, RANK, 0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights)

    def fit() -> None:
        sft.completion_loss(model, [(ids(args.context), [ids(args.trace + args.action)])], 1, recompute=True).backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = argparse.Namespace(temperature=1.0, updates=1, clip=0.2, kl=0.0, recompute=True)
    peak_of("04 fitting", fit)
    peak_of("05 validation", lambda: draw(1, args.trace, VALIDATION))
    peak_of("05 rollout", lambda: draw(args.group, args.trace))
    peak_of("05 update", lambda: rl.update(model, optimizer, [(ids(prompt), [ids(args.trace) for _ in range(args.group)])], [[1.0, -1.0] * (args.group // 2)], settings))
    optimizer = weights = None
    peak_of("06 acting", lambda: draw(TRACES, args.trace))
    peak_of("06 true action", lambda: score(TRACES))
    model = None
    gc.collect()
    judge = random_model(args.judge)
    peak_of("06 judging", lambda: judging("06 judging"))
    return peaks


def kept_by_a_layer(shape: str, tokens: int = 64) -> float:
    """Bytes a token that one decoder layer with a LoRA adapter keeps for its backward, counted."""
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = Qwen3ForCausalLM(config_of(shape, 1))
    torch.set_default_dtype(torch.float32)
    model.lm_head, model.model.embed_tokens = torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4)       # only the layer counts
    adapted = common.add_adapter(model.requires_grad_(False), RANK, 0)
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
    """Bytes of a model's weights on the GPU."""
    hidden, middle, layers, heads, tied, vocabulary = SHAPES[shape]
    linear = layers * (2 * hidden * heads * 128 + 2 * hidden * 8 * 128 + 3 * hidden * middle)
    return linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + vocabulary * hidden * 2 * (1 if tied else 2) + hidden * middle * 2      # NF4, scales, their scales; one layer's weight unpacked


def past_bytes(shape: str) -> int:
    """Bytes a token of keys and values."""
    return 2 * SHAPES[shape][2] * 8 * 128 * 2


def compute(args: argparse.Namespace) -> dict[str, float]:
    """{stage: peak in GiB}, from shapes."""
    hidden, middle, layers, heads, _, vocabulary = SHAPES[args.shape]
    weights, judge, past = weight_bytes(args.shape), weight_bytes(args.judge), past_bytes(args.shape)
    # The prompts are read at once, a layer's widest tensors at a time; then come the rows' caches and one token's logits in five forms.
    prompt = args.context + WORDS + args.action
    drawn = lambda rows, new, pairs=args.pairs: pairs * max(prompt * (past + 3 * middle * 2), rows * (prompt + new) * past + rows * vocabulary * (2 + 4 + 4 + 4 + 8))
    scored = lambda rows: (args.context + rows * (args.trace + args.action)) * past + rows * args.action * vocabulary * (2 + 4)
    adapter = layers * RANK * (2 * (hidden + heads * 128) + 2 * (hidden + 8 * 128) + 3 * (hidden + middle))
    trained = adapter * 4 * 4                                                           # weight, gradient and AdamW's two moments in float32
    layer = kept_by_a_layer(args.shape)
    backward = lambda tokens, predicted, copies: tokens * (layers * hidden * 2 + layer) + predicted * vocabulary * copies

    def verdict(shared: int, questions: int, length: int) -> float:
        """The cache, and the largest of: a layer's widest tensors for what the questions share, those for the questions with their mask (bfloat16, three of booleans), logits."""
        wide, row = 3 * SHAPES[args.judge][1] * 2, questions * length
        return (shared + row) * past_bytes(args.judge) + max(shared * wide, row * wide + row * (shared + row) * 2 + row * row * 3, questions * SHAPES[args.judge][5] * (2 + 4))

    verdicts = {stage: verdict(*sizes) for stage, sizes in judged(args).items()}
    parts = {"02 sampling": drawn(args.n, args.trace), "03 reconstructing": judge + drawn(args.n + 2, args.action), "03 likelihood": judge + scored(args.n + 2),
             "03 judging": judge + verdicts["03 judging"],
             "04 fitting": trained + backward(args.context + args.trace + args.action, args.trace + args.action, 2 + 4 + 4 + 2),
             "05 validation": trained + drawn(1, args.trace, VALIDATION),
             "05 rollout": trained + drawn(args.group, args.trace),
             # logits in bfloat16, float32 and over the temperature; softmax and entropy; two gradients
             "05 update": trained + backward(prompt + args.group * args.trace, args.group * args.trace, 2 + 4 + 4 + 4 + 4 + 4 + 4),
             "06 acting": adapter * 4 + drawn(TRACES, args.trace), "06 true action": adapter * 4 + scored(TRACES)}
    return {"weights": weights / GIB} | {stage: (weights + size) / GIB for stage, size in parts.items()} | {"06 judging": (judge + verdicts["06 judging"]) / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="whose shape (default: %(default)s)")
    parser.add_argument("--judge", choices=SHAPES, default="phi-4-mini", help="the judge's shape (default: %(default)s)")
    for name, size, what in (("context", 2048, "tokens in a context"), ("trace", 256, "tokens in a trace"), ("action", 64, "tokens in an action"), ("n", 4, "candidates a pair"),
                             ("group", 8, "completions a prompt in GRPO"), ("pairs", 4, "pairs, or prompts, at once")):
        parser.add_argument(f"--{name}", type=common.positive_int, default=size, help=f"{what} (default: %(default)s)")
    parser.add_argument("--computed", action="store_true", help="compute even if there is a GPU")
    args = parser.parse_args()
    measured = torch.cuda.is_available() and not args.computed
    peaks = (measure if measured else compute)(args)
    for stage, size in peaks.items():
        print(f"{stage:20} {size:6.2f} GiB")
    print(json.dumps({"device": torch.cuda.get_device_name() if measured else "none: computed", "torch": torch.__version__,
                      **{key: value for key, value in vars(args).items() if key != "computed"}, "peak_gib": {stage: round(size, 2) for stage, size in peaks.items()}}))


if __name__ == "__main__":
    main()
