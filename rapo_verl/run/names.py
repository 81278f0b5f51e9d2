"""What a run and those who look at it agree on: file names, environment variables, exit codes."""

# Files of a run's folder.
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
# Each line: when a run went on with another config, from which step, and what of it had changed.
CHANGES_FILE = "changes.jsonl"
# Held by the process that trains in the folder.
LOCK_FILE = ".lock"
LOG_FILE = "train.log"
FAILURE_FILE = "reward_failure.txt"
WANDB_FILE = "wandb_run_id.txt"
STACKS_DIR = "stacks"
METRICS_DIR = "metrics"
CHECKPOINTS_DIR = "checkpoints"
BAD_BATCHES_DIR = "bad_batches"
# Made by the trainer when it has saved before its last step.
STOPPED_FILE = "stopped.txt"
# Likewise, because of `survival.stop_on_collapse`: the run goes on only without it.
COLLAPSED_FILE = "collapsed.txt"
# Each line: a step's problems, by their row in the training file, and how many of the n answers to each were right.
GROUPS_FILE = "groups.jsonl"
# Make it, and the run saves after its step and ends with SAVED; slurm/launch.sh names one of its own.
STOP_FILE = "stop"
# Made in a job's shared folder by a run that makes no step: every node's agent writes the stacks of its processes.
DUMP_FILE = "dump_stacks"

# Environment variables: the run's folder; the step that it goes on from; the stop file; the Unix time at which the job
# is ended, in seconds; the job's shared folder.
RUN_DIR_VARIABLE = "RAPO_RUN_DIR"
RESUME_VARIABLE = "RAPO_RESUME_STEP"
STOP_FILE_VARIABLE = "RAPO_STOP_FILE"
DEADLINE_VARIABLE = "RAPO_DEADLINE"
STATE_VARIABLE = "RAPO_STATE"
# "0": each process of a run on a CPU imports for itself (rapo_verl/training/fork_server.py).
FORK_SERVER_VARIABLE = "RAPO_FORK_SERVER"
# What torch and vLLM are told on a processor, in training and in evaluation; what is set already stays.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # One unbound thread each: as fast for small models, and two runs on a machine do not spin against each other.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM would have a C++ compiler build one function that counts ranks: seconds of each start.
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM's model runs in its core, whose two processes would else wait for each other by spinning
    # (vllm/distributed/device_communicators/shm_broadcast.py:203): it insists on them (vllm/platforms/cpu.py:178)
    # for the sake of OpenMP's threads, of which there is one.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# What every process of a run, on every node, must see.
PROCESS_VARIABLES = (
    "VERL_PLATFORM",
    "VERL_USE_EXTERNAL_MODULES",
    RUN_DIR_VARIABLE,
    RESUME_VARIABLE,
    STOP_FILE_VARIABLE,
    DEADLINE_VARIABLE,
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "VERL_FILE_LOGGER_PATH",
    "TENSORBOARD_DIR",
    "VLLM_USE_FLASHINFER_SAMPLER",
    *CPU_ENVIRONMENT,
)

# Exit codes. REFUSED: input, config or environment that it would fail on, nothing was started. SAVED: start it again
# (sysexits.h: EX_TEMPFAIL). STALLED: no step for `survival.stall_minutes`. COLLAPSED: an alarm held, with
# `survival.stop_on_collapse`; do not start it again as it is.
DONE, FAILED, REFUSED, SAVED, STALLED, COLLAPSED, INTERRUPTED = 0, 1, 2, 75, 99, 100, 130
# Of a job on a cluster, beside those. 98, a node that does not see the folder, is slurm/launch.sh's own.
HEAD_FAILED, MISSING, HEAD_GONE, WORKER_FAILED, RAYLET_DIED = 90, 91, 92, 93, 94
NO_VERDICT, PREFLIGHT, NODE_LOST = 95, 96, 97
REQUEUED = (SAVED, NODE_LOST)
