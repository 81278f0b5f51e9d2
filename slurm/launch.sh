#!/usr/bin/env bash
# Runs `rapo "$@"` over every node of a Slurm job. The scripts beside it end in a call of this one; docs/cluster.md.
#
# One srun starts one agent a node (rapo_verl/cluster/node.py), which checks the node, starts its Ray and, on the first,
# the command. The verdict comes in a file, since srun's merged exit code loses it: rapo_verl/run/names.py has the
# codes. 75 (saved) and 97 (node lost) are requeued, the rest ends the job with that code.
set -euo pipefail
umask 077

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SAVED=75 COLLAPSED=100 NODE_LOST=97 NO_VERDICT=95 REFUSED=2

cancelled='' stop_asked=''
# shellcheck disable=SC2317 # the traps call them
on_stop_signal() {
    say "time is nearly up, or the job is preempted: save and stop"
    stop_asked=1
    [[ -z ${RAPO_STOP_FILE:-} ]] || touch "$RAPO_STOP_FILE"
}
# shellcheck disable=SC2317
on_cancel() { cancelled=1; }
say() { echo "[$(date +%T)] rapo: $*"; }
refuse() { say "refused: $*" >&2; exit "$REFUSED"; }

# The Unix time at which Slurm ends this job; nothing where it does not say, or says what is no time to come.
deadline() {
    local job=$SLURM_JOB_ID end
    # The number of an array's last task is that of the array, too.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    end=$(SLURM_TIME_FORMAT=standard squeue -h -j "$job" -o %e 2>/dev/null) || return 0
    [[ $end =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}$ ]] || return 0
    end=$(date -d "$end" +%s) && ((end > $(date +%s))) || return 0
    echo "$end"
}

# What is usual in a shell's start-up (`module load`, an unset LD_LIBRARY_PATH, a false last line) must not end the job.
read_facts() {
    trap 'say "$1 has left the shell: is there an \`exit\` in it?" >&2; exit "$REFUSED"' EXIT
    set -a +eu
    # shellcheck source=/dev/null
    source "$1"
    set +a +x -eu -o pipefail
    trap - EXIT
}

# In a function, which bash reads whole before it runs a line: a `git pull` cannot change a job that runs.
main() {
    trap on_stop_signal USR1
    trap on_cancel TERM

    # --- the cluster's facts ---
    env_file=${RAPO_ENV_FILE:-$clone/slurm/env}
    [[ -r $env_file ]] || refuse "no $env_file: cp slurm/env.example slurm/env and fill it in"
    secrets=$(dirname "$env_file")/secrets
    [[ -z $(find -L "$env_file" -perm /022) ]] || refuse "others can write $env_file, which is run as code: chmod go-w $env_file"
    [[ ! -e $secrets || -z $(find -L "$secrets" -perm /077) ]] || refuse "others can read $secrets: chmod 600 $secrets"
    for file in "$env_file" "$secrets"; do
        [[ -e $file ]] || continue
        bash -n "$file" || refuse "$file is no shell code, see above"
        ! grep -q $'\r' "$file" || refuse "$file has the line ends of Windows: sed -i 's/\r$//' $file"
        read_facts "$file"
    done

    problems=()
    number() { [[ ${!1:-0} =~ ^[0-9]+$ ]] || problems+=("$1=${!1} is no whole number"); }
    for name in JOIN_SECONDS LOST_SECONDS END_SECONDS MAX_REQUEUES RAY_CPUS OBJECT_STORE_BYTES; do
        number "RAPO_$name"
    done
    need() { [[ -n ${!1:-} ]] || problems+=("$1 is not set: $2"); }
    need RAPO_RUNS "absolute path of a folder that every node sees, for runs and their logs"
    need RAPO_RUNTIME "venv, apptainer or pyxis"
    wrap=() container=()
    case ${RAPO_RUNTIME:-} in
        venv)
            need RAPO_VENV "absolute path of the virtual environment that has rapo, on every node"
            [[ -x ${RAPO_VENV:-}/bin/python ]] || problems+=("RAPO_VENV=${RAPO_VENV:-}: no bin/python in it")
            PATH=${RAPO_VENV:-}/bin:$PATH
            ;;
        apptainer)
            need RAPO_IMAGE "the .sif file of requirements/rapo.def"
            wrap=(apptainer exec --nv --bind "$clone,${RAPO_RUNS:-}${RAPO_MOUNTS:+,$RAPO_MOUNTS}" "${RAPO_IMAGE:-}")
            ;;
        pyxis)
            need RAPO_IMAGE "the image for srun --container-image"
            container=("--container-image=${RAPO_IMAGE:-}" "--container-workdir=$clone"
                "--container-mounts=$clone:$clone,${RAPO_RUNS:-}:${RAPO_RUNS:-}${RAPO_MOUNTS:+,$RAPO_MOUNTS}")
            ;;
        *) problems+=("RAPO_RUNTIME=${RAPO_RUNTIME:-}; allowed: venv, apptainer, pyxis") ;;
    esac
    [[ ${RAPO_RUNS:-/} == /* ]] || problems+=("RAPO_RUNS=$RAPO_RUNS is relative: every node would have its own")
    [[ -n ${SLURM_JOB_ID:-} ]] || problems+=("this is no Slurm job: sbatch slurm/NAME.sh")
    if ((${#problems[@]})); then
        printf '  - %s\n' "${problems[@]}" >&2
        refuse "${#problems[@]} problem(s) in $env_file"
    fi

    # --- this job ---
    attempt=${SLURM_RESTART_COUNT:-0}
    run_dir='' sampling=0
    for argument in "$@"; do
        case $argument in
            run_dir=\'*\' | run_dir=\"*\") run_dir=${argument:9:-1} ;;
            run_dir=*) run_dir=${argument#run_dir=} ;;
            actor_rollout_ref.rollout.nnodes=*) sampling=${argument#*=} ;;
        esac
    done
    if [[ -z $run_dir ]]; then
        run_dir=$RAPO_RUNS/${SLURM_JOB_NAME//\//_}
        # Between single quotes Hydra takes everything as it is, but these.
        [[ $1 != train ]] || set -- "$@" "run_dir='${run_dir//\'/\\\'}'"
    fi
    [[ $run_dir != *\$\{* ]] || refuse "run_dir=$run_dir: \${ begins an interpolation; give the job another name: -J NAME"
    [[ $run_dir == /* ]] || refuse "run_dir=$run_dir is relative: every node would have its own"
    export RAPO_STATE=$run_dir/slurm/$SLURM_JOB_ID.$attempt RAPO_TAG=$SLURM_JOB_ID-$attempt RAPO_DRY_RUN=${DRY_RUN:-}
    mkdir -p "$RAPO_STATE"
    ln -sfn "$SLURM_JOB_ID.$attempt" "$run_dir/slurm/latest"

    # Two jobs never write one run folder. The job name does it for `--dependency=singleton`; this, for run_dir=.
    owner=$run_dir/slurm/owner
    if [[ $1 == train ]] && ! (set -o noclobber && echo "$SLURM_JOB_ID" >"$owner") 2>/dev/null; then
        other=$(<"$owner")
        [[ $other == "$SLURM_JOB_ID" || -z $(squeue -h -j "$other" -t RUNNING,COMPLETING,SUSPENDED -o %i 2>/dev/null) ]] ||
            refuse "job $other is writing $run_dir; wait for it, or give this run a name of its own: sbatch -J NAME"
        echo "$SLURM_JOB_ID" >"$owner"
    fi

    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ((${#hosts[@]} == SLURM_JOB_NUM_NODES)) ||
        refuse "Slurm gave $SLURM_JOB_NUM_NODES nodes but names ${#hosts[@]}: $SLURM_JOB_NODELIST"
    export RAPO_HOSTS="${hosts[*]}" RAPO_GPUS_PER_NODE=${RAPO_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [[ $RAPO_GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
        refuse "no GPUs in this job: #SBATCH --gpus-per-node, or RAPO_GPUS_PER_NODE=1 in $env_file for a run on processors"
    # Before the user's own overrides, which win. A trainer that samples on nodes of its own leaves them free.
    if [[ $1 == train ]]; then
        [[ $sampling =~ ^[0-9]+$ && $sampling -lt $SLURM_JOB_NUM_NODES ]] ||
            refuse "actor_rollout_ref.rollout.nnodes=$sampling leaves the trainer none of $SLURM_JOB_NUM_NODES node(s)"
        set -- train "trainer.nnodes=$((SLURM_JOB_NUM_NODES - sampling))" \
            "trainer.n_gpus_per_node=$RAPO_GPUS_PER_NODE" "${@:2}"
    fi

    # Ray's API runs code as this user: it takes a token, and its dashboard listens on loopback only.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAPO_STATE/token
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAPO_STATE/canary"
    RAPO_DEADLINE=$(deadline)
    export RAPO_DEADLINE RAPO_STOP_FILE=$RAPO_STATE/stop PYTHONPATH=$clone${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    export RAPO_JOIN_SECONDS=${RAPO_JOIN_SECONDS:-300}

    saved_step() { cat "$run_dir/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }
    before=$(saved_step)

    # --- run ---
    say "job $SLURM_JOB_ID attempt $attempt on ${hosts[*]}: rapo $*"
    say "logs: $RAPO_STATE"
    [[ -z $stop_asked ]] || touch "$RAPO_STOP_FILE"
    # In argv and not in a file, which a node without the shared filesystem could not read. Slurm sets the variables of
    # every maker of GPUs in each task, and veRL refuses ROCR_VISIBLE_DEVICES beside CUDA's.
    # shellcheck disable=SC2016
    agent='[[ -r $RAPO_STATE/canary ]] || {
        echo "rapo: $(hostname) does not see $RAPO_STATE: is its filesystem shared and mounted?" >&2
        sleep $((RAPO_JOIN_SECONDS + 300)); exit 98; } # the first node names it sooner
    unset ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ZE_AFFINITY_MASK
    exec python -m rapo_verl.cluster.node "$@"'
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=1 --wait="${RAPO_END_SECONDS:-120}" \
        ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --cpu-bind=none --export=ALL "${container[@]}" \
        "${wrap[@]}" bash -c "$agent" rapo-node "$@" </dev/null &
    srun_pid=$! srun_code=0
    while kill -0 "$srun_pid" 2>/dev/null; do # a signal ends `wait`, not srun
        srun_code=0
        wait "$srun_pid" || srun_code=$?
    done

    # --- verdict ---
    field() { sed -n "s/^$1: //p" "$RAPO_STATE/verdict" 2>/dev/null || true; }
    code=$(field code) reason=$(field reason) log=$(field log)
    rm -f "$RAY_AUTH_TOKEN_PATH"
    if [[ -z $code ]]; then
        code=$((srun_code ? srun_code : NO_VERDICT)) reason="no node left a verdict; srun ended with $srun_code"
    fi
    if [[ -n $cancelled ]]; then
        say "cancelled; saved up to step $(saved_step)"
        exit 143
    fi
    if ((code == SAVED || code == NODE_LOST)); then
        after=$(saved_step) stuck=0
        say "$reason; saved up to step $after"
        [[ $1 != train || $after != "$before" ]] || stuck=$(($(cat "$run_dir/slurm/stuck" 2>/dev/null || echo 0) + 1))
        echo "$stuck" >"$run_dir/slurm/stuck"
        if ((attempt >= ${RAPO_MAX_REQUEUES:-100})); then
            reason+="; not requeued again: RAPO_MAX_REQUEUES=${RAPO_MAX_REQUEUES:-100}"
        elif ((stuck >= 3)); then
            reason+="; not requeued again: three attempts saved nothing new; is --time shorter than start-up and one step?"
        elif say "requeueing" && scontrol requeue "$SLURM_JOB_ID"; then
            sleep 300 # Slurm ends this script
            exit "$code"
        else
            reason+="; Slurm would not requeue: submit the same line again, it goes on from step $after"
        fi
    fi
    if ((code)); then
        say "job $SLURM_JOB_ID attempt $attempt ended with code $code: $reason"
        if [[ $code != "$SAVED" && $code != "$COLLAPSED" && -s $log ]]; then
            say "read $log; its first error:"
            grep -nEm1 '(Error|Exception|ERROR|FATAL|CUDA|[Ff]ailed|Killed|low on memory|No space|problem\(s\)|refused|rror:)' "$log" | cut -c1-400 ||
                tail -n 3 "$log"
        fi
    else
        say "job $SLURM_JOB_ID attempt $attempt: done"
    fi
    exit "$code"
}
main "$@"
