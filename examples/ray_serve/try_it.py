"""Two replicas on this machine: users stay where their states are, and a killed replica is survived.

    python -m stca.examples.ray_serve.try_it BUNDLE

Prints one JSON object: of so many users, how many were hits on their later requests; and what became of the requests
while one replica was killed. Needs `ray[serve]` and `mmh3`.
"""

from __future__ import annotations

import collections
import http.client
import json
import sys
import time
from typing import Any

import numpy as np
import ray
from ray import serve

from stca import probe
from stca.bundle import Bundle
from stca.examples.ray_serve import app
from stca.serve.tensors import DATATYPES

USERS, ROUNDS, PORT = 60, 5, 8000


class Client:
    """Asks as a client does that keeps histories itself."""

    def __init__(self, bundle: str) -> None:
        graph = Bundle.load(bundle).manifest.graphs["request"]
        made = probe.single(graph.inputs, 50, 5, np.random.default_rng(0))
        self._inputs = {s.name: (s.scope, made[s.name]) for s in graph.inputs if s.shape != ("B_plus_1",)}
        self.codes: collections.Counter[str] = collections.Counter()

    def ask(self, user: str) -> bool:
        """Whether it was a hit; a user whose state is elsewhere sends the history."""
        told = self._sent(user, whole=False)
        self.codes[told.get("code", "ok")] += 1
        if told.get("code") == "history_needed":
            told = self._sent(user, whole=True)
            self.codes[f"then {told.get('code', 'ok')}"] += 1
        return bool(told.get("parameters", {}).get("hit"))

    def _sent(self, user: str, *, whole: bool) -> dict[str, Any]:
        tensors = [
            {"name": n, "datatype": DATATYPES[x.dtype.name], "shape": list(x.shape), "data": x.ravel().tolist()}
            for n, (scope, x) in self._inputs.items()
            if whole or scope != "user"
        ]
        body = json.dumps({"inputs": tensors, "parameters": {"user": user, "version": 1}})
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        try:
            connection.request("POST", "/v2/models/ranker/infer", body, {"x-session-id": user})
            answer = connection.getresponse()
            text = answer.read()
            try:
                return dict(json.loads(text))
            except ValueError:
                return {"code": f"HTTP {answer.status}"}
        finally:
            connection.close()


def main() -> None:
    bundle = sys.argv[1]
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app.build({"bundle": bundle, "replicas": "2", "workers": "1"}), name="stca")
    client, users = Client(bundle), [f"user {i}" for i in range(USERS)]
    for user in users:
        client.ask(user)
    hits = [sum(client.ask(user) for user in users) for _ in range(ROUNDS)]
    before, client.codes = client.codes, collections.Counter()
    replicas = [a for a in ray.util.list_named_actors(all_namespaces=True) if "Replica" in a["name"]]
    ray.kill(ray.get_actor(replicas[0]["name"], replicas[0]["namespace"]), no_restart=False)
    began = time.monotonic()
    while time.monotonic() - began < 10:
        for user in users:
            client.ask(user)
    after = sum(client.ask(user) for user in users)
    print(json.dumps({"users": USERS, "replicas": len(replicas), "hits_by_round": hits, "codes": before,
                      "codes_while_one_was_killed": client.codes, "hits_after": after}))  # fmt: skip


if __name__ == "__main__":
    main()
