#!/usr/bin/env bash
# A run on a TPU pod of Google Cloud, as queued resource:
#
#   export TPU=grain ZONE=us-central1-a TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create [--spot]   asks for the pod and waits until it is there
#   launch/tpu_vm.sh install           this checkout, as committed, and its packages, on every worker
#   launch/tpu_vm.sh run --config demo --workdir gs://BUCKET/RUN
#   launch/tpu_vm.sh tail [WORKER]     a worker's log, as it grows; worker 0 prints the progress
#   launch/tpu_vm.sh stop              every worker saves and ends
#   launch/tpu_vm.sh delete
#
# `run` with the same arguments resumes, after `stop`, a failure or maintenance. A pod that was taken away
# (--spot) is gone: delete, create, install, run.
set -euo pipefail
: "${TPU:?a name for the pod}" "${ZONE:?its zone}"
action=${1:?create, install, run, tail, stop or delete}
shift

everywhere() { # COMMAND, on every worker; gcloud's output names the worker that failed
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case $action in
  create)
    gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
      --accelerator-type="${TYPE:?such as v5litepod-64}" \
      --runtime-version="${RUNTIME:?such as v2-alpha-tpuv5-lite}" "$@"
    until [[ ${state:-} == ACTIVE ]]; do
      sleep "${POLL:-30}"
      state=$(gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format="value(state.state)")
      echo "$TPU: $state"
      [[ $state != FAILED && $state != SUSPENDED ]] || exit 1
    done
    ;;
  install)
    checkout=$(mktemp -d)/grain.tar
    git archive --output="$checkout" HEAD
    gcloud compute tpus tpu-vm scp "$checkout" "$TPU:grain.tar" --zone="$ZONE" --worker=all
    # The machines' own Python may be too old; uv brings one.
    everywhere 'python3 -m pip install --user uv && mkdir -p grain/source && tar -xf grain.tar -C grain/source &&
      cd grain && python3 -m uv venv --allow-existing --python 3.13 &&
      python3 -m uv pip install --reinstall-package grain_jax -c source/constraints-newest.txt \
        "./source[data,gcs,tpu]" && rm -r source'
    ;;
  run)
    printf -v arguments ' %q' "$@"
    # The braces: else a shell that waits for the trainer keeps ssh's output open until the run ends.
    everywhere "cd grain &&
      { nohup setsid .venv/bin/python -m grain_jax.train$arguments >>train.log 2>&1 </dev/null & }"
    ;;
  tail) gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="${1:-0}" --command="tail -F grain/train.log" ;;
  stop) everywhere 'pkill -TERM -f "[g]rain_jax.train"' ;; # the bracket: not this command itself
  delete) gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force ;;
  *) echo "$action: expected create, install, run, tail, stop or delete" >&2 && exit 2 ;;
esac
