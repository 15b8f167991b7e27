"""run.sh's presets, without a GPU: what each stage is told, and that it understands it."""

import importlib

import pytest
import torch
from transformers import LlamaForCausalLM

import common
from benchmarks import memory, preset


@pytest.mark.parametrize("arguments, pairs_of_the_longest", [([], 0), (["--gpu"], 4), (["--gpu", "4b"], 2)])
def test_every_stage_understands_its_preset_and_its_batches_hold_many_chats_but_few_long_pairs(
        tmp_path, arguments, pairs_of_the_longest):
    told = {}
    for script, *settings in preset.commands(tmp_path, *arguments):
        args = importlib.import_module(script.removesuffix(".py")).parse_args(settings)
        told.setdefault(script[:2], args)
    assert list(told) == ["01", "02", "03", "04", "05", "06"]
    if not arguments:
        return
    prepare, sample, score, fit, train, act = told.values()
    # Chats have to reach the limit of tokens, and six turns do not.
    assert prepare.max_context_turns >= 40 and prepare.max_context_tokens >= 1024
    assert {"backward", "guarded", "recon", "judged", "shuffled", "worst"} < set(fit.arms.split(","))
    assert score.judge == act.judge and "judge" in score.scorers and not score.judge.startswith("Qwen")
    words = 524                                            # of the prompt itself
    room = lambda context: 4 * (words + context + prepare.max_action_tokens + sample.max_trace_tokens)
    assert sample.batch_tokens // room(prepare.max_context_tokens) == pairs_of_the_longest
    assert sample.batch_tokens // room(150) >= 2 * pairs_of_the_longest
    assert fit.row_tokens >= prepare.max_context_tokens + sample.max_trace_tokens + prepare.max_action_tokens
    assert train.num_prompts * train.num_generations == 64 and train.steps == 100


@pytest.mark.parametrize("modern, dtype", [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_that_does_not_compute_in_bfloat16_gets_float16(monkeypatch, modern, dtype):
    """Cards before Ampere only emulate it, and torch says yes to that unless it is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: modern or including_emulation)
    assert common.resolve_dtype("auto") == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_model_computes_what_the_small_one_does(tiny, numbers, monkeypatch, tied):
    """Wider, deeper, with more heads and words: logits agree up to the rounding of bfloat16."""
    monkeypatch.setitem(memory.SHAPES, "grown", (96, 160, 4, 24, tied, len(tiny.tokenizer) + 50))
    small = tiny.model.to(torch.bfloat16).float()
    if tied:
        small.lm_head.weight = small.model.embed_tokens.weight
    ids = torch.tensor([[numbers.randrange(len(tiny.tokenizer)) for _ in range(40)]])
    large = preset.grow(small, "grown").float()
    assert isinstance(large, LlamaForCausalLM) and large.num_parameters() > 10 * small.num_parameters()
    with torch.no_grad():
        found, expected = large(ids).logits[..., :len(tiny.tokenizer)], small(ids).logits
    assert (found - expected).std() < 0.01 * expected.std()            # single logits round by more
