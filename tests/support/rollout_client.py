"""TRL's own client of a vLLM server, on a machine without vLLM and NCCL: tensors go through a socket instead."""

import contextlib
import socket
from unittest import mock

import requests
from trl.generation import vllm_client


class Client(vllm_client.VLLMClient):
    """As TRL has it, but for the connection that tensors take."""

    def init_communicator(self, device=0):
        self.communicator = socket.create_connection(("127.0.0.1", self.group_port))

    def close_communicator(self):
        if self.communicator is not None:
            self.communicator.close()
            self.communicator = None

    def logits(self, ids):
        """What the server computes with the weights that it has."""
        return requests.post(f"{self.base_url}/logits", json={"ids": ids}, timeout=60).json()


def send(iterator, group, src, post_iter_func):
    for item in iterator:
        group.sendall(post_iter_func(item).contiguous().view(-1).numpy().tobytes())


@contextlib.contextmanager
def without_vllm():
    """TRL takes vLLM for installed, and sends through the socket."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("is_vllm_available", lambda: True),
            ("_HAS_STATEFUL_TRAINER_ENGINE", True),
            ("_HAS_RESET_PREFIX_CACHE_SUCCESS", True),
            ("packed_nccl_broadcast_producer", send),
        ):
            stack.enter_context(mock.patch.object(vllm_client, name, value, create=True))
        yield
