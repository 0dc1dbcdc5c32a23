"""Meshes over the TPU slices that libtpu knows, and the rows of a batch that each host makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

from bipft_jax.pods.compiler import NO_TPU_HERE

SIZES = (1, 2, 4, 8, 16)
CHIPS = {
    "v5e:4x4": 16,
    "v5e:8x8": 64,
    "v5e:16x16": 256,
    "v6e:8x8": 64,
    "v5p:4x4x4": 64,
    "v5p:4x4x8": 128,
    "2 v5e:4x4": 16,  # two slices, of 16 each
}

# libtpu must not be loaded into the process of the tests, and cannot run anything: no compiling.
PROGRAM = """
import sys
import numpy as np
from jax.experimental import topologies
from bipft_jax.training import sharding

sizes = list(map(int, sys.argv[1].split(",")))
for name in sys.argv[2:]:
    slices, _, topology = ("1 " + name).rpartition(" ")
    several = {"num_slices": int(slices.split()[-1])} if slices != "1" else {}
    devices = list(topologies.get_topology_desc(topology, "tpu", **several).devices)
    hosts = {device.process_index for device in devices}
    for fsdp in sizes:
        for tensor in sizes:
            try:
                mesh = sharding.make_mesh(fsdp, tensor, devices)
            except ValueError as error:
                print(f"{name}: fsdp {fsdp} tensor {tensor}: {error}")
                continue
            assert set(mesh.devices.flat) == set(devices)
            batch_size = 2 * len(devices) // tensor  # two rows a shard
            held = {host: set() for host in hosts}
            for (data, part, _), device in np.ndenumerate(mesh.devices):
                first = 2 * (data * fsdp + part)
                held[device.process_index] |= {first, first + 1}
            for host in hosts:
                made = sharding.process_rows(mesh, batch_size, host)
                assert made.tolist() == sorted(held[host]), (name, fsdp, tensor, host, made)
            print(f"{name}: fsdp {fsdp} tensor {tensor}: {len(hosts)} hosts")
"""


def test_every_mesh_that_divides_a_slice_is_built_and_hosts_make_the_rows_they_hold():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(map(str, SIZES)), *CHIPS],
        env={**os.environ, **NO_TPU_HERE, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines() if "hosts" in line)
    refused = set(re.findall(r"(.*): (?=fsdp \d+ x tensor \d+ does not divide)", done.stdout))
    for name, chips in CHIPS.items():
        for fsdp in SIZES:
            for tensor in SIZES:
                mesh = f"{name}: fsdp {fsdp} tensor {tensor}"
                assert (mesh in refused) == (fsdp * tensor > chips)
                assert (mesh in said) == (fsdp * tensor <= chips)
    assert said["v5e:16x16: fsdp 1 tensor 1"] == "64 hosts"
