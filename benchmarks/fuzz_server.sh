#!/usr/bin/env bash
# Random requests against a real server, made from its own schema: none may be answered with a 5xx.
# PYTHON has this package with the extra `serve`, and schemathesis (pip install schemathesis); further arguments go to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-8391}
"$PYTHON" -m ctc_drafter serve --port "$PORT" --max-new-tokens 3 --queue 8 &
server=$!
trap 'kill -TERM $server; wait $server' EXIT
"$PYTHON" -m schemathesis.cli run "http://127.0.0.1:$PORT/openapi.json" --wait-for-schema 120 --phases coverage,fuzzing \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
  --request-timeout 60 --max-examples 200 --continue-on-failure "$@"
kill -0 $server
