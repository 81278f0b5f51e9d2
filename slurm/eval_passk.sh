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
#SBATCH --output=%x-%j.out
# sbatch [--nodes=N] [--array=0-7] slurm/eval_passk.sh MODEL [OUT] [options of `rapo eval generate`]: an engine for every GPU.
# Each task of an array makes its part of the samples in OUT. Without --data: data/aime24.parquet and aime25.parquet here.
clone=${RAPO_CLONE:-$SLURM_SUBMIT_DIR} model=${1:?a model folder, run folder or hub id} out=$SLURM_SUBMIT_DIR/evals/$(basename "$1")
shift
[[ ${1:--} == -* ]] || { out=$1; shift; }
data=(--data "$clone"/data/aime24.parquet "$clone"/data/aime25.parquet)
[[ " $*" != *" --data"* ]] || data=()
for file in "${data[@]:1}"; do
    [[ -r $file ]] || { echo "no $file: rapo data prepare aime24 aime25 --model $model --out $clone/data" >&2; exit 2; }
done
part=$("$clone/slurm/part.sh" "$out") || exit
exec "$clone/slurm/launch.sh" eval generate --model "$model" --out "$out" "${data[@]}" --ray auto --part "$part" "$@"
