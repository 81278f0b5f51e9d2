#!/usr/bin/env bash
#SBATCH --job-name=reference_answers
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
# sbatch slurm/reference_answers.sh FOLDER: judges the base's samples of `slurm/eval_passk.sh BASE FOLDER --token-ids ..`
# and keeps what a training with reference answers reads; docs/reference-answers.md.
exec "${RAPO_CLONE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" reference-answers "${1:?the folder of the samples}" "${@:2}"
