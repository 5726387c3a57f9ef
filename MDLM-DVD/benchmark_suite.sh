#!/usr/bin/env bash
# The three published algorithms over several numbers of steps, then scripts/plot_metrics.py. Every variable can be set from outside; the published run is
#   DRAFTER=llada_8b_base VERIFIER=llada_8b_instruct TASKS=gsm8k LIMIT=10 GEN_LENGTH=64 STEPS_ARR="10 20 30" bash benchmark_suite.sh
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python}
DRAFTER=${DRAFTER:-tiny_drafter}
VERIFIER=${VERIFIER:-tiny_verifier}
TASKS=${TASKS:-word_problems}
LIMIT=${LIMIT:-16}
GEN_LENGTH=${GEN_LENGTH:-96}
BATCH_SIZE=${BATCH_SIZE:-8}
NUM_FEWSHOT=${NUM_FEWSHOT:-0}
RESULTS_DIR=${RESULTS_DIR:-eval_results}
read -r -a STEPS_ARR <<<"${STEPS_ARR:-10 20 30}"

for steps in "${STEPS_ARR[@]}"; do
  for pair in baseline:baseline_cascade threshold:threshold_verifier topk:top_k_intersection; do
    "$PYTHON" scripts/run_evals.py --drafter "$DRAFTER" --verifier "$VERIFIER" --algorithm "${pair#*:}" --tasks "$TASKS" --limit "$LIMIT" \
      --steps "$steps" --gen_length "$GEN_LENGTH" --batch_size "$BATCH_SIZE" --num_fewshot "$NUM_FEWSHOT" \
      --output_file "$RESULTS_DIR/${pair%:*}_${steps}steps.json" "$@"
  done
done

"$PYTHON" scripts/plot_metrics.py --results_dir "$RESULTS_DIR" --output_dir "$RESULTS_DIR/plots"
