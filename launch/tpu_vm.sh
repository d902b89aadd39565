#!/usr/bin/env bash
# A run on TPUs of Google Cloud, as queued resource:
#
#   export TPU=grain ZONE=us-central1-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create [--spot]   asks for the pod and waits until it is there
#   launch/tpu_vm.sh install           this checkout, as committed, and its packages, on every worker
#   launch/tpu_vm.sh run --config demo --workdir gs://BUCKET/RUN
#   launch/tpu_vm.sh tail [WORKER [SLICE]]   a worker's log, as it grows; worker 0 of slice 0 prints the progress
#   launch/tpu_vm.sh stop              every worker saves and ends
#   launch/tpu_vm.sh delete
#
# SLICES=4 in the environment asks for four pods of TYPE, which train together. FORWARD="WANDB_API_KEY HF_TOKEN"
# names variables that `run` hands to the trainers. `run` with the same arguments resumes, after `stop`, a failure
# or maintenance. For spot capacity one command does it all, until the run is done or has failed:
#
#   launch/tpu_vm.sh keep --spot -- --config demo --workdir gs://BUCKET/RUN
#
# It creates and installs what is missing, again after the pod was taken away, and resumes the run. It may be
# started again at any time. End it (Ctrl-C) before `stop`, or it resumes the run.
set -euo pipefail
: "${TPU:?a name for the pod}" "${ZONE:?its zone}"
action=${1:?create, install, run, keep, tail, stop or delete}
shift
nodes=("$TPU") named=(--node-id="$TPU")
if ((${SLICES:-1} > 1)); then
  nodes=() named=(--node-count="$SLICES" --node-prefix="$TPU")
  for ((slice = 0; slice < SLICES; slice++)); do nodes+=("$TPU-$slice"); done
fi

everywhere() { # COMMAND, on every worker of all slices at once; gcloud's output names the worker that failed
  local node job jobs=() failed=0
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=$?; done
  return "$failed"
}

state() {
  gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format="value(state.state)"
}

case $action in
  create)
    gcloud compute tpus queued-resources create "$TPU" "${named[@]}" --zone="$ZONE" \
      --accelerator-type="${TYPE:?such as v5litepod-64}" \
      --runtime-version="${RUNTIME:?such as v2-alpha-tpuv5-lite}" "$@"
    until [[ ${now:-} == ACTIVE ]]; do
      sleep "${POLL:-30}"
      now=$(state)
      echo "$TPU: $now"
      [[ $now != FAILED && $now != SUSPENDED ]] || exit 1
    done
    ;;
  install)
    checkout=$(mktemp -d)/grain.tar
    git archive --output="$checkout" HEAD
    for node in "${nodes[@]}"; do
      gcloud compute tpus tpu-vm scp "$checkout" "$node:grain.tar" --zone="$ZONE" --worker=all
    done
    # The machines' own Python may be too old; uv brings one.
    everywhere 'python3 -m pip install --user uv && mkdir -p grain/source && tar -xf grain.tar -C grain/source &&
      cd grain && python3 -m uv venv --allow-existing --python 3.13 &&
      python3 -m uv pip install --reinstall-package grain_jax -c source/constraints-newest.txt \
        "./source[data,gcs,tpu]" && rm -r source'
    ;;
  run)
    variables=
    for name in ${FORWARD:-}; do
      [[ -n ${!name+set} ]] || { echo "FORWARD: $name is not set" >&2 && exit 2; }
      printf -v variables '%sexport %s=%q && ' "$variables" "$name" "${!name}"
    done
    printf -v arguments ' %q' "$@"
    # The braces: else a shell that waits for the trainer keeps ssh's output open until the run ends. `stop` signals
    # the inner shell too, which stays to note the status for `keep`.
    everywhere "${variables}cd grain && rm -f status &&
      { nohup setsid bash -c 'trap : TERM; \"\$@\"; echo \$? >status' run \
        .venv/bin/python -m grain_jax.train$arguments >>train.log 2>&1 </dev/null & }"
    ;;
  keep)
    flags=("$0" create)
    while [[ ${1:?--config and other arguments after a --} != -- ]]; do flags+=("$1") && shift; done
    shift
    while true; do
      now=$(state 2>&1) || [[ $now == *NOT_FOUND* ]] || now="unknown ($now)"
      case $now in
        *NOT_FOUND*) "${flags[@]}" || state >/dev/null ;; # ends here if the request was refused
        *FAILED | *SUSPENDED) echo "$TPU: $now; creating it again" && "$0" delete --quiet || true ;;
        *ACTIVE)
          # Of each worker: running, the trainer's status, or none where it never ran or the machine was restarted.
          # shellcheck disable=SC2016
          ends=$(everywhere 'echo "trainer: $(pgrep -f "[g]rain_jax.train" >/dev/null && echo running ||
            cat grain/status 2>/dev/null || echo none)"' | sed -n 's/.*trainer: //p' | sort -u) || ends=running
          if [[ $ends == 0 ]]; then echo "$TPU: done" && exit; fi
          if [[ $ends != *running* ]]; then
            for end in $ends; do # 75: preempted and saved. 134: another process fell silent.
              [[ $end =~ ^(0|75|134|none)$ ]] || { echo "$TPU: the run ended with status $end" >&2 && exit "$end"; }
            done
            echo "$TPU: starting the run"
            { [[ $ends != *none* ]] || "$0" install; } && "$0" run "$@" || true
          fi
          ;;
      esac
      sleep "${POLL:-30}"
    done
    ;;
  tail)
    gcloud compute tpus tpu-vm ssh "${nodes[${2:-0}]}" --zone="$ZONE" --worker="${1:-0}" \
      --command="tail -F grain/train.log"
    ;;
  stop) everywhere 'pkill -TERM -f "[g]rain_jax.train"' ;; # the bracket: not this command itself
  delete) gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force "$@" ;;
  *) echo "$action: expected create, install, run, keep, tail, stop or delete" >&2 && exit 2 ;;
esac
