#!/usr/bin/env bash
# lm-eval with `benthic serve`: examples/lm_eval.sh FOLDER TASKS [http://127.0.0.1:8000] [more options of lm_eval]
# Needs the package lm-eval[api]. FOLDER is what is served: its tokenizer makes the token ids that are sent.
set -euo pipefail
folder=$1 tasks=$2 url=${3:-http://127.0.0.1:8000}
shift $(($# < 3 ? $# : 3))
name=$(curl --fail --silent "$url/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
exec lm_eval --model local-completions --tasks "$tasks" "$@" --model_args \
    "model=$name,base_url=$url/v1/completions,tokenizer=$folder,tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=8,max_retries=1"
