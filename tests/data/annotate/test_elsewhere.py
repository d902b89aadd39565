"""Workers in another environment: Beam and grain_jax's wheel, and no checkout."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.data.annotate import drill, endpoint, faults
from tests.paths import ROOT

PACKAGES = ("apache_beam", "grain_jax", "grain_jax.data")


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    """Builds the wheel, installs it with Beam and httpx in a new environment; returns its python."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder / "dist", ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = (folder / "dist").iterdir()
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "apache-beam", "httpx", wheel], check=True)
    return python


def run(python: pathlib.Path, folder: pathlib.Path) -> None:
    """Annotates images by workers that run with `python`, started in `folder`."""
    names, causes = drill.plant(folder / "pictures", 24)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The pool starts whatever `python` is first in its path.
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder)}
    where = "import {0}; print('{0}', {0}.__file__)"
    told = [
        subprocess.run(
            [python, "-c", where.format(name)],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in PACKAGES
    ]
    assert all(str(python.parent.parent) in line for line in told)
    pool = subprocess.Popen(
        [python, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    output = folder / "out"
    try:
        with endpoint.serve(faults.reply) as server:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "grain_jax.data.annotate"),
                    *(f"--images={folder / 'pictures' / 'images'}", f"--output={output}"),
                    *("--shard-size=10", "--max-faults=1", "--passes=caption,describe"),
                    *(f"--endpoint={server.url}", "--chat=tiny", "--tries=2"),
                    f"--request-seconds={faults.TIME_OUT}",
                    *("--runner=PortableRunner", "--job_endpoint=embed"),
                    *("--environment_type=EXTERNAL", f"--environment_config=localhost:{port}"),
                ],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=300,
            )
    finally:
        pool.terminate()
        said = pool.communicate(timeout=30)[1]
    assert done.returncode == 0, done.stderr + said
    assert "Starting worker" in said
    assert "Traceback" not in done.stderr, done.stderr
    expected = causes | {name: cause for name, (cause, _) in faults.SERVER.items()}
    kept = {name for name, (_, kept) in faults.SERVER.items() if kept}
    faults.check(output, names, expected, kept)


@pytest.mark.slow  # installs some 100 packages: minutes
@pytest.mark.timeout(1800)
def test_workers_in_another_environment(tmp_path):
    run(make_environment(tmp_path), tmp_path)
