#!/usr/bin/env bash
# part.sh OUT: prints which part of how many ("1/4") a task of a job array makes in OUT; whatever numbers the array has.
set -euo pipefail
id=${SLURM_ARRAY_TASK_ID:-0} first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0}
step=${SLURM_ARRAY_TASK_STEP:-1} count=${SLURM_ARRAY_TASK_COUNT:-1}
place=$(((id - first) / step))
# --array=2,5: Slurm tells no task the numbers of the others. Each takes the first place that is free, and keeps it.
if (((last - first) / step + 1 != count)); then
    mkdir -p "$1/places"
    for ((place = 0; place < count; place++)); do
        file=$1/places/$SLURM_ARRAY_JOB_ID.$place
        (set -o noclobber && echo "$id" >"$file") 2>/dev/null || [[ $(<"$file") == "$id" ]] || continue
        break
    done
fi
echo "$place/$count"
