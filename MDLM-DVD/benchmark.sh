#!/usr/bin/env bash
# One run of scripts/run_evals.py. Every variable can be set from outside; the published run is
#   ALGORITHM=top_k_intersection DRAFTER=llada_8b_instruct VERIFIER=llada_8b_instruct TASKS=gsm8k LIMIT=24 \
#   STEPS=64 GEN_LENGTH=256 BATCH_SIZE=8 bash benchmark.sh
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python}
ALGORITHM=${ALGORITHM:-top_k_intersection}
DRAFTER=${DRAFTER:-tiny_drafter}
VERIFIER=${VERIFIER:-tiny_verifier}
TASKS=${TASKS:-word_problems}
LIMIT=${LIMIT:-24}
STEPS=${STEPS:-32}
GEN_LENGTH=${GEN_LENGTH:-96}
BATCH_SIZE=${BATCH_SIZE:-8}
NUM_FEWSHOT=${NUM_FEWSHOT:-0}
OUTPUT_FILE=${OUTPUT_FILE:-eval_results/${ALGORITHM}_${VERIFIER}.json}

"$PYTHON" scripts/run_evals.py --drafter "$DRAFTER" --verifier "$VERIFIER" --algorithm "$ALGORITHM" --tasks "$TASKS" --limit "$LIMIT" \
  --steps "$STEPS" --gen_length "$GEN_LENGTH" --batch_size "$BATCH_SIZE" --num_fewshot "$NUM_FEWSHOT" --output_file "$OUTPUT_FILE" "$@"
