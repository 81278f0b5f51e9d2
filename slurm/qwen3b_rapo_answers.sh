#!/usr/bin/env bash
#SBATCH --job-name=qwen3b_rapo_answers
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
exec "${RAPO_CLONE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" train experiment=qwen2.5_3b_rapo_answers "$@"
