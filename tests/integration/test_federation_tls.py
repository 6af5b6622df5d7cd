"""A real federation on loopback with TLS and registered keys; a module of its own, to run beside the other one."""

import subprocess

import pytest

from examples.federation.loopback import Loopback
from tests.conftest import SMALL, write_params
from tests.integration.certificates import write_certificates, write_keys
from tests.integration.test_federation import rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_run_with_tls_and_registered_keys_has_the_bytes_of_the_local_engine(extracted, tmp_path, app, quick_bin):
    changes = {"train_fl.num_clients": 2, "train_fl.clients_per_round": 2, "train_fl.num_rounds": 2}
    write_params(tmp_path, changes)
    (tmp_path / "data").symlink_to(extracted / "data")
    command = [quick_bin / "pipeline", "train-fl", "--method", "scaffold", "--partition", "dir05", "--seed", "0"]
    subprocess.run(command, cwd=tmp_path, check=True)
    local = (tmp_path / "results" / "scaffold-dir05" / "s0" / "model.safetensors").read_bytes()
    certificates = write_certificates(tmp_path / "certificates")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "data").symlink_to(extracted / "data")
    scalars = {key: value for key, value in SMALL.items() if not isinstance(value, list)}
    small = scalars | changes | {"federation.min_clients": 2}
    with Loopback(tmp_path, app, certificates, authenticate=True, programs=quick_bin) as federation:
        for client in range(3):
            private, public = write_keys(tmp_path / "keys", f"node-{client}")
            if client < 2:  # the third is not registered
                federation.register(public)
            federation.start_node(client, tmp_path, "--auth-supernode-private-key", str(private), name=f"n{client}")
        run = federation.run(small, method="scaffold", partition="dir05")
        assert federation.wait(run, 300) == "finished:completed", federation.log(run)
    results = tmp_path / "server" / "results" / "scaffold-dir05" / "s0"
    assert {row["name"] for row in rows(results / "participation.csv")} == {"n0", "n1"}
    assert (results / "model.safetensors").read_bytes() == local
