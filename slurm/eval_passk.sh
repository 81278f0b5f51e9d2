#!/usr/bin/env bash
#SBATCH --job-name=eval_passk
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# sbatch [--array=0-7] slurm/eval_passk.sh MODEL [OUT] [options of `rapo eval generate`]; every task takes from one queue.
model=${1:?a model folder or hub id} out=${2:-$SLURM_SUBMIT_DIR/evals/$(basename "$1")}
shift $(($# < 2 ? $# : 2))
exec "${RAPO_CLONE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" eval generate --model "$model" --out "$out" --preset rapo-paper "$@"
