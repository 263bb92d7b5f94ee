#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine by xpk:
#   IMAGE=... CLUSTER=... PROJECT=... ZONE=... STORAGE=... \
#       experiments/launch/xpk.sh WORKLOAD TPU_TYPE RUN_FOLDER [FLAG ...]
# IMAGE has this package and jax[tpu]. STORAGE is one that `xpk storage` has
# attached to the cluster, and RUN_FOLDER lies below its mount point: a Filestore or
# Lustre, since Cloud Storage FUSE cannot rename a checkpoint's folder at once.
set -euo pipefail

workload=${1:?give the name of the workload}
tpu_type=${2:?give the type of the slice, such as v5litepod-16}
folder=${3:?give the run folder, below the mount point of the storage}
shift 3
# As one word of the shell that xpk starts in each container.
command="flax-lstm train --distributed auto --auto-resume"
command+=" --save-minutes 10 --out $(printf %q "$folder")"
for flag in "$@"; do command+=" $(printf %q "$flag")"; done

exec xpk workload create \
    --cluster="${CLUSTER:?}" --project="${PROJECT:?}" --zone="${ZONE:?}" \
    --workload="$workload" --tpu-type="$tpu_type" --num-slices=1 \
    --docker-image="${IMAGE:?}" --storage="${STORAGE:?}" \
    --max-restarts=10 --command="$command"
