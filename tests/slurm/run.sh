#!/usr/bin/env bash
# A real SLURM cluster of this one machine runs launch/slurm.sbatch: two processes train, SIGTERM preempts them,
# the job is requeued and finishes; then a job array of two runs; then a process is killed; then a job is cancelled.
#
#   apt-get install slurm-wlm munge && tests/slurm/run.sh     as root; SCRATCH=DIR keeps the files
#
# CI does not run it. It takes some minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=${SCRATCH:-$(mktemp -d)}
mkdir -p "$scratch"/{state,spool,log}
host=$(hostname -s)

finish() {
  for job in $(squeue --noheader --format=%A); do
    scancel --full --signal=KILL "$job" || true # what runs
    scancel "$job" || true # what waits
  done
  sleep 3
  for daemon in slurmd slurmctld munged; do
    [[ -s $scratch/$daemon.pid ]] || continue
    pid=$(<"$scratch/$daemon.pid")
    kill "$pid" || continue
    timeout 30 tail --pid="$pid" -f /dev/null || true # it writes there to its end
  done
  [[ -n ${SCRATCH:-} ]] || rm -rf "$scratch"
}
trap finish EXIT

cat >"$scratch/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$scratch/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
ReturnToService=2
SelectType=select/cons_tres
MpiDefault=none
MinJobAge=600
KillWait=60
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.pid
SlurmctldLogFile=$scratch/log/slurmctld.log
SlurmdLogFile=$scratch/log/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=p Nodes=$host Default=YES State=UP
EOF
export SLURM_CONF=$scratch/slurm.conf
head -c 1024 /dev/urandom >"$scratch/munge.key"
chmod 600 "$scratch/munge.key"
chmod 755 "$scratch"
munged --force --key-file="$scratch/munge.key" --socket="$scratch/munge.socket" \
  --pid-file="$scratch/munged.pid" --log-file="$scratch/log/munged.log" --seed-file="$scratch/munge.seed"
slurmctld
slurmd
until sinfo --noheader --format=%T | grep -q idle; do sleep 1; done

state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p' | head -1; }
wait_for() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || { echo "gave up waiting for: $*"; tail -n 50 "$scratch"/*.log; exit 1; }
    sleep 0.5
  done
}
expect() { # JOB STATE
  [[ $(state "$1") == "$2" ]] || { echo "job $1: $(state "$1"), expected $2"; exit 1; }
}
ended() { [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
steps() { # WORKDIR COUNT: at least so many steps are logged
  [[ -f $1/metrics.jsonl ]] && (($(wc -l <"$1/metrics.jsonl") >= $2))
}
submit() { # NAME ARGUMENTS..., two processes of two virtual devices
  local name=$1
  shift
  sbatch --parsable --ntasks-per-node=2 --cpus-per-task=1 --output="$scratch/$name.log" "$@" launch/slurm.sbatch
}
export JAX_PLATFORMS=cpu PYTHONPATH=$PWD
# On CPUs only process 0 finds its programs in the cache, and Gloo gives the others 30 s to compile theirs.
export JAX_ENABLE_COMPILATION_CACHE=false
export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
XLA_FLAGS+=" --xla_llvm_disable_expensive_passes=true" # as the tests do
train="--config tests/run_config.py --config.checkpoint_every=1000"
for tower in image text decoder; do train+=" --config.model.$tower.depth=1"; done

echo "=== 1. Two processes, preempted by SIGTERM, requeued, finished"
export GRAIN_ARGS="$train --workdir $scratch/preempted --config.total_steps=200"
job=$(submit preempted)
wait_for 600 steps "$scratch/preempted" 10
squeue
scancel --signal=TERM "$job"
wait_for 120 grep -q "back into the queue" "$scratch/preempted.log"
echo "after SIGTERM at $(wc -l <"$scratch/preempted/metrics.jsonl") steps: $(state "$job")"
sleep 5 # for SLURM to forget the first start; it lets a requeued job wait two minutes
scontrol update job="$job" starttime=now
wait_for 600 ended "$job"
cat "$scratch/preempted.log"
scontrol show job "$job" | grep -E "JobState|Restarts"
expect "$job" COMPLETED
ls "$scratch/preempted/checkpoints"

echo "=== 2. An array: each task takes its line of GRAIN_ARGS_FILE"
for keep in 1 2; do
  echo "$train --workdir $scratch/array_$keep --config.checkpoint_keep=$keep --config.total_steps=5"
done >"$scratch/arguments.txt"
array=$(GRAIN_ARGS_FILE=$scratch/arguments.txt submit array_%a --array=1-2)
wait_for 600 ended "${array}_1"
wait_for 600 ended "${array}_2"
scontrol show job "$array" | grep -E "ArrayTaskId|JobState"
expect "${array}_1" COMPLETED
expect "${array}_2" COMPLETED
grep -H '"checkpoint_keep"' "$scratch"/array_?/config.json

echo "=== 3. One of two processes is killed: the job fails within a minute and says which"
GRAIN_ARGS="$train --workdir $scratch/killed --config.total_steps=200 --heartbeat-seconds=20"
job=$(submit killed)
wait_for 600 steps "$scratch/killed" 5
victim=$(for pid in $(scontrol listpids "$job" | awk '$4 == 1 {print $1}'); do
  grep -qsa grain_jax.train "/proc/$pid/cmdline" && echo "$pid"
done | tail -1)
kill -KILL "$victim"
began=$SECONDS
wait_for 120 ended "$job"
echo "$(state "$job") $((SECONDS - began)) s after SIGKILL of process 1"
tail -n 12 "$scratch/killed.log"
expect "$job" FAILED

echo "=== 4. Cancelled: saved, and not requeued"
GRAIN_ARGS="$train --workdir $scratch/cancelled --config.total_steps=200"
job=$(submit cancelled)
wait_for 600 steps "$scratch/cancelled" 5
scancel "$job"
wait_for 120 ended "$job"
sleep 5
tail -n 5 "$scratch/cancelled.log"
expect "$job" CANCELLED
echo "all as expected"
