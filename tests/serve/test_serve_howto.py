"""The how-to's programs and commands do what they say, in order, on a tiny random model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from posttrain import models, render

HOWTO = Path(__file__).resolve().parents[2] / "docs" / "howto_serve.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_howto_is_true(tmp_path: Path, free_port: int) -> None:
    tokenizer = render.Tokenizer.train_bpe(["Hello! How can I help?"] * 4, vocab_size=300)
    config = models.DecoderConfig(
        vocab_size=300,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=64,
        max_positions=512,
        init_std=0.2,
    )
    models.save(models.Decoder.random(config), tmp_path / "model", tokenizer=tokenizer)
    programs, commands = {}, []
    for language, block in BLOCK.findall(HOWTO.read_text()):
        text = block.replace("8000", str(free_port))
        if language == "bash":
            commands.append(text)
        else:
            programs[text.split()[1]] = text
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    server = subprocess.Popen([sys.executable, "serve_model.py"], cwd=tmp_path)
    try:
        wait_until_ready(f"http://127.0.0.1:{free_port}", server)
        if shutil.which("curl"):
            assert '"chat.completion"' in output(["bash", "-c", commands[0]], tmp_path)
        assert "chatcmpl-" in output([sys.executable, "ask.py"], tmp_path)
        assert "5 signals" in output([sys.executable, "judge.py"], tmp_path)
        assert output([sys.executable, "export.py"], tmp_path).endswith(" pairs\n")
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    finally:
        server.kill()
        server.wait()
    assert sorted(programs) == ["ask.py", "export.py", "judge.py", "serve_model.py"]
    assert (tmp_path / "prompt_completion.jsonl").read_text().count("\n") == 2


def output(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(url + "/ready").raise_for_status()
            return
        except httpx.TransportError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
