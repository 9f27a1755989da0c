#!/usr/bin/env bash
# curl with `benthic serve`: examples/curl.sh [http://127.0.0.1:8000]
# A server with API keys reads the one in OPENAI_API_KEY.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
# The key goes through a file descriptor: arguments are visible to all users of the machine.
ask() { curl --fail-with-body --silent --show-error --no-buffer --config <(printf 'header = "Authorization: Bearer %s"\n' "${OPENAI_API_KEY:-none}") "$@"; }

echo "# models"
ask "$url/v1/models"
echo
echo "# chat"
ask "$url/v1/chat/completions" --json '{"messages": [{"role": "user", "content": "def "}], "max_tokens": 16}'
echo
echo "# stream"
ask "$url/v1/completions" --json '{"prompt": "def ", "max_tokens": 16, "stream": true}'
echo "# health"
ask "$url/health"
echo
