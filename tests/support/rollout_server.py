"""Stands in for a vLLM server: keeps real weights in a process of its own, takes hand-overs, and computes with them.

It speaks what TRL's client speaks over HTTP; tensors come through a socket where vLLM has NCCL.

    python tests/support/rollout_server.py MODEL HTTP_PORT TENSOR_PORT
"""

import json
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod

import torch
from transformers import AutoModelForCausalLM

from losia_dist.integrations.trainer.rollout import receive


def tensors(connection, info):
    """What an update announces, as it comes in."""
    for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
        kind = getattr(torch, dtype)
        size = prod(shape) * kind.itemsize
        received = bytearray()
        while len(received) < size:
            received += connection.recv(size - len(received))
        yield name, torch.frombuffer(received, dtype=kind).reshape(shape)


def serve(model, http_port, tensor_port):
    listener = socket.create_server(("127.0.0.1", tensor_port))
    connections = []
    weights = dict(model.named_parameters())

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            config = {"weight_transfer_config": {}, "model_config": {"logprobs_mode": "processed_logprobs"}}
            self.answer({"data": [{"id": "model"}], "world_size": 1, "vllm_config": config})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            if self.path == "/update_weights":
                if not connections:
                    connections.append(listener.accept()[0])
                receive(weights, tensors(connections[0], asked["update_info"]))
            if self.path == "/logits":
                with torch.no_grad():
                    return self.answer(model(input_ids=torch.tensor(asked["ids"])).logits.tolist())
            return self.answer({"success": True})

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", http_port), Handler).serve_forever()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval(), int(sys.argv[2]), int(sys.argv[3]))
