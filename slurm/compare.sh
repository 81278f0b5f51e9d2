#!/usr/bin/env bash
# RAPO and both baselines from one seed and data, pass@k of each and of the base model, one report:
#   slurm/compare.sh 3b|7b [--dry-run] [--answers] [overrides of all trainings]
# --dry-run prints the sbatch lines. Every evaluation waits for its training, the report for every evaluation.
# --answers: RAPO with reference answers too (docs/reference-answers.md); they are sampled first where there are none.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$clone"
size=${1:-}
[[ $size == 3b || $size == 7b ]] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
shift
dry='' answers=''
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --answers) answers=answers/qwen2.5_$size ;;
        *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
    esac
    shift
done
env_file=${RAPO_ENV_FILE:-slurm/env}
[[ -r $env_file ]] || { echo "no $env_file: cp slurm/env.example slurm/env and fill it in" >&2; exit 2; }
set -a +eu
# shellcheck source=/dev/null
source "$env_file"
set +a -eu
base=Qwen/Qwen2.5-${size^^}
for set in aime24 aime25 ${answers:+simplerl-8k}; do
    [[ -n $dry || -r data/$set.parquet ]] || {
        echo "no data/$set.parquet: rapo data prepare $set --model $base --out data" >&2
        exit 2
    }
done

# submit NAME [sbatch options and script..]: prints the line, and leaves the job's id in $id.
submit() {
    local name=$1
    shift
    echo "sbatch $*"
    id="<$name>"
    [[ -n $dry ]] || id=$(sbatch --parsable "$@")
}

evals=$clone/evals/compare_$size waits=''
submit eval_base -J "eval_base_$size" slurm/eval_passk.sh "$base" "$evals/base"
waits+=:$id
# Another draw of the base chooses Hard: docs/evaluating.md.
submit eval_base_draw2 -J "eval_base_draw2_$size" slurm/eval_passk.sh "$base" "$evals/base_draw2" --draw 2
waits+=:$id
methods=(grpo grpo_reverse_kl rapo) made=''
if [[ -n $answers ]]; then
    methods+=(rapo_answers)
    if [[ ! -r $answers/answers.parquet ]]; then
        submit sample_answers -J "sample_answers_$size" slurm/eval_passk.sh "$base" "$clone/$answers" \
            --data data/simplerl-8k.parquet --n 32 --max-tokens 8192 --token-ids
        submit answers -J "answers_$size" --kill-on-invalid-dep=yes "--dependency=afterok:$id" \
            slurm/reference_answers.sh "$clone/$answers"
        # singleton: what the script's own header asks for, which this line replaces.
        made="--kill-on-invalid-dep=yes --dependency=singleton,afterok:$id"
    fi
fi
folders=("$evals/base")
for method in "${methods[@]}"; do
    folders+=("$evals/$method")
    name=qwen${size}_$method
    read -ra after <<<"$([[ $method != rapo_answers ]] || echo "$made")"
    submit "$name" "${after[@]}" "slurm/$name.sh" "$@"
    submit "eval_$name" -J "eval_$name" --kill-on-invalid-dep=yes "--dependency=afterok:$id" \
        slurm/eval_passk.sh "${RAPO_RUNS:?is not set in $env_file}/$name" "$evals/$method"
    waits+=:$id
done
submit report --kill-on-invalid-dep=yes "--dependency=afterok$waits" slurm/eval_report.sh "$evals/report" \
    "${folders[@]}" --hard-from "$evals/base_draw2"
