"""Ingest on a cluster of three nodes and kill one when the first episodes are committed; run by test_cluster.py."""

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import ingest.plan
from jobs.ingest import Config, run

source, lake = sys.argv[1:]
ingest.plan.MIN_TASK_FRAMES = 40
folder = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 1, "temp_dir": folder, "include_dashboard": False, "object_store_memory": 200 << 20},
)
nodes = [cluster.add_node(num_cpus=1, object_store_memory=200 << 20) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
killed: list[float] = []


def kill() -> None:
    staging = Path(lake) / "_staging"
    for _ in range(1200):
        if len(list(staging.rglob("task-*.json"))) >= 4:
            cluster.remove_node(nodes[0], allow_graceful=False)
            killed.append(time.monotonic())
            return
        time.sleep(0.1)


thread = threading.Thread(target=kill)
thread.start()
result = run(Config(source=source, lake=lake))
thread.join()
ray.shutdown()
cluster.shutdown()
shutil.rmtree(folder, ignore_errors=True)
print(json.dumps(result | {"killed": bool(killed)}))
