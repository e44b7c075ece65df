#!/bin/bash
# A Ray cluster on this machine, which outlives runs: they are submitted to it as jobs, one after another.
#
#     bash configs/cluster/one-node.sh
#     export RAY_AUTH_MODE=token
#     align submit experiment.yaml --address http://127.0.0.1:8265
#
# `ray stop` ends it, with everything that runs in it, and every other cluster of this user on this machine. Options of
# `ray start` may follow, such as --num-cpus 8.
set -euo pipefail

# Other users, and other machines, reach its ports: they need the token in ~/.ray/auth_token, which only this user can
# read. The dashboard, which takes the jobs, listens at 127.0.0.1 alone.
export RAY_AUTH_MODE=token
[[ -s ~/.ray/auth_token || -n ${RAY_AUTH_TOKEN:-} ]] || ray get-auth-token --generate > /dev/null

export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
exec ray start --head --disable-usage-stats "$@"
