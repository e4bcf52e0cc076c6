"""A server and a client: `python examples/serve_and_client.py [TARGET DRAFTER]`, by default the example pair.

Starts `vllm serve` with the drafter, streams a completion through the OpenAI client, reads the server's own
speculation metrics, and ends the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from openai import OpenAI

MODELS = Path(__file__).parent / "models"
PORT = int(os.environ.get("PORT", "8137"))


def wait_until_up(server: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers; ends the program if the server has ended."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
        else:
            return
    sys.exit(f"the server ended with status {server.returncode}: its log says why")


def main() -> None:
    """Serves, asks, and prints the answer as it comes."""
    target, drafter = sys.argv[1:] or (str(MODELS / "target"), str(MODELS / "drafter"))
    speculation = json.dumps({"method": "redrafter", "model": drafter, "num_speculative_tokens": 8})
    command = ["vllm", "serve", target, "--port", str(PORT), "--dtype", "float32", "--speculative-config", speculation]
    program = str(Path(sys.executable).with_name(command[0]))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with subprocess.Popen([program, *command[1:]], env=environment, stdout=sys.stderr) as server:
        try:
            wait_until_up(server)
            client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
            for chunk in client.completions.create(model=target, prompt="A list is", max_tokens=64, stream=True):
                print(chunk.choices[0].text, end="", flush=True)
            print()
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as metrics:
                lines = metrics.read().decode().splitlines()
            print(*(line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")), sep="\n")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
