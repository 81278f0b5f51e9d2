#!/usr/bin/env bash
#SBATCH --job-name=eval_report
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
# sbatch slurm/eval_report.sh OUT BASE EVALS.. [options of `rapo eval report`, --hard-from BASE_DRAW2 above all]: judges and reports.
out=${1:?a folder for the report}
shift
exec "${RAPO_CLONE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" eval report "$@" --score --out "$out"
