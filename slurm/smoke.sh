#!/usr/bin/env bash
#SBATCH --job-name=smoke
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.out
# sbatch [--array=0-7] slurm/smoke.sh [overrides]: the first job on a cluster; ends with "this machine can train".
exec "${RAPO_CLONE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" smoke -- "$@"
