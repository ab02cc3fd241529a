"""The job scripts and strategy overlays of configs/, run with stand-ins for the cluster's commands on one machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rft_lightning.cli import main
from rft_lightning.sharding import FSDP2Strategy

CONFIGS = Path(__file__).parent.parent / "configs"
CLUSTER = CONFIGS / "cluster"
SCRIPTS = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed_and_tell_their_use(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text().splitlines()[1].startswith("# ")


def test_scripts_are_listed_and_copied(tmp_path, capsys):
    main(["configs"])
    listed = capsys.readouterr().out
    assert "cluster/slurm.sbatch" in listed
    assert "A run on a SLURM cluster" in listed
    main(["configs", "--copy", str(tmp_path / "c")])
    for path in SCRIPTS:
        assert (tmp_path / "c" / "cluster" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted((CONFIGS / "strategy").glob("*.yaml")), ids=lambda path: path.stem)
def test_strategy_files_parse_and_state_every_argument(path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(CONFIGS / "coco.yaml"), "-c", str(path), "--print_config"])
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    stated = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    assert strategy["class_path"] == stated["class_path"]
    if strategy["class_path"].endswith("FSDP2Strategy"):
        assert stated["init_args"].keys() == strategy["init_args"].keys()
        assert stated["init_args"] == strategy["init_args"]
        defaults = FSDP2Strategy()
        shown = {name: value for name, value in stated["init_args"].items() if hasattr(defaults, name)}
        changed = {name for name, value in shown.items() if getattr(defaults, name) != value}
        assert (
            changed
            == {"fsdp2": set(), "hsdp": {"shard_size"}, "fsdp2_offload": {"offload_policy", "offload_reference"}}[
                path.stem
            ]
        )


def test_the_8_node_script_keeps_the_papers_16_prompts(tmp_path):
    script(tmp_path / "bin", "sbatch", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    command = ["bash", CLUSTER / "slurm_8_nodes.sh", "configs/coco.yaml", "--model.group_size", "8"]
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    words = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    options = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    assert words[3:5] == [str(CLUSTER / "slurm.sbatch"), "configs/coco.yaml"]
    assert words[-2] == "--data.batch_size"
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) * int(words[-1]) == 16
    assert options["gpus-per-node"] == options["ntasks-per-node"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize(("words", "said"), [([], "usage: "), (["no.yaml"], "there is no file no.yaml")])
def test_scripts_look_at_the_task_before_anything_starts(path, words, said, tmp_path):
    for name in ("sbatch", "srun", "python"):
        script(tmp_path / "bin", name, f"#!/bin/bash\ntouch {tmp_path}/started\n")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "DEVICES": "1",
        "SLURM_JOB_ID": "1",
    }
    done = subprocess.run(
        ["bash", path, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("listing", "found"), [(None, 0), ("exit 9", 0), ("echo GPU 0: A; echo GPU 1: A", 2)])
def test_torchrun_counts_gpus_or_asks_for_devices(listing, found, tmp_path):
    script(tmp_path / "bin", "python", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    if listing is not None:
        script(tmp_path / "bin", "nvidia-smi", f"#!/bin/bash\n{listing}\n")
    (tmp_path / "task.yaml").touch()
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHON": str(tmp_path / "bin" / "python")}
    if listing is None:
        environment["PATH"] = str(without_nvidia_smi(tmp_path / "tools"))
    command = ["/bin/bash", CLUSTER / "torchrun.sh", "task.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if found:
        assert f"--nproc-per-node\n{found}\n" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == (
            "torchrun.sh: nvidia-smi names no GPU here; set DEVICES, the number of processes on this machine\n"
        )


def without_nvidia_smi(folder: Path) -> Path:
    """A folder with what torchrun.sh calls, and nothing else."""
    folder.mkdir()
    for name in ("realpath", "basename", "mkdir", "cat", "grep"):
        (folder / name).symlink_to(Path("/usr/bin") / name)
    return folder


# Runs

STOP = """
import os, signal
from lightning.pytorch import Callback

class StopOnce(Callback):
    '''What the cluster does before the time limit: a signal, in the middle of the second rollout batch.'''

    def on_train_batch_start(self, trainer, *args):
        print(f"rank {trainer.global_rank} of {trainer.world_size} at step {trainer.global_step}", flush=True)
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
"""
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
runs = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "SLURM_NODEID": str(i)}})
    for i in range(tasks)
]
sys.exit(max(run.wait() for run in runs))
"""


@pytest.fixture
def job(tmp_path, tiny_policy) -> tuple[Path, dict[str, str]]:
    """A folder with a task of three steps and stand-ins for srun and scontrol; and the environment for a job in it."""
    (tmp_path / "stopping.py").write_text(STOP)
    (tmp_path / "task.yaml").write_text(
        f"config: {CONFIGS / 'quickstart.yaml'}\n"
        "trainer:\n"
        "  max_steps: 3\n"
        "  val_check_interval: 3\n"
        "  limit_val_batches: 0\n"
        "  callbacks+: [{class_path: stopping.StopOnce}]\n"
        f"model: {{init_args: {{policy: {tiny_policy}, group_size: 2, max_completion_length: 8}}}}\n"
        "data: {init_args: {batch_size: 1, shots: 2}}\n"
    )
    script(tmp_path / "bin", "srun", SRUN)
    script(tmp_path / "bin", "scontrol", f'#!/bin/bash\necho "$@" >>{tmp_path}/scontrol.log\n')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    environment = {
        **kept, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return tmp_path, environment


def checkpointed(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_slurm_job_is_interrupted_requeued_and_goes_on(job):
    folder, environment = job
    environment |= {
        "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "rft", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip

    def submit():
        command = ["bash", CLUSTER / "slurm.sbatch", "task.yaml", "--trainer.enable_progress_bar", "false"]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=400
        )

    first = submit()
    assert first.returncode == 75, first.stderr[-4000:]
    assert "rank 1 of 2 at step 1" in first.stdout
    assert (folder / "scontrol.log").read_text() == "requeue 4321\n"
    assert checkpointed(folder / "runs" / "4321")["global_step"] == 2
    second = submit()
    assert second.returncode == 0, second.stderr[-4000:]
    assert "rank 1 of 2 at step 2" in second.stdout
    assert "at step 1" not in second.stdout
    assert (folder / "scontrol.log").read_text() == "requeue 4321\n"
    assert checkpointed(folder / "runs" / "4321")["global_step"] == 3


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_failed_slurm_job_is_not_requeued(job):
    folder, environment = job
    script(folder / "bin", "srun", "#!/bin/bash\nexit 1\n")
    environment |= {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}
    command = ["bash", CLUSTER / "slurm.sbatch", "task.yaml"]
    assert subprocess.run(command, cwd=folder, check=False, env=environment).returncode == 1
    assert not (folder / "scontrol.log").exists()


def test_a_job_that_cannot_be_requeued_says_how_to_go_on(job):
    folder, environment = job
    script(folder / "bin", "srun", "#!/bin/bash\nexit 75\n")
    script(folder / "bin", "scontrol", "#!/bin/bash\nexit 1\n")
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}
    command = ["bash", CLUSTER / "slurm.sbatch", "task.yaml"]
    done = subprocess.run(command, cwd=folder, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 75
    assert f"saved in {folder}/runs/7/checkpoints/last.ckpt" in done.stderr
    assert f"submit it again with RUN={folder}/runs/7" in done.stderr


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_two_agents_of_torchrun_are_interrupted_and_go_on(job):
    folder, environment = job
    port = str(free_port())

    def launch():
        agents = []
        for node in range(2):
            variables = {"NODES": "2", "NODE_RANK": str(node), "DEVICES": "1", "MASTER_PORT": port}
            command = ["bash", CLUSTER / "torchrun.sh", "task.yaml", "--trainer.enable_progress_bar", "false"]
            output = (folder / f"node{node}.log").open("w")
            agents.append(
                subprocess.Popen(
                    command, cwd=folder, env={**environment, **variables}, stdout=output, stderr=subprocess.STDOUT
                )
            )
        statuses = [agent.wait(timeout=400) for agent in agents]
        return statuses, [(folder / f"node{node}.log").read_text() for node in range(2)]

    statuses, logs = launch()
    assert statuses == [75, 75], logs[0][-3000:] + logs[1][-3000:]
    assert checkpointed(folder / "runs" / "task")["global_step"] == 2
    statuses, logs = launch()
    assert statuses == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    assert "rank 1 of 2 at step 2" in logs[1]
    assert checkpointed(folder / "runs" / "task")["global_step"] == 3


# A stand-in for rft_lightning: two processes that are told to stop, the first ending later than the second. As in a
# run, a second signal ends them at once: it comes from torchrun as soon as one of them has ended.
ENDS = """
import os, signal, sys, time

rank = int(os.environ["RANK"])

def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0 if rank else 5)
    sys.exit(int(os.environ["STATUS"]))

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
open(f"ready{rank}", "w").close()
time.sleep(120)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGTERM", 3)])
def test_a_signal_to_the_launcher_reaches_the_processes_and_their_status_comes_back(job, number, status):
    folder, environment = job
    (folder / "rft_lightning").mkdir()
    (folder / "rft_lightning" / "__init__.py").touch()
    (folder / "rft_lightning" / "__main__.py").write_text(ENDS)
    variables = {"DEVICES": "2", "MASTER_PORT": str(free_port()), "STATUS": str(status)}
    launcher = subprocess.Popen(
        ["bash", CLUSTER / "torchrun.sh", "task.yaml"], cwd=folder, env={**environment, **variables},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)), launcher)
    launcher.send_signal(getattr(signal, number))
    assert launcher.wait(timeout=60) == status


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_sigterm_to_the_launcher_saves_the_run(job):
    folder, environment = job
    (folder / "stopping.py").write_text(
        STOP.replace("os.kill(os.getpid(), signal.SIGUSR1)", "open('now', 'w').close()")
    )
    variables = {"DEVICES": "2", "MASTER_PORT": str(free_port())}
    command = ["bash", CLUSTER / "torchrun.sh", "task.yaml", "--trainer.max_steps", "2000"]
    with (folder / "launcher.log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=folder, env={**environment, **variables}, stdout=log, stderr=subprocess.STDOUT
        )
        wait_for((folder / "now").exists, launcher)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=300) == 75, (folder / "launcher.log").read_text()[-3000:]
    assert checkpointed(folder / "runs" / "task")["global_step"] >= 2


def wait_for(there, process, seconds=300):
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"ended early with status {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
