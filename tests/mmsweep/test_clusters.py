"""The cluster files, against what will read them: Ray's schema, EC2's parameters, an AWS server, a shell.

What is not checked: that the clouds and Kubernetes accept them. For Google Cloud only Ray's schema is
here to ask, and for KubeRay only the handful of keys that this file knows of; no controller has seen it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from botocore.validate import ParamValidator
from http_service import HttpService

from mmsweep.cluster import ENVIRONMENT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
RAY_FILES = ("aws-gpu", "gcp-gpu", "local-cpu")
CLOUDS = ("aws-gpu", "gcp-gpu")
STORE_VARIABLES = {"AWS_ENDPOINT_URL", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"}


def text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text()


def filled(name: str) -> dict[str, Any]:
    """A cluster file with the examples behind its !fill_in taken for values."""
    return yaml.safe_load(text(name).replace("!fill_in ", ""))


def prepared(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(filled(name))
    validate_config(config)
    return config


def start_commands(config: dict[str, Any]) -> list[str]:
    return [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]


# --- what Ray says of the files ------------------------------------------------------------------


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_accepts_the_filled_in_file(name):
    config = prepared(name)
    assert config["cluster_name"] == "mmsweep"
    assert config["max_workers"] >= 1


@pytest.mark.parametrize("name", RAY_FILES)
def test_a_file_does_not_load_as_long_as_one_value_is_missing(name):
    """`ray up`, `down` and `exec` load it with `yaml.safe_load`; to call them here could reach a cloud."""
    pieces = text(name).split("!fill_in ")
    assert len(pieces) >= 4
    for left in range(1, len(pieces)):
        one = "".join(("!fill_in " if k == left else "") + piece for k, piece in enumerate(pieces))
        with pytest.raises(yaml.YAMLError, match="!fill_in") as refused:
            yaml.safe_load(one)
        assert refused.value.problem_mark.line == "".join(pieces[:left]).count("\n")


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_are_spot_machines_and_come_with_the_trials(name):
    config = prepared(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert config["provider"]["cache_stopped_nodes"] is False
    assert len(types) >= 3
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert worker["resources"]["GPU"] >= 1
        node = worker["node_config"]
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot or node["scheduling"]["provisioningModel"] == "SPOT"


@pytest.mark.parametrize("name", CLOUDS)
def test_every_worker_watches_for_its_notice(name):
    *_, watch = prepared(name)["worker_start_ray_commands"]
    assert f"spot_notice.py {name[:3]} " in watch


@pytest.mark.parametrize("name", RAY_FILES)
def test_what_is_sent_is_there_and_installs(name):
    config = prepared(name)
    assert all((ROOT / local).exists() for local in config["file_mounts"].values())
    sent = {Path(remote).name for remote in config["file_mounts"]}
    packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text()).group(1)
    assert {p.split(".")[0] for p in re.findall(r'"(.*?)"', packages)} <= sent
    assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"} <= sent
    assert any("make .venv/.run" in command for command in config["setup_commands"])
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text().split("$(VENV)/.run:")[1]


# --- security, and what every process gets -------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(p for p in FOLDER.iterdir() if p.is_file()), ids=lambda path: path.name
)
def test_no_secret_and_nothing_open_to_the_world(path):
    content = path.read_text()
    assert "0.0.0.0" not in content
    assert "::/0" not in content
    secrets = r"AKIA|ASIA|PRIVATE KEY|(access_key(_id)?|password)\s*[:=]\s*\w|\b[0-9a-f]{64}\b"
    assert not re.search(secrets, content, re.IGNORECASE)


@pytest.fixture
def node(tmp_path) -> Path:
    """A home as a set-up node has it, whose `ray`, `python` and `setsid` tell what they are given."""
    (tmp_path / "mmsweep").mkdir()
    (tmp_path / "mmsweep" / "cluster").symlink_to(FOLDER)
    programs = tmp_path / "mmsweep" / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "python", "setsid"):
        (programs / name).write_text(
            f'#!/bin/sh\n(echo "{name} $*"; env) >> "$HOME/calls"\necho >> "$HOME/calls"\n'
        )
        (programs / name).chmod(0o755)
    return tmp_path


def shell(command: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a cluster file with nothing in the environment but a home and a path."""
    bare = {"HOME": str(home), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "192.0.2.7", **more}
    return subprocess.run(["bash", "-c", command], env=bare, capture_output=True, text=True, cwd=home)


def calls(home: Path) -> list[tuple[str, dict[str, str]]]:
    found = []
    for block in (home / "calls").read_text().strip().split("\n\n"):
        command, *lines = block.splitlines()
        found.append((command, dict(line.partition("=")[::2] for line in lines)))
    return found


@pytest.mark.parametrize("name", RAY_FILES)
def test_every_start_command_has_the_token_and_the_environment(name, node):
    config = prepared(name)
    for command in start_commands(config):
        done = shell(command, node, RAY_USAGE_STATS_ENABLED="1")  # as `ray up` may set it
        assert done.returncode == 0, done.stderr
    started = [(command, env) for command, env in calls(node) if command.startswith("ray start")]
    assert len(started) == 2
    for command, env in started:
        assert env["RAY_AUTH_MODE"] == "token"
        assert {key: env[key] for key in ENVIRONMENT} == ENVIRONMENT
        assert ("--dashboard-host=127.0.0.1" in command) == ("--head" in command)
    (head, _), (worker, _) = started
    assert "--head" in head
    assert "--address=192.0.2.7:6379" in worker


def test_the_environment_is_that_of_a_launch(node):
    done = shell(". ~/mmsweep/cluster/environment.sh && env", node)
    set_here = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    path = set_here.pop("PATH")
    assert path.startswith(f"{node}/mmsweep/.venv/bin:")
    for name in ("HOME", "PWD", "SHLVL", "_", "RAY_HEAD_IP", "LC_CTYPE", "OLDPWD"):
        set_here.pop(name, None)
    assert set_here == {**ENVIRONMENT, "RAY_AUTH_MODE": "token"}


def test_google_s_storage_is_named_to_every_process(node):
    [write] = [command for command in prepared("gcp-gpu")["setup_commands"] if "store.sh" in command]
    assert shell(write, node).returncode == 0
    done = shell(". ~/mmsweep/cluster/environment.sh && env", node)
    set_here = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert set_here.keys() >= STORE_VARIABLES
    assert set_here["AWS_ENDPOINT_URL"] == "https://storage.googleapis.com"


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_head_s_chat_room_is_that_of_its_webhook_file(name, node):
    (node / "webhook.sh").write_text("export MMSWEEP_WEBHOOK=https://chat.example/secret\n")
    assert shell(prepared(name)["head_start_ray_commands"][-1], node).returncode == 0
    [(command, env)] = calls(node)
    assert command.startswith("ray start --head")
    assert env["MMSWEEP_WEBHOOK"] == "https://chat.example/secret"


# --- AWS -----------------------------------------------------------------------------------------


def aws_node_types() -> dict[str, Any]:
    return filled("aws-gpu")["available_node_types"]


@pytest.mark.parametrize("kind", aws_node_types())
def test_ec2_knows_every_parameter(kind):
    config = {**aws_node_types()[kind]["node_config"], "MinCount": 1, "MaxCount": 1, "SubnetId": "subnet-1"}
    service = boto3.Session().client("ec2", region_name="us-east-1").meta.service_model
    report = ParamValidator().validate(config, service.operation_model("RunInstances").input_shape)
    assert not report.has_errors(), report.generate_report()
    assert config["MetadataOptions"]["HttpTokens"] == "required"
    [disk] = config["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert disk["Ebs"]["DeleteOnTermination"] is True
    assert config["IamInstanceProfile"]["Name"] == ("mmsweep-head" if kind == "head" else "mmsweep-worker")


@pytest.mark.parametrize(
    ("cidr", "accepted"),
    [
        ("198.51.100.7/32", True),
        ("198.51.100.0/24", True),
        ("198.51.0.0/16", False),
        ("0.0.0.0/0", False),
        ("", False),
    ],
)
def test_only_a_small_range_may_open_ssh(cidr, accepted):
    pattern = re.search(r"OperatorCidr:.*?AllowedPattern: '(.*?)'", text("aws-account"), re.DOTALL).group(1)
    assert bool(re.fullmatch(pattern, cidr)) == accepted  # CloudFormation matches the whole value
    assert "Default" not in text("aws-account").split("OperatorCidr:")[1].split("Bucket:")[0]


@pytest.mark.s3  # the server that plays S3 plays the rest of AWS too
def test_aws_makes_the_account_s_parts_and_a_spot_worker(s3_server, tmp_path, monkeypatch):
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key of SSH there
    ec2 = boto3.client("ec2", region_name="us-east-1")
    group = deploy_account(ec2)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    config = prepared("aws-gpu")
    for kind in config["available_node_types"].values():
        kind["node_config"] |= {"SecurityGroupIds": [group], "ImageId": image}
    config = bootstrap_aws(config)

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in config["available_node_types"].values():
        provider.create_node(kind["node_config"], {}, 1)
    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    kinds = {kind["node_config"]["InstanceType"]: name for name, kind in aws_node_types().items()}
    assert sorted(machine["InstanceType"] for machine in machines) == sorted(kinds)
    for machine in machines:
        head = kinds[machine["InstanceType"]] == "head"
        assert [found["GroupId"] for found in machine["SecurityGroups"]] == [group]
        assert machine.get("InstanceLifecycle") == (None if head else "spot")
        profile = "mmsweep-head" if head else "mmsweep-worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
    check_ingress(ec2, group)
    groups = ec2.describe_security_groups()["SecurityGroups"]
    assert not [found["GroupName"] for found in groups if found["GroupName"].startswith("ray-")]


def deploy_account(ec2: Any) -> str:
    """Deploy aws-account.yaml; returns the id of its security group."""
    [vpc] = ec2.describe_vpcs()["Vpcs"]
    given = {"Vpc": vpc["VpcId"], "OperatorCidr": "198.51.100.7/32", "Bucket": "my-bucket"}
    stacks = boto3.client("cloudformation", region_name="us-east-1")
    stacks.create_stack(
        StackName="mmsweep",
        TemplateBody=text("aws-account"),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
    )
    [output] = stacks.describe_stacks(StackName="mmsweep")["Stacks"][0]["Outputs"]
    assert output["OutputKey"] == "SecurityGroup"
    return output["OutputValue"]


def check_ingress(ec2: Any, group: str) -> None:
    """SSH from the operator, everything from the group itself, and no more."""
    [found] = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = found["IpPermissions"]
    [ssh] = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)
    assert [source["CidrIp"] for source in ssh["IpRanges"]] == ["198.51.100.7/32"]
    inside = [pair["GroupId"] for rule in rules for pair in rule["UserIdGroupPairs"]]
    assert inside == [group]


@pytest.mark.s3
def test_declared_cores_and_gpus_are_those_of_the_machines(s3_server):
    types = {k: v for k, v in aws_node_types().items() if k != "head"}
    ec2 = boto3.client("ec2", region_name="us-east-1")
    for kind in types.values():
        name = kind["node_config"]["InstanceType"]
        [facts] = ec2.describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
        gpus = sum(gpu["Count"] for gpu in facts["GpuInfo"]["Gpus"])
        assert kind["resources"] == {"CPU": facts["VCpuInfo"]["DefaultVCpus"], "GPU": gpus}


def test_the_template_is_one_that_cloudformation_takes():
    done = subprocess.run(
        [
            Path(sys.executable).with_name("cfn-lint"),
            "--regions",
            "us-east-1",
            "--",
            FOLDER / "aws-account.yaml",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- Kubernetes ----------------------------------------------------------------------------------


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, policy = yaml.safe_load_all(text("kuberay"))
    return cluster, policy


def test_kuberay_s_keys():
    """The keys of ray.io/v1 that are used here, by hand: not the CRD's schema, and no controller's word."""
    cluster, policy = kuberay()
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    known = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
    assert spec.keys() == known | {"headGroupSpec", "workerGroupSpecs"}
    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert spec["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    [head] = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["envFrom"] == [{"secretRef": {"name": "mmsweep-webhook", "optional": True}}]
    [group] = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    for part in (spec["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        [container] = part["template"]["spec"]["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == ENVIRONMENT
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["runAsNonRoot"] is True
        labels = part["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"] == labels
        assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
    assert tolerated >= {"nvidia.com/gpu", "cloud.google.com/gke-spot", "spot"}


def test_kubernetes_refuses_the_placeholders():
    """A namespace is a DNS label (RFC 1123): lower case."""
    for document in kuberay():
        assert not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["namespace"])


# --- the notice of a spot machine ----------------------------------------------------------------


class Metadata(HttpService):
    """A cloud's metadata service: no notice at first, then one."""

    def __init__(self, cloud: str, quiet: int) -> None:
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                good = cloud == "aws" and self.path == "/latest/api/token"
                self.answer(200 if good else 404, b"a-token")

            def do_GET(self) -> None:
                outer.asked += 1
                notice = outer.asked > quiet
                if cloud == "gcp":
                    good = (
                        self.path.endswith("/instance/preempted")
                        and self.headers["Metadata-Flavor"] == "Google"
                    )
                    self.answer(200 if good else 403, b"TRUE" if notice else b"FALSE")
                else:
                    good = self.headers["X-aws-ec2-metadata-token"] == "a-token"
                    good_path = self.path == "/latest/meta-data/spot/instance-action"
                    self.answer(401 if not good else 200 if notice and good_path else 404, b"{}")

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)


# --- a cluster, as the files start it ------------------------------------------------------------


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home with this repository's own environment in it, and a token made as the files make it."""
    folder = Path(tempfile.mkdtemp(prefix="mm"))  # short: Ray's sockets are below it
    (folder / "mmsweep").mkdir()
    (folder / "mmsweep" / "cluster").symlink_to(FOLDER)
    (folder / "mmsweep" / ".venv").symlink_to(sys.prefix)
    [make_token] = prepared("local-cpu")["head_setup_commands"][-1:]
    done = shell(f"umask 022; {make_token}", folder)
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_nobody_else_can_read_the_token(home):
    token = home / ".ray" / "auth_token"
    assert len(token.read_text()) >= 32
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    [check] = prepared("local-cpu")["worker_setup_commands"][-1:]
    assert shell(check, home).returncode == 0
    token.chmod(0o644)
    assert shell(check, home).returncode != 0
    token.chmod(0o600)


@dataclass(frozen=True, slots=True)
class Head:
    """Ports of a running head."""

    gcs: int
    dashboard: int


@pytest.fixture(scope="module")
def head(home) -> Iterator[Head]:
    """A head that runs the start command of local-cpu.yaml, on ports of its own."""
    from tests.conftest import free_port

    command = prepared("local-cpu")["head_start_ray_commands"][-1]
    port, dashboard = free_port(), free_port()
    for old, new in (
        ("--port=6379", f"--port={port}"),
        ("--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
    ):
        assert old in command
        command = command.replace(old, new)
    own = {
        "--dashboard-port": dashboard,
        "--dashboard-agent-listen-port": free_port(),
        "--dashboard-agent-grpc-port": free_port(),
        "--runtime-env-agent-port": free_port(),
        "--metrics-export-port": free_port(),
        "--ray-client-server-port": free_port(),
        "--num-cpus": 1,
        "--temp-dir": home / "t",
    }
    command += " " + " ".join(f"{name}={value}" for name, value in own.items()) + " --block"
    output = (home / "head.log").open("wb")
    process = psutil.Popen(
        ["bash", "-c", command],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while submit(dashboard)[0] is None:
            assert process.poll() is None, (home / "head.log").read_text()
            assert time.monotonic() < deadline, (home / "head.log").read_text()
            time.sleep(0.1)
        yield Head(port, dashboard)
    finally:
        # Never `ray stop`, which would end every Ray of this machine.
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        output.close()


def submit(port: int, token: str | None = None) -> tuple[int | None, str]:
    """Ask for a job to be run; HTTP status and body of the answer, None without one."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps({"entrypoint": "echo done"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return None, ""


def test_jobs_need_the_token(head, home):
    assert submit(head.dashboard)[0] == 401
    assert submit(head.dashboard, "0" * 64)[0] in (401, 403)
    status, body = submit(head.dashboard, (home / ".ray" / "auth_token").read_text())
    assert status == 200, body
    assert json.loads(body)["submission_id"].startswith("raysubmit_")


def test_the_dashboard_listens_on_this_machine_alone(head):
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == head.dashboard
    }
    assert listening <= {"127.0.0.1", "::1"}
    assert listening


def examine(head: Head, home: Path, first: str = "") -> list[str]:
    """Lines of the doctor about the cluster, after some code of its process."""
    code = f"import sys; from mmsweep import doctor; {first}"
    code += "from mmsweep.store import open_store; objects = open_store(sys.argv[2]).objects; "
    code += "print(*(found.line() for found in doctor.check_cluster(sys.argv[1], objects)), sep=chr(10))"
    words = f"127.0.0.1:{head.gcs} {home / 'store'}"
    done = shell(f"cd {ROOT} && . cluster/environment.sh && python -c '{code}' {words}", home)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_doctor_finds_the_cluster_sound(head, home):
    lines = examine(head, home)
    assert [line.split()[0] for line in lines[:3]] == ["ok"] * 3
    assert "1 node, 1 CPUs, 0 GPUs" in lines[0]
    assert re.search(r"Ray at \S+ wants a token$", lines[1])
    assert re.search(r"the jobs API at \S+ wants a token$", lines[2])
    disks = [line for line in lines[3:] if re.match(r"warning  (cache|runs) ", line)]  # small or slow here
    if not disks:
        assert re.search(r"every node has python 3\..*, and sound devices, disks, store and clock$", lines[3])
    assert len(lines) == 3 + (len(disks) or 1)
    assert list((home / "store").rglob("*")) == []


def test_the_doctor_finds_a_node_with_other_versions(head, home):
    here = 'doctor.clusters.installed = lambda package: "9.9.9"; '  # of this process alone
    lines = examine(head, home, here)
    [problem] = [line for line in lines if line.startswith("problem")]
    assert re.search(r" node \S+ differs: mmsweep \S+ \(here 9\.9\.9\), ray 2\.", problem)


STANDS_IN_FOR_AN_AGENT = """
import pathlib, signal, sys
def told(*_):
    pathlib.Path(sys.argv[-1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, told)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def few_processes(tmp_path) -> Path:
    """A folder like /proc that shows what `show` has started, and nothing else of this machine."""
    (tmp_path / "proc").mkdir()
    return tmp_path / "proc"


def show(proc: Path, pid: int) -> None:
    (proc / str(pid)).symlink_to(f"/proc/{pid}")


@pytest.fixture
def stand_in(few_processes, tmp_path) -> Iterator[Callable[..., Path]]:
    """Starts a process with the command line of an agent; it makes the file that is returned on SIGTERM."""
    for module in ("agent", "follower", "other"):
        path = tmp_path / "code" / "mmsweep" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STANDS_IN_FOR_AN_AGENT)
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> Path:
        told = tmp_path / f"told-{len(started)}"
        process = subprocess.Popen(
            [sys.executable, *words, told], cwd=tmp_path / "code", stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        show(few_processes, process.pid)
        return told

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def spot_notice(node: Path, proc: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = f"{node}/mmsweep/.venv/bin:{os.environ['PATH']}"
    command = [sys.executable, FOLDER / "spot_notice.py", *words, "--poll", "0.01", "--proc", proc]
    environment = {"HOME": str(node), "PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


AGENT = ("-m", "mmsweep.agent", "--detach")


def raylet(head: Head) -> int:
    """Process id of the node of a head, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            program, *options = process.info["cmdline"] or [""]
            at = rf"--gcs-address=.*:{head.gcs}"
            if program.endswith("/raylet") and any(re.fullmatch(at, option) for option in options):
                return process.pid
        time.sleep(0.1)
    raise AssertionError("no raylet")


@pytest.mark.parametrize(("cloud", "deadline"), [("aws", "110"), ("gcp", "25")])
def test_a_notice_saves_the_runs_and_drains_the_node(cloud, deadline, head, node, few_processes, stand_in):
    """The node is the real one of `head`; the `ray` that would drain it only tells what it was asked."""
    show(few_processes, raylet(head))
    told = stand_in(*AGENT)
    service = Metadata(cloud, quiet=3)
    try:
        done = spot_notice(node, few_processes, cloud, "--metadata", service.url)
    finally:
        service.stop()
    assert done.returncode == 0, done.stderr
    assert service.asked == 4
    assert told.exists()
    assert "1 runs on this machine" in done.stdout
    asked = [command for command, _ in calls(node) if f":{head.gcs} " in command]
    assert len(asked) == 1
    words = asked[0].split()
    assert words[:3] == ["ray", "drain-node", "--address"]
    assert re.fullmatch(r"[0-9a-f]{56}", words[words.index("--node-id") + 1])
    assert words[words.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    assert words[-2:] == ["--deadline-remaining-seconds", deadline]


def test_an_agent_that_starts_before_ray_hears_of_the_notice_is_told(few_processes, stand_in, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    notice = importlib.import_module("spot_notice")
    told = [stand_in(*AGENT)]

    def drain(*_: object) -> bool:
        told.append(stand_in(*AGENT))
        return True

    monkeypatch.setattr(notice, "nodes", lambda _: [("127.0.0.1:6379", "the node")])
    monkeypatch.setattr(notice, "drain", drain)
    assert notice.main(["--now", "--poll", "0.01", "--proc", str(few_processes)]) == 0
    assert [path.exists() for path in told] == [True, True]


def test_only_what_a_launch_has_started_is_told(node, few_processes, stand_in, monkeypatch):
    agent, follower = stand_in(*AGENT), stand_in("-m", "mmsweep.follower", "--detach")
    others = [
        stand_in("-m", "mmsweep.agent"),  # by hand
        stand_in("-m", "mmsweep.other", "--detach"),
        stand_in("-m", "mmsweep.other", "-m", "mmsweep.agent", "--detach"),
    ]
    monkeypatch.syspath_prepend(FOLDER)
    notice = importlib.import_module("spot_notice")
    with monkeypatch.context() as somebody_else:
        somebody_else.setattr(os, "getuid", lambda: 4_000_000)
        assert notice.agents(few_processes) == set()
    assert len(notice.agents(few_processes)) == 2
    done = spot_notice(node, few_processes, "--now")
    assert done.returncode == 1  # there is no Ray node to drain
    assert agent.exists()
    assert follower.exists()
    assert not any(other.exists() for other in others)
