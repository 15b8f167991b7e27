"""A tiny random model with its own tokenizer, made on the spot, the stage files as modules, and a real browser."""

import base64
import http.server
import importlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import threading
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


def make_tiny(folder: Path) -> Path:
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
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture()
def tiny(tiny_folder):
    """(model, tokenizer), fresh for each test."""
    from common import load_model

    return load_model(str(tiny_folder), False)


@pytest.fixture(scope="session")
def encoder():
    """The embedded sentence encoder, loaded once: nothing changes it."""
    from common import load_encoder

    return load_encoder()


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


class Loopback:
    """A real server on loopback that speaks the chat API. It gives `answers` in turn, then `reply(body)`.

    An answer is a text, (text, finish_reason), an HTTP status, (status, headers, body) or a dict: the whole JSON.
    """

    def __init__(self):
        self.answers, self.asked, self.reply, self.port = [], [], lambda body: "Sam is tired. Sam wants to go home.", 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], body))
                given = outer.answers.pop(0) if outer.answers else outer.reply(body)
                status, headers, text = (given, {}, "no") if isinstance(given, int) else given if isinstance(given, tuple) and len(given) == 3 else (200, {}, given)
                if text is given:
                    text, finish = text if isinstance(text, tuple) else (text, "stop")
                    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
                    text = json.dumps(text if isinstance(text, dict) else {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage})
                self.send_response(status)
                for name, value in {**headers, "Content-Length": len(text.encode())}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):                      # a client that did not wait for the answer
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
    """A Loopback that the stages are pointed to, with a key, and without waits."""
    import common

    server = Loopback()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key-1234")
    monkeypatch.setattr(common, "WAITS", (0,) * 5)
    yield server
    server.stop()


class Browser:
    """Headless Chromium, driven through its debugging pipe: JSON messages that end in a zero byte, no driver and no port."""

    def __init__(self, folder: Path):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   "--no-first-run", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
        (self.read_end, write_end), (read_end, self.write_end) = os.pipe(), os.pipe()

        def as_3_and_4() -> None:
            parked = os.dup(read_end), os.dup(write_end)     # either may be 3 or 4 itself
            os.dup2(parked[0], 3)
            os.dup2(parked[1], 4)

        self.process = subprocess.Popen(command, preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.buffer, self.number, self.session, self.console = b"", 0, None, []
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def receive(self, seconds: float) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.read_end], [], [], seconds)[0], "the browser does not answer"
            self.buffer += os.read(self.read_end, 1 << 16)
        message, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(message)
        if found.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(found["params"])
        return found

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self.receive(60)).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int = 1100) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=page.as_uri())
        while self.receive(60).get("method") != "Page.loadEventFired":
            pass

    def reload(self) -> None:
        self.call("Page.reload")
        while self.receive(60).get("method") != "Page.loadEventFired":
            pass

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=f"Key{key.upper()}" if len(key) == 1 else key, **({"text": key} if kind == "keyDown" and len(key) == 1 else {}))

    def value(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture()
def browser(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("no chromium on this machine: install that system package to run the browser tests")
    driven = Browser(tmp_path)
    yield driven
    driven.close()
