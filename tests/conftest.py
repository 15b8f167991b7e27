"""A tiny random model with its own tokenizer, made on the spot, the stages as modules, and a server on loopback."""

import http.server
import importlib
import json
import os
import random
import shutil
import sys
import threading
from argparse import Namespace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                            # many tests ask for equal bits, as only a CPU gives
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
from browser import Browser

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def pytest_configure(config):
    """Two deprecations inside the pinned libraries, which nothing here can act on."""
    for line in ("ignore:.*torch.jit.script_method.*:DeprecationWarning", "ignore:.*is_gradient_checkpointing.*"):
        config.addinivalue_line("filterwarnings", line)


def make_tiny(folder: Path) -> Path:
    """A two-layer Llama with grouped-query attention and random weights, saved as a local model folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = "Sam feels happy and wants to know how the day went. Conversation: Then Sam wrote"
    tokenizer.train_from_iterator([words] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>",
                                   pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
                         bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
                         initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture()
def tiny(tiny_folder) -> common.LocalModel:
    """The tiny model in float32, fresh for each test."""
    return common.load_model(str(tiny_folder), False, "float32")


@pytest.fixture(scope="session")
def encoder():
    """The embedded sentence encoder, loaded once: nothing changes it."""
    return common.load_encoder()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("no chromium on this machine: install that system package to run the browser tests")
    driven = Browser(tmp_path_factory.mktemp("browser"))
    yield driven
    driven.close()


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


def make_pair(name: str = "c/1", action: str = "that sounds like a lot of work to me", split: str = "train",
              **more) -> common.Pair:
    turns = [("bo", "my garden is full of weeds again"), ("ann", "oh no"), ("bo", "it took all day")]
    context = [common.Turn(speaker=speaker, text=text) for speaker, text in turns]
    return common.Pair(**{"id": name, "user": "ann", "conversation": name.split("/")[0], "split": split,
                          "context": context, "action": action} | more)


def make_run(folder: Path, train: int = 6, val: int = 2, test: int = 6) -> Path:
    """A run folder with pairs.jsonl, as stage 1 leaves it; every pair is a conversation of its own."""
    actions = ["that sounds like a lot of work to me", "I would rather stay at home and read a book",
               "did you eat yet?", "my sister wants to move to the sea", "we could try the new place on friday",
               "no idea, ask the teacher"]
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    pairs = [make_pair(f"c{place}/1", f"{actions[place % len(actions)]} {place}", split)
             for place, split in enumerate(splits)]
    config = {"arguments": {"seed": 0}, "inputs": {}}
    common.write_file(folder / "pairs.jsonl", "".join(map(common.dump_row, pairs)), config)
    return folder


def run_stages(stage, run: Path, model: Path, *commands: str) -> None:
    """main() of each command, like '04_select_sft --arms recon', on one run folder and model, in float32."""
    for command in commands:
        name, *arguments = command.split()
        try:
            stage(name).main([*arguments, "--run", str(run), "--model", str(model), "--dtype", "float32"])
        finally:
            release()


def release() -> None:
    """Give up the locks of run folders, which a stage holds for as long as its process lives."""
    while common.LOCKS:
        common.LOCKS.pop().release()


@pytest.fixture(autouse=True)
def released():
    yield
    release()


def api_args(run: Path, **more) -> Namespace:
    """What common.ApiModel reads of a stage's arguments."""
    return Namespace(**{"run": run, "api_omit": "", "concurrency": 4} | more)


class Loopback:
    """A real server on loopback that speaks the chat API. It gives `answers` in turn, then `reply(body)`.

    An answer is a text, (text, finish_reason), an HTTP status, (status, headers, body) or a dict: the whole JSON.
    """

    def __init__(self):
        self.answers, self.asked, self.port = [], [], 0
        self.reply = lambda body: "Sam is tired. Sam wants to go home."
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], body))
                given = outer.answers.pop(0) if outer.answers else outer.reply(body)
                status, headers, text = (given, {}, "no") if isinstance(given, int) else \
                    given if isinstance(given, tuple) and len(given) == 3 else (200, {}, given)
                if text is given:
                    text, finish = text if isinstance(text, tuple) else (text, "stop")
                    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
                    text = json.dumps(text if isinstance(text, dict) else {
                        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                                     "finish_reason": finish}], "usage": usage})
                self.send_response(status)
                headers = {"Content-Type": "application/json", **headers, "Content-Length": len(text.encode())}
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):                    # a client that did not wait for the answer
                pass

        self.listening = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self.listening.server_port
        threading.Thread(target=self.listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """From here on connections are refused."""
        self.listening.shutdown()
        self.listening.server_close()


@pytest.fixture()
def loopback(monkeypatch):
    """A Loopback that the stages are pointed to, with a key; requests are not retried."""
    server = Loopback()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-1234")
    monkeypatch.setattr(common, "API_RETRIES", 0)
    yield server
    server.stop()
