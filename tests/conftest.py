"""A tiny random model with its own tokenizer, made on the spot, and the stage files as modules."""

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    """Two deprecations inside the pinned libraries, which nothing here can act on."""
    for line in ("ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:.*is_gradient_checkpointing.*:FutureWarning"):
        config.addinivalue_line("filterwarnings", line)


TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A two-layer Llama with grouped-query attention and random weights, saved as a local model folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["Sam feels happy and wants to know how the day went. Conversation: Then Sam wrote"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny(tiny_folder):
    """(model, tokenizer), fresh for each test."""
    from common import load_model

    return load_model(str(tiny_folder), False)


@pytest.fixture(scope="session")
def stage():
    """stage('03_reconstruct_score') imports a stage file."""
    return importlib.import_module


@pytest.fixture()
def numbers(request) -> random.Random:
    """Fresh random inputs each run; the seed is printed with a failure."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"random inputs of {request.node.name}: seed {seed}")
    return random.Random(seed)


def random_ids(numbers: random.Random, low: int, high: int) -> list[int]:
    """Token ids, `low` to `high` of them, without the control tokens 0 and 1."""
    return [numbers.randrange(2, 300) for _ in range(numbers.randint(low, high))]


def make_pair(name: str = "c/1", action: str = "that sounds like a lot of work to me", split: str = "train") -> dict:
    context = [{"speaker": "bo", "text": "my garden is full of weeds again"}, {"speaker": "ann", "text": "oh no"}, {"speaker": "bo", "text": "it took all day"}]
    return {"id": name, "user": "ann", "conversation": name.split("/")[0], "split": split, "context": context, "action": action}
